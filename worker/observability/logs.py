"""Log to stdout, one record per line, in one format for this program and its libraries.

structlog passes its fields to the standard library, whose single handler renders all records; so a second
`configure_logging` also applies to loggers that were already used.
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

from worker.observability.log_messages import message_of
from worker.observability.log_sampling import Kind, LogSampler, Suppressed

PACKAGES: Final = ("worker", "vqa_worker")

Format: TypeAlias = Literal["json", "console"]
Redact: TypeAlias = Callable[[str], str]

# Below INFO these log headers, bodies or signed URLs, and so questions, images and keys.
SENSITIVE_LIBRARIES: Final = frozenset(
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
# The worker has its own records of what these report: a lost connection, a failed request.
DOUBLING_LIBRARIES: Final = frozenset(
    ["aio_pika", "aiormq", "boto3", "botocore", "httpx2", "openai", "s3transfer", "urllib3"]
)
# Except for this format of aiormq's: RabbitMQ blocked or unblocked a connection (a memory or disk alarm).
_NOT_DOUBLED: Final = "Connection %r was "
# The event of a library's record; its text is the message.
LIBRARY_EVENT: Final = "library_message"
# Records that an operator requested with SIGUSR1: logged at any level.
IN_FLIGHT_LOGGER: Final = "worker.in_flight"
MAX_REASON_CHARS: Final = 300
# Every finished job is logged.
NEVER_SUPPRESSED: Final = frozenset(["job_finished", "events_suppressed"])
FIRST_KEYS: Final = ("timestamp", "level", "event", "message", "logger")
SECONDS_DIGITS: Final = 3
SIGNIFICANT_DIGITS: Final = 6  # of other fractions, such as a cost
SHORT_CHARS: Final = 64
MAX_FRAMES: Final = 12  # of one exception, the innermost ones
MAX_CAUSES: Final = 5
MAX_GROUP_MEMBERS: Final = 5

_PROJECT: Final = f"{Path(__file__).parents[2]}/"


def configure_logging(
    level: str, fmt: Format | None, redact: Redact, *, stream: TextIO | None = None
) -> None:
    """Send all log records to stdout. May be called again; the last call applies.

    Args:
        level: debug, info, warning or error: for this program. Libraries log from `warning` on, with `debug`
            all records, except for `SENSITIVE_LIBRARIES`; the `DOUBLING_LIBRARIES` log only with `debug`.
            Unless it is `debug`, repeated warnings and errors are suppressed: see `log_suppressed_events`.
        fmt: None: `console` on a terminal, else `json`.
        redact: applied to every string before it is written.
        stream: replaces stdout.
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
    handler = _Handler(target, None if number <= logging.DEBUG else LogSampler())
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=[*described, _library_record],
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
    for package in PACKAGES:
        logging.getLogger(package).setLevel(number)
    logging.getLogger(IN_FLIGHT_LOGGER).setLevel(min(number, logging.INFO))
    # Not used here, and slow to collect ("Optimization" in the Logging HOWTO).
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


def log_suppressed_events(*, flush: bool = False) -> None:
    """Log how many repeated records were suppressed, for each window that is over.

    Args:
        flush: also for windows that are still open.
    """
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Handler):
            for suppressed in handler.suppressed(flush=flush):
                _log_suppressed(suppressed)


def _log_suppressed(suppressed: Suppressed) -> None:
    kind = suppressed.kind
    reason = {"reason": kind.reason} if kind.reason else {}
    structlog.get_logger(kind.logger).log(
        kind.level,
        "events_suppressed",
        suppressed_event=kind.event,
        **reason,
        count=suppressed.records,
        window_s=suppressed.window_s,
    )


class _Handler(logging.StreamHandler[TextIO]):
    """The only handler: filters, samples and writes all records."""

    def __init__(self, stream: TextIO, sampler: LogSampler | None) -> None:
        super().__init__(stream)
        self._sampler = sampler
        self.addFilter(_is_safe)
        if sampler is not None:
            self.addFilter(_is_not_doubled)
        self.addFilter(self._passes_sampling)

    def suppressed(self, *, flush: bool) -> list[Suppressed]:
        """Return what was suppressed, see `LogSampler`."""
        return self._sampler.suppressed(flush=flush) if self._sampler else []

    def _passes_sampling(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or self._sampler is None:
            return True
        kind = _kind_of(record)
        return kind.event in NEVER_SUPPRESSED or self._sampler.should_log(kind)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the library's name
        """Report that a record was lost; the default implementation prints the record without redaction."""
        kind = type(sys.exc_info()[1]).__name__
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"a log line of {record.name} could not be written: {kind}\n")


def _is_safe(record: logging.LogRecord) -> bool:
    # A filter instead of a level: a library may set its own level (OPENAI_LOG=debug does).
    return record.levelno >= logging.INFO or record.name.split(".", 1)[0] not in SENSITIVE_LIBRARIES


def _is_not_doubled(record: logging.LogRecord) -> bool:
    """Return False for a record that doubles the worker's own; an error with an exception may be a bug."""
    if record.name.split(".", 1)[0] not in DOUBLING_LIBRARIES:
        return True
    is_bug = record.levelno >= logging.ERROR and record.exc_info
    return bool(is_bug) or str(record.msg).startswith(_NOT_DOUBLED)


def _kind_of(record: logging.LogRecord) -> Kind:
    """Return the event and reason of a record, without values that differ between jobs."""
    if not isinstance(record.msg, dict):
        # A library's record: the format string without its arguments.
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
        colors=colors,
        sort_keys=False,
        event_key="message",
        pad_event_to=0,
        exception_formatter=structlog.dev.plain_traceback,
    )


def _library_record(_: object, __: str, entry: EventDict) -> EventDict:
    """Make the text of a library's record its message."""
    text, entry["event"] = entry["event"], LIBRARY_EVENT
    # In the other lines asyncio prints the task and its exception with its message.
    entry["message"] = text.split("\n", 1)[0] if entry["logger"] == "asyncio" else text
    return entry


def _plain_entry(redact: Redact) -> Processor:
    # Most strings repeat from record to record: level, event, model.
    short = lru_cache(maxsize=1024)(redact)

    def shown(text: str) -> str:
        return short(text) if len(text) <= SHORT_CHARS else redact(text)

    def process(_: object, __: str, entry: EventDict) -> EventDict:
        """Put the common keys first, convert all values to strict JSON, and add the message."""
        keys = dict.fromkeys((*FIRST_KEYS, *entry))
        plain = {key: _shown(_rounded(key, entry.get(key)), shown) for key in keys}
        if "message" not in entry:
            plain["message"] = message_of(plain["event"], plain)
        return plain

    return process


def _rounded(key: str, value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value, SECONDS_DIGITS) if key.endswith("_s") else float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def _shown(value: Any, redact: Redact) -> Any:
    try:
        return _plain(value, redact)
    except Exception:  # noqa: BLE001  # a value's own methods may raise anything, and a list may hold itself
        return f"<{type(value).__name__}: not serializable>"


def _plain(value: Any, redact: Redact) -> Any:
    """Convert any value to JSON types, with every string redacted."""
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
    """Return the types and frames of an unexpected exception, innermost first, without messages.

    Messages of exceptions can contain data of a job.
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
    """Return a file's path relative to site-packages or the project."""
    return path.rpartition("/site-packages/")[2].removeprefix(_PROJECT)
