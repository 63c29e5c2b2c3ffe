"""One line a log record, to stdout, in one form for this program's records and those of its libraries.

structlog's part is small on purpose: its chain only gathers the fields, and the standard library carries them
to the one formatter here. A second `configure_logging` therefore also reaches loggers that have been used.
"""

import contextlib
import io
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from itertools import islice
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, Final, Literal, TextIO, TypeAlias
from uuid import UUID

import structlog

Format: TypeAlias = Literal["json", "console"]
Redact: TypeAlias = Callable[[str], str]

# Below INFO these show headers, bodies, frames or signed URLs, and so questions, images and keys.
DISCREET_LIBRARIES: Final = (
    "aio_pika",
    "aiormq",
    "boto3",
    "botocore",
    "httpcore2",
    "httpx2",
    "openai",
    "s3transfer",
    "urllib3",
)

MAX_DEPTH: Final = 6
MAX_ITEMS: Final = 100
MAX_INTEGER_BITS: Final = 1024
MAX_FRAMES: Final = 12  # of one exception, the innermost ones
MAX_CAUSES: Final = 5
MAX_GROUP_MEMBERS: Final = 5
MAX_GROUP_DEPTH: Final = 3

_PROJECT: Final = str(Path(__file__).parent.parent)
_RESERVED: Final = frozenset({"timestamp", "level", "event", "logger", "exception"})
_COLOURS: Final = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}
# Strict JSON: the values have been made harmless before, a NaN left over would be a fault of this module.
_encode: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def configure_logging(
    level: str, fmt: Format | None, redact: Redact, *, stream: TextIO | None = None
) -> None:
    """Send all log records to stdout. May be called again; the last call holds.

    Args:
        level: debug, info, warning or error: for this program. Libraries are heard from `warning` on, with
            `debug` from their debug records on, except for those that would show what nobody should see.
        fmt: how a line looks; None: for a person on a terminal, JSON everywhere else.
        redact: applied to every text before it is written.
        stream: instead of stdout.
    """
    target = stream or sys.stdout
    if isinstance(target, io.TextIOWrapper) and target.encoding.lower() != "utf-8":
        target.reconfigure(encoding="utf-8")
    is_terminal = target.isatty()
    chosen = fmt or ("console" if is_terminal else "json")
    handler = _Handler(target)
    handler.setFormatter(_Formatter(_console(colours=is_terminal) if chosen == "console" else _json, redact))
    _install(handler)
    _set_levels(logging.getLevelNamesMapping()[level.upper()])
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


class _Handler(logging.StreamHandler[TextIO]):
    """The one way out. A type of its own, so that a second configuration finds the first one's."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.addFilter(_may_be_shown)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the library's name
        """Say that a line was lost; the library's own way shows the record as it is, with what is secret."""
        kind = type(sys.exc_info()[1]).__name__
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"a log line of {record.name} could not be written: {kind}\n")


def _may_be_shown(record: logging.LogRecord) -> bool:
    # On the handler and not only by level: a library may set its own level (OPENAI_LOG=debug does).
    return record.levelno >= logging.INFO or record.name.split(".", 1)[0] not in DISCREET_LIBRARIES


def _install(handler: logging.Handler) -> None:
    """Replace our own handler and that of `logging.basicConfig`, which libraries call; leave all others."""
    root = logging.getLogger()
    for other in list(root.handlers):
        if isinstance(other, _Handler) or type(other) is logging.StreamHandler:
            root.removeHandler(other)
    root.addHandler(handler)


def _set_levels(level: int) -> None:
    is_debug = level <= logging.DEBUG
    logging.getLogger("worker").setLevel(level)
    logging.getLogger().setLevel(level if is_debug else max(level, logging.WARNING))
    for name in DISCREET_LIBRARIES:
        logging.getLogger(name).setLevel(logging.INFO if is_debug else logging.NOTSET)


class _Formatter(logging.Formatter):
    """A record as one line; never raises, whatever it is given."""

    def __init__(self, render: Callable[[dict[str, Any]], str], redact: Redact) -> None:
        super().__init__()
        self._render = render
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(record.msg) if isinstance(record.msg, dict) and hasattr(record, "_name") else {}
        event = _text(fields.pop("event", "")) if fields else _message(record)
        exception = _exception(fields.pop("exc_info", None) or record.exc_info)
        entry = {
            "timestamp": _timestamp(record.created),
            "level": record.levelname.lower(),
            "event": self._plain(event),
            "logger": record.name,
        }
        for key, value in fields.items():
            entry[f"{key}_" if key in _RESERVED else key] = self._plain(value)
        if exception is not None:
            entry["exception"] = self._plain(exception)
        return _encodable(self._render(entry))

    def _plain(self, value: Any) -> Any:
        return _plain(value, self._redact, MAX_DEPTH)


def _message(record: logging.LogRecord) -> str:
    try:
        message = record.getMessage()
    except Exception:  # noqa: BLE001  # the arguments' own __str__ may raise anything
        return f"a log message whose arguments don't fit: {record.msg!r}"
    # asyncio appends the task and its exception, message and all.
    return message.split("\n", 1)[0] if record.name == "asyncio" else message


def _exception(exc_info: Any) -> BaseException | None:
    """Whatever `exc_info` may be: an exception, a triple, or True for the one being handled."""
    match exc_info:
        case BaseException():
            return exc_info
        case (_, BaseException() as exception, _):
            return exception
        case True:
            return sys.exc_info()[1]
    return None


def _timestamp(seconds: float) -> str:
    """RFC 3339 in UTC with milliseconds."""
    whole = int(seconds)
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))
    return f"{text}.{int((seconds - whole) * 1000):03d}Z"


def _encodable(line: str) -> str:
    try:
        line.encode()
    except UnicodeEncodeError:
        return line.encode(errors="replace").decode()
    return line


# Values


def _plain(value: Any, redact: Redact, depth: int) -> Any:
    """Anything → what strict JSON can hold, with every text redacted."""
    if isinstance(value, str):
        return redact(str.__str__(value))
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return _plain_number(value)
    try:
        return _plain_container(value, redact, depth - 1)
    except Exception:  # noqa: BLE001  # it iterates over what may be anybody's class, or change meanwhile
        return _unshowable(value)


def _plain_number(value: float) -> int | float | str:
    if isinstance(value, int):
        bits = value.bit_length()
        return int(value) if bits <= MAX_INTEGER_BITS else f"<integer of {bits} bits>"
    return float(value) if math.isfinite(value) else str(float(value))


def _plain_container(value: Any, redact: Redact, depth: int) -> Any:
    is_mapping = isinstance(value, Mapping)
    if not is_mapping and not isinstance(value, list | tuple | set | frozenset):
        return redact(_text(value))
    if depth < 0:
        return f"<{type(value).__name__}>"
    kept = list(islice(value.items() if is_mapping else value, MAX_ITEMS + 1))
    rest = ["…"] if len(kept) > MAX_ITEMS else []
    del kept[MAX_ITEMS:]
    if is_mapping:
        return {redact(_text(key)): _plain(item, redact, depth) for key, item in kept} | dict.fromkeys(rest)
    return [_plain(item, redact, depth) for item in kept] + rest


def _text(value: Any) -> str:
    """What a value is called in a log; its own methods are not trusted to work."""
    try:
        match value:
            case BaseException():
                return describe_bug(value)
            case bytes() | bytearray() | memoryview():
                return f"<{len(value)} bytes>"
            case Enum():
                return str(value.value)
            case str() | PurePath() | UUID() | Decimal() | date() | datetime():
                return str(value)
        return repr(value)
    except Exception:  # noqa: BLE001  # see above
        return _unshowable(value)


def _unshowable(value: Any) -> str:
    return f"<{type(value).__name__} that cannot be shown>"


# Exceptions


def describe_bug(exc: BaseException) -> str:
    """Where an unexpected exception came from: types and frames, innermost first, and never its message.

    Messages of exceptions can hold whatever a job holds.
    """
    return _describe(exc, MAX_GROUP_DEPTH)


def _describe(exc: BaseException, depth: int) -> str:
    return "; caused by ".join(_describe_one(link, depth) for link in _chain(exc))


def _chain(exc: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = exc
    while link is not None and id(link) not in seen and len(seen) < MAX_CAUSES:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _describe_one(exc: BaseException, depth: int) -> str:
    kind = type(exc)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    members = "".join(f" [{member}]" for member in _members(exc, depth))
    frames = [*_frames(exc.__traceback__)][-MAX_FRAMES:]
    where = " at " + "; from ".join(reversed(frames)) if frames else ""
    return f"{name}{members}{where}"


def _members(exc: BaseException, depth: int) -> Iterator[str]:
    if isinstance(exc, BaseExceptionGroup) and depth > 0:
        for member in exc.exceptions[:MAX_GROUP_MEMBERS]:
            yield _describe(member, depth - 1)
        if len(exc.exceptions) > MAX_GROUP_MEMBERS:
            yield f"and {len(exc.exceptions) - MAX_GROUP_MEMBERS} more"


def _frames(traceback: TracebackType | None) -> Iterator[str]:
    while traceback is not None:
        code = traceback.tb_frame.f_code
        yield f"{_short(code.co_filename)}:{traceback.tb_lineno} in {code.co_qualname}"
        traceback = traceback.tb_next


def _short(path: str) -> str:
    """A file's path without what differs from machine to machine."""
    _, is_package, inside = path.rpartition("/site-packages/")
    if is_package:
        return inside
    if path.startswith(f"{_PROJECT}/"):
        return path[len(_PROJECT) + 1 :]
    return "/".join(path.split("/")[-2:])


# Lines


def _json(entry: dict[str, Any]) -> str:
    return _encode(entry)


def _console(*, colours: bool) -> Callable[[dict[str, Any]], str]:
    def render(entry: dict[str, Any]) -> str:
        level = f"{entry.pop('level'):<8}"
        if colours:
            level = f"\x1b[{_COLOURS.get(level.strip(), '0')}m{level}\x1b[0m"
        moment, event, logger = entry.pop("timestamp")[11:-1], entry.pop("event"), entry.pop("logger")
        fields = "".join(f" {key}={_console_value(value)}" for key, value in entry.items())
        return f"{moment} {level} {event}{fields} ({logger})"

    return render


def _console_value(value: Any) -> str:
    is_simple = isinstance(value, str) and value != "" and not any(mark in value for mark in ' "=')
    return value if is_simple else _encode(value)
