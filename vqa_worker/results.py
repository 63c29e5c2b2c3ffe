"""Results as the client returns them."""

from typing import Self

from pydantic import Field

from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.result import JobFailure
from vqa_worker.messages.result import Result as _Result


class JobFailedError(Exception):
    """The job failed, see `Result.raise_for_error`.

    Attributes:
        code: the `error.code` of the result.
        message: what was wrong, for a person.
        retryable: whether the same job could succeed if submitted again later.
        result: the whole result, for example for its `usage`.
    """

    def __init__(self, result: "Result", error: "Failure") -> None:
        super().__init__(result, error)
        self.result = result
        self.code = error.code
        self.message = error.message
        self.retryable = error.retryable

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class Failure(JobFailure):
    """Why there is no answer."""

    # A newer worker can have codes that this client does not know.
    code: ErrorCode | str = Field(union_mode="left_to_right")  # type: ignore[assignment]  # wider on purpose


class Result(_Result):
    """A job's result: an `answer` or an `error`. Unknown fields of a newer worker are dropped."""

    error: Failure | None = None

    @property
    def succeeded(self) -> bool:
        """Whether there is an answer (None where the model only called tools: see `response`)."""
        return self.status == "succeeded"

    def raise_for_error(self) -> Self:
        """Return this result if the job succeeded.

        Raises:
            JobFailedError: the job failed.
        """
        if self.error is not None:
            raise JobFailedError(self, self.error)
        return self
