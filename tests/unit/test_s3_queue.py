"""Each kind of S3 error alone, among good objects, and in a whole queue: who fails, who waits, who pauses."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from tests.conftest import picture
from tests.fake_s3 import Answer, FakeS3, give, refuse
from tests.unit.fakes import ANSWER, a_delivery
from tests.unit.s3 import isolate
from vqa_worker.messages.error_codes import ErrorCode
from worker.clock import Clock
from worker.errors import Dependency
from worker.images.conversion_pool import ConversionPool
from worker.images.loader import ImageLoader
from worker.images.preparation import ImageRules
from worker.images.source import SourcePolicy
from worker.jobs.attempt import Attempt
from worker.jobs.cancellation import CancelledJobs
from worker.jobs.outcome import DeadLettered, Failed, Outcome, Requeued, Retried, Succeeded
from worker.jobs.outcome_builder import OutcomeBuilder
from worker.jobs.request import RequestRules
from worker.model.answer import Answer as ModelAnswer
from worker.model.request import RequestBody
from worker.observability.redaction import Redactor
from worker.observability.tenants import Tenants
from worker.processor import Processor, ProcessorDependencies
from worker.resilience import outage_reports
from worker.resilience.concurrency_limiter import ConcurrencyLimiter
from worker.resilience.outage_detector import OutageDetector
from worker.resilience.outage_reports import OutageReports
from worker.resilience.retry_policy import RetryPolicy
from worker.s3 import client
from worker.s3.aws import Aws, Endpoint
from worker.s3.client import S3

PICTURE = picture() + bytes(100)
MAX_ATTEMPTS = 3
SLOTS = 8
PAGE = give(b"<html><title>A proxy</title></html>", 403)


class _Model:
    """Answers every complete request."""

    async def complete(self, model: str, body: RequestBody, *, time_left_s: float) -> ModelAnswer:
        assert model
        assert time_left_s > 0
        assert len(b"".join([piece async for piece in body])) == body.length
        return ANSWER


@dataclass
class Queue:
    """A processor with a real S3 client, and a queue as the broker's: requeued jobs come again at its end."""

    processor: Processor
    detector: OutageDetector
    outages: int = 0
    ended: dict[str, Outcome] = field(default_factory=dict)
    _waiting: deque[tuple[str, int]] = field(default_factory=deque)

    def put(self, ids: Iterable[str]) -> None:
        self._waiting.extend((id_, 0) for id_ in ids)

    async def work(self, *, rounds: int) -> None:
        """Process jobs, a few at once; in an outage one, as the worker's probes."""
        for _ in range(rounds):
            is_down = Dependency.S3 in self.detector.outages
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), 1 if is_down else SLOTS))]
            outcomes = await asyncio.gather(*[self._process(*job) for job in batch])
            for (id_, counted), outcome in zip(batch, outcomes, strict=True):
                match outcome:
                    case Requeued():
                        self._waiting.append((id_, max(0, counted - outcome.restored_attempts)))
                    case Retried():
                        self._waiting.append((id_, outcome.attempts))
                    case _:
                        self.ended[id_] = outcome
            self.outages += not is_down and Dependency.S3 in self.detector.outages

    async def _process(self, id_: str, counted: int) -> Outcome:
        job = {"id": id_, "question": "What is it?", "images": [f"s3://photos/{id_}.png"]}
        delivery = a_delivery(json.dumps(job).encode(), counted_attempts=counted)
        return await self.processor.process(delivery, Attempt.from_delivery(delivery))


@pytest.fixture
async def fake() -> AsyncIterator[FakeS3]:
    async with FakeS3.serving(PICTURE) as fake:
        yield fake


@pytest.fixture
async def queue(fake: FakeS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Queue]:
    isolate(monkeypatch, tmp_path)
    for module, name in (
        (client, "MAX_RETRY_DELAY_S"),
        (outage_reports, "MAX_WAIT_S"),
        (outage_reports, "MAX_WAIT_ALONE_S"),
    ):
        monkeypatch.setattr(module, name, 0.01)
    s3, clock = S3(Aws(Endpoint(fake.url, "auto"))), Clock()
    limiter = ConcurrencyLimiter(SLOTS, initial=SLOTS, clock=clock)
    detector = OutageDetector(lambda: limiter.slots_in_use)
    dependencies = ProcessorDependencies(
        images=ImageLoader(
            s3,
            SourcePolicy(["*"], ["*"]),
            ImageRules(10_000, why_not_converted="VQA_IMAGE_CONVERT is never"),
            ConversionPool(processes=1, memory_bytes=1024),
            max_per_job=4,
            buffer_bytes=64 * 1024 * 1024,
            links=None,
        ),
        model=_Model(),
        store=None,
        limiter=limiter,
        detector=detector,
        outage_reports=OutageReports(detector, limiter, clock),
        cancelled_jobs=CancelledJobs(),
        tenants=Tenants(),
        outcomes=OutcomeBuilder(Redactor(()), clock),
        rules=RequestRules("m", ["m"], 10_000, 20, send_image_detail=False),
        retry=RetryPolicy(max_attempts=MAX_ATTEMPTS, delays_s=(1,)),
        job_timeout_s=60.0,
        clock=clock,
    )
    yield Queue(Processor(dependencies), detector)
    await s3.close()


# Answers of S3, and the code with which one bad job among good ones ends.
JOBS_OWN = [
    (refuse(404, "NoSuchKey"), "image_not_found"),
    (refuse(404, "NoSuchBucket"), "image_not_found"),
    (refuse(403, "AccessDenied"), "image_forbidden"),
    (refuse(403, "InvalidObjectState"), "image_forbidden"),
    (refuse(400, "KeyTooLongError"), "invalid_job"),
    (give(PICTURE, x_amz_checksum_crc32="AAAAAA=="), "image_corrupt"),
]
MAYBE_EVERYBODYS = [
    (refuse(403, "NeverHeardOf"), "image_forbidden"),
    (refuse(400, "InvalidRequest"), "image_forbidden"),
    (refuse(405, "MethodNotAllowed"), "image_forbidden"),
    (refuse(400, "KMS.DisabledException"), "image_forbidden"),
    (refuse(500, "InternalError"), "attempts_exhausted"),
    (give(b"", 502), "attempts_exhausted"),
    (PAGE, "attempts_exhausted"),
    (give(b"", 401), "attempts_exhausted"),
    (give(b"<html>", 200, Content_Type="text/html"), "attempts_exhausted"),
]
BUSY = [
    refuse(503, "SlowDown"),
    refuse(400, "Throttling"),
    refuse(400, "RequestTimeout"),
    give(b"", 429),
    give(b"", 408),
    give(b"", 409),
    give(b"", 425),
]
EVERYBODYS = [
    refuse(301, "PermanentRedirect"),
    refuse(400, "AuthorizationHeaderMalformed"),
    refuse(403, "AllAccessDisabled"),
    refuse(403, "UserSuspended"),
    refuse(403, "InvalidAccessKeyId"),
    refuse(403, "SignatureDoesNotMatch"),
    refuse(400, "ExpiredToken"),
    refuse(403, "RequestTimeTooSkewed"),
    refuse(403, "AccessDenied", message="Transaction cap exceeded, see the Caps & Alerts page"),
]


def only(fake: FakeS3, bad: Iterable[str], answer: Answer) -> None:
    """Answer so for these jobs' objects only."""
    keys, well = {f"/photos/{id_}.png" for id_ in bad}, fake.answer

    async def respond(request: web.BaseRequest) -> web.StreamResponse:
        return await (answer if request.raw_path in keys else well)(request)

    fake.answer = respond


def code(outcome: Outcome) -> str:
    assert isinstance(outcome, Failed | DeadLettered), outcome
    return outcome.code


GOOD = [f"good-{n}" for n in range(100)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [*JOBS_OWN, *MAYBE_EVERYBODYS, *((answer, "attempts_exhausted") for answer in [*BUSY, *EVERYBODYS])],
)
async def test_a_bad_object_among_good_ones_ends_alone(
    fake: FakeS3, queue: Queue, answer: Answer, expected: str
) -> None:
    """Any answer about it is the job's own while others are read, and the others do not wait."""
    only(fake, ["bad"], answer)
    queue.put(["good", "bad", *GOOD])
    await queue.work(rounds=12)
    # More good jobs keep coming.
    waves = 0
    while "bad" not in queue.ended and waves < 20:
        queue.put(f"more-{waves}-{n}" for n in range(SLOTS))
        await queue.work(rounds=1)
        waves += 1
    await queue.work(rounds=3)
    bad = queue.ended.pop("bad")
    assert code(bad) == expected
    assert len(queue.ended) == 1 + len(GOOD) + waves * SLOTS
    assert {type(outcome) for outcome in queue.ended.values()} == {Succeeded}
    assert queue.outages == 0


@pytest.mark.parametrize("answer", BUSY)
async def test_a_throttled_object_among_good_ones_waits_and_costs_no_attempt(
    fake: FakeS3, queue: Queue, answer: Answer
) -> None:
    well = fake.answer
    only(fake, ["bad"], answer)
    queue.put(["good", "bad", *GOOD])
    await queue.work(rounds=40)
    assert {type(queue.ended[id_]) for id_ in GOOD} == {Succeeded}
    assert "bad" not in queue.ended
    fake.answer = well
    await queue.work(rounds=5)
    ended = queue.ended["bad"]
    assert isinstance(ended, Succeeded)
    assert ended.result.attempts == 1


@pytest.mark.parametrize(("answer", "expected"), JOBS_OWN)
async def test_a_queue_of_bad_objects_pauses_nothing(
    fake: FakeS3, queue: Queue, answer: Answer, expected: str
) -> None:
    fake.answer = answer
    queue.put(GOOD[:20])
    await queue.work(rounds=5)
    assert {code(outcome) for outcome in queue.ended.values()} == {expected}
    assert len(queue.ended) == 20
    assert queue.outages == 0


@pytest.mark.parametrize("worked_before", [False, True], ids=["from the start", "after some time"])
@pytest.mark.parametrize("answer", [*(answer for answer, _ in MAYBE_EVERYBODYS), *BUSY, *EVERYBODYS])
async def test_an_s3_that_answers_so_to_everybody_fails_no_job(
    fake: FakeS3, queue: Queue, answer: Answer, *, worked_before: bool
) -> None:
    well = fake.answer
    if worked_before:
        queue.put(["before"])
        await queue.work(rounds=1)
    fake.answer = answer
    queue.put(GOOD[:20])
    await queue.work(rounds=30)
    assert queue.ended.keys() <= {"before"}
    assert queue.outages == 1
    assert Dependency.S3 in queue.detector.outages
    fake.answer = well
    await queue.work(rounds=10)
    assert {type(outcome) for outcome in queue.ended.values()} == {Succeeded}
    assert len(queue.ended) == 20 + worked_before
    assert {
        outcome.result.attempts for outcome in queue.ended.values() if isinstance(outcome, Succeeded)
    } == {1}


@pytest.mark.parametrize("answer", [PAGE, give(b"", 404), *BUSY, *EVERYBODYS])
async def test_a_single_job_waits_for_an_s3_that_is_not_right(
    fake: FakeS3, queue: Queue, answer: Answer
) -> None:
    well = fake.answer
    fake.answer = answer
    queue.put(["alone"])
    await queue.work(rounds=20)
    assert queue.ended == {}
    assert Dependency.S3 in queue.detector.outages
    fake.answer = well
    await queue.work(rounds=2)
    assert isinstance(queue.ended["alone"], Succeeded)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [*JOBS_OWN, (refuse(403, "NeverHeardOf"), "attempts_exhausted")],
)
async def test_a_single_bad_job_ends(fake: FakeS3, queue: Queue, answer: Answer, expected: str) -> None:
    fake.answer = answer
    queue.put(["alone"])
    await queue.work(rounds=20)
    assert code(queue.ended["alone"]) == expected
    assert ErrorCode(expected)
