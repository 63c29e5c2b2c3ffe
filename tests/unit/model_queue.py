"""A worker in virtual time: the real decisions, with a queue and a model API of the tests."""

import asyncio
import json
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.unit.fake_clock import FakeClock
from tests.unit.fakes import ANSWER, a_delivery, cancel_all
from vqa_worker.messages.conversation import ImageRef
from vqa_worker.messages.result import SentImage, Usage
from worker.errors import Dependency
from worker.images.memory_budget import MemoryBudget, Reservation
from worker.images.source import ImageSource
from worker.jobs.attempt import Attempt
from worker.jobs.cancellation import CancelledJobs
from worker.jobs.delivery import Delivery
from worker.jobs.outcome import DeadLettered, Failed, Outcome, Requeued, Retried, Succeeded
from worker.jobs.outcome_builder import OutcomeBuilder
from worker.jobs.request import RequestRules
from worker.model.answer import Answer
from worker.model.request import ImageUrl, RequestBody
from worker.observability.redaction import Redactor
from worker.observability.tenants import Tenants
from worker.processor import Processor, ProcessorDependencies
from worker.resilience.concurrency_limiter import ConcurrencyLimiter
from worker.resilience.consumer_controller import ConsumerController
from worker.resilience.outage_detector import OutageDetector
from worker.resilience.outage_reports import OutageReports
from worker.resilience.retry_policy import RetryPolicy

MAX_ATTEMPTS = 3
RETRY_DELAY_S = 1
SLOTS = 8
JOB_TIMEOUT_S = 60.0
# Refusals come sooner than answers.
ANSWER_S, REFUSAL_S = 0.4, 0.1


@dataclass
class Message:
    """A job in the queue, with what the worker notes in its headers."""

    id: str
    model: str
    counted: int = 0
    malformed: int = 0
    unusable: Usage | None = None


class _Opened:
    urls: Sequence[ImageUrl] = ()
    sent: Sequence[SentImage] = ()
    converted_s = 0.0

    def mark_sent(self) -> None:
        pass


class _Images:
    """The jobs have none."""

    def check(self, refs: Sequence[ImageRef], body: bytes) -> list[ImageSource]:
        assert body
        assert not refs
        return []

    @asynccontextmanager
    async def reserve(self, images: Sequence[ImageSource]) -> AsyncIterator[Reservation]:
        async with MemoryBudget(1000).reserve(len(images)) as reservation:
            yield reservation

    @asynccontextmanager
    async def open(
        self, images: Sequence[ImageSource], reservation: Reservation, *, time_left_s: float
    ) -> AsyncIterator[_Opened]:
        assert not images
        assert isinstance(reservation, Reservation)
        assert time_left_s > 0
        yield _Opened()


class _Limiter(ConcurrencyLimiter):
    """Counts the pauses of the worker."""

    pauses = 0

    def close(self, reason: str) -> None:
        self.pauses += 1
        super().close(reason)


@dataclass
class Api:
    """Answers jobs, and fails those that `is_bad` with the same error each time.

    Attributes:
        error: the worker's error for the API's answer.
        is_bad: decides by a job's id and its model.
        calls: how often each job was sent.
    """

    error: Exception
    is_bad: Callable[[str, str], bool]
    clock: FakeClock
    calls: Counter[str] = field(default_factory=Counter)

    async def complete(self, model: str, body: RequestBody, *, time_left_s: float) -> Answer:
        assert time_left_s > 0
        sent = json.loads(b"".join([piece async for piece in body]))
        id_ = sent["messages"][0]["content"]
        self.calls[id_] += 1
        if self.is_bad(id_, model):
            await self.clock.sleep(REFUSAL_S)
            raise self.error.with_traceback(None)
        await self.clock.sleep(ANSWER_S)
        return ANSWER


class Scene:
    """A worker, its queue and its API. `run` advances the time.

    Attributes:
        ended: the outcomes of the jobs that have ended, in order.
        in_a_row: most different jobs that failed without a success in between.
    """

    def __init__(self, error: Exception, is_bad: Callable[[str, str], bool], *models: str) -> None:
        self.clock = clock = FakeClock()
        self.api = Api(error, is_bad, clock)
        self.limiter = limiter = _Limiter(SLOTS, initial=SLOTS, models=len(models), clock=clock)
        self.detector = detector = OutageDetector(
            lambda: limiter.slots_in_use, limiter.oldest_request, has_several_models=len(models) > 1
        )
        reports = OutageReports(detector, limiter, clock)
        self._processor = Processor(
            ProcessorDependencies(
                images=_Images(),
                model=self.api,
                store=None,
                limiter=limiter,
                detector=detector,
                outage_reports=reports,
                cancelled_jobs=CancelledJobs(),
                tenants=Tenants(),
                outcomes=OutcomeBuilder(Redactor(()), clock),
                rules=RequestRules(models[0], models, 10_000, 20, send_image_detail=False),
                retry=RetryPolicy(MAX_ATTEMPTS, (RETRY_DELAY_S,)),
                job_timeout_s=JOB_TIMEOUT_S,
                clock=clock,
            )
        )
        self._controller = ConsumerController(
            detector, limiter, consumer=self, jobs=self, maximum=SLOTS, clock=clock
        )
        self._usual_model = models[0]
        self._waiting: deque[Message] = deque()
        self._prefetch = SLOTS
        self._tasks: set[asyncio.Task[Outcome | None]] = set()
        self._delayed: set[asyncio.Task[None]] = set()
        self.ended: dict[str, Outcome] = {}
        self.in_a_row, self._row = 0, 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Scene"]:
        """Run the worker."""
        controller = asyncio.create_task(self._controller.run())
        try:
            yield self
            # Nobody awaits these tasks.
            for task in (controller, *self._tasks, *self._delayed):
                assert not task.done() or task.exception() is None
        finally:
            await cancel_all([controller, *self._tasks, *self._delayed])

    def put(self, ids: Iterable[str], model: str | None = None) -> None:
        """Publish jobs."""
        self._waiting.extend(Message(id_, model or self._usual_model) for id_ in ids)
        self._deliver()

    async def run(self, seconds: float, *, until: Iterable[str] = ()) -> None:
        """Advance the time, or until these jobs have ended."""
        ids, ends = {*until}, self.clock.monotonic() + seconds
        while self.clock.monotonic() < ends and not (ids and ids <= self.ended.keys()):
            await self.clock.advance(1.0)

    @property
    def is_paused(self) -> bool:
        """Whether the worker, or a model, is paused now."""
        return Dependency.MODEL in self.detector.outages or bool(self.detector.paused_models)

    @property
    def pauses(self) -> int:
        """How often the worker paused; not pauses of single models."""
        return self.limiter.pauses

    def codes(self, ids: Iterable[str]) -> Counter[str]:
        """Return how many of these jobs have ended in which way: `succeeded`, or an error code."""
        ended = [self.ended[id_] for id_ in ids if id_ in self.ended]
        return Counter(it.code if isinstance(it, Failed | DeadLettered) else it.name for it in ended)

    def attempts(self, id_: str) -> int:
        """Return the attempts in the result of a job."""
        outcome = self.ended[id_]
        assert isinstance(outcome, Succeeded | Failed | DeadLettered)
        return outcome.result.attempts

    # The consumer and the jobs of the controller.

    async def set_prefetch(self, prefetch: int) -> None:
        self._prefetch = prefetch
        self._deliver()

    async def get_one(self) -> Delivery | None:
        return self._delivery(self._waiting.popleft()) if self._waiting else None

    @property
    def unsettled(self) -> int:
        return len(self._tasks)

    def accept(self, delivery: Delivery) -> asyncio.Task[Outcome | None]:
        task = asyncio.create_task(self._process(delivery))
        self._tasks.add(task)
        task.add_done_callback(self._settled)
        return task

    def _settled(self, task: asyncio.Task[Outcome | None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self._deliver()

    def _deliver(self) -> None:
        while self._waiting and len(self._tasks) < self._prefetch:
            self.accept(self._delivery(self._waiting.popleft()))

    def _delivery(self, message: Message) -> Delivery:
        job = {
            "id": message.id,
            "model": message.model,
            "messages": [{"role": "user", "content": message.id}],
        }
        return a_delivery(
            job,
            counted_attempts=message.counted,
            malformed_answers=message.malformed,
            unusable=message.unusable,
            received_at=self.clock.monotonic(),
        )

    async def _process(self, delivery: Delivery) -> Outcome:
        attempt = Attempt.from_delivery(delivery)
        outcome = await self._processor.process(delivery, attempt)
        id_ = outcome.job_id or ""
        match outcome:
            case Requeued():
                counted = max(0, delivery.counted_attempts - outcome.restored_attempts)
                self._waiting.append(self._again(outcome, counted))
            case Retried():
                again = self._again(outcome, outcome.attempts)
                task = asyncio.create_task(self._put_later(again, outcome.delay_s))
                self._delayed.add(task)
                task.add_done_callback(self._delayed.discard)
            case _:
                assert id_ not in self.ended
                self.ended[id_] = outcome
                self._row = 0 if isinstance(outcome, Succeeded) else self._row + 1
                self.in_a_row = max(self.in_a_row, self._row)
        return outcome

    def _again(self, outcome: Requeued | Retried, counted: int) -> Message:
        return Message(
            outcome.job_id or "", outcome.model, counted, outcome.malformed_answers, outcome.unusable
        )

    async def _put_later(self, message: Message, delay_s: float) -> None:
        await self.clock.sleep(delay_s)
        self._waiting.append(message)
        self._deliver()
