"""Spans as the OTLP exporter sends them to a local receiver."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from tests.otlp import Receiver, Seen
from tests.unit.fakes import TOPOLOGY, FakePublisher, a_delivery, turns_of_the_loop
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.result import Result, Usage
from worker.errors import Dependency, DependencyDownError, JobError, TransientError
from worker.jobs.in_flight_jobs import InFlightJobs
from worker.jobs.outcome import Outcome, Requeued, Succeeded
from worker.observability import tracing
from worker.observability.tracing.otlp import MAX_CHARS, Otlp, Scene
from worker.rabbitmq.settlement import ReplyPolicy, Settlement

TRACE = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
SCENE = Scene("jobs", frozenset({"jobs", "results"}), "amqp://broker:5672/", "https://api.example/v1")
ANSWERED = Succeeded(job_id="j", model="m", result=Result(id="j", status="succeeded", answer="a"))


class Traced:
    """A tracer and the receiver of its spans, which arrive until the tracer is closed."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.tracer = Otlp(SCENE)

    async def spans(self) -> list[Seen]:
        await self.tracer.close()
        return sorted(self.receiver.spans, key=lambda span: span.began)

    async def only_span(self) -> Seen:
        (span,) = await self.spans()
        return span


@pytest.fixture
async def traced(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Traced]:
    async with Receiver.serving() as receiver:
        for name, value in receiver.environment().items():
            monkeypatch.setenv(name, value)
        yield Traced(receiver)


@pytest.mark.parametrize(
    ("address", "attributes"),
    [
        ("amqp://broker:5672/", {"server.address": "broker", "server.port": 5672}),
        ("amqp://a:5672/,amqp://b:5672/", {}),
    ],
)
async def test_a_span_has_the_address_of_the_broker_unless_it_is_a_cluster(
    traced: Traced, address: str, attributes: Mapping[str, object]
) -> None:
    tracer = Otlp(replace(SCENE, rabbitmq_address=address))
    with tracer.process(a_delivery()):
        pass
    await tracer.close()
    found = (await traced.only_span()).attributes
    assert {name: value for name, value in found.items() if name.startswith("server.")} == attributes


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (JobError(ErrorCode.IMAGE_NOT_FOUND, "s3://secret/place is not there"), "image_not_found"),
        (TransientError(Dependency.S3, "timeout", "s3://secret/place is slow"), "timeout"),
        (DependencyDownError(Dependency.S3, "no secret/place is there"), "s3_down"),
        (ValueError("a secret/place"), "ValueError"),
        (asyncio.CancelledError("a secret/place"), "cancelled"),
    ],
)
async def test_an_exception_in_a_span_is_recorded_by_type_and_not_by_message(
    traced: Traced, error: BaseException, kind: str
) -> None:
    with suppress(type(error)), traced.tracer.fetch("images[0]"):
        raise error
    span = await traced.only_span()
    assert span.is_error
    assert span.attributes == {"vqa.image": "images[0]", "error.type": kind}
    assert b"secret" not in b"".join(traced.receiver.bodies)


async def test_the_recorded_failure_takes_precedence_over_the_exception_that_follows(traced: Traced) -> None:
    with suppress(TransientError), traced.tracer.call("m", "deepinfra") as span:
        span.failed("503")
        raise TransientError(Dependency.MODEL, "http_5xx", "the API answered 503")
    assert (await traced.only_span()).attributes["error.type"] == "503"


@pytest.mark.parametrize(
    ("response", "finish_reason", "usage", "expected"),
    [
        ({}, None, None, {}),
        ({"model": 7, "id": ["x"]}, None, None, {}),
        (
            {"model": "m" * 1000, "id": "i" * 1000},
            "f" * 1000,
            None,
            {
                "gen_ai.response.model": "m" * MAX_CHARS,
                "gen_ai.response.id": "i" * MAX_CHARS,
                "gen_ai.response.finish_reasons": ["f" * MAX_CHARS],
            },
        ),
        (
            {"id": "1"},
            "stop",
            Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7),
            {
                "gen_ai.response.id": "1",
                "gen_ai.response.finish_reasons": ["stop"],
                "gen_ai.usage.input_tokens": 3,
                "gen_ai.usage.output_tokens": 4,
            },
        ),
    ],
)
async def test_valid_response_attributes_are_recorded(
    traced: Traced,
    response: dict[str, Any],
    finish_reason: str | None,
    usage: Usage | None,
    expected: Mapping[str, Any],
) -> None:
    with traced.tracer.call("m", "deepinfra") as span:
        span.answered(usage, finish_reason, response)
    seen = await traced.only_span()
    assert seen.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "deepinfra",
        "gen_ai.request.model": "m",
        "server.address": "api.example",
        "server.port": 443,
        **expected,
    }


@pytest.mark.parametrize(
    ("exchange", "routing_key", "name", "attribute"),
    [
        ("", "results", "publish results", "messaging.destination.name"),
        ("replies", "results", "publish replies:results", "messaging.destination.name"),
        ("", "vqa.results.ann", "publish {reply_to}", "messaging.destination.template"),
        ("replies", "vqa.results.ann", "publish replies:{reply_to}", "messaging.destination.template"),
    ],
)
async def test_only_the_worker_s_own_queues_are_in_span_names(
    traced: Traced, exchange: str, routing_key: str, name: str, attribute: str
) -> None:
    with traced.tracer.publish(exchange, routing_key, "1") as span:
        assert span.headers.keys() == {"traceparent"}
    seen = await traced.only_span()
    assert seen.name == name
    assert seen.attributes[attribute] == name.removeprefix("publish ")


async def test_a_requeued_job_is_not_an_error(traced: Traced) -> None:
    with traced.tracer.process(a_delivery(trace=TRACE, queued_s=1.5, deliveries=2)) as span:
        span.set_outcome(Requeued(job_id="j", model="m", reason="the worker is shutting down"))
    seen = await traced.only_span()
    assert not seen.is_error
    assert seen.attributes["vqa.outcome"] == "requeued"
    assert (seen.attributes["vqa.queued_s"], seen.attributes["vqa.deliveries"]) == (1.5, 2)


async def test_a_job_that_is_redelivered_while_it_runs_has_a_span_for_each_delivery(
    traced: Traced, uses: Callable[[tracing.Tracer], None]
) -> None:
    """The call belongs to the first delivery; the outcome is recorded and published once."""
    uses(traced.tracer)
    may_end, lives = asyncio.Event(), True

    async def process(*_: object) -> Outcome:
        with tracing.spans().call("m", "deepinfra"):
            await may_end.wait()
        return ANSWERED

    async with asyncio.TaskGroup() as tasks:
        settlement = Settlement(FakePublisher(), TOPOLOGY, ReplyPolicy(["results"]))
        in_flight = InFlightJobs(tasks, process, settlement)
        in_flight.accept(a_delivery(trace=TRACE, can_ack=lambda: lives))
        await turns_of_the_loop()
        in_flight.accept(a_delivery(trace=TRACE, redelivered=True))
        await turns_of_the_loop()
        lives = False
        may_end.set()
    first, call, second = await traced.spans()
    assert [span.name for span in (first, call, second)] == ["process jobs", "chat m", "process jobs"]
    assert {span.trace_id for span in (first, call, second)} == {"a" * 32}
    assert [span.parent_id for span in (first, call, second)] == ["b" * 16, first.span_id, "b" * 16]
    assert [span.attributes.get("vqa.outcome") for span in (first, second)] == ["succeeded", None]


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> Callable[[tracing.Tracer], None]:
    """Return a function that installs a tracer until the end of the test."""
    return lambda tracer: monkeypatch.setattr(tracing, "_tracer", tracer)
