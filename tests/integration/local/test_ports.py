import socket
from contextlib import closing

from deploy.local.ports import PortBlock


def test_two_stacks_never_share_a_port() -> None:
    with closing(PortBlock()) as first, closing(PortBlock()) as second:
        ports = [block.take() for block in (first, second) for _ in range(15)]
    assert len(set(ports)) == len(ports)


def test_a_port_in_use_is_not_returned() -> None:
    with closing(PortBlock()) as block:
        expected = sorted(block.take() for _ in range(3))
    with socket.create_server(("127.0.0.1", expected[0])) as taken, closing(PortBlock()) as block:
        try:
            while True:
                assert block.take() != taken.getsockname()[1]
        except IndexError:
            pass


def test_ports_are_outside_the_ephemeral_range() -> None:
    with closing(PortBlock()) as block:
        assert block.take() < 32_768
