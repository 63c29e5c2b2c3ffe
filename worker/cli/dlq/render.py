"""How letters are shown: to a person in lines, to a program as JSON."""

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

HEADS: Final = ("LETTER", "DIED AT", "CODE", "MODEL", "ATTEMPTS", "JOB", "WHY")
GAP: Final = "  "
LONG_TEXT_CHARS: Final = 200
MAX_PLAIN_CHARS: Final = 2000


@cache
def _redactor() -> "Redactor":
    from worker.observability.redaction import Redactor

    return Redactor(())


def _clean(text: str) -> str:
    """One line, without anything secret or unprintable."""
    return printable(_redactor()(text))


def in_json(letter: "DeadLetter") -> dict[str, Any]:
    """What is known of a letter."""
    known = asdict(letter)
    return {"letter": known.pop("name"), **{name: plain(value) for name, value in known.items()}}


def whole(held: "FetchedDeadLetter") -> dict[str, Any]:
    """A letter with headers and body: as text in `body`, or where it is none in `body_base64`."""
    try:
        body = {"body": held.body.decode()}
    except UnicodeDecodeError:
        body = {"body_base64": base64.b64encode(held.body).decode()}
    return {**in_json(held.record), "content_type": held.delivery.content_type, **_rest(held), **body}


def _rest(held: "FetchedDeadLetter") -> dict[str, Any]:
    return {"timestamp": plain(held.delivery.timestamp), "headers": plain(dict(held.headers))}


def plain(value: Any) -> Any:
    """Whatever AMQP can carry, as JSON can hold it."""
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


def table(letters: Iterable["DeadLetter"]) -> Iterator[str]:
    """A line for each letter under a line of heads; on a narrow terminal, why it died is told below it."""
    from rich.cells import cell_len, set_cell_size

    rows = [HEADS, *map(_row, letters)]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    is_narrow = columns is not None and sum(widths) + len(GAP) * len(widths) > columns
    for row in rows:
        cells = [set_cell_size(cell, width) for cell, width in zip(row[:-1], widths, strict=False)]
        if not is_narrow:
            yield GAP.join([*cells, row[-1]])
            continue
        yield GAP.join(cells).rstrip()
        if row is not HEADS:
            yield f"{' ' * widths[0]}{GAP}{row[-1]}"


def _row(letter: "DeadLetter") -> Sequence[str]:
    died_at = f"{letter.died_at:%Y-%m-%d %H:%M:%S}" if letter.died_at else "-"
    why = letter.message or f"moved here by RabbitMQ ({letter.code})"
    cells = (letter.name, died_at, letter.code, letter.model, str(letter.attempts), letter.job_id or "-", why)
    return [_clean(cell) for cell in cells]


def summary(letters: Sequence["DeadLetter"]) -> str:
    """How many there are of each code."""
    codes = Counter(_clean(letter.code) for letter in letters)
    return ", ".join(f"{count} {code}" for code, count in codes.most_common())


def page(held: "FetchedDeadLetter") -> Iterator[str]:
    """A letter with all that it says, for a person: nothing in it can control the terminal."""
    for name, value in {**in_json(held.record), **_rest(held)}.items():
        if name == "headers":
            yield from (f"header {printable(key)}: {printable(_in_words(it))}" for key, it in value.items())
        elif value is not None:
            yield f"{name}: {printable(_in_words(value))}"
    yield ""
    yield from map(printable, _body(held.body))


def _in_words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _body(body: bytes) -> Sequence[str]:
    """The body, indented where it is JSON; images and other long texts are told by their length."""
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
    """The text with an escape in the place of what cannot be seen."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )
