"""The result: what the worker publishes for a job."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from worker.errors import ErrorCode
from worker.messages.serialization import to_json


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Usage(_Part):
    """Tokens as the API counted them, and what they cost."""

    prompt_tokens: int = Field(ge=0, description="Of the question; the images' are among them.")
    completion_tokens: int = Field(ge=0, description="Of the answer.")
    total_tokens: int = Field(ge=0, description="Both together.")
    cost_usd: float | None = Field(
        default=None, description="The provider's own figure, else from `VQA_PRICES`, else null."
    )


class Timings(_Part):
    """Seconds. Null where there was nothing to measure."""

    queued_s: float | None = Field(default=None, description="From the message's timestamp to its delivery.")
    fetch_s: float | None = Field(
        default=None, description="Loading the images, all attempts of this delivery."
    )
    model_s: float | None = Field(
        default=None, description="Waiting for the API, all attempts of this delivery."
    )
    total_s: float = Field(default=0.0, description="From the delivery to this result.")


class JobFailure(_Part):
    """Why there is no answer."""

    code: ErrorCode = Field(description="Readers must accept codes that they don't know.")
    message: str = Field(description="For a person: what was wrong, naming the image or the field.")
    retryable: bool = Field(description="Whether the same job, submitted again later, could succeed.")


class Result(_Part):
    """The body of a message on the reply queue."""

    id: str | None = Field(description="The job's id; null where it could not be read.")
    status: Literal["succeeded", "failed"] = Field(description="Whether there is an answer.")
    answer: str | None = Field(
        default=None, description="Null on failure, and where the model only called tools."
    )
    model: str | None = Field(
        default=None, description="The model that was asked; null if the job was unreadable."
    )
    finish_reason: str | None = Field(default=None, description="The API's word for why the answer ends.")
    usage: Usage | None = Field(
        default=None, description="Given whenever the API reported it, on failure too."
    )
    timings: Timings = Timings()
    attempts: int = Field(default=1, ge=1, description="This one included.")
    metadata: dict[str, Any] = Field(
        default={}, description="The job's own, unchanged; empty where it has none."
    )
    error: JobFailure | None = None
    response: dict[str, Any] | None = Field(
        default=None,
        description="The API's whole response body, where the answer is more than plain text "
        "or `VQA_INCLUDE_RESPONSE=true`.",
    )

    def to_body(self) -> bytes:
        """The message's body: JSON in UTF-8."""
        return to_json(self.model_dump())
