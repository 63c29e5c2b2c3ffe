"""Render dead letters as text and as JSON."""

import base64
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from worker.observability.redaction import Redactor
    from worker.rabbitmq.dead_letter_record import DeadLetter
    from worker.rabbitmq.dead_letters import FetchedDeadLetter

HEADERS: Final = ("NAME", "DIED AT", "CODE", "MODEL", "ATTEMPTS", "JOB", "ERROR")
GAP: Final = "  "
LONG_TEXT_CHARS: Final = 200
MAX_PLAIN_CHARS: Final = 2000


@cache
def _redactor() -> "Redactor":
    from worker.observability.redaction import Redactor

    return Redactor(())


def _clean(text: str) -> str:
    """Return one line without secrets and unprintable characters."""
    return printable(_redactor()(text))


def in_json(dead_letter: "DeadLetter") -> dict[str, Any]:
    """Return a dead letter without headers and body."""
    return {name: plain(value) for name, value in asdict(dead_letter).items()}


def full_json(held: "FetchedDeadLetter") -> dict[str, Any]:
    """Return a dead letter with headers and body: `body` if it is UTF-8, otherwise `body_base64`."""
    try:
        body = {"body": held.body.decode()}
    except UnicodeDecodeError:
        body = {"body_base64": base64.b64encode(held.body).decode()}
    return {**in_json(held.record), "content_type": held.delivery.content_type, **_rest(held), **body}


def _rest(held: "FetchedDeadLetter") -> dict[str, Any]:
    return {"timestamp": plain(held.delivery.timestamp), "headers": plain(dict(held.headers))}


def plain(value: Any) -> Any:
    """Convert any AMQP value to a JSON value."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case datetime():
            return value.isoformat().replace("+00:00", "Z")
        case Mapping():
            return {str(name): plain(item) for name, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case bytes() | bytearray():
            return base64.b64encode(value).decode()
    return str(value)


def table(dead_letters: Iterable["DeadLetter"]) -> Iterator[str]:
    """Yield a header and one line per dead letter; a narrow terminal gets the error on a second line."""
    from rich.cells import cell_len, set_cell_size

    rows = [HEADERS, *map(_row, dead_letters)]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    is_narrow = columns is not None and sum(widths) + len(GAP) * len(widths) > columns
    for row in rows:
        cells = [set_cell_size(cell, width) for cell, width in zip(row[:-1], widths, strict=False)]
        if not is_narrow:
            yield GAP.join([*cells, row[-1]])
            continue
        yield GAP.join(cells).rstrip()
        if row is not HEADERS:
            yield f"{' ' * widths[0]}{GAP}{row[-1]}"


def _row(dead_letter: "DeadLetter") -> Sequence[str]:
    died_at = f"{dead_letter.died_at:%Y-%m-%d %H:%M:%S}" if dead_letter.died_at else "-"
    error = dead_letter.message or f"dead-lettered by RabbitMQ ({dead_letter.code})"
    cells = (
        dead_letter.name,
        died_at,
        dead_letter.code,
        dead_letter.model,
        str(dead_letter.attempts),
        dead_letter.job_id or "-",
        error,
    )
    return [_clean(cell) for cell in cells]


def summary(dead_letters: Sequence["DeadLetter"]) -> str:
    """Return the number of dead letters per error code."""
    codes = Counter(_clean(dead_letter.code) for dead_letter in dead_letters)
    return ", ".join(f"{count} {code}" for code, count in codes.most_common())


def page(held: "FetchedDeadLetter") -> Iterator[str]:
    """Yield a dead letter as lines of text that cannot control the terminal."""
    for name, value in {**in_json(held.record), **_rest(held)}.items():
        if name == "headers":
            yield from (f"header {printable(key)}: {printable(_as_text(it))}" for key, it in value.items())
        elif value is not None:
            yield f"{name}: {printable(_as_text(value))}"
    yield ""
    yield from map(printable, _body(held.body))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _body(body: bytes) -> Sequence[str]:
    """Return the lines of a body: JSON is indented, long data URLs and long texts are shortened."""
    try:
        return json.dumps(_shortened(json.loads(body)), indent=2, ensure_ascii=False).split("\n")
    except (ValueError, RecursionError):
        text = body.decode(errors="backslashreplace")
    more = [f"… ({len(text)} characters)"] if len(text) > MAX_PLAIN_CHARS else []
    return [*text[:MAX_PLAIN_CHARS].split("\n"), *more]


def _shortened(value: Any) -> Any:
    match value:
        case str() if value[:5].lower() == "data:" and len(value) > LONG_TEXT_CHARS:
            head, _, payload = value.partition(",")
            return f"{head[:LONG_TEXT_CHARS]},[{len(payload)} characters]"
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
