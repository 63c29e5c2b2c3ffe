"""The attempt at a job: what is known about it so far."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Self, TypeAlias

from worker.jobs.delivery import Delivery
from worker.messages.job import Job
from worker.model.answer import Answer
from worker.observability import metrics

Stage: TypeAlias = Literal["decode", "wait", "fetch", "model", "diagnose", "store", "publish"]

# The stages in `vqa_stage_duration_seconds`, without `publish`, which the settlement measures.
_MEASURED: tuple[Stage, ...] = ("wait", "fetch", "model")


@dataclass(slots=True, eq=False)
class Attempt:
    """One attempt at one job. A plain record: it travels with the job and decides nothing.

    Times are in seconds of the worker's monotonic clock.

    Attributes:
        received: when the delivery arrived; `ends_at`: when it must be settled (`VQA_JOB_TIMEOUT`).
        queued_s: seconds that the message spent in the queue, where known.
        counted_before: attempts before this one, as the message counts them.
        restored_attempts: how many of those no longer count, because an outage caused them.
        job_id, allowed_model, deadline, metadata: from the job, as soon as it is decoded.
        stage: the current stage; `since`: when it began.
        seconds: time spent in each stage before the current one; `observed`: the part that is in the metrics.
        answer: the API's answer. From then on the job is paid for, and nothing may lose the answer.
        trace_id: of the message's trace, in hexadecimal.
    """

    received: float
    queued_s: float | None
    counted_before: int
    since: float
    trace_id: str | None = None
    ends_at: float = float("inf")
    restored_attempts: int = 0
    job_id: str | None = None
    allowed_model: str | None = None
    deadline: datetime | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    stage: Stage = "decode"
    seconds: dict[Stage, float] = field(default_factory=dict)
    observed: dict[Stage, float] = field(default_factory=dict)
    answer: Answer | None = None

    @classmethod
    def of(cls, delivery: Delivery) -> Self:
        """Return the attempt that begins with a delivery."""
        return cls(
            received=delivery.received,
            queued_s=delivery.queued_s,
            counted_before=delivery.attempts,
            since=delivery.received,
            trace_id=delivery.trace_id,
        )

    @property
    def number(self) -> int:
        """The number of counted attempts, this one included."""
        return self.counted_before - self.restored_attempts + 1

    @property
    def model(self) -> str:
        """The model's name as a metric label: an allowed model, or `unknown`."""
        return self.allowed_model or metrics.UNKNOWN_MODEL

    def identify(self, job: Job) -> None:
        """Take over what names the job; the job itself may hold images and is not kept."""
        self.job_id = job.id
        self.deadline = job.deadline
        self.metadata = job.metadata or {}

    def restore_attempts(self, count: int) -> None:
        """Stop counting this many of the earlier attempts."""
        self.restored_attempts = min(count, self.counted_before)

    def enter(self, stage: Stage, now: float) -> None:
        """End the current stage and begin another."""
        self.seconds[self.stage] = self.seconds_in(self.stage, now)
        self.stage, self.since = stage, now

    def move(self, source: Stage, target: Stage, seconds: float) -> None:
        """Book time of one stage, which is over, as time of another."""
        self.seconds[source] = max(0.0, self.seconds.get(source, 0.0) - seconds)
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds

    def seconds_in(self, stage: Stage, now: float) -> float:
        """Return the seconds spent in a stage so far."""
        running_s = now - self.since if stage == self.stage else 0.0
        return self.seconds.get(stage, 0.0) + running_s

    def time_left_s(self, now: float) -> float:
        """Return the seconds until the delivery must be settled."""
        return max(0.0, self.ends_at - now)

    def has_entered(self, stage: Stage) -> bool:
        """Return whether the attempt reached a stage."""
        return stage == self.stage or stage in self.seconds


def observe_stages(attempt: Attempt, now: float) -> None:
    """Record the duration of the stages since the last call in the metrics: one sample for each API call."""
    for stage in _MEASURED:
        seconds, before = attempt.seconds_in(stage, now), attempt.observed.get(stage, 0.0)
        if attempt.has_entered(stage) and (seconds > before or stage not in attempt.observed):
            metrics.series(metrics.STAGE_DURATION, stage, attempt.model).observe(seconds - before)
            attempt.observed[stage] = seconds
