"""Validate single values: lists, queue names, globs, headers.

Validators raise ValueError with the rest of a sentence that begins with the variable's name. `info.data` has
only the preceding fields that are valid, so one error hides no other.
"""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, TypeAlias

import pydantic_core
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationInfo

from worker.settings.faults import shown, variable

MAX_NAME_BYTES: Final = 255  # names of queues and exchanges are short strings in AMQP 0-9-1
MAX_RETRY_DELAY_S: Final = 86_400
# Set by the HTTP client; overriding them breaks the request.
CLIENT_HEADERS: Final = frozenset(
    {"connection", "content-length", "content-type", "host", "transfer-encoding"}
)

# Prefix of settings that name a field of the jobs' metadata.
METADATA: Final = "metadata."

# A value that turns a setting off.
OFF: Final = "off"

# Placeholder for a default that is derived from other settings; replaced during validation.
DERIVED: Final[Any] = None


def default(derive: Callable[[Mapping[str, Any]], Any]) -> BeforeValidator:
    """Return a validator that derives the default from the preceding fields.

    Not a `default_factory`: pydantic skips it, and the field's validation, after an error in a field above.
    """
    return BeforeValidator(lambda value, info: derive(info.data) if value is DERIVED else value)


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _items(value: Any) -> Any:
    """Split `a, b,,c` into `("a", "b", "c")`; return other types unchanged."""
    if not isinstance(value, str):
        return value
    return tuple(item for item in map(str.strip, value.split(",")) if item)


def _json_object(value: Any) -> Any:
    """Parse a JSON object; return other types unchanged."""
    try:
        value = pydantic_core.from_json(value.encode()) if isinstance(value, str) else value
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError('must be a JSON object, e.g. {"name": …}')  # noqa: TRY004  # pydantic's protocol
    return value


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be printable text")
    return text


def _metadata_field(text: str) -> str:
    if not text.startswith(METADATA) or text == METADATA:
        raise ValueError("must be `metadata.` and the name of a metadata field, e.g. metadata.team")
    return _printable(text)


def _name(text: str) -> str:
    if len(text.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"is longer than {MAX_NAME_BYTES} bytes, the limit of AMQP names")
    return _printable(text)


def _distinct_queue(text: str, info: ValidationInfo) -> str:
    if text.startswith("amq."):
        raise ValueError("must not begin with 'amq.', which is reserved by RabbitMQ")
    for field in ("jobs_queue", "results_queue"):
        if info.data.get(field) == text:
            raise ValueError(f"is the same queue as {variable(field)}: use different queues")
    return text


def retry_queue(jobs_queue: str, delay_s: int) -> str:
    """Return the name of the retry queue for a delay in seconds."""
    return f"{jobs_queue}.retry.{delay_s}s"


def _retry_queues_fit(delays: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
    if not delays:
        raise ValueError("must be a comma-separated list of whole seconds, e.g. 1,5,30,120")
    names = {retry_queue(info.data.get("jobs_queue", ""), delay) for delay in delays}
    if any(len(name.encode()) > MAX_NAME_BYTES for name in names):
        raise ValueError(
            f"makes the name of a retry queue longer than {MAX_NAME_BYTES} bytes:"
            f" shorten {variable('jobs_queue')}"
        )
    for field in ("results_queue", "dead_letter_queue"):
        if info.data.get(field) in names:
            raise ValueError(
                f"makes a retry queue with the same name as {variable(field)}: rename that queue"
            )
    return delays


def _off(value: Any) -> Any:
    """Return None for `off`, and numbers as they are."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() == OFF:
        return None
    if not re.fullmatch(r"-?[0-9]+", value.strip()):
        raise ValueError(f"must be a whole number, or {OFF}")
    return value


def _globs_of(what: str, pattern: str = r"[!-.0-~]+") -> Callable[[tuple[str, ...]], tuple[str, ...]]:
    def check(globs: tuple[str, ...]) -> tuple[str, ...]:
        for glob in globs:
            if not re.fullmatch(pattern, glob):
                raise ValueError(f"{shown(glob)} is not {what}: names or globs, without scheme and /")
        return globs

    return check


def _not_empty(globs: tuple[str, ...]) -> tuple[str, ...]:
    if not globs:
        raise ValueError(
            "is not set: list the buckets that jobs may read from, comma-separated, or * for any"
        )
    return globs


def _header_name(name: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        raise ValueError("is not a valid header name")
    if name.lower() in CLIENT_HEADERS:
        raise ValueError("is set by the HTTP client")
    return name


def _header_value(secret: SecretStr) -> SecretStr:
    # The HTTP client encodes header values given as text as ASCII and fails on anything else.
    if not re.fullmatch(r"([!-~]([ -~]*[!-~])?)?", secret.get_secret_value()):
        raise ValueError("must be printable ASCII without leading or trailing spaces")
    return secret


Count: TypeAlias = Annotated[int, Field(ge=1)]
Seconds: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# None: off.
CountOrOff: TypeAlias = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(_off)]
AnyCase: Final = BeforeValidator(_lower)
CommaList: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_items)]
JsonObject: Final = BeforeValidator(_json_object)
Printable: TypeAlias = Annotated[str, AfterValidator(_printable)]
MetadataField: TypeAlias = Annotated[str, AfterValidator(_metadata_field)]
ExchangeName: TypeAlias = Annotated[str, AfterValidator(_name)]
QueueName: TypeAlias = Annotated[str, AfterValidator(_name), AfterValidator(_distinct_queue)]
RetryDelays: TypeAlias = Annotated[
    tuple[Annotated[int, Field(ge=1, le=MAX_RETRY_DELAY_S)], ...],
    BeforeValidator(_items),
    AfterValidator(_retry_queues_fit),
]
# The ARN of an access point has a slash.
BucketGlobs: TypeAlias = Annotated[
    CommaList, AfterValidator(_globs_of("a bucket's name", r"[!-.0-~]+|arn:[!-~]+"))
]
Buckets: TypeAlias = Annotated[BucketGlobs, AfterValidator(_not_empty)]
Hosts: TypeAlias = Annotated[CommaList, AnyCase, AfterValidator(_globs_of("a host"))]
Headers: TypeAlias = Annotated[
    dict[Annotated[str, AfterValidator(_header_name)], Annotated[SecretStr, AfterValidator(_header_value)]],
    JsonObject,
]
