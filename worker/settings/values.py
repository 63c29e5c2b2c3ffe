"""The checks of single values: lists, names of queues, globs, headers.

A check raises ValueError with the end of a sentence that the variable's name begins. `info.data` holds the
fields above that passed their own checks, and only those; so one fault hides no other.
"""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, TypeAlias

import pydantic_core
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationInfo

from worker.settings.faults import shown, variable

MAX_NAME_BYTES: Final = 255  # a queue's or exchange's name: AMQP 0-9-1 calls it a short string
MAX_RETRY_DELAY_S: Final = 86_400
# What the HTTP client works out for itself; a second opinion breaks the request.
CLIENT_HEADERS: Final = frozenset(
    {"connection", "content-length", "content-type", "host", "transfer-encoding"}
)

# What a setting begins with that names a field of the jobs' metadata.
METADATA: Final = "metadata."

# Stands for a default that is worked out from other settings; no field keeps it.
DERIVED: Final[Any] = None


def default(derive: Callable[[Mapping[str, Any]], Any]) -> BeforeValidator:
    """A default that follows from the fields above.

    Not a `default_factory`: pydantic skips those, and with them the field's checks, after any fault above.
    """
    return BeforeValidator(lambda value, info: derive(info.data) if value is DERIVED else value)


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _items(value: Any) -> Any:
    """`a, b,,c` → `("a", "b", "c")`; what is not text passes through."""
    if not isinstance(value, str):
        return value
    return tuple(item for item in map(str.strip, value.split(",")) if item)


def _json_object(value: Any) -> Any:
    """A JSON object as text → dict; what is not text passes through."""
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
        raise ValueError(
            "must be `metadata.` and the name of a field of the jobs' metadata, e.g. metadata.team"
        )
    return _printable(text)


def _name(text: str) -> str:
    if len(text.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"is longer than the {MAX_NAME_BYTES} bytes that AMQP allows a name")
    return _printable(text)


def _queue_of_its_own(text: str, info: ValidationInfo) -> str:
    if text.startswith("amq."):
        raise ValueError("must not begin with 'amq.', which RabbitMQ keeps for itself")
    for field in ("jobs_queue", "results_queue"):
        if info.data.get(field) == text:
            raise ValueError(f"is the same queue as {variable(field)}: each needs its own")
    return text


def retry_queue(jobs_queue: str, delay_s: int) -> str:
    """The name of the queue that holds jobs back for so many seconds."""
    return f"{jobs_queue}.retry.{delay_s}s"


def _retry_queues_fit(delays: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
    if not delays:
        raise ValueError("must be a comma list of whole seconds, e.g. 1,5,30,120")
    names = {retry_queue(info.data.get("jobs_queue", ""), delay) for delay in delays}
    if any(len(name.encode()) > MAX_NAME_BYTES for name in names):
        raise ValueError(
            f"makes the name of a retry queue longer than {MAX_NAME_BYTES} bytes:"
            f" shorten {variable('jobs_queue')}"
        )
    for field in ("results_queue", "dead_letter_queue"):
        if info.data.get(field) in names:
            raise ValueError(f"makes a retry queue of the same name as {variable(field)}: rename that one")
    return delays


def _globs_of(what: str) -> Callable[[tuple[str, ...]], tuple[str, ...]]:
    def check(globs: tuple[str, ...]) -> tuple[str, ...]:
        for glob in globs:
            if not re.fullmatch(r"[!-.0-~]+", glob):
                raise ValueError(f"{shown(glob)} is not {what}: names or globs, without scheme and /")
        return globs

    return check


def _not_empty(globs: tuple[str, ...]) -> tuple[str, ...]:
    if not globs:
        raise ValueError(
            "is not set: name the buckets that jobs may read from, comma separated, or * for any"
        )
    return globs


def _header_name(name: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        raise ValueError("cannot be the name of a header")
    if name.lower() in CLIENT_HEADERS:
        raise ValueError("belongs to the HTTP client")
    return name


def _header_value(secret: SecretStr) -> SecretStr:
    # The HTTP client encodes header values given as text as ASCII and fails on anything else.
    if not re.fullmatch(r"([!-~]([ -~]*[!-~])?)?", secret.get_secret_value()):
        raise ValueError("must be printable ASCII without blanks around it")
    return secret


Count: TypeAlias = Annotated[int, Field(ge=1)]
Seconds: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AnyCase: Final = BeforeValidator(_lower)
CommaList: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_items)]
JsonObject: Final = BeforeValidator(_json_object)
Printable: TypeAlias = Annotated[str, AfterValidator(_printable)]
MetadataField: TypeAlias = Annotated[str, AfterValidator(_metadata_field)]
ExchangeName: TypeAlias = Annotated[str, AfterValidator(_name)]
QueueName: TypeAlias = Annotated[str, AfterValidator(_name), AfterValidator(_queue_of_its_own)]
RetryDelays: TypeAlias = Annotated[
    tuple[Annotated[int, Field(ge=1, le=MAX_RETRY_DELAY_S)], ...],
    BeforeValidator(_items),
    AfterValidator(_retry_queues_fit),
]
Buckets: TypeAlias = Annotated[
    CommaList, AfterValidator(_not_empty), AfterValidator(_globs_of("a bucket's name"))
]
Hosts: TypeAlias = Annotated[CommaList, AnyCase, AfterValidator(_globs_of("a host"))]
Headers: TypeAlias = Annotated[
    dict[Annotated[str, AfterValidator(_header_name)], Annotated[SecretStr, AfterValidator(_header_value)]],
    JsonObject,
]
