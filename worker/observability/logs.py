"""One line a log record, to stdout, in one form for this program's records and those of its libraries.

structlog's loggers hand their fields to the standard library, whose one handler renders the records of both;
so a second `configure_logging` also reaches loggers that have been used.
"""

import contextlib
import io
import json
import logging
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, TextIO, TypeAlias, cast

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, Processor

from worker.observability.log_sampling import Kind, Repeats, Withheld

Format: TypeAlias = Literal["json", "console"]
Redact: TypeAlias = Callable[[str], str]

# Below INFO these show headers, bodies, frames or signed URLs, and so questions, images and keys.
DISCREET_LIBRARIES: Final = frozenset(
    [
        "aio_pika",
        "aiohttp",
        "aiormq",
        "boto3",
        "botocore",
        "httpx2",
        "openai",
        "opentelemetry",
        "requests",
        "s3transfer",
        "urllib3",
    ]
)
# The logger of what somebody asks for: shown at any level.
ASKED: Final = "worker.asked"
MAX_REASON_CHARS: Final = 300
# Each job's own end is told, however many end alike.
NEVER_WITHHELD: Final = frozenset(["job_finished", "events_suppressed"])
FIRST_KEYS: Final = ("timestamp", "level", "event", "logger")
SHORT_CHARS: Final = 64
MAX_FRAMES: Final = 12  # of one exception, the innermost ones
MAX_CAUSES: Final = 5
MAX_GROUP_MEMBERS: Final = 5

_PROJECT: Final = f"{Path(__file__).parents[2]}/"


def configure_logging(
    level: str, fmt: Format | None, redact: Redact, *, stream: TextIO | None = None
) -> None:
    """Send all log records to stdout. May be called again; the last call holds.

    Args:
        level: debug, info, warning or error: for this program. Libraries are heard from `warning` on, with
            `debug` from their debug records on, except for those that would show what nobody should see.
            Unless it is `debug`, warnings and errors that repeat are withheld: see `tell_repeated`.
        fmt: how a line looks; None: for a person on a terminal, JSON everywhere else.
        redact: applied to every text before it is written.
        stream: instead of stdout.
    """
    target = stream or sys.stdout
    if isinstance(target, io.TextIOWrapper):
        target.reconfigure(encoding="utf-8", errors="replace")
    is_terminal = target.isatty()
    described: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    number = logging.getLevelNamesMapping()[level.upper()]
    handler = _Handler(target, None if number <= logging.DEBUG else Repeats())
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=[*described, _only_first_line_of_asyncio],
            processors=[
                ProcessorFormatter.remove_processors_meta,
                structlog.processors.ExceptionRenderer(lambda exc_info: describe_exception(exc_info[1])),
                _plain_entry(redact),
                _renderer(fmt or ("console" if is_terminal else "json"), colors=is_terminal),
            ],
        )
    )
    others = number if number <= logging.DEBUG else max(number, logging.WARNING)
    logging.basicConfig(level=others, handlers=[handler], force=True)
    logging.getLogger("worker").setLevel(number)
    logging.getLogger(ASKED).setLevel(min(number, logging.INFO))
    # What no line here shows need not be found out for each ("Optimization" in the Logging HOWTO).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            *described,
            ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def log_suppressed_events(*, all_of_it: bool = False) -> None:
    """Log how many lines were withheld since they said the same as others, in minutes that are over.

    Args:
        all_of_it: also in those that are not.
    """
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Handler):
            for withheld in handler.withheld(all_of_it=all_of_it):
                _tell_withheld(withheld)


def _tell_withheld(withheld: Withheld) -> None:
    kind = withheld.kind
    reason = {"reason": kind.reason} if kind.reason else {}
    structlog.get_logger(kind.logger).log(
        kind.level,
        "events_suppressed",
        of=kind.event,
        **reason,
        times=withheld.times,
        within_s=withheld.within_s,
    )


class _Handler(logging.StreamHandler[TextIO]):
    """The one way out."""

    def __init__(self, stream: TextIO, repeats: Repeats | None) -> None:
        super().__init__(stream)
        self._repeats = repeats
        self.addFilter(_may_be_shown)
        self.addFilter(self._is_news)

    def withheld(self, *, all_of_it: bool) -> list[Withheld]:
        """What was withheld, see `Repeats`."""
        return self._repeats.withheld(all_of_it=all_of_it) if self._repeats else []

    def _is_news(self, record: logging.LogRecord) -> bool:
        """Whether a warning or an error says something else than the last ones did."""
        if record.levelno < logging.WARNING or self._repeats is None:
            return True
        kind = _kind_of(record)
        return kind.event in NEVER_WITHHELD or self._repeats.may_be_shown(kind)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the library's name
        """Say that a line was lost; the library's own way shows the record as it is, with what is secret."""
        kind = type(sys.exc_info()[1]).__name__
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"a log line of {record.name} could not be written: {kind}\n")


def _may_be_shown(record: logging.LogRecord) -> bool:
    # On the handler and not by level: a library may set its own level (OPENAI_LOG=debug does).
    return record.levelno >= logging.INFO or record.name.split(".", 1)[0] not in DISCREET_LIBRARIES


def _kind_of(record: logging.LogRecord) -> Kind:
    """What a line says; not of which job, nor how long it took."""
    if not isinstance(record.msg, dict):
        # A library's, its values not yet put in.
        return Kind(record.name, record.levelno, str(record.msg).split("\n", 1)[0], "")
    entry = cast("EventDict", record.msg)
    reasons = (str(entry[name]) for name in ("reason", "exception", "warning") if name in entry)
    return Kind(record.name, record.levelno, str(entry.get("event")), next(reasons, "")[:MAX_REASON_CHARS])


def _renderer(fmt: Format, *, colors: bool) -> Processor:
    if fmt == "json":
        return structlog.processors.JSONRenderer(
            serializer=json.dumps, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )
    return structlog.dev.ConsoleRenderer(
        colors=colors, sort_keys=False, exception_formatter=structlog.dev.plain_traceback
    )


def _only_first_line_of_asyncio(_: object, __: str, entry: EventDict) -> EventDict:
    """Asyncio goes on with the task and its exception, message and all."""
    if entry["logger"] == "asyncio":
        entry["event"] = entry["event"].split("\n", 1)[0]
    return entry


def _plain_entry(redact: Redact) -> Processor:
    # Most texts of a log line are the same in the next: its level, its event, the model.
    short = lru_cache(maxsize=1024)(redact)

    def shown(text: str) -> str:
        return short(text) if len(text) <= SHORT_CHARS else redact(text)

    def process(_: object, __: str, entry: EventDict) -> EventDict:
        """Put the keys that every line has first, and make all values fit for strict JSON."""
        keys = dict.fromkeys((*FIRST_KEYS, *entry))
        return {key: _shown(entry.get(key), shown) for key in keys}

    return process


def _shown(value: Any, redact: Redact) -> Any:
    try:
        return _plain(value, redact)
    except Exception:  # noqa: BLE001  # a value's own methods may raise anything, and a list may hold itself
        return f"<{type(value).__name__} that cannot be shown>"


def _plain(value: Any, redact: Redact) -> Any:
    """Whatever it is, as JSON can hold it, with every text in it redacted."""
    match value:
        case None | bool():
            return value
        case str():
            return redact(value)
        case int() | float():  # a number beyond a float's range raises OverflowError
            return value if math.isfinite(value) else str(value)
        case bytes() | bytearray() | memoryview():
            return f"<{len(value)} bytes>"
        case Mapping():
            return {redact(str(key)): _plain(item, redact) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item, redact) for item in value]
        case BaseException():
            return redact(describe_exception(value))
    return redact(str(value))


def describe_exception(exc: BaseException) -> str:
    """Where an unexpected exception came from: types and frames, innermost first, and never its message.

    Messages of exceptions can hold whatever a job holds.
    """
    return "; caused by ".join(map(_describe, islice(_causes(exc), MAX_CAUSES)))


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    while exc is not None:
        yield exc
        exc = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)


def _describe(exc: BaseException) -> str:
    kind = type(exc)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(exc, BaseExceptionGroup):
        name += "".join(f" [{describe_exception(member)}]" for member in exc.exceptions[:MAX_GROUP_MEMBERS])
    frames = [
        f"{_short(frame.f_code.co_filename)}:{line} in {frame.f_code.co_qualname}"
        for frame, line in traceback.walk_tb(exc.__traceback__)
    ]
    return f"{name} at {'; from '.join(reversed(frames[-MAX_FRAMES:]))}" if frames else name


def _short(path: str) -> str:
    """A file's path without what differs from machine to machine."""
    return path.rpartition("/site-packages/")[2].removeprefix(_PROJECT)
