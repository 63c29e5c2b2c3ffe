"""The table of events in docs/logging.md is what the code logs, and each event has a message."""

import ast
import re
import string
from collections.abc import Iterator
from typing import get_args

from tests.running import ROOT
from worker.jobs.attempt import Stage
from worker.observability.log_messages import MESSAGES
from worker.observability.logs import PACKAGES

LEVELS = ("debug", "info", "warning", "error", "critical")
# The client library logs in the user's program: its lines are not the worker's.
CLIENTS_LOG = "log = logging.getLogger("
PAGE = (ROOT / "docs/logging.md").read_text()


def _levels(call: ast.Call) -> set[str]:
    """Return the levels that a call logs at; an empty set if it does not log."""
    match call.func:
        case ast.Attribute(value=ast.Name(id="log" | "in_flight_log") | ast.Call(), attr="log"):
            return {"as suppressed"}
        case ast.Attribute(value=ast.Name(id="log" | "in_flight_log") | ast.Call(), attr=level):
            return {level} & set(LEVELS)
    return set()


def _calls() -> Iterator[tuple[str, ast.Call]]:
    """Yield each call that logs, with its event."""
    for path in sorted(it for package in PACKAGES for it in (ROOT / package).rglob("*.py")):
        source = path.read_text()
        if CLIENTS_LOG in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and _levels(node):
                texts = [
                    it.value for it in node.args if isinstance(it, ast.Constant) and isinstance(it.value, str)
                ]
                assert len(texts) == 1, f"{path}:{node.lineno}: an event is a word in the code"
                yield texts[0], node


def _table(heading: str) -> list[list[str]]:
    section = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_the_table_has_each_event_with_its_levels() -> None:
    logged: dict[str, set[str]] = {}
    for event, call in _calls():
        logged.setdefault(event, set()).update(_levels(call))
    reported = {
        event: set(levels.split(", "))
        for events, levels, _ in _table("Event reference")
        for event in re.findall(r"`(\w+)`", events)
    }
    assert reported == logged
    assert len(logged) > 30


def test_each_event_has_a_message() -> None:
    assert {event for event, _ in _calls()} == set(MESSAGES)


def test_each_call_passes_the_fields_of_the_event_s_message() -> None:
    """Calls with `**fields` are checked by the tests of these events."""
    checked = 0
    for event, call in _calls():
        template, passed = MESSAGES[event], {keyword.arg for keyword in call.keywords}
        if isinstance(template, str) and None not in passed:
            used = {name for _, name, _, _ in string.Formatter().parse(template) if name}
            assert used <= passed, event
            checked += 1
    assert checked > 20


def test_the_table_of_levels_is_complete() -> None:
    assert [row[0].strip("`") for row in _table("Levels")] == list(LEVELS)


def test_the_table_of_stages_is_complete() -> None:
    assert {row[0].strip("`") for row in _table("In-flight jobs")} == set(get_args(Stage))
