"""Commands on all pages of the documentation have valid options and targets.

`tests/integration/test_documented_commands.py` runs those of the pages for new users.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer.main
from typer._click.exceptions import MissingParameter, UsageError
from typer.core import TyperGroup
from typer.exceptions import Exit

from tests.documentation import calls, pages, shell_blocks
from tests.running import ROOT
from worker.cli.commands import build

# The programs of commands on other pages, and why these commands are not run.
NOT_RUN = {
    "curl": "needs a broker at the documented address",
    "docker": "needs a container engine; tests/slow/image builds and runs the image with one",
    "helm": "needs a cluster; tests/slow/helm renders and validates the chart",
    "kill": "needs a process id; tests/integration/test_in_flight.py sends the signal",
    "kubectl": "needs a cluster",
    "llama-server": "needs a model",
    "ollama": "downloads a model",
    "pip": "changes the environment",
    "rabbitmqctl": "needs the broker's host; tests/integration/permissions imports the same files over HTTP",
    "vllm": "needs a GPU",
    ".venv/bin/python": "is the benchmark, which takes minutes; tests/slow runs its parts",
    "/usr/bin/time": "measures 100,000 jobs, which takes minutes",
}
RUN_OR_CHECKED = {"vqa-worker", "make", "python", "export", "source"}
KEYWORDS = {"for", "done"}

PAGES = [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages()]


def parse(arguments: Sequence[str]) -> None:
    """Parse arguments of `vqa-worker` without running the command.

    Raises:
        UsageError: as the command would.
    """
    command = typer.main.get_command(build(lambda _: 0))
    context, rest = None, list(arguments)
    while isinstance(command, TyperGroup):
        context = command.make_context(command.name, rest, parent=context)
        _, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])  # noqa: SLF001
        assert found is not None
        command = found
    command.make_context(command.name, rest, parent=context)


def programs(block: Sequence[str]) -> list[str]:
    """Return the program of each command; variables before it are not part of it."""
    return [re.sub(r"^\s*([A-Z_]+=\S*\s+)*", "", command).split(" ")[0] for command in block]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_run_or_checked_or_there_is_a_reason(page: Path) -> None:
    known = {*NOT_RUN, *RUN_OR_CHECKED, *KEYWORDS}
    blocks = [named for block in shell_blocks(page) if known & {*(named := programs(block))}]
    assert {program for named in blocks for program in named} - known == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_has_valid_options(page: Path) -> None:
    problems = []
    for arguments in calls(page, "vqa-worker"):
        if arguments and arguments[0] == "COMMAND":
            continue
        try:
            parse(arguments)
        except (MissingParameter, Exit):
            pass  # only the name of the command, or its help
        except UsageError as error:
            # The files of the examples do not exist here.
            if not str(error).endswith("does not exist."):
                problems.append(f"{arguments}: {error}")
    assert problems == []


def test_an_unknown_option_or_command_is_found() -> None:
    for wrong in (["submit", "--no-such-option"], ["no-such-command"], ["dlq", "no-such-command"]):
        with pytest.raises(UsageError):
            parse(wrong)


def test_every_make_target_of_a_page_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {(page.name, arguments[0]) for page in pages() for arguments in calls(page, "make") if arguments}
    assert len(named) > 10
    assert {name for name in named if re.fullmatch("[a-z-]+", name[1]) and name[1] not in targets} == set()
