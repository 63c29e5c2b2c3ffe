"""Errors by cause: the job itself, a transient failure, a rate limit, an unavailable dependency.

Exceptions of libraries are translated into these where the library is called.
"""

from enum import StrEnum
from typing import Final

from vqa_worker.messages.error_codes import ErrorCode

# Codes that count as failures of the service in the service level indicator. The others are the job's own
# errors and count as neither success nor failure of the service, except for NEUTRAL_FAILURES.
SERVICE_FAILURES: Final = frozenset({ErrorCode.ATTEMPTS_EXHAUSTED, ErrorCode.DEADLINE_EXCEEDED})
# Codes that are excluded from every error ratio.
NEUTRAL_FAILURES: Final = frozenset({ErrorCode.CANCELLED})


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


class JobError(Exception):
    """A permanent error of the job: a retry would fail the same way.

    Attributes:
        code: the `error.code` of the result.
        message: for a person: what is wrong, naming the image or field, and what to do.
    """

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class TransientError(Exception):
    """The attempt failed and a retry may succeed; the attempt is counted.

    Attributes:
        dependency: that failed.
        reason: a short name from a closed set, used as a metric label.
        message: what happened, for a person.
        forbidden: the API answered 403, for this job or for all.
        is_duplicate: another job reports the same failure, so this is not further evidence of an outage.
    """

    def __init__(
        self,
        dependency: Dependency,
        reason: str,
        message: str,
        *,
        forbidden: bool = False,
        is_duplicate: bool = False,
    ) -> None:
        super().__init__(message)
        self.dependency = dependency
        self.reason = reason
        self.message = message
        self.forbidden = forbidden
        self.is_duplicate = is_duplicate

    def without_traceback(self) -> "TransientError":
        """Return the error without its frames, which would keep the images in memory."""
        self.__context__ = None
        return self.with_traceback(None)

    def duplicate(self) -> "TransientError":
        """Return the same error for another job."""
        return TransientError(self.dependency, self.reason, self.message, is_duplicate=True)


class RateLimitedError(Exception):
    """The model API answered 429. The attempt is not counted.

    Attributes:
        retry_after_s: seconds to wait, if the API reports them.
    """

    def __init__(self, retry_after_s: float | None) -> None:
        super().__init__("the model API limits the rate of requests")
        self.retry_after_s = retry_after_s


class DependencyDownError(Exception):
    """A dependency is unreachable or rejects every request; the attempt is not counted.

    Attributes:
        dependency: that failed.
        message: what happened and what to do, for an operator.
        may_be_partial: only one bucket or model may be affected.
        is_duplicate: another job reports the same failure, so this is not further evidence of an outage.
    """

    def __init__(
        self,
        dependency: Dependency,
        message: str,
        *,
        may_be_partial: bool = False,
        is_duplicate: bool = False,
    ) -> None:
        super().__init__(message)
        self.dependency = dependency
        self.message = message
        self.may_be_partial = may_be_partial
        self.is_duplicate = is_duplicate

    def duplicate(self) -> "DependencyDownError":
        """Return the same error for another job."""
        return DependencyDownError(
            self.dependency, self.message, may_be_partial=self.may_be_partial, is_duplicate=True
        )
