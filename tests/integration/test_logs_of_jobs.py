"""Log lines about jobs: one for each outcome, with the job's ids and without its content."""

import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from deploy.local.model_simulator.behavior import Answer, Error, Malformed, Outcome
from deploy.local.stack import Stack
from tests.breaking import events
from tests.conftest import BUCKET, PutImage
from tests.running import Client, Worker, until

SECRET = "a-word-that-nobody-should-see"


@dataclass(frozen=True)
class Scene:
    """A worker at level debug with a result store, and its publisher."""

    stack: Stack
    worker: Worker
    client: Client

    async def line(self, job_id: str | None = None, **properties: Any) -> dict[str, Any]:
        """Publish a job; return the line about its outcome."""
        job = properties.pop("job")
        await self.client.publish(job, **properties)
        found = await until(lambda: self._ends(job_id or job["id"]), "the job's line")
        (line,) = found
        return dict(line)

    def _ends(self, job_id: str) -> list[dict[str, Any]]:
        return [line for line in events(self.worker, "job_finished") if line["job_id"] == job_id]


@pytest.fixture(scope="module")
async def scene(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    stack.model.reset()
    async with (
        Worker.running(
            stack,
            tmp_path_factory.mktemp("logs"),
            VQA_LOG_LEVEL="debug",
            VQA_RESULT_STORE=f"s3://{BUCKET}/logs",
            VQA_MAX_ATTEMPTS="2",
        ) as worker,
        Client.of(stack, worker) as client,
    ):
        yield Scene(stack, worker, client)


def a_job(question: str, image: str, **fields: Any) -> dict[str, Any]:
    return {"id": uuid.uuid4().hex, "question": question, "images": [image], **fields}


async def test_a_job_s_line_has_its_ids(scene: Scene, put_image: PutImage) -> None:
    trace_id, job = uuid.uuid4().hex, a_job("What?", put_image())
    line = await scene.line(
        job=job, headers={"traceparent": f"00-{trace_id}-{'1' * 16}-00"}, correlation_id="request 7"
    )
    assert (line["job_id"], line["trace_id"], line["correlation_id"]) == (job["id"], trace_id, "request 7")
    assert (line["level"], line["outcome"], line["attempts"]) == ("info", "succeeded", 1)


async def test_without_a_trace_and_with_the_default_correlation_id_the_line_omits_them(
    scene: Scene, put_image: PutImage
) -> None:
    job = a_job("What?", put_image())
    line = await scene.line(job=job, correlation_id=job["id"])
    assert not {"trace_id", "correlation_id"} & line.keys()


async def test_the_level_of_a_line_depends_on_the_outcome(scene: Scene, put_image: PutImage) -> None:
    marker = uuid.uuid4().hex
    scene.stack.model.play(Error(status=500), marker=marker, times=2)
    exhausted = a_job(marker, put_image())
    dead = await scene.line(job=exhausted)
    assert (dead["level"], dead["outcome"], dead["error"]) == ("error", "dead_lettered", "attempts_exhausted")
    assert dead["reason"] == "2 attempts failed, the last one because the API answered 500"
    assert dead["message"].endswith(f"2 attempts (attempts_exhausted): {dead['reason']}.")
    refused = await scene.line(job=a_job("What?", f"s3://{BUCKET}/missing"))
    assert (refused["level"], refused["outcome"], refused["error"]) == (
        "warning",
        "failed",
        "image_not_found",
    )
    assert refused["reason"] == "images[0]: S3 has no such object (NoSuchKey)"
    assert refused["reason"] in refused["message"]
    (retry,) = (line for line in events(scene.worker, "job_retried") if line["job_id"] == exhausted["id"])
    assert (retry["level"], retry["reason"], retry["attempts"]) == ("warning", "http_500", 1)
    failed = f"Job {exhausted['id']} failed with a transient error (http_500)"
    assert retry["message"] == f"{failed}; it is retried in 1 s, attempts so far: 1."


async def test_earlier_lines_have_the_trace_id_too(scene: Scene, put_image: PutImage) -> None:
    marker, trace_id = uuid.uuid4().hex, uuid.uuid4().hex
    scene.stack.model.play(Error(status=500), marker=marker)
    await scene.line(job=a_job(marker, put_image()), headers={"traceparent": f"00-{trace_id}-{'1' * 16}-01"})
    about = [line["event"] for line in scene.worker.log() if line.get("trace_id") == trace_id]
    assert about == ["job_retried", "job_finished"]


async def test_the_content_of_a_job_is_not_logged_even_at_level_debug(
    scene: Scene, put_image: PutImage
) -> None:
    """Neither the API's answer nor a presigned URL is logged, for any outcome."""
    image = put_image(key=f"{SECRET}.png")
    content = {"metadata": {"who": SECRET}, "system": SECRET, "params": {"user": SECRET}}
    signed = f"https://user:{SECRET}@example.com/a.png?X-Amz-Signature={SECRET}"
    outcomes: list[Outcome] = [
        Answer(text=f"It is {SECRET}."),
        Answer(text="", refusal=SECRET),
        Error(status=400, message=f"bad: {SECRET}"),
        Error(status=503, message=f"bad: {SECRET}"),
        Malformed(how="not_json"),
    ]
    jobs = []
    for outcome in outcomes:
        marker = f"{SECRET} {uuid.uuid4().hex}"
        scene.stack.model.play(outcome, marker=marker)
        jobs.append(a_job(marker, image, **content))
        jobs[-1]["images"].append(signed)
    bad = (
        f"data:image/png;base64,{SECRET}",
        f"ftp://{SECRET}@example.com/x",
        f"s3://{BUCKET}/{SECRET}-missing",
    )
    jobs += [a_job(SECRET, image, **content) for image in bad]
    levels = [(await scene.line(job=job))["level"] for job in jobs]
    assert levels == ["info", "warning", "warning", "info", "info", "warning", "warning", "warning"]
    unreadable = uuid.uuid4().hex
    await scene.line(
        job=json.dumps({"question": SECRET}).encode()[:-1], job_id=unreadable, message_id=unreadable
    )

    assert len(events(scene.worker, "job_retried")) >= 2
    output = scene.worker.output()
    assert SECRET not in output
    reasons = {line["reason"] for line in events(scene.worker, "job_finished") if "reason" in line}
    assert {"the model refused to answer", "the API answered 400"} <= reasons
    assert scene.stack.s3.secret_key not in output
    assert scene.stack.model.api_key not in output
