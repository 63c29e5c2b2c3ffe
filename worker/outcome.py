"""What a job became: a closed set of values, matched in the one place that settles deliveries."""

from dataclasses import dataclass

from worker.errors import ErrorCode
from worker.result import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What every outcome knows: the job's id, if it was read, and the model as a metric's label."""

    job_id: str | None
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered(_Outcome):
    """The model answered."""

    result: Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused(_Outcome):
    """The job failed for good, and its publisher is told."""

    result: Result
    code: ErrorCode


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter(_Outcome):
    """The job failed for good and is kept; its publisher is told, where there is somebody to tell."""

    result: Result
    code: ErrorCode
    message: str
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry(_Outcome):
    """The attempt failed; the broker holds the job for `delay_s` whole seconds. So many attempts count."""

    delay_s: int
    attempts: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveBack(_Outcome):
    """Not now and not here: the job goes back as it was, and nothing is counted.

    `refunded` of its attempts so far were an outage's, and do not count either.
    """

    reason: str
    refunded: int = 0


Outcome = Answered | Refused | DeadLetter | Retry | GiveBack
