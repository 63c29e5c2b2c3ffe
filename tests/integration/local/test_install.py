import threading
from pathlib import Path

import pytest

from deploy.local import install
from deploy.local.install import (
    Install,
    Installation,
    Machine,
    Plan,
    TellPerson,
    UseContainer,
    UseInstalled,
    ensure_rabbitmq,
    find_installation,
    plan,
)

HERE = Installation(Path("/a/rabbitmq-server"), Path("/a/rabbitmqctl"), Path("/a/epmd"))


def first_command(chosen: Plan) -> str:
    assert isinstance(chosen, Install)
    return " ".join(chosen.commands[0])


def test_an_installed_rabbitmq_is_used_whatever_else_there_is() -> None:
    machine = Machine(installed=HERE, docker=True, apt=True, brew=True, root=True)
    assert plan(machine) == UseInstalled(HERE)


def test_a_container_is_preferred_to_changing_the_machine() -> None:
    assert plan(Machine(docker=True, apt=True, root=True)) == UseContainer()


def test_root_installs_with_apt_get_without_extras_and_without_starting_a_service() -> None:
    command = first_command(plan(Machine(apt=True, root=True)))
    assert "apt-get" in command
    assert command.endswith("install -y --no-install-recommends rabbitmq-server")
    assert "RUNLEVEL=1" in command
    assert "sudo" not in command


def test_the_package_lists_are_only_refreshed_after_a_failure() -> None:
    chosen = plan(Machine(apt=True, root=True))
    assert isinstance(chosen, Install)
    assert not any("update" in command for command in chosen.commands)
    assert chosen.refresh is not None
    assert chosen.refresh[-1] == "update"


def test_sudo_is_used_where_it_asks_for_no_password() -> None:
    assert first_command(plan(Machine(apt=True, sudo=True))).startswith("sudo -n env")


def test_without_the_rights_for_apt_get_homebrew_is_tried() -> None:
    assert first_command(plan(Machine(apt=True, brew=True))) == "brew install rabbitmq"


@pytest.mark.parametrize("machine", [Machine(), Machine(apt=True), Machine(root=True), Machine(sudo=True)])
def test_where_nothing_works_one_line_says_what_to_install(machine: Machine) -> None:
    chosen = plan(machine)
    assert isinstance(chosen, TellPerson)
    assert "apt-get install rabbitmq-server" in chosen.message
    assert "\n" not in chosen.message


def test_what_is_found_on_this_machine_can_be_run() -> None:
    found = find_installation()
    if found is None:
        pytest.skip("RabbitMQ is not installed here")
    assert all(path.is_file() for path in (found.server, found.ctl, found.epmd))


def test_who_needs_a_broker_while_it_is_being_installed_waits_for_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands: list[tuple[str, ...]] = []
    installing, may_end = threading.Event(), threading.Event()
    found: list[Installation | UseContainer] = []

    def run(command: tuple[str, ...]) -> bool:
        installing.set()
        assert may_end.wait(30)
        commands.append(command)
        return True

    def here() -> Installation | None:
        return HERE if commands else None

    monkeypatch.setattr(install, "_runs", run)
    monkeypatch.setattr(install, "find_installation", here)
    monkeypatch.setattr(install, "look_around", lambda: Machine(installed=here(), apt=True, root=True))
    first = threading.Thread(target=lambda: found.append(ensure_rabbitmq()))
    first.start()
    assert installing.wait(30)
    second = threading.Thread(target=lambda: found.append(ensure_rabbitmq()))
    second.start()
    may_end.set()
    first.join(30)
    second.join(30)
    assert found == [HERE, HERE]
    assert [command[-1] for command in commands if "install" in command] == ["rabbitmq-server"]
