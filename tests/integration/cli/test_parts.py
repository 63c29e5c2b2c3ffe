"""Parts of the commands: listing, settings, state files."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.stack import Stack
from tests.conftest import BUCKET, PutImage
from worker.cli.dlq.records import Lines
from worker.cli.shell import CommandError
from worker.cli.storage import open_s3
from worker.cli.submit.estimate import dollars
from worker.cli.submit.state import Planned, Received, SubmissionState
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


@pytest.fixture
def state(tmp_path: Path) -> Iterator[SubmissionState]:
    with contextlib.closing(
        SubmissionState.create(tmp_path / "folder" / "it.submission", {"name": "it"})
    ) as state:
        yield state


def test_only_the_owner_can_read_a_state_file_its_folder_and_sqlite_s_other_files(
    state: SubmissionState,
) -> None:
    assert state.path is not None
    with state.locked("submitting"), state.transaction():
        state.set_head({"name": "it"})
    files = list(state.path.parent.iterdir())
    assert {file.name for file in files} >= {"it.submission", "it.submission-wal", "it.submission.lock"}
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {"0o600"}
    assert oct(state.path.parent.stat().st_mode & 0o777) == "0o700"


def test_only_the_owner_can_read_saved_dead_letters(tmp_path: Path) -> None:
    path = tmp_path / "state" / "purged.jsonl"
    with Lines(path) as lines:
        lines.add({"body": "a question"})
    assert oct(path.stat().st_mode & 0o777) == "0o600"
    assert oct(path.parent.stat().st_mode & 0o777) == "0o700"


def test_a_deleted_state_file_leaves_no_other_file(state: SubmissionState) -> None:
    assert state.path is not None
    with state.locked("submitting"):
        pass
    state.delete()
    assert list(state.path.parent.iterdir()) == []


def test_creating_an_existing_state_file_opens_it(state: SubmissionState) -> None:
    assert state.path is not None
    with contextlib.closing(SubmissionState.create(state.path, {"name": "other"})) as second:
        assert second.head()["name"] == "it"


def test_an_interrupted_transaction_is_rolled_back(state: SubmissionState) -> None:
    def interrupt() -> None:
        with state.transaction():
            assert state.add(Planned("a", b"{}"))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        interrupt()
    assert state.counts().total == 0


def test_a_result_confirms_its_job(state: SubmissionState) -> None:
    with state.transaction():
        for job_id in "ab":
            state.add(Planned(job_id, b"{}"))
    jobs = state.unconfirmed(0, 10)
    state.set_sent(jobs)
    new, unknown = state.store([Received("a", b"{}", 1, failed=False, tokens=3, cost=0.5)] * 2)
    assert (len(new), unknown) == (1, [])
    assert [job.id for job in state.unconfirmed(0, 10)] == ["b"]
    counts = state.counts()
    assert (counts.total, counts.sent, counts.confirmed, counts.received) == (2, 1, 1, 1)
    assert (counts.tokens, counts.cost, counts.knows_cost) == (3, 0.5, True)


def test_bodies_are_deleted_after_the_confirm(state: SubmissionState) -> None:
    assert state.path is not None
    with state.transaction():
        state.add(Planned("a", b"a secret question"))
    state.set_confirmed(state.unconfirmed(0, 10))
    with contextlib.closing(sqlite3.connect(state.path)) as file:
        assert file.execute("SELECT body FROM jobs").fetchall() == [(None,)]


def test_a_state_file_of_another_version_is_rejected(state: SubmissionState) -> None:
    assert state.path is not None
    state.set_head({"format": "2"})
    with pytest.raises(CommandError, match="by another version"):
        SubmissionState.open(state.path)


def test_the_unfinished_state_file_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    (tmp_path / f".it.submission.{os.getpid()}").write_text("half of it")
    with contextlib.closing(SubmissionState.create(tmp_path / "it.submission", {"name": "it"})) as state:
        assert state.counts().total == 0
