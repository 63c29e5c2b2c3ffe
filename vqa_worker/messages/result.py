"""The result of a job, as a message on the reply queue."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.serialization import to_json


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _is_none(value: object) -> bool:
    return value is None


class Usage(_Part):
    """Token counts of the model API, and the cost. Null: the API does not report it, or not as a number."""

    prompt_tokens: int | None = Field(
        default=None, ge=0, description="Tokens of the request, images included; null if unknown."
    )
    completion_tokens: int | None = Field(
        default=None, ge=0, description="Tokens of the answer; null if unknown."
    )
    total_tokens: int | None = Field(
        default=None, ge=0, description="Prompt and completion tokens; null if unknown."
    )
    cost_usd: float | None = Field(
        default=None, description="As reported by the provider, else computed from `VQA_PRICES`, else null."
    )
    cached_tokens: int | None = Field(
        default=None,
        ge=0,
        exclude_if=_is_none,
        description="Prompt tokens that the provider had in its cache. Only present if the API reports it.",
    )
    reasoning_tokens: int | None = Field(
        default=None,
        ge=0,
        exclude_if=_is_none,
        description="Tokens of the model's reasoning. Only present if the API reports it.",
    )

    def __add__(self, other: "Usage") -> "Usage":
        """Return the usage of both requests; what is unknown of one is unknown of both."""
        known = {name: value for name, value in self.model_dump().items() if value is not None}
        others = {name: value for name, value in other.model_dump().items() if value is not None}
        return Usage(**{name: known[name] + others[name] for name in known.keys() & others.keys()})


class SentImage(_Part):
    """An image as it was sent to the model API."""

    url: str = Field(description="As in the job; of a data URL only the beginning.")
    page: int | None = Field(default=None, description="Page of a PDF or TIFF, from 1; else null.")
    source_type: str = Field(description="Media type of the content, such as `image/heic`.")
    source_bytes: int = Field(description="Size of the content.")
    sent_type: str = Field(description="Media type of what was sent.")
    sent_bytes: int = Field(description="Size of what was sent, before base64.")
    width: int | None = Field(default=None, description="In pixels, as sent; null if unknown.")
    height: int | None = Field(default=None, description="In pixels, as sent; null if unknown.")


class Timings(_Part):
    """Durations in seconds. Null if not measured."""

    queued_s: float | None = Field(default=None, description="From the message's timestamp to its delivery.")
    fetch_s: float | None = Field(
        default=None, description="Loading and converting the images, in all attempts of this delivery."
    )
    model_s: float | None = Field(
        default=None, description="Waiting for the model API, in all attempts of this delivery."
    )
    total_s: float = Field(default=0.0, description="From the delivery to this result.")


class JobFailure(_Part):
    """Why the job failed."""

    code: ErrorCode = Field(description="Error code. Consumers must accept unknown codes.")
    message: str = Field(description="Human-readable: what was wrong, naming the image or field.")
    retryable: bool = Field(description="Whether the same job could succeed if submitted again later.")


class Result(_Part):
    """The body of a message on the reply queue."""

    id: str | None = Field(description="The job's id; null if it could not be read.")
    status: Literal["succeeded", "failed"] = Field(description="Whether the job succeeded.")
    answer: str | None = Field(
        default=None,
        description="The text of the answer. Null on failure, and if the model only called tools.",
    )
    model: str | None = Field(
        default=None, description="The requested model; null if the job was unreadable."
    )
    finish_reason: str | None = Field(
        default=None, description="Why the answer ended, as reported by the model API."
    )
    usage: Usage | None = Field(
        default=None,
        description="Present if the model API reported it, also on failure. The sum of all answers to the"
        " job, those that could not be used included.",
    )
    timings: Timings = Timings()
    attempts: int = Field(default=1, ge=1, description="Number of attempts, this one included.")
    metadata: dict[str, Any] = Field(
        default={}, description="The job's `metadata`, unchanged; empty if it has none."
    )
    error: JobFailure | None = None
    response: dict[str, Any] | None = Field(
        default=None,
        description="The whole response body of the model API, if the answer is more than plain text or does"
        " not satisfy the job's JSON schema, or with `VQA_INCLUDE_RESPONSE=true`.",
    )
    images: list[SentImage] | None = Field(
        default=None,
        description="What was sent for each image that the worker read, in order, pages one by one; null if"
        " no request was sent, or all images were sent as links.",
    )
    parsed: Any = Field(
        default=None,
        description="The value of an answer to `response_format: json_schema`, which satisfies the schema."
        " Null for other jobs, on failure, and with `VQA_SCHEMA_REPAIRS=off`.",
    )
    provider: str | None = Field(default=None, description="The provider that answered; null if none did.")
    answered_model: str | None = Field(
        default=None,
        description="The model that answered, as reported by the API. Providers forward retired names.",
    )
    service_tier: str | None = Field(
        default=None, description="The service tier of the answer, as reported by the API."
    )
    result_url: str | None = Field(
        default=None,
        description="`s3://bucket/key` of the whole result, if it is too large for a message"
        " (`VQA_LARGE_RESULTS`): an object with the same JSON. `answer`, `parsed` and `response` are null"
        " here.",
    )

    def to_body(self) -> bytes:
        """Return the body of the message: JSON in UTF-8."""
        return to_json(self.model_dump())
