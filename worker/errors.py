"""Errors by cause: the job itself, a transient failure, a rate limit, an unavailable dependency.

Exceptions of libraries are translated into these where the library is called.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class ErrorCode(StrEnum):
    """The codes of `error.code` in a result. Readers must accept codes they don't know."""

    INVALID_JOB = "invalid_job"
    IMAGE_NOT_FOUND = "image_not_found"
    IMAGE_FORBIDDEN = "image_forbidden"
    IMAGE_SOURCE_NOT_ALLOWED = "image_source_not_allowed"
    IMAGE_TOO_LARGE = "image_too_large"
    IMAGE_UNSUPPORTED_TYPE = "image_unsupported_type"
    IMAGE_CORRUPT = "image_corrupt"
    TOO_MANY_IMAGES = "too_many_images"
    MODEL_REJECTED = "model_rejected"
    EMPTY_ANSWER = "empty_answer"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    CANCELLED = "cancelled"
    RESULT_TOO_LARGE = "result_too_large"


# For docs/messages.md: when a code occurs, and what happens in addition to the failed result.
DESCRIPTIONS: Final[Mapping[ErrorCode, str]] = {
    ErrorCode.INVALID_JOB: "The message is not a valid job: not strict JSON, an invalid or unknown field, no"
    " id, a model that is not allowed, control characters in an object key, too many JSON values, more than 1"
    " MB apart from data URLs, or a body larger than `VQA_MAX_JOB_BYTES`. If the body has no readable id, a"
    " copy goes to the dead-letter queue; a result is then published only if the message has a `message_id`,"
    " a `reply_to` or a `correlation_id`.",
    ErrorCode.IMAGE_NOT_FOUND: "S3 has no such object. (Without permission to list the bucket, S3 reports a"
    " missing object as forbidden.)",
    ErrorCode.IMAGE_FORBIDDEN: "S3 denies the worker access to this object.",
    ErrorCode.IMAGE_SOURCE_NOT_ALLOWED: "The bucket is not in `VQA_ALLOWED_BUCKETS`, the link's host is not"
    " in `VQA_ALLOWED_LINK_HOSTS`, or the URL has another scheme, `http://` included.",
    ErrorCode.IMAGE_TOO_LARGE: "The image is larger than `VQA_MAX_IMAGE_BYTES`.",
    ErrorCode.IMAGE_UNSUPPORTED_TYPE: "The content is not JPEG, PNG or WebP. With `VQA_IMAGE_DELIVERY=link`"
    " the model API checks the type and size of S3 images, not the worker.",
    ErrorCode.IMAGE_CORRUPT: "The image is empty, or its base64 is invalid.",
    ErrorCode.TOO_MANY_IMAGES: "The job has more images than `VQA_MAX_IMAGES_PER_JOB`.",
    ErrorCode.MODEL_REJECTED: "The model API rejects this request permanently (400, 413, 422, its content"
    " policy; 403 for this job while others succeed). The message contains the error message of the API.",
    ErrorCode.EMPTY_ANSWER: "The model API returned neither text nor a tool call: the token limit was spent"
    " on reasoning, or a content filter removed the text. The request was billed and is not retried; the"
    " result has `finish_reason` and `usage`.",
    ErrorCode.DEADLINE_EXCEEDED: "The job's `deadline` passed before the model request, or is earlier than"
    " the next attempt.",
    ErrorCode.ATTEMPTS_EXHAUSTED: "Transient errors (a timeout, a lost connection, a 5xx response) exceeded"
    " `VQA_MAX_ATTEMPTS`, or the job was delivered more than `VQA_DELIVERY_LIMIT` times without an outcome."
    " The job also goes to the dead-letter queue.",
    ErrorCode.RESULT_TOO_LARGE: "The result is larger than the broker's `max_message_size`. The request was"
    " billed and the answer is lost; `usage` has its cost.",
    ErrorCode.CANCELLED: "The job was cancelled. A running model request may have been billed.",
}

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
