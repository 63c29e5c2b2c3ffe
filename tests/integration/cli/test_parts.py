"""Parts of the commands: listing, settings, state files, locks, times, results."""

import contextlib
import csv
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from deploy.local.stack import Stack
from tests.conftest import BUCKET, PutImage
from vqa_worker.rabbitmq.replies import Reply
from worker.cli import outputs, state_dir
from worker.cli.shell import CommandError, dollars
from worker.cli.state_dir import append_lines, make_private_folder
from worker.cli.storage import open_s3
from worker.cli.submit import batch
from worker.cli.submit.results import parse, received
from worker.cli.submit.state import JobResult, SubmissionState
from worker.cli.times import parse_duration, parse_time
from worker.s3.uploads import list_keys
from worker.settings import CommandSettings, Settings, load_command_settings


@pytest.fixture
def settings(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> CommandSettings:
    for name, value in stack.environment().items():
        monkeypatch.setenv(name, value)
    return load_command_settings(env_file=None)


async def test_a_listing_reads_all_pages(settings: CommandSettings, put_image: PutImage) -> None:
    names = ["1", "2 &amp; <b>", "3+4%20", "ü/5", "6"]
    for name in names:
        put_image(b"x", key=f"pages/{name}")
    async with open_s3(settings) as s3:
        found = [key async for key in list_keys(s3, BUCKET, "pages/", page=2)]
        nothing = [key async for key in list_keys(s3, BUCKET, "nothing there/")]
    assert found == sorted((f"pages/{name}" for name in names), key=str.encode)
    assert nothing == []


def test_commands_have_the_same_settings_as_workers() -> None:
    for name, field in CommandSettings.model_fields.items():
        if name == "allowed_buckets":
            # Only workers need it.
            continue
        of_workers = Settings.model_fields[name]
        assert (field.annotation, field.default, field.metadata) == (
            of_workers.annotation,
            of_workers.default,
            of_workers.metadata,
        ), name


@pytest.mark.parametrize(
    ("usd", "shown"), [(0.0, "$0.00"), (0.00044, "$0.000440"), (0.01, "$0.01"), (1234.5, "$1,234.50")]
)
def test_amounts_below_a_cent_have_six_decimal_places(usd: float, shown: str) -> None:
    assert dollars(usd) == shown


def saved(path: Path, *jobs: tuple[str, bytes, str | None]) -> SubmissionState:
    """Save jobs (id, body and custom_id) in a state file and open it."""
    with contextlib.closing(SubmissionState.draft()) as draft:
        for job in jobs:
            assert draft.add(*job)
        make_private_folder(path.parent)
        draft.save(path, {"name": "it"})
    return SubmissionState.open(path)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[SubmissionState]:
    jobs = saved(tmp_path / "folder" / "it.submission", ("a", b"a secret question", None), ("b", b"{}", None))
    with contextlib.closing(jobs) as state:
        yield state


def test_only_the_owner_can_read_a_state_file_its_folder_and_sqlite_s_other_files(
    state: SubmissionState, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    state.set_head({"name": "it"})
    with state_dir.locked("it"):
        lock = tmp_path / "vqa-worker" / "it.lock"
        files = [*state.path.parent.iterdir(), lock]
        assert {file.name for file in files} >= {"it.submission", "it.submission-wal", "it.lock"}
        assert {oct(file.stat().st_mode & 0o777) for file in files} == {"0o600"}
        assert {oct(file.parent.stat().st_mode & 0o777) for file in files} == {"0o700"}


def test_only_the_owner_can_read_saved_dead_letters(tmp_path: Path) -> None:
    path = tmp_path / "state" / "purged.jsonl"
    append_lines(path, {"body": "a question"})
    assert oct(path.stat().st_mode & 0o777) == "0o600"
    assert oct(path.parent.stat().st_mode & 0o777) == "0o700"


def test_a_deleted_state_file_leaves_no_other_file(state: SubmissionState) -> None:
    state.delete()
    assert list(state.path.parent.iterdir()) == []


def test_a_job_that_has_a_result_meanwhile_is_not_sent(state: SubmissionState) -> None:
    jobs = state.unconfirmed(0, 10)
    assert [job.is_new for job in jobs] == [True, True]
    state.set_sent(jobs)
    assert [job.is_new for job in state.unconfirmed(0, 10)] == [False, False]
    state.store([JobResult("a", b"{}", 1, failed=False)])
    assert [job.id for job in state.set_sent(jobs)] == ["b"]
    assert state.awaited() == 0
    state.set_confirmed(jobs)
    assert state.awaited() == 1


def test_a_result_confirms_its_job(state: SubmissionState) -> None:
    state.set_sent(state.unconfirmed(0, 10))
    new, unknown = state.store([JobResult("a", b"{}", 1, failed=False, tokens=3, cost=0.5)] * 2)
    assert (len(new), unknown) == (1, 0)
    assert [job.id for job in state.unconfirmed(0, 10)] == ["b"]
    counts = state.counts()
    assert (counts.total, counts.sent, counts.confirmed, counts.received) == (2, 1, 1, 1)
    assert (counts.tokens, counts.cost) == (3, 0.5)


def test_bodies_are_deleted_after_the_confirm(state: SubmissionState) -> None:
    state.set_confirmed(state.unconfirmed(0, 10))
    with contextlib.closing(sqlite3.connect(state.path)) as file:
        assert file.execute("SELECT body FROM jobs").fetchall() == [(None,)] * 2


@pytest.mark.parametrize("content", ["something else", ""])
def test_a_file_that_is_not_a_state_file_is_rejected(tmp_path: Path, content: str) -> None:
    (tmp_path / "it").write_text(content)
    with pytest.raises(CommandError, match="is not the state file of a submission"):
        SubmissionState.open(tmp_path / "it")
    with pytest.raises(CommandError, match="is not the state file of a submission"):
        SubmissionState.open(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


def test_a_state_file_of_another_version_is_rejected(state: SubmissionState) -> None:
    state.set_head({"format": "1"})
    with pytest.raises(CommandError, match="by another version"):
        SubmissionState.open(state.path)


def test_the_unfinished_state_file_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".it.submission.draft").write_text("half of it")
    with contextlib.closing(saved(tmp_path / "it.submission", ("a", b"{}", None))) as state:
        assert state.counts().total == 1
    assert not list(tmp_path.glob(".*"))


# Locks


@pytest.fixture
def state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "vqa-worker"


def test_a_lock_is_kept_while_other_commands_try_to_get_it(state_home: Path) -> None:
    with state_dir.locked("it"):
        for _ in range(3):
            with pytest.raises(CommandError, match="is using the submission it"), state_dir.locked("it"):
                pass
    assert list(state_home.iterdir()) == []
    with state_dir.locked("it"):
        pass


def test_a_lock_on_a_deleted_lock_file_does_not_count(state_home: Path) -> None:
    """A process opens the lock file, the holder deletes it, and a third process creates the next one."""
    with state_dir.locked("it"):
        opened = os.open(state_home / "it.lock", os.O_RDWR)
    fcntl.flock(opened, fcntl.LOCK_EX)
    with state_dir.locked("it"), pytest.raises(CommandError), state_dir.locked("it"):
        pass
    os.close(opened)


# Times

NOT_TIMES = (
    "99999999999d", "9" * 400 + "d", "9999-12-31T23:59:59-01:00", "0001-01-01T00:00:00+01:00", "2030-02-30",
    "2030-01-31T12:00:00", "2030-01-31T12:00", "tomorrow", "", "-1d", "2x", "d", "\u0661d",
)  # fmt: skip


@pytest.mark.parametrize("text", NOT_TIMES)
@pytest.mark.parametrize("from_now", [1, -1])
def test_what_is_not_a_time_is_rejected(text: str, from_now: int) -> None:
    with pytest.raises(ValueError, match=r"is not a|is too long"):
        parse_time(text, from_now=from_now)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2030-01-31", datetime(2030, 1, 31, tzinfo=UTC)),
        ("2030-01-31T12:00:00+05:30", datetime(2030, 1, 31, 6, 30, tzinfo=UTC)),
        ("9999-12-31T23:59:59Z", datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
    ],
)
def test_times_are_in_utc(text: str, expected: datetime) -> None:
    assert parse_time(text, from_now=1) == expected


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("1d", 86_400), ("1w", 604_800)]
)
def test_durations_have_a_unit(text: str, seconds: int) -> None:
    assert parse_duration(text).total_seconds() == seconds


# Results

WRONG_FIELDS: tuple[Any, ...] = ("text", 7, -1, 1e400, True, None, [], ["x"], {}, {"x": 1}, 10**30, "\ud800")
FIELDS = ("answer", "model", "finish_reason", "usage", "error", "metadata", "response", "attempts", "status")
USAGE = ("prompt_tokens", "completion_tokens", "total_tokens", "cost_usd")


def malformed_results() -> Iterator[dict[str, Any]]:
    """Yield results with one field that a worker would not write."""
    for value in WRONG_FIELDS:
        for status in ("succeeded", "failed"):
            yield from ({"status": status, field: value} for field in FIELDS)
            yield from ({"status": status, "usage": {name: value}} for name in USAGE)
            yield from ({"status": status, "error": {name: value}} for name in ("code", "message"))


def test_malformed_results_are_collected_and_written_in_every_format(tmp_path: Path) -> None:
    results = list(malformed_results())
    planned = [(str(number), b"{}", f"request-{number}") for number in range(len(results))]
    replies = [
        Reply(json.dumps({"id": str(number), **result}).encode(), 1) for number, result in enumerate(results)
    ]
    with contextlib.closing(saved(tmp_path / "it.submission", *planned)) as state:
        new, unknown = state.store([received(reply) for reply in replies])
        assert (len(new), unknown) == (len(results), 0)
        assert state.counts().tokens == 2 * 7
        assert state.counts().cost == pytest.approx(2 * 7)
        outputs.write(state, "csv", tmp_path / "out.csv", None)
        outputs.write(state, "jsonl", tmp_path / "out.jsonl", None)
        outputs.write(state, "batch", tmp_path / "out", tmp_path / "errors")
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == [custom_id for *_, custom_id in planned]
    lines = {name: (tmp_path / name).read_text().splitlines() for name in ("out.jsonl", "out", "errors")}
    assert len(lines["out.jsonl"]) == len(lines["out"]) + len(lines["errors"]) == len(results)
    for line in (*lines["out"], *lines["errors"]):
        assert json.loads(line).keys() == {"id", "custom_id", "response", "error"}


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "cached_tokens": 2},
         {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}),
        ({"prompt_tokens": None, "completion_tokens": 4, "total_tokens": 7}, None),
        (None, None),
    ],
)  # fmt: skip
def test_a_batch_line_has_no_usage_if_a_number_is_unknown(usage: Any, expected: Any) -> None:
    result = {"id": "a", "status": "succeeded", "answer": "b", "provider": "p", "usage": usage}
    line = batch.line_of("request-1", parse(json.dumps(result).encode()), 1)
    assert line["response"]["body"]["usage"] == expected


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"1", b'"x"', b"null", b'{"id": 5}', b"[" * 100_000, b"\xff"]
)
def test_a_body_without_an_id_is_a_result_of_an_unknown_job(body: bytes) -> None:
    assert received(Reply(body, 1)).id == ""


@pytest.mark.parametrize(
    ("code", "message", "status", "type_"),
    [
        ("model_rejected", "the API answered 400: bad image", 400, "invalid_request_error"),
        ("model_rejected", "the API answered 422: a\nb", 422, "invalid_request_error"),
        ("attempts_exhausted", "5 attempts failed, the last one because the API answered 500: busy", 500,
         "server_error"),
        ("empty_answer", "the model returned nothing", 200, None),
        ("schema_mismatch", "the answer does not satisfy it: the API answered 400: no", 200, None),
        ("invalid_job", "model: is not among VQA_ALLOWED_MODELS", None, None),
        ("image_not_found", "images[0] does not exist", None, None),
    ],
)  # fmt: skip
def test_the_error_file_has_the_status_of_the_api_if_it_answered(
    code: str, message: str, status: int | None, type_: str | None
) -> None:
    result = {"id": "a", "status": "failed", "error": {"code": code, "message": message}}
    line = batch.line_of("request-1", parse(json.dumps(result).encode()), 1)
    response = line["response"] or {"status_code": None, "body": {}}
    assert response["status_code"] == status
    if type_ is None:
        assert line["error"] == {"code": code, "message": message}
        return
    assert line["error"] is None
    error = response["body"]["error"]
    assert error == {
        "message": message.partition(f"{status}: ")[2], "type": type_, "param": None, "code": code
    }  # fmt: skip
