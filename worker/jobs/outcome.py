"""What a job became: a closed set of values, matched in the one place that settles deliveries."""

from dataclasses import dataclass
from typing import ClassVar

from worker.errors import ErrorCode
from worker.messages.result import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What every outcome knows: the job's id, if it was read, and the model as a metric's label."""

    # As log lines and spans name the outcome.
    name: ClassVar[str]

    job_id: str | None
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Succeeded(_Outcome):
    """The model answered."""

    name: ClassVar[str] = "succeeded"

    result: Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(_Outcome):
    """The job failed for good, and its publisher is told."""

    name: ClassVar[str] = "failed"

    result: Result
    code: ErrorCode


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLettered(_Outcome):
    """The job failed for good and is kept; its publisher is told, where there is somebody to tell."""

    name: ClassVar[str] = "dead_lettered"

    result: Result
    code: ErrorCode
    message: str
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried(_Outcome):
    """The attempt failed; the broker holds the job for `delay_s` whole seconds. So many attempts count."""

    name: ClassVar[str] = "retried"

    delay_s: int
    attempts: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Requeued(_Outcome):
    """The job returns to the queue, and this attempt is not counted.

    Attributes:
        restored_attempts: earlier attempts that an outage caused and that no longer count.
    """

    name: ClassVar[str] = "requeued"

    reason: str
    restored_attempts: int = 0


Outcome = Succeeded | Failed | DeadLettered | Retried | Requeued
