"""A cluster of three private RabbitMQ nodes, whose nodes can be killed, stopped and paused."""

import os
import secrets
import shutil
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Final, Literal, Self

from deploy.local.install import ensure_rabbitmq
from deploy.local.ports import PortBlock
from deploy.local.rabbitmq import Member, RabbitMQ, port_mapper

SIZE: Final = 3
# Seconds until the other nodes notice a silent one. RabbitMQ's default is 60.
NET_TICK_S: Final = 5
HEARTBEAT_S: Final = 3
_CONFIGURATION: Final = f"""\
cluster_formation.peer_discovery_backend = classic_config
cluster_partition_handling = pause_minority
net_ticktime = {NET_TICK_S}
"""
# The queues of which fewer than all members are in contact with the leader.
_INCOMPLETE: Final = f"""
[N || Q <- rabbit_amqqueue:list(), amqqueue:get_type(Q) =:= rabbit_quorum_queue,
      {{N, _}} <- [amqqueue:get_pid(Q)],
      length([ok || M <- rabbit_nodes:all_running(), is_pid(rpc:call(M, erlang, whereis, [N]))]) < {SIZE}].
"""
_LEADERS_ELSEWHERE: Final = """
[N || Q <- rabbit_amqqueue:list(), amqqueue:get_type(Q) =:= rabbit_quorum_queue,
      {N, L} <- [amqqueue:get_pid(Q)], L =/= node()].
"""
_TAKE_LEADERS: Final = """
[ra:transfer_leadership(Leader, {N, node()})
 || Q <- rabbit_amqqueue:list(), amqqueue:get_type(Q) =:= rabbit_quorum_queue,
    {N, L} = Leader <- [amqqueue:get_pid(Q)], L =/= node()].
"""

PartitionHandling = Literal["pause_minority", "ignore"]


class RabbitMQCluster(AbstractContextManager["RabbitMQCluster"]):
    """Three nodes with one cookie, which form a cluster; made by `start`.

    Attributes:
        nodes: the nodes; each has its own `url`.
    """

    def __init__(self, nodes: list[RabbitMQ], resources: ExitStack) -> None:
        self.nodes = nodes
        self._resources = resources

    @classmethod
    def start(cls) -> Self:
        """Start all nodes and wait until they are ready."""
        installation = ensure_rabbitmq()
        with ExitStack() as resources:
            root = Path(tempfile.mkdtemp(prefix="vqa-cluster-"))
            resources.callback(shutil.rmtree, root, ignore_errors=True)
            ports = PortBlock()
            resources.callback(ports.close)
            epmd_port = ports.take()
            _write_cookie(root)
            mapper = port_mapper(installation, epmd_port, root / "epmd")
            resources.callback(mapper.kill)
            mapper.launch()
            names = [f"vqa-{epmd_port}-{number}@localhost" for number in range(SIZE)]
            configuration = _CONFIGURATION + "".join(
                f"cluster_formation.classic_config.nodes.{number} = {name}\n"
                for number, name in enumerate(names, start=1)
            )
            nodes = [
                RabbitMQ(installation, root / name, ports, Member(name, root, epmd_port, configuration))
                for name in names
            ]
            for node in nodes:
                resources.callback(node.close)
            # The first one creates the cluster, which the others join.
            for node in nodes:
                node.start()
            return cls(nodes, resources.pop_all())
        raise AssertionError  # mypy: the block above does not swallow exceptions

    def __exit__(self, *_: object) -> None:
        """Stop all nodes and delete their data."""
        for node in self.nodes:
            self.resume(node)
        self._resources.close()

    @property
    def url(self) -> str:
        """The URLs of all nodes, with a heartbeat interval that detects a paused node soon."""
        return ",".join(f"{node.url}?heartbeat={HEARTBEAT_S}" for node in self.nodes)

    def pause(self, node: RabbitMQ) -> None:
        """Stop the node's process without closing its connections (SIGSTOP), as in a partition."""
        os.kill(node.pids[0], signal.SIGSTOP)

    def resume(self, node: RabbitMQ) -> None:
        """Continue after `pause`."""
        if node.running:
            os.kill(node.pids[0], signal.SIGCONT)

    def start_nodes(self, *nodes: RabbitMQ) -> None:
        """Start nodes together: a node that was stopped first waits for those that were stopped later."""
        with ThreadPoolExecutor() as threads:
            for done in [threads.submit(node.start) for node in nodes]:
                done.result()

    def set_partition_handling(self, handling: PartitionHandling) -> None:
        """Set what a node does without a majority, until its restart."""
        for node in self.nodes:
            node.ctl("eval", f"application:set_env(rabbit, cluster_partition_handling, {handling}).")

    def is_complete(self) -> bool:
        """Return whether all nodes run and all members of the quorum queues are up."""
        try:
            ready = all(node.is_ready() for node in self.nodes)
            return ready and self.nodes[0].ctl("eval", _INCOMPLETE).strip() == "[]"
        except RuntimeError:
            return False

    def move_leaders(self, to: RabbitMQ) -> None:
        """Make a node the leader of all quorum queues."""
        to.ctl("eval", _TAKE_LEADERS)

    def leads(self, node: RabbitMQ) -> bool:
        """Return whether a node is the leader of all quorum queues."""
        return node.ctl("eval", _LEADERS_ELSEWHERE).strip() == "[]"


def _write_cookie(home: Path) -> None:
    cookie = home / ".erlang.cookie"
    cookie.write_text(secrets.token_hex(10))
    cookie.chmod(0o400)
