import asyncio
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn
from uuid import UUID

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from worker.observability.log_sampling import MAX_SHOWN
from worker.observability.logs import (
    DOUBLING_LIBRARIES,
    IN_FLIGHT_LOGGER,
    LIBRARY_EVENT,
    PACKAGES,
    SENSITIVE_LIBRARIES,
    configure_logging,
    describe_exception,
    log_suppressed_events,
)
from worker.observability.redaction import MARK, Redactor

SECRET = "sk-very-secret"
QUESTION = "what is on this picture of mine?"
FIXED = ["timestamp", "level", "event", "message", "logger"]

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def restored_logging(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # pytest's handlers get every record too, and fail on those that only the worker's handler can write.
    monkeypatch.setattr(type(caplog.handler), "handleError", lambda *_: None)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in (*PACKAGES, IN_FLIGHT_LOGGER, *SENSITIVE_LIBRARIES):
        logging.getLogger(name).setLevel(logging.NOTSET)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def lines(stream: io.StringIO) -> Lines:
    """Configure JSON at level info; return a function that returns the lines."""
    configure_logging("info", "json", Redactor([SECRET]), stream=stream)
    return lambda: [json.loads(line, parse_constant=_refuse) for line in stream.getvalue().splitlines()]


def _refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")


def our_log() -> Any:
    return structlog.get_logger("worker.tests")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# The format of a line


def test_a_line_begins_with_the_fixed_fields(lines: Lines) -> None:
    our_log().info("job done", job="a", attempts=2, cost=0.5, ok=True, error=None)
    (line,) = lines()
    assert list(line) == [*FIXED, "job", "attempts", "cost", "ok", "error"]
    assert line["level"] == "info"
    assert line["event"] == line["message"] == "job done"
    assert line["logger"] == "worker.tests"
    assert (line["job"], line["attempts"], line["cost"], line["ok"], line["error"]) == (
        "a",
        2,
        0.5,
        True,
        None,
    )


def test_the_timestamp_is_rfc_3339_in_utc(lines: Lines) -> None:
    our_log().info("now")
    logging.getLogger("lib").error("now")
    for line in lines():
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line["timestamp"])


def test_the_timestamp_is_the_current_time(lines: Lines) -> None:
    our_log().info("now")
    moment = datetime.fromisoformat(lines()[0]["timestamp"])
    assert abs((datetime.now(UTC) - moment).total_seconds()) < 10


def test_records_of_libraries_have_the_same_format(lines: Lines) -> None:
    logging.getLogger("aiohttp.server").warning("lost %s", "the broker")
    (line,) = lines()
    assert list(line) == FIXED
    assert (line["level"], line["event"], line["logger"]) == ("warning", LIBRARY_EVENT, "aiohttp.server")
    assert line["message"] == "lost the broker"


def test_context_variables_are_on_every_line(lines: Lines) -> None:
    structlog.contextvars.bind_contextvars(job="a")
    our_log().info("one")
    assert lines()[0]["job"] == "a"


def test_a_bound_logger_keeps_its_fields(lines: Lines) -> None:
    our_log().bind(job="a").info("one", n=1)
    assert (lines()[0]["job"], lines()[0]["n"]) == ("a", 1)


def test_non_ascii_text_is_not_escaped(lines: Lines, stream: io.StringIO) -> None:
    our_log().info("Grüße, 猫 🐈")
    assert "Grüße, 猫 🐈" in stream.getvalue()
    assert lines()[0]["event"] == "Grüße, 猫 🐈"


@pytest.mark.parametrize("fmt", ["json", "console"])
def test_every_record_is_one_line(stream: io.StringIO, fmt: Any) -> None:
    configure_logging("info", fmt, Redactor([]), stream=stream)
    our_log().info("a\nb\r\nc", x="d\ne\u2028f", y={"g\nh": ["i\nj"]})
    logging.getLogger("lib").error("a\nb")
    assert len(stream.getvalue().splitlines()) == 2


def test_an_exception_does_not_break_the_line(lines: Lines) -> None:
    our_log().error("k\nl", exc_info=ValueError("two\nlines"))
    assert len(lines()) == 1


def test_in_text_format_an_exception_follows_its_line(stream: io.StringIO) -> None:
    configure_logging("info", "console", Redactor([]), stream=stream)
    our_log().error("a bug", exc_info=caught(fail_because))
    first, second = stream.getvalue().splitlines()
    assert "a bug" in first
    assert second.startswith("RuntimeError at ")
    assert QUESTION not in stream.getvalue()


def test_fields_with_the_names_of_fixed_ones_do_not_replace_them(lines: Lines) -> None:
    our_log().info("event", level="high", logger="mine", timestamp="then")
    (line,) = lines()
    assert (line["level"], line["logger"]) == ("info", "worker.tests")
    assert line["timestamp"] != "then"


@pytest.mark.parametrize("fields", [{"name": 1}, {"msg": 1, "args": 2, "message": 3, "module": 4}])
def test_fields_may_have_the_names_of_log_record_attributes(lines: Lines, fields: dict[str, int]) -> None:
    our_log().info("event", **fields)
    assert fields.items() <= lines()[0].items()


# Text format


def test_a_terminal_gets_coloured_text() -> None:
    terminal = Terminal()
    configure_logging("info", None, Redactor([SECRET]), stream=terminal)
    our_log().warning("careful", job="a b", n=1, key=SECRET)
    line = terminal.getvalue()
    assert "\x1b[" in line
    plain = re.sub(r"\x1b\[\d*m", "", line)
    fields = "event=careful job='a b' n=1 key=[redacted]\n"
    assert re.search(rf"Z \[warning *\] careful \[worker\.tests\] {re.escape(fields)}$", plain)


def test_the_text_format_shows_the_message_before_the_event(stream: io.StringIO) -> None:
    configure_logging("info", "console", Redactor([]), stream=stream)
    our_log().info("consumption_resumed", after_s=1.23456)
    assert "] Consumption resumed after 1.235 s. [worker.tests] event=" in stream.getvalue()


# Messages and figures


def test_figures_are_rounded(lines: Lines) -> None:
    our_log().info("x", model_s=1.23456789, cost_usd=0.000514123456789, n=123456789, large=1234567.89)
    (line,) = lines()
    assert (line["model_s"], line["cost_usd"]) == (1.235, 0.000514123)
    assert (line["n"], line["large"]) == (123456789, 1234570.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"job_id": "a", "outcome": "succeeded", "attempts": 1, "total_s": 1.95049, "total_tokens": 1467}
            | {"cost_usd": 0.000514},
            "Job a succeeded in 1.95 s, 1 attempt, 1467 tokens, 0.000514 USD.",
        ),
        (
            {"job_id": "a", "outcome": "succeeded", "attempts": 2, "total_s": 2.0},
            "Job a succeeded in 2 s, 2 attempts.",
        ),
        (
            {"job_id": "a", "outcome": "failed", "attempts": 1, "total_s": 0.0214, "error": "image_not_found"}
            | {"reason": "images[0]: S3 has no such object"},
            "Job a failed in 0.021 s, 1 attempt (image_not_found): images[0]: S3 has no such object.",
        ),
        (
            {"job_id": None, "outcome": "dead_lettered", "attempts": 5, "total_s": 1, "error": "invalid_job"}
            | {"reason": f"no {SECRET}"},
            "A job without a readable id was dead-lettered in 1 s, 5 attempts (invalid_job): no [redacted].",
        ),
        ({"job_id": "a"}, "job finished"),
        ({"job_id": "a", "outcome": "failed", "total_s": "soon", "attempts": None}, "job finished"),
    ],
)
def test_the_message_about_a_finished_job_says_why(
    lines: Lines, fields: dict[str, Any], message: str
) -> None:
    our_log().info("job_finished", **fields)
    assert lines()[0]["message"] == message


def test_a_list_in_a_message_is_readable_text(lines: Lines) -> None:
    our_log().error("topology_mismatch", faults=["queue a is missing", "queue b is missing"])
    assert lines()[0]["message"] == (
        "The queues or exchanges are not as configured: queue a is missing; queue b is missing."
    )


def test_a_pipe_gets_json(stream: io.StringIO) -> None:
    configure_logging("info", None, Redactor([]), stream=stream)
    our_log().info("x")
    assert json.loads(stream.getvalue())["event"] == "x"


def test_the_text_format_has_no_colours_on_a_pipe(stream: io.StringIO) -> None:
    configure_logging("info", "console", Redactor([]), stream=stream)
    our_log().error("x")
    assert "\x1b" not in stream.getvalue()


def test_lines_are_written_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", None, Redactor([]))
    our_log().info("x")
    shown = capsys.readouterr()
    assert json.loads(shown.out)["event"] == "x"
    assert shown.err == ""


def test_stdout_is_utf8_in_every_locale() -> None:
    code = (
        "import structlog; from worker.observability.logs import configure_logging;"
        "configure_logging('info', None, str); structlog.get_logger('worker').info('猫 \\ud800')"
    )
    shown = subprocess.run(  # noqa: S603  # our own code
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert json.loads(shown.stdout.decode("utf-8"))["event"] == "猫 ?"
    assert shown.stderr == b""


# Levels


def test_lines_below_the_level_are_not_written(lines: Lines) -> None:
    our_log().debug("no")
    logging.getLogger("worker.other").debug("no")
    assert lines() == []


def test_libraries_log_warnings_and_errors(lines: Lines) -> None:
    names = {"aiohttp.access", "asyncio", *SENSITIVE_LIBRARIES} - DOUBLING_LIBRARIES
    for name in names:
        logging.getLogger(name).info("no")
        logging.getLogger(name).warning("yes")
    assert {(line["logger"], line["message"]) for line in lines()} == {(name, "yes") for name in names}


@pytest.mark.parametrize("library", sorted(DOUBLING_LIBRARIES))
def test_a_library_does_not_double_the_worker_s_own_lines(lines: Lines, library: str) -> None:
    log = logging.getLogger(f"{library}.connection")
    for _ in range(MAX_SHOWN + 1):
        log.warning("Connection closed")
        log.error("Connection closed: %s", "reset")
    log_suppressed_events(flush=True)
    assert lines() == []
    log.error("Consumer callback failed", exc_info=caught(fail))
    log.warning("Connection %r was blocked by: %r", "amqp", "low on memory")
    assert [line["message"] for line in lines()] == [
        "Consumer callback failed",
        "Connection 'amqp' was blocked by: 'low on memory'",
    ]


def test_at_level_error_warnings_of_libraries_are_not_written(stream: io.StringIO) -> None:
    configure_logging("error", "json", Redactor([]), stream=stream)
    logging.getLogger("aiormq").warning("no")
    our_log().warning("no")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("name", [*sorted(SENSITIVE_LIBRARIES), "openai._base_client", "botocore.auth"])
def test_headers_and_bodies_logged_by_libraries_are_never_written(stream: io.StringIO, name: str) -> None:
    configure_logging("debug", "json", Redactor([]), stream=stream)
    logging.getLogger(name).setLevel(logging.DEBUG)  # as OPENAI_LOG=debug does
    logging.getLogger(name).debug("Authorization: …")
    assert stream.getvalue() == ""
    logging.getLogger(name).info("request sent")
    assert "request sent" in stream.getvalue()
    logging.getLogger(name).setLevel(logging.NOTSET)


def test_at_level_debug_other_libraries_log_everything(stream: io.StringIO) -> None:
    configure_logging("debug", "json", Redactor([]), stream=stream)
    logging.getLogger("asyncio").debug("using a selector")
    our_log().debug("ours")
    assert len(stream.getvalue().splitlines()) == 2


def test_a_second_configuration_also_applies_to_loggers_in_use(lines: Lines) -> None:
    log = our_log()
    log.info("first")
    second = io.StringIO()
    configure_logging("debug", "json", Redactor(["first-secret"]), stream=second)
    log.debug("first-secret")
    assert len(lines()) == 1
    line = json.loads(second.getvalue())
    assert line["event"] == line["message"] == MARK


def test_the_handler_of_a_library_does_not_duplicate_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = logging.getLogger()
    root.addHandler(logging.StreamHandler())
    configure_logging("info", "json", Redactor([]))
    our_log().info("once")
    shown = capsys.readouterr()
    assert len((shown.out + shown.err).splitlines()) == 1


def test_requested_lines_are_written_at_every_level(stream: io.StringIO) -> None:
    configure_logging("error", "json", Redactor([]), stream=stream)
    our_log().info("no")
    structlog.get_logger(IN_FLIGHT_LOGGER).info("yes")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["yes"]


# Repetitions


def test_a_repeated_error_is_logged_a_few_times_and_then_counted(lines: Lines) -> None:
    for number in range(MAX_SHOWN + 5):
        our_log().warning("job_retried", job_id=str(number), reason="http_5xx")
    our_log().warning("job_retried", job_id="another", reason="timeout")
    log_suppressed_events()
    assert [line["reason"] for line in lines()] == ["http_5xx"] * MAX_SHOWN + ["timeout"]
    log_suppressed_events(flush=True)
    reported = lines()[-1]
    assert reported.pop("timestamp")
    assert reported.pop("window_s") < 60
    assert re.fullmatch(
        r"5 more records of job_retried \(http_5xx\) within [\d.]+ s were not logged\.",
        reported.pop("message"),
    )
    assert reported == {
        "level": "warning",
        "event": "events_suppressed",
        "logger": "worker.tests",
        "suppressed_event": "job_retried",
        "reason": "http_5xx",
        "count": 5,
    }
    log_suppressed_events(flush=True)
    assert lines()[-1]["event"] == "events_suppressed"
    assert len(lines()) == MAX_SHOWN + 2


def test_occurrences_of_one_bug_are_counted_together_and_other_bugs_separately(lines: Lines) -> None:
    for number in range(MAX_SHOWN + 5):
        our_log().error("internal_error", job_id=str(number), exception="ValueError at a.py:1")
    our_log().error("internal_error", job_id="1", exception="ValueError at b.py:1")
    assert len(lines()) == MAX_SHOWN + 1


def test_a_library_s_repeated_message_is_counted_regardless_of_its_values(lines: Lines) -> None:
    for number in range(MAX_SHOWN + 5):
        logging.getLogger("opentelemetry.exporter").error("Failed to export %s", number)
    log_suppressed_events(flush=True)
    assert len(lines()) == MAX_SHOWN + 1
    reported = lines()[-1]
    assert (reported["logger"], reported["level"]) == ("opentelemetry.exporter", "error")
    assert (reported["suppressed_event"], reported["count"]) == ("Failed to export %s", 5)
    assert "reason" not in reported


@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_the_end_of_every_job_is_logged(lines: Lines, level: str) -> None:
    for number in range(MAX_SHOWN * 3):
        getattr(our_log(), level)("job_finished", job_id=str(number), error="model_rejected")
    assert len(lines()) == MAX_SHOWN * 3


def test_events_below_warning_are_not_suppressed(lines: Lines) -> None:
    for number in range(MAX_SHOWN * 3):
        our_log().info("cancelled", job_id=str(number))
    assert len(lines()) == MAX_SHOWN * 3


def test_at_level_debug_no_line_is_suppressed(stream: io.StringIO) -> None:
    configure_logging("debug", "json", Redactor([]), stream=stream)
    for _ in range(MAX_SHOWN * 3):
        our_log().warning("job_retried", reason="http_5xx")
    assert len(stream.getvalue().splitlines()) == MAX_SHOWN * 3


# Secrets


def test_secrets_are_redacted_in_every_text_of_a_record(lines: Lines, stream: io.StringIO) -> None:
    our_log().info(
        f"key {SECRET}",
        text=SECRET,
        nested={"a": [{SECRET: f"x{SECRET}"}], "b": {SECRET}},
        odd=Path(SECRET),
        shown=SecretStr(SECRET),
        url="https://h/p?X-Amz-Signature=abc",
    )
    logging.getLogger("lib").error("key %s %r", SECRET, [SECRET])
    assert len(lines()) == 2
    assert SECRET not in stream.getvalue()
    assert "abc" not in stream.getvalue()


def test_a_line_that_cannot_be_written_is_not_written_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    closed = io.StringIO()
    configure_logging("info", "json", Redactor([SECRET]), stream=closed)
    closed.close()
    our_log().info(SECRET, x=SECRET)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "a log line of worker.tests could not be written: ValueError\n"


# Unusual values


class Colour(StrEnum):
    RED = "red"


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError(QUESTION)


class BrokenList(list[int]):
    def __iter__(self) -> Iterator[int]:
        raise RuntimeError(QUESTION)


def endless() -> list[Any]:
    items: list[Any] = []
    items.append(items)
    return items


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (b"\xff\x00", "<2 bytes>"),
        (bytearray(3), "<3 bytes>"),
        ({1}, [1]),
        ((1, "a"), [1, "a"]),
        ({1: {"a": (2,)}, None: 3}, {"1": {"a": [2]}, "None": 3}),
        (Colour.RED, "red"),
        (Path("/a/b"), "/a/b"),
        (Decimal("1.50"), "1.50"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (datetime(2030, 1, 2, tzinfo=UTC), "2030-01-02 00:00:00+00:00"),
        ("\ud800", "\ufffd"),
        pytest.param(10**5000, "<int: not serializable>", id="an integer too long to be written"),
        (2**64, 2**64),
        (Broken(), "<Broken: not serializable>"),
        (BrokenList([1]), "<BrokenList: not serializable>"),
        (KeyError(QUESTION), "KeyError"),
        (range(3), "range(0, 3)"),
        (endless(), "<list: not serializable>"),
        ({"a": [Broken()]}, "<dict: not serializable>"),
    ],
)
def test_an_unusual_value_is_written_as_strict_json(lines: Lines, value: Any, shown: Any) -> None:
    our_log().info("odd", value=value)
    assert lines()[0]["value"] == shown


@pytest.mark.parametrize("event", [None, 1, b"x", Broken(), KeyError(QUESTION), {"a": 1}, "%s %d"])
def test_an_unusual_event_is_written_too(lines: Lines, stream: io.StringIO, event: Any) -> None:
    our_log().info(event, n=1)
    assert lines()[0]["n"] == 1
    assert QUESTION not in stream.getvalue()


def test_arguments_that_do_not_fit_the_format_are_reported_but_not_logged(
    lines: Lines, capsys: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("lib").error("%d pictures", SECRET)
    our_log().info("%d", x=SECRET)
    assert [line["message"] for line in lines()] == ["%d"]
    assert capsys.readouterr().err == "a log line of lib could not be written: TypeError\n"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()) | st.integers(), inner),
)


@given(event=st.text(st.characters()), value=VALUES)
def test_no_value_breaks_the_line(event: str, value: Any) -> None:
    stream = io.StringIO()
    configure_logging("info", "json", Redactor([]), stream=stream)
    our_log().info(event, value=value)
    written = stream.getvalue()
    written.encode()
    assert written.endswith("}\n")
    assert written.count("\n") == 1
    json.loads(written, parse_constant=_refuse)


# Exceptions


def fail(message: str) -> NoReturn:
    raise KeyError(message)


def fail_because(message: str) -> NoReturn:
    try:
        fail(message)
    except KeyError as error:
        raise RuntimeError(message) from error


def caught(function: Callable[[str], NoReturn]) -> BaseException:
    try:
        function(QUESTION)
    except BaseException as error:  # noqa: BLE001
        return error


def test_a_bug_is_described_by_type_and_frames_innermost_first() -> None:
    shown = describe_exception(caught(fail))
    assert shown.startswith("KeyError at tests/integration/test_logs.py:")
    places = [place.split(" in ")[1] for place in shown.split("; from ")]
    assert places == ["fail", "caught"]


def test_the_message_of_a_bug_is_not_written() -> None:
    assert QUESTION not in describe_exception(caught(fail_because))


def test_the_causes_of_a_bug_are_described() -> None:
    first, second = describe_exception(caught(fail_because)).split("; caused by ")
    assert first.startswith("RuntimeError at ")
    assert second.startswith("KeyError at ")


def test_a_suppressed_context_is_not_described() -> None:
    error = ValueError()
    error.__context__ = KeyError()
    assert describe_exception(error) == "ValueError; caused by KeyError"
    error.__suppress_context__ = True
    assert describe_exception(error) == "ValueError"


def test_a_cycle_of_causes_ends() -> None:
    one, two = ValueError(), KeyError()
    one.__cause__, two.__cause__ = two, one
    assert describe_exception(one).startswith("ValueError; caused by KeyError")


def test_a_long_chain_of_causes_is_truncated() -> None:
    error: BaseException = ValueError()
    for _ in range(50):
        outer = ValueError()
        outer.__cause__ = error
        error = outer
    assert describe_exception(error).count("caused by") == 4


def test_types_of_libraries_have_qualified_names() -> None:
    assert describe_exception(json.JSONDecodeError("x", "y", 0)) == "json.decoder.JSONDecodeError"


def test_the_members_of_an_exception_group_are_described() -> None:
    group = ExceptionGroup(QUESTION, [KeyError(QUESTION), ExceptionGroup("x", [OSError(2, QUESTION)])])
    assert describe_exception(group) == "ExceptionGroup [KeyError] [ExceptionGroup [FileNotFoundError]]"


def test_a_large_exception_group_is_truncated() -> None:
    assert describe_exception(ExceptionGroup("x", [KeyError()] * 7)).count("[KeyError]") == 5


def test_a_recursion_has_its_innermost_frames() -> None:
    def dig(message: str) -> NoReturn:
        dig(message)
        raise AssertionError

    assert describe_exception(caught(dig)).count("; from ") == 11


def test_paths_of_a_library_s_frames_begin_at_its_package() -> None:
    def wrong(_: str) -> NoReturn:
        structlog.get_context(None)  # type: ignore[arg-type]  # a failure inside a library
        raise AssertionError

    assert " at structlog/_base.py:" in describe_exception(caught(wrong))


@pytest.mark.parametrize("log", [our_log, lambda: logging.getLogger("lib")])
def test_an_exception_is_one_field_without_its_message(
    lines: Lines, stream: io.StringIO, log: Callable[[], Any]
) -> None:
    try:
        fail_because(QUESTION)
    except RuntimeError:
        log().exception("a bug")
    (line,) = lines()
    assert line["level"] == "error"
    assert line["exception"].startswith("RuntimeError at tests/integration/test_logs.py:")
    assert "; caused by KeyError at " in line["exception"]
    assert QUESTION not in stream.getvalue()


def test_exc_info_may_be_an_exception(lines: Lines) -> None:
    error = caught(fail)
    our_log().error("one", exc_info=error)
    our_log().error("two", exc_info=(type(error), error, error.__traceback__))
    our_log().error("three", exc_info=True)
    our_log().error("four", exc_info=False)
    assert ["exception" in line for line in lines()] == [True, True, False, False]


async def test_asyncio_s_message_about_a_failed_task_does_not_contain_the_exception(
    lines: Lines, stream: io.StringIO
) -> None:
    async def lose() -> None:
        fail(QUESTION)

    task = asyncio.create_task(lose())
    await asyncio.wait([task])
    loop = asyncio.get_running_loop()
    loop.default_exception_handler(
        {"message": "Task exception was never retrieved", "exception": task.exception(), "future": task}
    )
    (line,) = lines()
    assert line["message"] == "Task exception was never retrieved"
    assert "fail" in line["exception"]
    assert QUESTION not in stream.getvalue()
