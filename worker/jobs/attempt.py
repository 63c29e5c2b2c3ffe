"""One attempt at a job: ids, stage timings and the answer."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Self, TypeAlias

from vqa_worker.messages.job import Job
from vqa_worker.messages.result import SentImage, Usage
from worker.jobs.delivery import Delivery
from worker.model.answer import Answer
from worker.observability import metrics

Stage: TypeAlias = Literal["decode", "wait", "fetch", "convert", "model", "diagnose", "store", "publish"]

# The stages in `vqa_stage_duration_seconds`, without `publish`, which the settlement measures.
_MEASURED: tuple[Stage, ...] = ("wait", "fetch", "convert", "model")


@dataclass(slots=True, eq=False)
class Attempt:
    """Plain record of one attempt. Times are in seconds of the worker's monotonic clock.

    Attributes:
        received_at: when the delivery arrived; `ends_at`: when it must be settled (`VQA_JOB_TIMEOUT`).
        queued_s: seconds in the queue, where known; `trace_id`: of the message's trace, in hexadecimal.
        counted_before: counted attempts before this one, from the header `vqa-attempts`.
        malformed_before: how many of those were billed for an answer that cannot be read.
        restored_attempts: how many of those no longer count, because an outage caused them.
        job_id, allowed_model, deadline, metadata: from the job, as soon as it is decoded.
        stage: the current stage; `stage_started_at`: when it began.
        seconds: time spent in each stage before the current one; `observed`: the part that is in the metrics.
        unusable: usage of the model's answers that could not be used, of all attempts, if it was reported.
        has_bought_malformed: whether this attempt's answer cannot be read, and the API reported its usage.
        images: what the last request sent of the images that the worker reads; None: nothing yet.
        answer: the model's answer. From then on the request is billed, and the answer must not be lost.
        draft: the answer that is being repaired, because it does not satisfy the job's JSON schema.
        can_resume: whether the result store has the draft, so that any worker can go on with it.
        is_stored: whether the result store has the answer, so that no worker pays for it again.
    """

    received_at: float
    queued_s: float | None
    counted_before: int
    stage_started_at: float
    trace_id: str | None = None
    ends_at: float = float("inf")
    malformed_before: int = 0
    restored_attempts: int = 0
    job_id: str | None = None
    allowed_model: str | None = None
    deadline: datetime | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    stage: Stage = "decode"
    seconds: dict[Stage, float] = field(default_factory=dict)
    observed: dict[Stage, float] = field(default_factory=dict)
    unusable: Usage | None = None
    has_bought_malformed: bool = False
    images: list[SentImage] | None = None
    answer: Answer | None = None
    draft: Answer | None = None
    can_resume: bool = False
    is_stored: bool = False

    @classmethod
    def from_delivery(cls, delivery: Delivery) -> Self:
        """Return the attempt that begins with a delivery."""
        return cls(
            received_at=delivery.received_at,
            queued_s=delivery.queued_s,
            counted_before=delivery.counted_attempts,
            stage_started_at=delivery.received_at,
            trace_id=delivery.trace_id,
            malformed_before=delivery.malformed_answers,
            unusable=delivery.unusable,
        )

    @property
    def number(self) -> int:
        """The number of this attempt: counted attempts so far, plus one."""
        return self.counted_before - self.restored_attempts + 1

    @property
    def billed_malformed(self) -> int:
        """How many answers that cannot be read were billed so far, this attempt's included."""
        return self.malformed_before + self.has_bought_malformed

    @property
    def model(self) -> str:
        """The model's name as a metric label: an allowed model, or `unknown`."""
        return self.allowed_model or metrics.UNKNOWN_MODEL

    @property
    def decoded_job_id(self) -> str:
        """The job's id, which every decoded job has."""
        assert self.job_id is not None  # noqa: S101 - for the type checker
        return self.job_id

    def set_job(self, job: Job) -> None:
        """Set the attempt's job id, deadline and metadata."""
        self.job_id, self.deadline, self.metadata = job.id, job.deadline, job.metadata or {}

    def restore_attempts(self, count: int) -> None:
        """Stop counting this many of the earlier attempts."""
        self.restored_attempts = min(count, self.counted_before)

    def enter(self, stage: Stage, now: float) -> None:
        """End the current stage and begin another."""
        self.seconds[self.stage] = self.seconds_in(self.stage, now)
        self.stage, self.stage_started_at = stage, now

    def reassign(self, source: Stage, target: Stage, seconds: float) -> None:
        """Move recorded time from one stage to another."""
        self.seconds[source] = max(0.0, self.seconds.get(source, 0.0) - seconds)
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds

    def seconds_in(self, stage: Stage, now: float) -> float:
        """Return the seconds spent in a stage so far."""
        return self.seconds.get(stage, 0.0) + (now - self.stage_started_at if stage == self.stage else 0.0)

    def time_left_s(self, now: float) -> float:
        """Return the seconds until the delivery must be settled."""
        return max(0.0, self.ends_at - now)

    def has_entered(self, stage: Stage) -> bool:
        """Return whether the attempt reached a stage."""
        return stage == self.stage or stage in self.seconds


def observe_stages(attempt: Attempt, now: float) -> None:
    """Record the stages since the last call in the metrics: one sample for each model request."""
    for stage in _MEASURED:
        seconds, before = attempt.seconds_in(stage, now), attempt.observed.get(stage, 0.0)
        if attempt.has_entered(stage) and (seconds > before or stage not in attempt.observed):
            metrics.series(metrics.STAGE_DURATION, stage, attempt.model).observe(seconds - before)
            attempt.observed[stage] = seconds
