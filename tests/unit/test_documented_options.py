"""Commands on all pages of the documentation have valid options and targets."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer.main
from typer._click.exceptions import MissingParameter, UsageError
from typer.core import TyperGroup
from typer.exceptions import Exit

from tests.documentation import calls, pages
from tests.running import ROOT
from worker.cli.commands import build

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
