"""Errors by cause: the job itself, a transient failure, a rate limit, an unavailable dependency.

Exceptions of libraries are translated into these where the library is called.
"""

from enum import StrEnum
from typing import Final, NamedTuple

from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.result import Usage

# Codes that count as failures of the service in the service level indicator. The others are the job's own
# errors and count as neither success nor failure of the service, except for NEUTRAL_FAILURES.
SERVICE_FAILURES: Final = frozenset({ErrorCode.ATTEMPTS_EXHAUSTED, ErrorCode.DEADLINE_EXCEEDED})
# Codes that are excluded from every error ratio.
NEUTRAL_FAILURES: Final = frozenset({ErrorCode.CANCELLED})

# The reason of an attempt that failed with the status 500, which APIs also answer to a job they cannot take.
HTTP_500: Final = "http_500"
# The reason of an attempt whose answer was billed, but cannot be read.
MALFORMED_RESPONSE: Final = "malformed_response"
# The reasons of attempts that look like an outage, but can be due to one job, however often it is tried.
REASONS_OF_BAD_JOBS: Final = frozenset({HTTP_500, MALFORMED_RESPONSE})


class Dependency(StrEnum):
    """A service that the worker depends on.

    The result store is also in S3, but its bucket can fail separately.
    """

    MODEL = "model"
    S3 = "s3"
    RESULT_STORE = "result_store"
    RABBITMQ = "rabbitmq"

    @property
    def label(self) -> str:
        """Its name in `vqa_dependency_up`, `/readyz` and the log."""
        return Dependency.S3.value if self is Dependency.RESULT_STORE else self.value


class Explanation(NamedTuple):
    """Why a job failed, for a person.

    Attributes:
        message: for the result; may quote the API and name the image's URL.
        log_message: for the log; only the worker's own words.
    """

    message: str
    log_message: str

    @classmethod
    def loggable(cls, text: str) -> "Explanation":
        """Return the explanation for a text of the worker's own words."""
        return cls(text, text)

    def after(self, introduction: str) -> "Explanation":
        """Return the explanation with an introduction of the worker's own words."""
        return Explanation(f"{introduction}{self.message}", f"{introduction}{self.log_message}")

    def about_image(self, name: str) -> "Explanation":
        """Return the explanation with an image's name; only its place in the job is for the log."""
        place = name.partition(" ")[0]
        return Explanation(f"{name}: {self.message}", f"{place}: {self.log_message}")


class _ExplainedError(Exception):
    """An error whose message can have words of others, which are not logged.

    Attributes:
        usage: tokens and cost of an answer of the model API that cannot be used, if it reports them.
    """

    usage: Usage | None = None

    def __init__(self, message: str, log_message: str | None) -> None:
        super().__init__(message)
        self.message = message
        self.log_message = message if log_message is None else log_message

    @property
    def explanation(self) -> Explanation:
        """Why the job failed."""
        return Explanation(self.message, self.log_message)


class JobError(_ExplainedError):
    """A permanent error of the job: a retry would fail the same way.

    Attributes:
        code: the `error.code` of the result.
        message: for a person: what is wrong, naming the image or field, and what to do.
        log_message: the same without words of the API or the job.
    """

    def __init__(self, code: ErrorCode, message: str, *, log_message: str | None = None) -> None:
        super().__init__(message, log_message)
        self.code = code


class TransientError(_ExplainedError):
    """The attempt failed and a retry may succeed; the attempt is counted.

    Attributes:
        dependency: that failed.
        reason: a short name from a closed set, used as a metric label.
        message: what happened, for a person.
        log_message: the same without words of the API or the job.
        refused: the API refuses this job, or every job: a 403, or an answer that no rule knows.
        model: only this model is concerned; empty: all.
        is_duplicate: another job reports the same failure, so this is not further evidence of an outage.
        is_likely_the_jobs: a rejection in general words, or one that no rule knows: the job's own,
            unless many jobs get it.
        cause: for an operator, if this is an outage: also with words of the API, without data of the job.
    """

    def __init__(
        self,
        dependency: Dependency,
        reason: str,
        message: str,
        *,
        log_message: str | None = None,
        refused: bool = False,
        model: str = "",
        is_duplicate: bool = False,
    ) -> None:
        super().__init__(message, log_message)
        self.dependency = dependency
        self.reason = reason
        self.is_likely_the_jobs = False
        self.cause = self.log_message
        self.refused = refused
        self.model = model
        self.is_duplicate = is_duplicate

    def without_traceback(self) -> "TransientError":
        """Return the error without its frames, which would keep the images in memory."""
        self.__context__ = None
        return self.with_traceback(None)

    def duplicate(self) -> "TransientError":
        """Return the same error for another job."""
        copy = TransientError(
            self.dependency,
            self.reason,
            self.message,
            log_message=self.log_message,
            refused=self.refused,
            model=self.model,
            is_duplicate=True,
        )
        copy.is_likely_the_jobs, copy.cause = self.is_likely_the_jobs, self.cause
        return copy


class RateLimitedError(Exception):
    """The model API takes no more requests now. The attempt is not counted.

    Attributes:
        retry_after_s: seconds to wait, if the API reports them.
        message: what the API said, for an operator; redacted.
        is_overloaded: it said that it is overloaded (503, 529), not that this account is limited (429). If
            nothing succeeds for a while, it is down.
        concerns_tier: only the service tier of the request has no capacity.
    """

    def __init__(
        self,
        retry_after_s: float | None,
        message: str = "the model API limits the rate of requests",
        *,
        is_overloaded: bool = False,
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.message = message
        self.is_overloaded = is_overloaded
        self.concerns_tier = False


class DependencyDownError(Exception):
    """A dependency is unreachable or rejects every request; the attempt is not counted.

    Attributes:
        dependency: that failed.
        message: what happened and what to do, for an operator.
        model: only this model is concerned; empty: all.
        may_be_the_jobs: only this job, or only its bucket, may be concerned: while others succeed, it is.
        is_duplicate: another job reports the same failure, so this is not further evidence of an outage.
    """

    def __init__(
        self,
        dependency: Dependency,
        message: str,
        *,
        model: str = "",
        may_be_the_jobs: bool = False,
        is_duplicate: bool = False,
    ) -> None:
        super().__init__(message)
        self.dependency = dependency
        self.message = message
        self.model = model
        self.may_be_the_jobs = may_be_the_jobs
        self.is_duplicate = is_duplicate

    def duplicate(self) -> "DependencyDownError":
        """Return the same error for another job."""
        return DependencyDownError(
            self.dependency,
            self.message,
            model=self.model,
            may_be_the_jobs=self.may_be_the_jobs,
            is_duplicate=True,
        )


class UnwrittenResultError(Exception):
    """A large result could not be written to S3; the message gives S3's reason, for an operator."""


class NotAdmittedError(Exception):
    """The job was not admitted: the worker is paused, stopping or busy; another one can take the job."""
