import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.local import install, stack
from deploy.local.container import RabbitMQContainer
from deploy.local.install import (
    Installation,
    RabbitMQNotInstalledError,
    ensure_rabbitmq,
    find_installation,
    install_commands,
)
from deploy.local.ports import PortBlock
from deploy.local.rabbitmq import Broker, RabbitMQ

HERE = Installation(Path("/a/rabbitmq-server"), Path("/a/rabbitmqctl"), Path("/a/epmd"))
SetMachine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SetMachine:
    """Fake the installed programs, the user's id, and whether sudo asks for a password."""

    def set_machine(*programs: str, root: bool = False, sudo: bool = False) -> None:
        monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in programs else None)
        monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
        monkeypatch.setattr(install, "succeeds", lambda *_: sudo)

    return set_machine


def test_root_installs_with_apt_get_without_starting_a_service(machine: SetMachine) -> None:
    machine("apt-get", root=True)
    first, update, again = install_commands()
    assert first == again
    assert first[:2] == ("env", "RUNLEVEL=1")
    assert "install -y --no-install-recommends rabbitmq-server" in first[-1]
    assert "systemctl disable" in first[-1]
    assert update[-1].endswith(" update")


def test_sudo_is_used_if_it_asks_for_no_password(machine: SetMachine) -> None:
    machine("apt-get", sudo=True)
    assert {command[:3] for command in install_commands()} == {("sudo", "-n", "env")}


def test_without_permission_for_apt_get_homebrew_is_used(machine: SetMachine) -> None:
    machine("apt-get", "brew")
    assert install_commands() == [("brew", "install", "rabbitmq")]


@pytest.mark.parametrize("programs", [(), ("apt-get",)])
def test_without_a_package_manager_one_line_names_what_to_install(
    machine: SetMachine, monkeypatch: pytest.MonkeyPatch, programs: tuple[str, ...]
) -> None:
    machine(*programs)
    monkeypatch.setattr(install, "find_installation", lambda: None)
    with pytest.raises(RabbitMQNotInstalledError, match=r"^[^\n]*apt-get install rabbitmq-server[^\n]*$"):
        ensure_rabbitmq()


def test_found_programs_are_existing_files() -> None:
    found = find_installation()
    if found is None:
        pytest.skip("RabbitMQ is not installed here")
    assert all(path.is_file() for path in (found.server, found.ctl, found.epmd))


def test_a_second_caller_waits_until_the_first_has_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installing, may_end = threading.Event(), threading.Event()
    installations: list[Installation] = []
    found: list[Installation] = []

    def run(*_: object) -> Installation:
        installing.set()
        assert may_end.wait(30)
        installations.append(HERE)
        return HERE

    monkeypatch.setattr(install, "_install", run)
    monkeypatch.setattr(install, "find_installation", lambda: next(iter(installations), None))
    callers = [threading.Thread(target=lambda: found.append(ensure_rabbitmq())) for _ in range(2)]
    for caller in callers:
        caller.start()
        assert installing.wait(30)
    may_end.set()
    for caller in callers:
        caller.join(30)
    assert found == [HERE, HERE]
    assert installations == [HERE]


@pytest.mark.parametrize(
    ("installed", "docker", "expected"),
    [(True, True, RabbitMQ), (True, False, RabbitMQ), (False, True, RabbitMQContainer)],
)
def test_docker_is_used_only_where_rabbitmq_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, installed: bool, docker: bool, expected: type[Broker]
) -> None:
    monkeypatch.setattr(stack, "find_installation", lambda: HERE if installed else None)
    monkeypatch.setattr(stack, "ensure_rabbitmq", lambda _: HERE)
    monkeypatch.setattr(stack, "succeeds", lambda *_: docker)
    ports = PortBlock()
    try:
        assert type(stack.local_rabbitmq(tmp_path / "rabbitmq", ports, print)) is expected
    finally:
        ports.close()
