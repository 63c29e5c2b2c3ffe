"""What can go wrong with a job, sorted by whose fault it is and what follows from it.

Exceptions of libraries are translated into these where the library is called, and nowhere else.
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


# For docs/messages.md: when a code occurs, and what follows beside a failed result.
MEANING: Final[Mapping[ErrorCode, str]] = {
    ErrorCode.INVALID_JOB: "The message is not a job: no strict JSON, a wrong or unknown field, no id, a"
    " model that is not allowed, control characters in an object key, or a body over `VQA_MAX_JOB_BYTES`. If"
    " the body's own id could not be read, a copy goes to the dead-letter queue; there is then a result only"
    " if the message has a `message_id`, a `reply_to` or a `correlation_id`.",
    ErrorCode.IMAGE_NOT_FOUND: "S3 has no such object. (It only says so to those who may list the bucket;"
    " to others the object is forbidden.)",
    ErrorCode.IMAGE_FORBIDDEN: "S3 denies the worker access to this object.",
    ErrorCode.IMAGE_SOURCE_NOT_ALLOWED: "The bucket is not among `VQA_ALLOWED_BUCKETS`, the link's host not"
    " among `VQA_ALLOWED_LINK_HOSTS`, or the URL is of another kind, `http://` included.",
    ErrorCode.IMAGE_TOO_LARGE: "The image has more than `VQA_MAX_IMAGE_BYTES`.",
    ErrorCode.IMAGE_UNSUPPORTED_TYPE: "The content is not JPEG, PNG or WebP. With `VQA_IMAGE_DELIVERY=link`"
    " the worker sees no content, and leaves this and the size of S3 images to the API.",
    ErrorCode.IMAGE_CORRUPT: "The image is empty, or its base64 cannot be decoded.",
    ErrorCode.TOO_MANY_IMAGES: "The job has more images than `VQA_MAX_IMAGES_PER_JOB`.",
    ErrorCode.MODEL_REJECTED: "The API refuses this request for good (400, 413, 422, its content policy; 403"
    " for this job while others succeed). The message has the API's own words.",
    ErrorCode.EMPTY_ANSWER: "The API answered with neither text nor a tool call: the token limit was spent on"
    " reasoning, or a content filter left nothing. It was paid for and is not tried again; the result has"
    " `finish_reason` and `usage`.",
    ErrorCode.DEADLINE_EXCEEDED: "The job's `deadline` passed before the API was called, or comes before the"
    " next attempt could be made.",
    ErrorCode.ATTEMPTS_EXHAUSTED: "A fault that could have passed (a time-out, a broken connection, a 5xx"
    " answer) outlived `VQA_MAX_ATTEMPTS`, or the job was delivered more than `VQA_DELIVERY_LIMIT` times"
    " without coming to an end. The job goes to the dead-letter queue too.",
    ErrorCode.RESULT_TOO_LARGE: "The result is larger than the broker takes a message (its"
    " `max_message_size`). The answer was paid for, and is lost: `usage` says what it cost.",
    ErrorCode.CANCELLED: "Somebody cancelled the job. A call that was running may have been paid for.",
}

# For the service level: what a failure with each code says about the service. A job that would fail just as
# well if everything here and behind it were perfect says nothing.
COUNTS_AGAINST_THE_SERVICE: Final = frozenset({ErrorCode.ATTEMPTS_EXHAUSTED, ErrorCode.DEADLINE_EXCEEDED})
# Nobody's fault.
COUNTS_FOR_NOTHING: Final = frozenset({ErrorCode.CANCELLED})


class Dependency(StrEnum):
    """What the worker needs from outside.

    The result store is S3 too, and yet one can fail while the other, in another bucket, is well.
    """

    MODEL = "model"
    S3 = "s3"
    RESULT_STORE = "result_store"
    RABBITMQ = "rabbitmq"

    @property
    def label(self) -> str:
        """What it goes by in `vqa_dependency_up`, in `/readyz` and in the log."""
        return Dependency.S3.value if self is Dependency.RESULT_STORE else self.value


class JobError(Exception):
    """The job itself is at fault: trying again would end the same way.

    Attributes:
        code: what the result's `error.code` says.
        message: for a person: what was wrong, naming the image or the field, and what to do.
    """

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class TransientError(Exception):
    """This attempt failed and another may succeed; the attempt is counted.

    Attributes:
        dependency: which one failed.
        reason: a short name out of a closed set, fit for a metric's label.
        message: what happened, for a person.
        forbidden: the API answered 403, which can be about this job or about everybody.
        is_echo: another job has met the very same fault, so that it is no further sign of an outage.
    """

    def __init__(
        self,
        dependency: Dependency,
        reason: str,
        message: str,
        *,
        forbidden: bool = False,
        is_echo: bool = False,
    ) -> None:
        super().__init__(message)
        self.dependency = dependency
        self.reason = reason
        self.message = message
        self.forbidden = forbidden
        self.is_echo = is_echo

    def let_go(self) -> "TransientError":
        """The error without the frames that it came through, which hold on to the images."""
        self.__context__ = None
        return self.with_traceback(None)

    def echo(self) -> "TransientError":
        """The same for another job."""
        return TransientError(self.dependency, self.reason, self.message, is_echo=True)


class RateLimitedError(Exception):
    """The API answered 429. The attempt is not counted.

    Attributes:
        retry_after_s: seconds the API asks to wait, where it says so.
    """

    def __init__(self, retry_after_s: float | None) -> None:
        super().__init__("the model API limits the rate of requests")
        self.retry_after_s = retry_after_s


class DependencyDownError(Exception):
    """A dependency is out of reach or refuses everybody: no fault of the job, no attempt counted.

    Attributes:
        dependency: which one.
        message: what happened and what to do, for the person on call.
        may_be_partial: it can be that of one bucket, or one model, alone.
        is_echo: another job has met the very same fault, so that it is no further sign of an outage.
    """

    def __init__(
        self, dependency: Dependency, message: str, *, may_be_partial: bool = False, is_echo: bool = False
    ) -> None:
        super().__init__(message)
        self.dependency = dependency
        self.message = message
        self.may_be_partial = may_be_partial
        self.is_echo = is_echo

    def echo(self) -> "DependencyDownError":
        """The same for another job."""
        return DependencyDownError(
            self.dependency, self.message, may_be_partial=self.may_be_partial, is_echo=True
        )
