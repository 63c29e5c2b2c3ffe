"""`vqa-worker dlq`: from a dead-lettered job to its answer, and purging."""

import json
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aio_pika

from deploy.local.model_simulator.behavior import Error
from deploy.local.stack import Stack
from tests.breaking import job
from tests.conftest import MakeClient, StartWorker
from tests.integration.cli.dlq.dead_letters import Queues, add_dead_letters, ids_of, state
from tests.integration.cli.running import Cli

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_a_dead_lettered_job_is_listed_shown_replayed_and_answered(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, tmp_path: Path
) -> None:
    marker = uuid.uuid4().hex
    worker = await start_worker(VQA_MAX_ATTEMPTS="1")
    client = await client_of(worker)
    stack.model.play(Error(status=500, message="broken, sorry"), marker=marker)
    dead = job(f"What is it? {marker}", metadata={"order": 7})
    first = await client.ask(**dead)
    assert first.body["error"]["code"] == "attempts_exhausted"

    cli = Cli.of(stack, tmp_path, worker)
    (dead_letter,) = await cli.run_json("dlq", "list")
    assert (dead_letter["job_id"], dead_letter["code"]) == (dead["id"], "attempts_exhausted")
    assert (dead_letter["model"], dead_letter["attempts"]) == ("default", 1)
    assert "broken, sorry" in dead_letter["message"]
    listed = await cli.run("dlq", "list")
    assert listed.code == 0
    assert listed.out.splitlines()[1].split()[0] == dead_letter["name"]
    shown = await cli.run("dlq", "show", dead["id"])
    assert marker in shown.out
    assert "data:image/png;base64," in shown.out

    client.replies.clear()
    replayed = await cli.run("dlq", "replay", dead_letter["name"], "--yes")
    assert (replayed.code, replayed.out) == (0, "")
    second = await client.result(dead["id"])
    assert (second.body["status"], second.body["attempts"]) == ("succeeded", 1)
    assert second.body["metadata"] == {"order": 7}
    assert await client.depth(worker.dead_letter_queue) == 0
    (recorded,) = map(json.loads, (state(cli) / "replayed.jsonl").read_text().splitlines())
    assert (recorded["action"], recorded["job_id"]) == ("replay", dead["id"])
    assert recorded["message"] == dead_letter["message"]


async def test_a_replayed_job_keeps_its_body_and_properties(cli: Cli, queues: Queues) -> None:
    body = b'{"id": "as-it-was",  "question": "?", "images": ["s3://b/k"]}'
    sent = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
    properties: dict[str, Any] = {
        "message_id": "the-publisher-s",
        "correlation_id": "c-1",
        "reply_to": "amq.gen-somewhere",
        "timestamp": sent,
        "content_type": "application/json",
    }
    trace = {"traceparent": TRACE, "tracestate": "a=b", "timestamp_in_ms": 1700000000123}
    await queues.dead_letter(body, headers={**trace, "CC": ["elsewhere"], "made-up": "x"}, **properties)
    assert (await cli.run("dlq", "replay", "--yes")).code == 0
    (message,) = await queues.drain(queues.jobs)
    assert message.body == body
    assert {name: getattr(message, name) for name in properties} == properties
    headers = dict(message.headers)
    assert headers.pop("vqa-copy")
    headers.pop("x-delivery-count", None)
    assert headers == {**trace, "made-up": "x"}
    assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT


async def test_a_dead_letter_without_an_id_is_replayed_without_one(cli: Cli, queues: Queues) -> None:
    # aio-pika gives every message an id; the worker marks it as not the publisher's.
    await queues.dead_letter(b"no job", "invalid_job", message_id="made-up", headers={"vqa-copy": "made-up"})
    (dead_letter,) = await cli.run_json("dlq", "list")
    assert (dead_letter["job_id"], dead_letter["message_id"], dead_letter["model"]) == (None, None, "unknown")
    assert (await cli.run("dlq", "replay", dead_letter["name"], "--yes")).code == 0
    (message,) = await queues.drain(queues.jobs)
    assert message.headers["vqa-copy"] == message.message_id


async def test_purge_deletes_matching_dead_letters_and_saves_them_to_a_file(cli: Cli, queues: Queues) -> None:
    kept = await add_dead_letters(queues, 1)
    await queues.dead_letter(b"\xffno job", "invalid_job", message_id="purged", reply_to="r")
    ended = await cli.run("dlq", "purge", "--yes")
    assert ended.code == 2
    assert ended.err_lines == [
        "Error: no filter. Give one, such as an ID, --code invalid_job or --until 30d, or use --all."
    ]
    done = await cli.run_json("dlq", "purge", "--code", "invalid_job", "--save", "saved.jsonl", "--yes")
    assert [(it["action"], it["done"], it["job_id"]) for it in done] == [("purge", True, "purged")]
    (saved,) = map(json.loads, (cli.folder / "saved.jsonl").read_text().splitlines())
    assert (saved["body_base64"], saved["reply_to"]) == ("/25vIGpvYg==", "r")
    (recorded,) = map(json.loads, (state(cli) / "purged.jsonl").read_text().splitlines())
    assert (recorded["action"], recorded["queue"]) == ("purge", queues.dead)
    assert ids_of(await queues.drain(queues.dead)) == kept


async def test_purge_changes_nothing_if_its_copy_cannot_be_written(cli: Cli, queues: Queues) -> None:
    await add_dead_letters(queues, 1)
    ended = await cli.run("dlq", "purge", "--all", "--yes", "--save", "/dev/null/saved.jsonl")
    assert ended.code == 1
    assert ended.err_lines[-1] == (
        "Error: cannot write /dev/null/saved.jsonl: File exists. Choose another file."
    )
    assert await queues.depth(queues.dead) == 1


async def test_without_a_writable_state_folder_a_replay_keeps_no_log(cli: Cli, queues: Queues) -> None:
    ids = await add_dead_letters(queues, 1)
    # As in a container with a read-only root file system.
    ended = await cli.run("dlq", "replay", "--yes", XDG_STATE_HOME="/dev/null")
    assert ended.code == 0
    assert ended.err_lines[1].startswith("Warning: no log is kept: cannot write /dev/null/")
    assert ended.err_lines[2] == "replay: 1 of 1 done"
    assert ids_of(await queues.drain(queues.jobs)) == ids


async def test_only_the_owner_can_read_the_files_also_if_they_existed(cli: Cli, queues: Queues) -> None:
    state(cli).mkdir(parents=True)
    written = (state(cli) / "replayed.jsonl", state(cli) / "purged.jsonl", cli.folder / "saved.jsonl")
    for path in written:
        path.touch(mode=0o644)
        path.chmod(0o644)
    for command in (["replay"], ["purge", "--all", "--save", "saved.jsonl"]):
        await add_dead_letters(queues, 1)
        assert (await cli.run("dlq", *command, "--yes")).code == 0
    for path in written:
        assert (len(path.read_text().splitlines()), oct(path.stat().st_mode & 0o777)) == (1, "0o600")
