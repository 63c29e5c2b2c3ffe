"""The job, as a message on the jobs queue.

A job has a short form (`question` and `images`) or a long form (`messages`); `Conversation` renders both.
"""

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    field_validator,
    model_validator,
)

from vqa_worker.messages.limits import text_chars
from vqa_worker.messages.serialization import to_json
from vqa_worker.messages.validation_errors import MAX_REPORTED_ERRORS, shorten

MAX_ID_CHARS = 256
MAX_METADATA_BYTES = 16 * 1024
# The worker sets these itself: they decide what is billed and how the response is read.
RESERVED_PARAMS = frozenset({"model", "messages", "stream", "n"})
MAX_DEADLINE_CHARS = 64
# Amazon S3 user guide, "How S3 Versioning works": version IDs are at most 1,024 bytes.
MAX_VERSION_ID_CHARS = 1024

# Of `image_max_edge` and `max_edge`, in pixels.
MIN_EDGE, MAX_EDGE = 64, 16_384
MAX_PAGES_CHARS = 200
# Larger numbers are typing errors.
MAX_PAGE = 100_000

# Providers cache common prefixes of requests: the images of a document, or the same question.
PromptOrder: TypeAlias = Literal["images_first", "question_first"]

# An approximation of "printable" that regular expressions of every language understand.
_ID_PATTERN = r"^[^\u0000-\u001f\u007f-\u009f]*$"
_VERSION_ID = re.compile(rf"[!-~]{{1,{MAX_VERSION_ID_CHARS}}}")
_PAGES = re.compile(r"[0-9]{1,6}(-[0-9]{1,6})?(,[0-9]{1,6}(-[0-9]{1,6})?)*")
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:[0-5]\d)", re.ASCII)


def valid_id(value: object) -> str | None:
    """Return `value` if it is a valid job id (1 to 256 printable characters), else None."""
    if isinstance(value, str) and 0 < len(value) <= MAX_ID_CHARS and value.isprintable():
        return value
    return None


def _check_id(value: object) -> object:
    if value is not None and valid_id(value) is None:
        raise ValueError(f"must be a string of 1 to {MAX_ID_CHARS} printable characters")
    return value


def parse_deadline(value: object) -> datetime | None:
    """Parse the deadline of a job, an RFC 3339 time; return it in UTC.

    Raises:
        ValueError: it is not such a time; the message says why.
    """
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_DEADLINE_CHARS or not _RFC3339.fullmatch(value):
        raise ValueError("must be an RFC 3339 time with an offset, such as 2030-01-31T12:00:00Z")
    text = value.upper().replace(" ", "T")
    if text[17:19] == "60":
        # Python does not support leap seconds (RFC 3339 §5.7); use the second before.
        text = f"{text[:17]}59{text[19:]}"
    try:
        # Near the years 1 and 9999 the same time in UTC can be out of range.
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("is not a valid time") from None


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few_unknown_fields(cls, value: object) -> object:
        """Report the first of many unknown fields; pydantic would report each one."""
        unknown = [name for name in value if name not in cls.model_fields] if isinstance(value, dict) else []
        more = len(unknown) - MAX_REPORTED_ERRORS
        if more > 0:
            first = "; ".join(f"{shorten(name)}: unknown field" for name in unknown[:MAX_REPORTED_ERRORS])
            raise ValueError(f"{first}; and {more} more")
        return value


class _Open(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="allow")


_DETAIL = "Dropped unless `VQA_SEND_IMAGE_DETAIL=true` or the provider profile sends it."


def _check_version_id(value: str | None) -> str | None:
    if value is not None and not _VERSION_ID.fullmatch(value):
        raise ValueError(f"must be 1 to {MAX_VERSION_ID_CHARS} printable ASCII characters without spaces")
    return value


VersionId = Annotated[
    str | None,
    AfterValidator(_check_version_id),
    Field(
        description="Version of the S3 object. Default: the current one. Only for `s3://` URLs.",
        json_schema_extra={"minLength": 1, "maxLength": MAX_VERSION_ID_CHARS, "pattern": r"^[!-~]*$"},
    ),
]


def parse_pages(text: str) -> tuple[tuple[int, int], ...]:
    """Parse page numbers such as `1-3,7`; return the first and last page of each range.

    Raises:
        ValueError: the text has another form; the message says which.
    """
    if len(text) <= MAX_PAGES_CHARS and _PAGES.fullmatch(text):
        ends = [part.partition("-") for part in text.split(",")]
        ranges = tuple((int(first), int(last or first)) for first, _, last in ends)
        if all(1 <= first <= last <= MAX_PAGE for first, last in ranges):
            return ranges
    raise ValueError("must be page numbers from 1 such as 1-3,7")


def _check_pages(value: str | None) -> str | None:
    if value is not None:
        parse_pages(value)
    return value


Edge: TypeAlias = Annotated[int | None, Field(ge=MIN_EDGE, le=MAX_EDGE)]
MaxEdge = Annotated[
    Edge,
    Field(
        description="The longest side in pixels that this image is sent with; larger ones are scaled down."
    ),
]
Pages = Annotated[
    str | None,
    AfterValidator(_check_pages),
    Field(
        description="Pages of a PDF or TIFF, such as `1-3,7`; each is sent as an image. Default: all.",
        json_schema_extra={"maxLength": MAX_PAGES_CHARS, "pattern": f"^{_PAGES.pattern}$"},
    ),
]


class ImageUrl(_Open):
    """The URL of an image: `s3://bucket/key`, `https://…` or `data:image/…;base64,…`."""

    url: str
    detail: str | None = Field(default=None, description=_DETAIL)
    version_id: VersionId = None
    max_edge: MaxEdge = None
    pages: Pages = None


class ImageObject(_Strict):
    """The object form of an image in the short form."""

    url: str
    detail: str | None = Field(default=None, description=_DETAIL)
    version_id: VersionId = None
    max_edge: MaxEdge = None
    pages: Pages = None


class TextPart(_Open):
    """Text in a chat message."""

    type: Literal["text"]
    text: str


class ImagePart(_Open):
    """An image in a chat message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class RefusalPart(_Open):
    """A refusal of the model in an earlier turn."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | ImagePart | RefusalPart, Field(discriminator="type")]


class ChatMessage(_Open):
    """A chat message in the OpenAI format; other fields (`name`, `tool_calls`, …) are passed on."""

    role: Annotated[str, StringConstraints(min_length=1)]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None


# The two forms of a job, for its JSON Schema; a null field counts as missing.
_NONE: dict[str, JsonValue] = {"type": "null"}
_SHORT_FORM: dict[str, JsonValue] = {
    "title": "Short form",
    "required": ["question", "images"],
    "properties": {"question": {"type": "string"}, "images": {"type": "array"}, "messages": _NONE},
}
_LONG_FORM: dict[str, JsonValue] = {
    "title": "Long form",
    "required": ["messages"],
    "properties": {
        "messages": {"type": "array"},
        **dict.fromkeys(("question", "images", "system", "prompt_order"), _NONE),
    },
}


class Job(_Strict):
    """A question about images: the body of a message on the jobs queue."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_SHORT_FORM, _LONG_FORM]})

    id: Annotated[str | None, BeforeValidator(_check_id)] = Field(
        default=None,
        description="Unique id of the job, 1 to 256 printable characters. Default: the AMQP message_id.",
        json_schema_extra={"minLength": 1, "maxLength": MAX_ID_CHARS, "pattern": _ID_PATTERN},
    )
    question: str | None = Field(
        default=None,
        description="Short form: the question about the images.",
        json_schema_extra={"pattern": r"\S"},
    )
    images: Annotated[list[str | ImageObject], Field(min_length=1, fail_fast=True)] | None = Field(
        default=None, description="Short form: at least one image, as a URL or as an object with `url`."
    )
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = Field(
        default=None, description="Long form: chat messages in the OpenAI format."
    )
    system: str | None = Field(default=None, description="Short form only: a system message.")
    model: str | None = Field(default=None, description="One of `VQA_ALLOWED_MODELS`. Default: `VQA_MODEL`.")
    image_max_edge: Edge = Field(
        default=None,
        description="The longest side in pixels that images are sent with; larger ones are scaled down."
        " At most `VQA_IMAGE_MAX_EDGE`, if that is set.",
    )
    prompt_order: PromptOrder | None = Field(
        default=None,
        description="Short form only: whether the images or the question come first. Default: "
        "`VQA_PROMPT_ORDER`.",
    )
    params: dict[str, Any] | None = Field(
        default=None,
        description="Additional fields of the model request, except `model`, `messages`, `stream` and `n`.",
        json_schema_extra={"propertyNames": {"not": {"enum": [*sorted(RESERVED_PARAMS)]}}},
    )
    deadline: Annotated[datetime | None, BeforeValidator(parse_deadline)] = Field(
        default=None,
        description="RFC 3339 time after which no model request is sent.",
        json_schema_extra={"pattern": f"^{_RFC3339.pattern}$"},
    )
    metadata: dict[str, Any] | None = Field(
        default=None, description="At most 16 KiB of JSON, copied to the result and not interpreted."
    )

    @field_validator("question")
    @classmethod
    def _question_has_text(cls, value: str | None) -> str | None:
        # A pattern would copy the text.
        if value is not None and (not value or value.isspace()):
            raise ValueError("must contain text")
        return value

    @field_validator("params")
    @classmethod
    def _no_reserved_params(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if reserved := sorted(RESERVED_PARAMS & (value or {}).keys()):
            raise ValueError(f"must not contain {', '.join(reserved)}: the worker sets these itself")
        return value

    @field_validator("metadata")
    @classmethod
    def _metadata_is_small(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value and (
            text_chars(list(value.values())) > MAX_METADATA_BYTES or len(to_json(value)) > MAX_METADATA_BYTES
        ):
            raise ValueError(f"must be at most {MAX_METADATA_BYTES} bytes of JSON")
        return value

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.messages is not None:
            for field in ("question", "images", "system", "prompt_order"):
                if getattr(self, field) is not None:
                    raise ValueError(
                        f"{field} belongs to the short form and cannot be combined with messages"
                    )
        elif self.question is None or self.images is None:
            raise ValueError("needs question and images (the short form) or messages (the long form)")
        return self
