"""The job: what a message on the jobs queue says, and how it is read.

A job has a short form (`question` and `images`) and a long one (`messages`); both become a `Conversation`,
the only form that the rest of the worker knows.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, Self

import pydantic_core
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from worker.messages.limits import MAX_TEXT_CHARS, excess, holds_infinity, text_chars

MAX_ID_CHARS = 256
MAX_METADATA_BYTES = 16 * 1024
# These four decide what is paid for and how it is read, so they are the worker's to set.
RESERVED_PARAMS = frozenset({"model", "messages", "stream", "n"})
MAX_FAULTS_NAMED = 5
MAX_PLACE_CHARS = 100
MAX_DEADLINE_CHARS = 64
# Of a body that is refused, to read its id without reading all of it.
BEGINNING_BYTES = 64 * 1024
# Of a damaged body that is read as far as possible.
LENIENT_BYTES = 1024 * 1024

_Location = tuple[int | str, ...]

# Of what a printable character is, as much as can be said in every language's regular expressions.
_ID_PATTERN = r"^[^\u0000-\u001f\u007f-\u009f]*$"
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:[0-5]\d)", re.ASCII)


def readable_id(value: object) -> str | None:
    """`value` if it can serve as a job's id (1 to 256 printable characters), else None."""
    if isinstance(value, str) and 0 < len(value) <= MAX_ID_CHARS and value.isprintable():
        return value
    return None


def _check_id(value: object) -> object:
    if value is not None and readable_id(value) is None:
        raise ValueError(f"must be a string of 1 to {MAX_ID_CHARS} printable characters")
    return value


def parse_deadline(value: object) -> datetime | None:
    """A deadline as a job says it.

    Raises:
        ValueError: it is no RFC 3339 time; the message says what is wrong with it.
    """
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_DEADLINE_CHARS or not _RFC3339.fullmatch(value):
        raise ValueError("must be an RFC 3339 time with an offset, such as 2030-01-31T12:00:00Z")
    text = value.upper().replace(" ", "T")
    if text[17:19] == "60":
        # A leap second (RFC 3339 §5.7), which Python's clock does not know: the second before it will do.
        text = f"{text[:17]}59{text[19:]}"
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("is not a time that exists") from None


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few_unknown_fields(cls, value: object) -> object:
        """Name the first of many unknown fields; pydantic would report each one."""
        unknown = [name for name in value if name not in cls.model_fields] if isinstance(value, dict) else []
        if len(unknown) > MAX_FAULTS_NAMED:
            named = "; ".join(f"{_shortened(name)}: unknown field" for name in unknown[:MAX_FAULTS_NAMED])
            raise ValueError(f"{named}; and {len(unknown) - MAX_FAULTS_NAMED} more")
        return value


class _Open(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="allow")


class ImageUrl(_Open):
    """Where an image is: `s3://bucket/key`, `https://…` or `data:image/…;base64,…`."""

    url: str
    detail: str | None = Field(default=None, description="Dropped unless `VQA_SEND_IMAGE_DETAIL=true`.")


class ImageObject(_Strict):
    """The object form of an image in the short form."""

    url: str
    detail: str | None = Field(default=None, description="Dropped unless `VQA_SEND_IMAGE_DETAIL=true`.")


class TextPart(_Open):
    """A piece of text within a chat message."""

    type: Literal["text"]
    text: str


class ImagePart(_Open):
    """An image within a chat message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class RefusalPart(_Open):
    """What the model refused with in an earlier turn."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | ImagePart | RefusalPart, Field(discriminator="type")]


class ChatMessage(_Open):
    """One turn in the OpenAI format; fields not named here (`name`, `tool_calls`, …) are passed on."""

    role: Annotated[str, StringConstraints(min_length=1)]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None


# The two forms of a job, for its JSON Schema; a field that is null is none.
_NONE: dict[str, JsonValue] = {"type": "null"}
_SHORT_FORM: dict[str, JsonValue] = {
    "title": "Short form",
    "required": ["question", "images"],
    "properties": {"question": {"type": "string"}, "images": {"type": "array"}, "messages": _NONE},
}
_LONG_FORM: dict[str, JsonValue] = {
    "title": "Long form",
    "required": ["messages"],
    "properties": {"messages": {"type": "array"}, "question": _NONE, "images": _NONE, "system": _NONE},
}


class Job(_Strict):
    """A question about images, as it stands in a message on the jobs queue."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_SHORT_FORM, _LONG_FORM]})

    id: Annotated[str | None, BeforeValidator(_check_id)] = Field(
        default=None,
        description="The job's identity, 1 to 256 printable characters. Falls back to the AMQP message_id.",
        json_schema_extra={"minLength": 1, "maxLength": MAX_ID_CHARS, "pattern": _ID_PATTERN},
    )
    question: str | None = Field(
        default=None,
        description="Short form: what is asked about the images.",
        json_schema_extra={"pattern": r"\S"},
    )
    images: Annotated[list[str | ImageObject], Field(min_length=1, fail_fast=True)] | None = Field(
        default=None, description="Short form: at least one image, as a URL or as an object with `url`."
    )
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = Field(
        default=None, description="Long form: chat messages in the OpenAI format."
    )
    system: str | None = Field(default=None, description="Short form only: a system message.")
    model: str | None = Field(default=None, description="One of the allowed models; default `VQA_MODEL`.")
    params: dict[str, Any] | None = Field(
        default=None,
        description="Further fields of the request body, except `model`, `messages`, `stream` and `n`.",
        json_schema_extra={"propertyNames": {"not": {"enum": [*sorted(RESERVED_PARAMS)]}}},
    )
    deadline: Annotated[datetime | None, BeforeValidator(parse_deadline)] = Field(
        default=None,
        description="RFC 3339 time past which the job is not paid for.",
        json_schema_extra={"pattern": f"^{_RFC3339.pattern}$"},
    )
    metadata: dict[str, Any] | None = Field(
        default=None, description="At most 16 KiB of JSON, echoed in the result and never interpreted."
    )

    @field_validator("question")
    @classmethod
    def _question_has_text(cls, value: str | None) -> str | None:
        # Not a pattern: pydantic would make a second copy of the text for it.
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
            for field in ("question", "images", "system"):
                if getattr(self, field) is not None:
                    raise ValueError(f"{field} belongs to the short form and must not stand beside messages")
        elif self.question is None or self.images is None:
            raise ValueError("needs question and images (the short form) or messages (the long form)")
        return self


class InvalidJobError(Exception):
    """The message is not a job.

    Attributes:
        message: what is wrong with it, for a person; holds nothing of the job's values.
        job_id: the id, from the body or else from the AMQP message_id; None where neither could be read.
        id_in_body: whether the body's own id could be read.
    """

    def __init__(self, message: str, *, job_id: str | None, id_in_body: bool) -> None:
        super().__init__(message)
        self.message = message
        self.job_id = job_id
        self.id_in_body = id_in_body


def decode(body: bytes, message_id: str | None, max_bytes: int) -> Job:
    """Read a message's body as strict RFC 8259 JSON; the job returned has an id.

    Raises:
        InvalidJobError: the body is not a job, or is larger than `max_bytes`.
    """
    fallback = readable_id(message_id)
    if len(body) > max_bytes:
        message = f"the body has {len(body)} bytes; VQA_MAX_JOB_BYTES allows {max_bytes}"
        raise _oversized(message, body[:max_bytes], fallback)
    if (too_much := excess(body)) is not None:
        raise _oversized(too_much, body, fallback)
    try:
        job = Job.model_validate(_parse_json(body))
    except (ValueError, RecursionError) as error:
        own = _id_of(body)
        raise InvalidJobError(_explain(error), job_id=own or fallback, id_in_body=own is not None) from None
    if job.id is not None:
        return job
    if fallback is None:
        message = "id: missing, and the message has no usable message_id to fall back to"
        raise InvalidJobError(message, job_id=None, id_in_body=False)
    return job.model_copy(update={"id": fallback})


def _oversized(message: str, body: bytes, fallback: str | None) -> InvalidJobError:
    own = _id_of_beginning(body)
    return InvalidJobError(message, job_id=own or fallback, id_in_body=own is not None)


def _parse_json(body: bytes) -> Any:
    value = pydantic_core.from_json(body, allow_inf_nan=False)
    if not isinstance(value, dict):
        raise ValueError("the body must be a JSON object")  # noqa: TRY004 - one type for all of it
    if holds_infinity(value):
        raise ValueError("a number is too large for a 64-bit float")
    if text_chars(value) > MAX_TEXT_CHARS:
        raise ValueError(f"the text is longer than {MAX_TEXT_CHARS} characters")
    return value


def read_leniently(body: bytes) -> dict[str, Any] | None:
    """What a body says that need not be a valid job; None if it is no JSON object at all."""
    try:
        # What is not UTF-8 becomes lone surrogates, which are no part of a readable id.
        value = json.loads(body.decode(errors="surrogateescape"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _id_of(body: bytes) -> str | None:
    """Return the id of a body that is not a valid job, if it can be read."""
    if len(body) > LENIENT_BYTES:
        return _id_of_beginning(body)
    return readable_id((read_leniently(body) or {}).get("id"))


def _id_of_beginning(body: bytes) -> str | None:
    """Return the id of a body that is refused unread, if it is near its beginning."""
    try:
        value = pydantic_core.from_json(body[:BEGINNING_BYTES], allow_partial=True)
    except ValueError:
        return None
    return readable_id(value.get("id")) if isinstance(value, dict) else None


def _explain(error: Exception) -> str:
    if isinstance(error, ValidationError):
        found = error.errors(include_input=False, include_url=False)
        faults = [_explain_fault(fault) for fault in _without_other_members(found)]
        more = len(faults) - MAX_FAULTS_NAMED
        return "; ".join(faults[:MAX_FAULTS_NAMED]) + (f"; and {more} more" if more > 0 else "")
    if isinstance(error, RecursionError):
        return "the body's JSON is nested too deeply"
    return f"the body is not strict JSON (RFC 8259): {error}"


def _without_other_members(faults: Sequence[Any]) -> list[Any]:
    """The faults, but not that an image is no string where it was given as an object, and the like.

    A value that is of no member's type has a fault for each member. One that has faults further inside is of
    that member's type, and what the others say of it is noise.
    """
    values = [_split(fault["loc"]) for fault in faults]
    looked_into = {value for value, inside in values if len(inside) > 1}
    return [
        fault
        for fault, (value, inside) in zip(faults, values, strict=True)
        if len(inside) != 1 or value not in looked_into
    ]


def _split(location: _Location) -> tuple[_Location, _Location]:
    """Where a value of a union type stands, and the rest: the union's member and what is within the value.

    Told by position, not by the member's name: a job may have a field of that name. The rest is empty where
    there is no union.
    """
    match location:
        case ("images", int(), _, *_):
            at = 2
        case ("messages", int(), "content", _, *_):
            at = 3
        case _:
            at = len(location)
    return location[:at], location[at:]


def _place(location: _Location) -> str:
    """The location in a publisher's terms: without the union's members ("str", "ImageObject", …)."""
    value, inside = _split(location)
    # In a message's content, the part's number is followed by its kind: a member again.
    members = (0, 2) if value[:1] == ("messages",) else (0,)
    parts = [*value, *(part for n, part in enumerate(inside) if n not in members)]
    return ".".join(_shortened(str(part)) for part in parts)


def _shortened(name: str) -> str:
    return name if len(name) <= MAX_PLACE_CHARS else f"{name[: MAX_PLACE_CHARS - 1]}…"


def _explain_fault(fault: Any) -> str:
    place = _place(fault["loc"])
    match fault["type"]:
        case "extra_forbidden":
            text = "unknown field"
        case "model_type" | "model_attributes_type":  # pydantic's own words name the class
            text = "Input should be a valid object"
        case "union_tag_invalid":  # pydantic's own words repeat the job's
            text = f"type must be one of {fault['ctx']['expected_tags']}"
        case _:
            text = fault["msg"].removeprefix("Value error, ")
    return f"{place}: {text}" if place else text


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image of a job: `where` it stands in it, its URL as given, and the `detail` asked for."""

    where: str
    url: str
    detail: str | None = None


class Conversation:
    """What is asked, in the API's own format, with the images still as the job names them."""

    def __init__(self, job: Job) -> None:
        self._messages = job.messages if job.messages is not None else _from_short_form(job)
        self._short = job.messages is None

    def images(self) -> list[ImageRef]:
        """Every image in the order in which it stands in the conversation."""
        return [
            ImageRef(self._where(m, p, nth), part.image_url.url, part.image_url.detail)
            for nth, (m, p, part) in enumerate(self._image_parts())
        ]

    def render(self, url: str, *, send_detail: bool) -> list[dict[str, Any]]:
        """The `messages` of the request, with `url` in the place of each image's."""
        messages = [message.model_dump(exclude_unset=True) for message in self._messages]
        for m, p, _ in self._image_parts():
            image_url = messages[m]["content"][p]["image_url"]
            image_url["url"] = url
            if not send_detail or image_url.get("detail") is None:
                image_url.pop("detail", None)
        return messages

    def _image_parts(self) -> Iterator[tuple[int, int, ImagePart]]:
        for m, message in enumerate(self._messages):
            if isinstance(message.content, list):
                for p, part in enumerate(message.content):
                    if isinstance(part, ImagePart):
                        yield m, p, part

    def _where(self, message: int, part: int, nth: int) -> str:
        return f"images[{nth}]" if self._short else f"messages[{message}].content[{part}]"


def _from_short_form(job: Job) -> list[ChatMessage]:
    """Images before the question, as the makers of vision models advise."""
    parts: list[Part] = []
    for image in job.images or ():
        fields = {"url": image} if isinstance(image, str) else image.model_dump(exclude_unset=True)
        parts.append(ImagePart(type="image_url", image_url=ImageUrl(**fields)))
    parts.append(TextPart(type="text", text=job.question or ""))
    asked = ChatMessage(role="user", content=parts)
    return [asked] if job.system is None else [ChatMessage(role="system", content=job.system), asked]


def to_json(value: Any, *, sort_keys: bool = False) -> bytes:
    """Compact JSON in UTF-8; a lone surrogate, which UTF-8 cannot hold, becomes a question mark."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=sort_keys)
    return text.encode(errors="replace")


def json_text(text: str) -> bytes:
    """`text` as it stands between the quotes of a JSON string."""
    return to_json(text)[1:-1]
