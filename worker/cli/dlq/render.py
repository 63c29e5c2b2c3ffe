"""Render dead letters as text and as JSON."""

import base64
import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import to_jsonable_python
from rich.cells import cell_len, set_cell_size

if TYPE_CHECKING:
    from worker.rabbitmq.dead_letter_record import DeadLetter
    from worker.rabbitmq.dead_letters import FetchedDeadLetter

HEADERS: Final = ("NAME", "AGE", "CODE", "JOB", "MODEL", "ERROR")
GAP: Final = "  "
LONG_TEXT_CHARS: Final = 1000
SHORT_TEXT_CHARS: Final = 100

# Converts a `DeadLetter`, and any value of AMQP, to a value of JSON.
in_json = partial(to_jsonable_python, bytes_mode="base64", fallback=str)


def full_json(held: "FetchedDeadLetter") -> dict[str, Any]:
    """Return a dead letter with headers and its body: `body` if that is UTF-8, otherwise `body_base64`."""
    delivery = held.delivery
    encoded = {"content_encoding": delivery.content_encoding} if delivery.content_encoding else {}
    more = {"content_type": delivery.content_type, **encoded, "timestamp": delivery.timestamp}
    full = {**in_json(held.record), **in_json(more), "headers": in_json(dict(held.headers))}
    try:
        return {**full, "body": held.body.decode()}
    except UnicodeDecodeError:
        return {**full, "body_base64": base64.b64encode(held.body).decode()}


def table(dead_letters: Iterable["DeadLetter"]) -> Iterator[str]:
    """Yield a header and one line per dead letter; a narrow terminal gets model and error below."""
    now = datetime.now(UTC)
    rows = [HEADERS, *(_row(dead_letter, now) for dead_letter in dead_letters)]
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = list(_aligned(rows))
    if columns is None or max(map(cell_len, lines)) <= columns:
        yield from lines
        return
    indent = " " * (cell_len(rows[-1][0]) + len(GAP))
    for row, line in zip(rows, _aligned([row[:4] for row in rows]), strict=True):
        yield line
        if row is not HEADERS:
            error = ": ".join(row[4:])
            yield from textwrap.wrap(error, columns, initial_indent=indent, subsequent_indent=indent)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield GAP.join(map(set_cell_size, row, widths)).rstrip()


def _row(dead_letter: "DeadLetter", now: datetime) -> Sequence[str]:
    """Return the cells of a row without secrets and unprintable characters."""
    from worker.observability.redaction import Redactor

    redact = Redactor(())
    age = _age((now - dead_letter.died_at).total_seconds()) if dead_letter.died_at else "-"
    error = dead_letter.message or f"dead-lettered by RabbitMQ ({dead_letter.code})"
    cells = (dead_letter.name, age, dead_letter.code, dead_letter.job_id or "-", dead_letter.model, error)
    return [printable(redact(cell)) for cell in cells]


def _age(seconds: float) -> str:
    """Return a duration as `--since` reads it: `45s`, `12m`, `3h`, `9d`."""
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f}{unit}"
    return f"{max(0, seconds):.0f}s"


def page(held: "FetchedDeadLetter") -> list[str]:
    """Return a dead letter as indented JSON that cannot control the terminal; long texts are shortened.

    The body is decompressed, and a value if it is JSON.
    """
    full = full_json(held)
    full.pop("body_base64", None)
    try:
        full["body"] = json.loads(held.readable_body)
    except (ValueError, RecursionError):
        full["body"] = held.readable_body.decode(errors="backslashreplace")
    text = json.dumps(_shortened(full), indent=2, ensure_ascii=False)
    return [printable(line) for line in text.split("\n")]


def _shortened(value: Any) -> Any:
    match value:
        case str() if len(value) > LONG_TEXT_CHARS:
            return f"{value[:SHORT_TEXT_CHARS]}… ({len(value):,} characters)"
        case dict():
            return {name: _shortened(item) for name, item in value.items()}
        case list():
            return [_shortened(item) for item in value]
    return value


def printable(text: str) -> str:
    """Replace unprintable characters by escape sequences."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )
