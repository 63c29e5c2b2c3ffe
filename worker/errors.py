"""What can go wrong with a job, sorted by whose fault it is and what follows from it.

Exceptions of libraries are translated into these where the library is called, and nowhere else.
"""

from enum import StrEnum


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


class Dependency(StrEnum):
    """What the worker needs from outside; the label values of `vqa_dependency_up`."""

    MODEL = "model"
    S3 = "s3"
    RABBITMQ = "rabbitmq"


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
    """

    def __init__(self, dependency: Dependency, reason: str, message: str, *, forbidden: bool = False) -> None:
        super().__init__(message)
        self.dependency = dependency
        self.reason = reason
        self.message = message
        self.forbidden = forbidden


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
    """

    def __init__(self, dependency: Dependency, message: str) -> None:
        super().__init__(message)
        self.dependency = dependency
        self.message = message
