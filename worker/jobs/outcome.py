"""The outcome of a job: a closed set of values, matched exhaustively by the settlement."""

from dataclasses import dataclass
from typing import ClassVar

from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.result import Result, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What every outcome has: the job's id, if known, and the model as a metric label."""

    # In log lines and spans.
    name: ClassVar[str]

    job_id: str | None
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Succeeded(_Outcome):
    """The model answered; the result has the answer.

    Attributes:
        if_unwritten: the outcome instead, if the result is too large for a message and cannot be written to
            S3. None: the answer is not in the result store, so the job would be billed again.
    """

    name: ClassVar[str] = "succeeded"

    result: Result
    if_unwritten: "Requeued | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(_Outcome):
    """The job failed permanently; the result has the error.

    Attributes:
        reason: why, for the log: the message of the error without words of the API or the job.
        if_unwritten: as in `Succeeded`.
    """

    name: ClassVar[str] = "failed"

    result: Result
    code: ErrorCode
    reason: str
    if_unwritten: "Requeued | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLettered(_Outcome):
    """The job failed permanently and is dead-lettered; its result is published if it has a recipient.

    Attributes:
        message: the message of the error; `reason`: the same for the log, as in `Failed`.
    """

    name: ClassVar[str] = "dead_lettered"

    result: Result
    code: ErrorCode
    message: str
    reason: str
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried(_Outcome):
    """The attempt failed; the broker holds the job for `delay_s` whole seconds.

    Attributes:
        attempts: the number of attempts that count; `malformed_answers`: those billed for an answer that
            cannot be read; `unusable`: their usage, as far as the API reported it.
    """

    name: ClassVar[str] = "retried"

    delay_s: int
    attempts: int
    reason: str
    malformed_answers: int = 0
    unusable: Usage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Requeued(_Outcome):
    """The job returns to the queue, and this attempt does not count.

    Attributes:
        restored_attempts: earlier attempts that an outage caused and that no longer count.
        malformed_answers, unusable: as in `Retried`, this attempt's included if its answer was billed.
    """

    name: ClassVar[str] = "requeued"

    reason: str
    restored_attempts: int = 0
    malformed_answers: int = 0
    unusable: Usage | None = None


Outcome = Succeeded | Failed | DeadLettered | Retried | Requeued
