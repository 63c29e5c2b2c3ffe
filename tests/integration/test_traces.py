"""Spans of real jobs, as a collector receives them; see docs/tracing.md."""

import re
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from deploy.local.model_simulator.behavior import Answer, Error
from deploy.local.stack import Stack
from tests.authority import Authority
from tests.conftest import BUCKET, PutImage
from tests.otlp import Receiver, Seen
from tests.running import ROOT, Client, Reply, Worker, calls_with, until
from worker import __version__

PARENT_ID = "00f067aa0ba902b7"
TRACESTATE = "congo=t61rcWkgMzE"


@dataclass(frozen=True)
class Scene:
    """A worker that exports spans, its publisher, and a receiver."""

    stack: Stack
    worker: Worker
    client: Client
    receiver: Receiver

    async def ask(self, *, flags: str = "01", tracestate: str = TRACESTATE, **job: Any) -> tuple[Reply, str]:
        """Publish a job in a new trace; return the result and the trace's id."""
        trace_id, job_id = uuid.uuid4().hex, uuid.uuid4().hex
        properties = {name: job.pop(name) for name in ("reply_to", "message_id", "timestamp") if name in job}
        headers: dict[str, Any] = {
            "traceparent": f"00-{trace_id}-{PARENT_ID}-{flags}",
            "tracestate": tracestate,
        }
        await self.client.publish({"id": job_id, **job}, headers=headers, **properties)
        return await self.client.result(job_id), trace_id

    async def spans(self, trace_id: str, last: str, times: int = 1) -> list[Seen]:
        """Wait for `times` spans named `last`; return all spans of the trace."""

        def are_there() -> list[Seen]:
            spans = self.receiver.of(trace_id)
            return spans if sum(span.name == last for span in spans) == times else []

        found: list[Seen] = await until(are_there, f"{times} spans named {last} in {trace_id}")
        return found

    @property
    def process(self) -> str:
        return f"process {self.worker.jobs_queue}"


@pytest.fixture(scope="module")
async def scene(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    stack.model.reset()
    folder = tmp_path_factory.mktemp("traced")
    async with (
        Receiver.serving() as receiver,
        Worker.running(stack, folder, VQA_MAX_ATTEMPTS="2", **receiver.environment()) as worker,
        Client.of(stack, worker) as client,
    ):
        yield Scene(stack, worker, client, receiver)


async def test_a_job_is_one_trace_with_a_span_for_each_step(scene: Scene, put_image: PutImage) -> None:
    reply, trace_id = await scene.ask(question="What?", images=[put_image()], message_id="m-1")
    process, fetch, chat, publish = await scene.spans(trace_id, scene.process)

    assert [span.kind for span in (process, fetch, chat, publish)] == [
        "CONSUMER",
        "CLIENT",
        "CLIENT",
        "PRODUCER",
    ]
    assert process.parent_id == PARENT_ID
    assert {fetch.parent_id, chat.parent_id, publish.parent_id} == {process.span_id}
    assert process.began <= fetch.began <= fetch.ended <= chat.began <= chat.ended <= publish.began
    assert publish.ended <= process.ended
    assert not any(span.is_error for span in (process, fetch, chat, publish))
    # The consumer of the result continues the trace from this span.
    assert reply.message.headers == {
        "traceparent": f"00-{trace_id}-{publish.span_id}-01",
        "tracestate": TRACESTATE,
    }
    assert {span.tracestate for span in (process, fetch, chat, publish)} == {TRACESTATE}


async def test_the_attributes_of_the_spans(scene: Scene, put_image: PutImage) -> None:
    reply, trace_id = await scene.ask(question="What?", images=[put_image()], message_id="m-2")
    process, fetch, chat, publish = await scene.spans(trace_id, scene.process)
    broker, api = urlsplit(scene.stack.rabbitmq.url), urlsplit(scene.stack.model.base_url)
    rabbitmq = {
        "messaging.system": "rabbitmq",
        "server.address": broker.hostname,
        "server.port": broker.port,
    }

    size = process.attributes["messaging.message.body.size"]
    assert isinstance(size, int)
    assert process.attributes == {
        **rabbitmq,
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": scene.worker.jobs_queue,
        "messaging.message.id": "m-2",
        "messaging.message.body.size": size,
        "vqa.deliveries": 1,
        "vqa.job.id": reply.body["id"],
        "vqa.outcome": "succeeded",
        "vqa.attempts": 1,
    }
    assert fetch.attributes == {"vqa.image": "images[0]"}
    model = scene.stack.model.models[0]
    assert chat.name == f"chat {model}"
    response_id = chat.attributes["gen_ai.response.id"]
    assert response_id
    assert chat.attributes == {
        "server.address": api.hostname,
        "server.port": api.port,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": api.hostname,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": response_id,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": reply.body["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": reply.body["usage"]["completion_tokens"],
        "vqa.cost_usd": reply.body["usage"]["cost_usd"],
    }
    assert publish.name == f"publish {scene.worker.results_queue}"
    assert publish.attributes == {
        **rabbitmq,
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.destination.name": scene.worker.results_queue,
        "messaging.message.id": reply.message.message_id,
    }
    assert (
        process.resource.items()
        >= {
            "service.name": "vqa-worker",
            "service.version": __version__,
        }.items()
    )


async def test_a_retry_is_in_the_same_trace(scene: Scene, put_image: PutImage) -> None:
    marker = uuid.uuid4().hex
    scene.stack.model.play(Error(status=500), marker=marker)
    reply, trace_id = await scene.ask(question=marker, images=[put_image()])
    spans = await scene.spans(trace_id, scene.process, times=2)

    assert reply.body["attempts"] == 2
    first, second = (span for span in spans if span.name == scene.process)
    (retry,) = (span for span in spans if span.name == f"publish {scene.worker.jobs_queue}.retry.1s")
    (result,) = (span for span in spans if span.name == f"publish {scene.worker.results_queue}")
    failed, succeeded = (span for span in spans if span.name.startswith("chat "))
    assert first.parent_id == PARENT_ID
    assert [span.parent_id for span in (failed, retry)] == [first.span_id] * 2
    # The parent of the second attempt is the span that publishes the retry.
    assert second.parent_id == retry.span_id
    assert [span.parent_id for span in (succeeded, result)] == [second.span_id] * 2
    assert failed.attributes["error.type"] == "500"
    assert first.attributes["error.type"] == "http_500"
    assert first.attributes["vqa.outcome"] == "retried"
    assert [span.attributes["vqa.attempts"] for span in (first, second)] == [1, 2]
    assert [span.is_error for span in (first, failed, second, succeeded)] == [True, True, False, False]
    assert reply.message.headers["traceparent"] == f"00-{trace_id}-{result.span_id}-01"


async def test_a_job_without_a_trace_begins_one_that_includes_its_retry(
    scene: Scene, put_image: PutImage
) -> None:
    marker = uuid.uuid4().hex
    scene.stack.model.play(Error(status=500), marker=marker)
    reply = await scene.client.ask(question=marker, images=[put_image()])

    _, trace_id, _, flags = str(reply.message.headers["traceparent"]).split("-")
    spans = await scene.spans(trace_id, scene.process, times=2)
    assert int(flags, 16) & 1
    assert [span.parent_id for span in spans].count("") == 1
    assert spans[0].name == scene.process
    (line,) = (
        line
        for line in scene.worker.log()
        if line.get("job_id") == reply.body["id"] and line["event"] == "job_finished"
    )
    assert line["trace_id"] == trace_id


async def test_each_call_after_a_429_is_a_separate_span(scene: Scene, put_image: PutImage) -> None:
    marker = uuid.uuid4().hex
    scene.stack.model.play(Error(status=429, headers={"Retry-After": "0"}), marker=marker, times=2)
    reply, trace_id = await scene.ask(question=marker, images=[put_image()])
    spans = await scene.spans(trace_id, scene.process)

    assert reply.body["attempts"] == 1
    chats = [span for span in spans if span.name.startswith("chat ")]
    assert [span.attributes.get("error.type") for span in chats] == ["429", "429", None]
    assert [span.name for span in spans].count("fetch image") == 3
    assert len({span.parent_id for span in chats}) == 1


async def test_each_fetched_image_has_a_span(scene: Scene, put_image: PutImage) -> None:
    link = "https://example.com/a.png?token=not-to-be-seen"
    reply, trace_id = await scene.ask(question="What?", images=[put_image(), link, put_image(b"<html>")])
    spans = await scene.spans(trace_id, scene.process)

    assert reply.body["error"]["code"] == "image_unsupported_type"
    fetched = {span.attributes["vqa.image"]: span for span in spans if span.name == "fetch image"}
    assert fetched.keys() == {"images[0]", "images[2]"}
    assert fetched["images[2]"].attributes["error.type"] == "image_unsupported_type"
    assert not fetched["images[0]"].is_error
    (process,) = (span for span in spans if span.name == scene.process)
    assert (process.attributes["vqa.outcome"], process.attributes["error.type"]) == (
        "failed",
        "image_unsupported_type",
    )
    assert process.is_error


async def test_a_dead_letter_continues_the_trace(scene: Scene, put_image: PutImage) -> None:
    marker = uuid.uuid4().hex
    scene.stack.model.play(Error(status=500), marker=marker, times=2)
    reply, trace_id = await scene.ask(question=marker, images=[put_image()])
    dead_letter = await scene.client.take(scene.worker.dead_letter_queue)
    spans = await scene.spans(trace_id, scene.process, times=2)

    (dead_lettered,) = (span for span in spans if span.name == f"publish {scene.worker.dead_letter_queue}")
    (reported,) = (span for span in spans if span.name == f"publish {scene.worker.results_queue}")
    assert dead_letter.headers["traceparent"] == f"00-{trace_id}-{dead_lettered.span_id}-01"
    assert reply.message.headers["traceparent"] == f"00-{trace_id}-{reported.span_id}-01"
    last = [span for span in spans if span.name == scene.process][-1]
    assert (last.attributes["vqa.outcome"], last.attributes["error.type"]) == (
        "dead_lettered",
        "attempts_exhausted",
    )


async def test_a_reply_queue_is_not_named_in_spans(scene: Scene, put_image: PutImage) -> None:
    queue = await scene.client.reply_queue()
    _, trace_id = await scene.ask(question="What?", images=[put_image()], reply_to=queue)
    *_, publish = await scene.spans(trace_id, scene.process)

    assert publish.name == "publish {reply_to}"
    assert publish.attributes["messaging.destination.template"] == "{reply_to}"
    assert queue not in str(publish)


async def test_spans_contain_no_content_of_jobs_and_answers(
    scene: Scene, stack: Stack, put_image: PutImage
) -> None:
    """All exported bytes of all spans are searched."""
    secret = uuid.uuid4().hex
    answer = uuid.uuid4().hex
    key = f"{uuid.uuid4().hex}.png"
    stack.model.play(Answer(text=f"{answer}!"), marker=secret)
    image = put_image(key=key)
    signed = f"https://example.com/{secret}.png?X-Amz-Signature={secret}"
    _, answered = await scene.ask(question=secret, images=[image], metadata={"who": secret}, system=secret)
    stack.model.play(Error(status=400, message=f"bad {secret}"), marker=secret)
    _, rejected = await scene.ask(question=secret, images=[image, signed])
    _, missing = await scene.ask(question=secret, images=[f"s3://{BUCKET}/{secret}"])
    for trace_id in (answered, rejected, missing):
        await scene.spans(trace_id, scene.process)

    sent = b"".join(scene.receiver.bodies)
    for hidden in (
        secret,
        answer,
        key,
        BUCKET,
        "Signature",
        scene.stack.s3.secret_key,
        scene.stack.model.api_key,
    ):
        assert hidden.encode() not in sent, hidden


async def test_requests_to_the_provider_have_no_trace_headers(scene: Scene, put_image: PutImage) -> None:
    marker = uuid.uuid4().hex
    await scene.ask(question=marker, images=[put_image()])
    (call,) = calls_with(scene.stack, marker)
    assert not {"traceparent", "tracestate", "baggage", "b3"} & call.headers.keys()


async def test_an_unsampled_trace_is_passed_on_unsampled(scene: Scene, put_image: PutImage) -> None:
    reply, trace_id = await scene.ask(flags="00", question="What?", images=[put_image()])
    _, sampled = await scene.ask(question="What?", images=[put_image()])
    await scene.spans(sampled, scene.process)

    assert scene.receiver.of(trace_id) == []
    assert re.fullmatch(f"00-{trace_id}-[0-9a-f]{{16}}-00", str(reply.message.headers["traceparent"]))
    assert reply.message.headers["tracestate"] == TRACESTATE


async def test_the_collector_s_certificate_is_verified_with_the_variable_for_it(
    stack: Stack, put_image: PutImage, tmp_path: Path
) -> None:
    """`REQUESTS_CA_BUNDLE` is often set for all programs of a machine."""
    authority, other = (Authority.made_in(tmp_path / name) for name in ("authority", "other"))
    async with Receiver.serving(authority.server_context()) as receiver:
        certificates = {
            "OTEL_EXPORTER_OTLP_CERTIFICATE": authority.certificate,
            "REQUESTS_CA_BUNDLE": other.certificate,
        }
        settings = {**receiver.environment(), **certificates}
        async with Worker.running(stack, tmp_path, **settings) as worker, Client.of(stack, worker) as client:
            await client.ask(question="What?", images=[put_image()])
            await until(lambda: len(receiver.spans) == 4, "four spans have arrived")


@pytest.mark.parametrize("tracestate", ["no state", "a=1,a=2", ",", "x" * 512])
async def test_an_invalid_tracestate_is_dropped(scene: Scene, put_image: PutImage, tracestate: str) -> None:
    reply, trace_id = await scene.ask(tracestate=tracestate, question="What?", images=[put_image()])
    *_, publish = await scene.spans(trace_id, scene.process)
    assert reply.message.headers.get("tracestate", "") == publish.tracestate


async def test_the_docs_list_all_attributes_of_the_spans(scene: Scene, put_image: PutImage) -> None:
    marker, queue = uuid.uuid4().hex, await scene.client.reply_queue()
    scene.stack.model.play(Error(status=500), marker=marker)
    image = put_image()
    _, retried = await scene.ask(question=marker, images=[image], message_id="1", timestamp=datetime.now(UTC))
    _, replied = await scene.ask(question=marker, images=[image], reply_to=queue)
    spans = [*await scene.spans(retried, scene.process, times=2), *await scene.spans(replied, scene.process)]
    seen: dict[str, set[str]] = {}
    for span in spans:
        seen.setdefault(span.name.split(" ")[0], set()).update(span.attributes.keys() - {"error.type"})

    page = (ROOT / "docs/tracing.md").read_text()
    table = page.split("\n| Span | Attributes |\n", 1)[1].split("\n\n", 1)[0]
    named: dict[str, set[str]] = {}
    for line in table.splitlines()[1:-1]:
        kinds, attributes = line.strip("| ").split(" | ")
        for kind in kinds.split(", "):
            found = re.findall(r"`((?:messaging|gen_ai|server|vqa)\.[\w.]+)`", attributes)
            named.setdefault(kind, set()).update(found)
    assert seen == named
