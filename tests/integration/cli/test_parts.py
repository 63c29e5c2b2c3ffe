"""What commands are made of, where it is easier seen by itself."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.stack import Stack
from tests.conftest import BUCKET, PutImage
from worker.cli.shell import CommandError
from worker.cli.storage import open_s3
from worker.cli.submit.estimate import dollars
from worker.cli.submit.manifest import Manifest, Planned, Received
from worker.s3.uploads import list_keys
from worker.settings import CommandSettings, Settings, load_command_settings


@pytest.fixture
def settings(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> CommandSettings:
    for name, value in stack.environment().items():
        monkeypatch.setenv(name, value)
    return load_command_settings(env_file=None)


async def test_a_listing_goes_over_all_of_its_pages(settings: CommandSettings, put_image: PutImage) -> None:
    names = ["1", "2 &amp; <b>", "3+4%20", "ü/5", "6"]
    for name in names:
        put_image(b"x", key=f"pages/{name}")
    async with open_s3(settings) as s3:
        found = [key async for key in list_keys(s3, BUCKET, "pages/", page=2)]
        nothing = [key async for key in list_keys(s3, BUCKET, "nothing there/")]
    assert found == sorted((f"pages/{name}" for name in names), key=str.encode)
    assert nothing == []


def test_settings_of_commands_are_those_of_workers() -> None:
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
def test_money_is_shown_with_the_places_that_say_something(usd: float, shown: str) -> None:
    assert dollars(usd) == shown


@pytest.fixture
def manifest(tmp_path: Path) -> Iterator[Manifest]:
    with contextlib.closing(Manifest.make(tmp_path / "folder" / "it.submission", {"name": "it"})) as manifest:
        yield manifest


def test_a_manifest_is_for_its_owner_s_eyes_and_leaves_nothing_behind(manifest: Manifest) -> None:
    assert manifest.path is not None
    assert manifest.path.stat().st_mode & 0o777 == 0o600
    with manifest.locked("submitting"):
        pass
    manifest.delete()
    assert list(manifest.path.parent.iterdir()) == []


def test_a_manifest_that_is_made_twice_is_one(manifest: Manifest) -> None:
    assert manifest.path is not None
    with contextlib.closing(Manifest.make(manifest.path, {"name": "other"})) as second:
        assert second.head()["name"] == "it"


def test_what_a_transaction_did_not_end_is_not_there(manifest: Manifest) -> None:
    def broken_off() -> None:
        with manifest.transaction():
            assert manifest.add(Planned("a", b"{}"))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        broken_off()
    assert manifest.counts().total == 0


def test_a_result_says_that_its_job_was_in_the_queue(manifest: Manifest) -> None:
    with manifest.transaction():
        for job_id in "ab":
            manifest.add(Planned(job_id, b"{}"))
    jobs = manifest.unconfirmed(0, 10)
    manifest.about_to_send(jobs)
    new, strange = manifest.keep([Received("a", b"{}", 1, failed=False, tokens=3, cost=0.5)] * 2)
    assert (len(new), strange) == (1, [])
    assert [job.id for job in manifest.unconfirmed(0, 10)] == ["b"]
    counts = manifest.counts()
    assert (counts.total, counts.sent, counts.confirmed, counts.in_hand) == (2, 1, 1, 1)
    assert (counts.tokens, counts.cost, counts.knows_cost) == (3, 0.5, True)


def test_what_was_asked_is_not_kept_longer_than_needed(manifest: Manifest) -> None:
    assert manifest.path is not None
    with manifest.transaction():
        manifest.add(Planned("a", b"a secret question"))
    manifest.are_confirmed(manifest.unconfirmed(0, 10))
    with contextlib.closing(sqlite3.connect(manifest.path)) as file:
        assert file.execute("SELECT body FROM jobs").fetchall() == [(None,)]


def test_a_manifest_of_another_version_is_refused(manifest: Manifest) -> None:
    assert manifest.path is not None
    manifest.set_head({"format": "2"})
    with pytest.raises(CommandError, match="of another version"):
        Manifest.open(manifest.path)


def test_a_draft_that_was_broken_off_is_in_nobody_s_way(tmp_path: Path) -> None:
    (tmp_path / f".it.submission.{os.getpid()}").write_text("half of it")
    with contextlib.closing(Manifest.make(tmp_path / "it.submission", {"name": "it"})) as manifest:
        assert manifest.counts().total == 0
