"""The settings: one frozen object, checked as a whole before any connection is made.

Values come from the environment, then from `.env` in the working directory, then from files in the folder
that `VQA_SECRETS_DIR` names. The descriptions below are the users' reference: `docs/settings.md` is made of
them.
"""

import difflib
import ipaddress
import json
import os
import re
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias
from urllib.parse import SplitResult, unquote, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

PREFIX: Final = "VQA_"
DEEPINFRA_KEY: Final = "DEEPINFRA_TOKEN"
OPENAI_KEY: Final = "OPENAI_API_KEY"
FALLBACK_KEYS: Final = (DEEPINFRA_KEY, OPENAI_KEY)

MAX_NAME_BYTES: Final = 255  # a queue's or exchange's name: AMQP 0-9-1 calls it a short string
MAX_PREFETCH: Final = 65_535  # basic.qos carries the prefetch in 16 bits
BROKER_DELIVERY_LIMIT: Final = (
    100  # the `x-delivery-limit` of the jobs queue, a backstop behind the worker's own
)
MAX_RETRY_DELAY_S: Final = 86_400
# RabbitMQ takes back what was not acked in 30 minutes (`consumer_timeout`); one minute is kept in hand.
JOB_TIMEOUT_CEILING_S: Final = 1740
AMQP_PORTS: Final = {"amqp": 5672, "amqps": 5671}

# A password that every RabbitMQ is delivered with is no secret, and "guest" is a word that messages may need.
PUBLIC_PASSWORDS: Final = frozenset({"guest"})

# For these an empty value is an answer ("none"); for every other setting it is the same as no value at all,
# because compose files and charts hand empty strings on for whatever nobody has filled in.
EMPTY_MEANS_NONE: Final = frozenset({"allowed_reply_to", "allowed_link_hosts"})

# Stands for a default that is worked out from other settings; no field keeps it.
_DERIVED: Final[Any] = None


class SettingsError(Exception):
    """The settings are wrong.

    Attributes:
        faults: one line each, with the variable's name first; never a secret's value.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)


def variable(field: str) -> str:
    """The environment variable of a field."""
    return PREFIX + field.upper()


# Checks of single values. They raise ValueError with the end of a sentence that the variable's name begins;
# pydantic collects those of all fields. `info.data` holds the fields above that passed their own checks, and
# only those.


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _items(value: Any) -> Any:
    """`a, b,,c` → `("a", "b", "c")`; what is not text passes through."""
    if not isinstance(value, str):
        return value
    return tuple(item for item in map(str.strip, value.split(",")) if item)


def _whole_seconds(value: Any) -> Any:
    """`1,5,30` → `(1, 5, 30)`."""
    delays = _items(value)
    if not isinstance(delays, tuple | list) or not delays:
        raise ValueError("must be a comma list of whole seconds, e.g. 1,5,30,120")
    for delay in delays:
        if not re.fullmatch(r"0*[1-9][0-9]{0,4}", str(delay), re.ASCII) or int(delay) > MAX_RETRY_DELAY_S:
            raise ValueError(
                f"{_shown(delay)} is not a number of whole seconds from 1 to {MAX_RETRY_DELAY_S}"
                " (retry queues are named by whole seconds)"
            )
    return tuple(int(delay) for delay in delays)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError
    return dict(pairs)


def _json_object(value: Any) -> Any:
    """A JSON object as text → dict; what is not text passes through."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError):
        raise ValueError("must be a JSON object in which no key appears twice") from None
    if not isinstance(parsed, dict):
        raise ValueError('must be a JSON object, e.g. {"name": …}')  # noqa: TRY004  # pydantic's protocol
    return parsed


def _printable(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("must be printable text, and some of it")
    return text


def _name(text: str) -> str:
    _printable(text)
    if len(text.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"is longer than the {MAX_NAME_BYTES} bytes that AMQP allows a name")
    return text


def _queue_name(text: str) -> str:
    _name(text)
    if text.startswith("amq."):
        raise ValueError("must not begin with 'amq.', which RabbitMQ keeps for itself")
    return text


def _other_than_queues_above(text: str, info: ValidationInfo) -> str:
    for field in ("jobs_queue", "results_queue"):
        if field != info.field_name and info.data.get(field) == text:
            raise ValueError(f"is the same queue as {variable(field)}: each needs its own")
    return text


def retry_queue(jobs_queue: str, delay_s: int) -> str:
    """The name of the queue that holds jobs back for so many seconds."""
    return f"{jobs_queue}.retry.{delay_s}s"


def _retry_queues_fit(delays: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
    if "jobs_queue" not in info.data:
        return delays
    names = {retry_queue(info.data["jobs_queue"], delay) for delay in delays}
    if any(len(name.encode()) > MAX_NAME_BYTES for name in names):
        raise ValueError(
            f"makes the name of a retry queue longer than {MAX_NAME_BYTES} bytes:"
            f" shorten {variable('jobs_queue')}"
        )
    for field in ("results_queue", "dead_letter_queue"):
        if info.data.get(field) in names:
            raise ValueError(f"makes a retry queue of the same name as {variable(field)}: rename that one")
    return delays


def _host_is_sound(host: str) -> bool:
    if ":" not in host:
        return re.fullmatch(r"[a-z0-9._-]+", host) is not None and host.strip(".") != ""
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def _split_url(url: str, schemes: tuple[str, ...]) -> SplitResult:
    """Take a URL apart, strictly: what two parsers might read differently is refused. Never shows the URL."""
    wanted = " or ".join(f"{scheme}://" for scheme in schemes)
    if not re.fullmatch(r"[!-\[\]-~]+", url):
        raise ValueError(
            "must be a URL without blanks, backslashes, control or non-ASCII characters (percent-encode them)"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(
            "is not a URL: host or port cannot be read"
            " (special characters in a password must be percent-encoded)"
        ) from None
    if parts.scheme not in schemes:
        raise ValueError(f"must begin with {wanted}")
    if not parts.hostname or not _host_is_sound(parts.hostname):
        raise ValueError(f"must have a host, as in {schemes[0]}://host/")
    if port == 0:
        raise ValueError("must have a port from 1 to 65535, or none")
    return parts


def _broker_url(secret: SecretStr) -> SecretStr:
    parts = _split_url(secret.get_secret_value(), tuple(AMQP_PORTS))
    if parts.fragment:
        raise ValueError("has a '#' in it: special characters in a password must be percent-encoded")
    return secret


def _http_url(url: str) -> str:
    parts = _split_url(url, ("https", "http"))
    if "@" in parts.netloc:
        raise ValueError("must not carry a user name or password: URLs are shown in logs")
    if "?" in url or "#" in url:
        raise ValueError("must not have a query or a fragment: paths are appended to it")
    return url.rstrip("/")


def host_of(url: str) -> str:
    """The host of a URL in lower case, without port; empty if it has none."""
    try:
        return (urlsplit(url).hostname or "").removesuffix(".")
    except ValueError:
        return ""


def fallback_key_variable(base_url: str) -> str | None:
    """Which common variable may stand in for `VQA_MODEL_API_KEY` at this URL.

    A provider's key goes to no other provider.
    """
    host = host_of(base_url)
    if host == "deepinfra.com" or host.endswith(".deepinfra.com"):
        return DEEPINFRA_KEY
    if host == "api.openai.com" or host.endswith(".api.openai.com"):
        return OPENAI_KEY
    return None


def _api_key(secret: SecretStr, info: ValidationInfo) -> SecretStr:
    key = secret.get_secret_value().strip()
    if not key:
        raise ValueError(_missing_key(info.data.get("model_base_url", "")))
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError(
            "has blanks, control or non-ASCII characters inside: it was not copied whole, or too much was"
        )
    return SecretStr(key)


def _missing_key(base_url: str) -> str:
    asked = f"is not set: give the key of the API at {host_of(base_url) or 'VQA_MODEL_BASE_URL'}"
    fallback = fallback_key_variable(base_url)
    if fallback:
        return f"{asked} (or set {fallback}, which is used for this host)"
    return f"{asked} (any word if it wants none; {' and '.join(FALLBACK_KEYS)} are for their own hosts only)"


# What the HTTP client works out for itself; a second opinion breaks the request.
_CLIENT_HEADERS: Final = frozenset(
    {"connection", "content-length", "content-type", "host", "transfer-encoding"}
)


def _headers(value: Any) -> Any:
    headers = _json_object(value)
    if isinstance(headers, dict):
        lowered = [str(name).lower() for name in headers]
        for name, content in headers.items():
            if lowered.count(str(name).lower()) > 1:
                raise ValueError(f"{_shown(name)} is given twice (upper and lower case make no difference)")
            _check_header(str(name), content)
    return headers


def _check_header(name: str, content: object) -> None:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        raise ValueError(f"{_shown(name)} cannot be the name of a header")
    if name.lower() in _CLIENT_HEADERS:
        raise ValueError(f"{_shown(name)} belongs to the HTTP client")
    plain = content.get_secret_value() if isinstance(content, SecretStr) else content
    # The HTTP client encodes header values given as text as ASCII and fails on anything else.
    if not isinstance(plain, str) or not re.fullmatch(r"[ -~]*", plain) or plain != plain.strip():
        raise ValueError(
            f"the value of {_shown(name)} must be a string of printable ASCII, no blanks around it"
        )


def _bucket_globs(globs: tuple[str, ...]) -> tuple[str, ...]:
    if not globs:
        raise ValueError(
            "is not set: name the buckets that jobs may read from, comma separated, or * for any"
        )
    if odd := next((glob for glob in globs if not re.fullmatch(r"[!-.0-~]+", glob)), None):
        raise ValueError(
            f"{_shown(odd)} is not a bucket's name: names or globs, comma separated, without s3:// and /"
        )
    return globs


def _host_globs(globs: tuple[str, ...]) -> tuple[str, ...]:
    if odd := next((glob for glob in globs if not re.fullmatch(r"[!-.0-~]+", glob)), None):
        raise ValueError(
            f"{_shown(odd)} is not a host: names or globs, comma separated, without https:// and /"
        )
    return tuple(glob.lower() for glob in globs)


def _model_is_allowed(models: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    model = info.data.get("model")
    if model is not None and model not in models:
        raise ValueError(
            f"lacks {_shown(model)}, the value of {variable('model')}: add it, or change that one"
        )
    return models


def _result_store(url: str | None) -> str | None:
    if url is None:
        return None
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^\s/][^\s]*", url):
        raise ValueError("must look like s3://bucket/prefix")
    raise ValueError("is not supported by this version yet: leave it unset")


def _existing_folder(path: Path | None) -> Path | None:
    if path is not None and not path.is_dir():
        raise ValueError(f"{_shown(path)} is not a folder")
    return path


# The files of the TLS connection to the broker. They are loaded here once to see that they can be.


def _readable_tls_file(path: Path | None, info: ValidationInfo) -> Path | None:
    if path is None:
        return None
    url = info.data.get("rabbitmq_url")
    if url is not None and urlsplit(url.get_secret_value()).scheme != "amqps":
        raise ValueError(
            f"is of no use without TLS: {variable('rabbitmq_url')} must begin with amqps://, or leave it out"
        )
    try:
        path.read_bytes()
    except OSError as error:
        raise ValueError(f"{_shown(path)} cannot be read: {error.strerror}") from None
    return path


def _ca_file(path: Path | None) -> Path | None:
    if path is not None:
        try:
            ssl.create_default_context(cafile=path)
        except (ssl.SSLError, ValueError):
            raise ValueError(f"{_shown(path)} holds no certificates in PEM form that can be read") from None
    return path


def _key_file(path: Path | None, info: ValidationInfo) -> Path | None:
    if "rabbitmq_cert_file" not in info.data:  # it has a fault of its own
        return path
    certificate = info.data["rabbitmq_cert_file"]
    if (certificate is None) != (path is None):
        raise ValueError(f"and {variable('rabbitmq_cert_file')} go together: give both or neither")
    if path is not None:
        try:
            _load_certificate(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate, path)
        except (ssl.SSLError, ValueError):
            raise ValueError(
                f"and {variable('rabbitmq_cert_file')} cannot be loaded as a certificate and its own key:"
                " both must be PEM, belong together, and the key must not be encrypted"
            ) from None
    return path


def _load_certificate(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    # The empty password makes an encrypted key an error; without it OpenSSL would ask at the terminal, and
    # wait.
    context.load_cert_chain(certificate, key, password="")


Count: TypeAlias = Annotated[int, Field(ge=1)]
Seconds: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
CommaList: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_items)]
HttpUrl: TypeAlias = Annotated[str, AfterValidator(_http_url)]
TlsFile: TypeAlias = Annotated[Path | None, AfterValidator(_readable_tls_file)]
QueueName: TypeAlias = Annotated[str, AfterValidator(_queue_name), AfterValidator(_other_than_queues_above)]


def _default(derive: Callable[[Mapping[str, Any]], Any]) -> BeforeValidator:
    """A default that follows from the fields above.

    Not a `default_factory`: pydantic skips those, and with them the field's checks, after any fault above.
    """

    def fill(value: Any, info: ValidationInfo) -> Any:
        return derive(info.data) if value is _DERIVED else value

    return BeforeValidator(fill)


def _standard_reply_queues(data: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        data.get("results_queue", "vqa.results"),
        "vqa.results.*",
        "amq.rabbitmq.reply-to.*",
        "amq.gen-*",
    )


class Price(BaseModel):
    """What a model costs in USD per million tokens: `{"prompt": x, "completion": y}` or `[x, y]`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: float = Field(ge=0, allow_inf_nan=False)
    completion: float = Field(ge=0, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _from_pair(cls, value: Any) -> Any:
        match value:
            case [prompt, completion]:
                return {"prompt": prompt, "completion": completion}
        return value


class Settings(BaseSettings):
    """All settings. `load_settings` reads them; the constructor takes fields by name and reads nothing."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="forbid",
        validate_default=True,
        hide_input_in_errors=True,
    )

    rabbitmq_url: Annotated[SecretStr, AfterValidator(_broker_url)] = Field(
        default=SecretStr("amqp://guest:guest@localhost:5672/"),
        description="The broker: `amqp://user:password@host:port/vhost`, or `amqps://` for TLS. Special"
        " characters in user name, password and vhost are percent-encoded (the vhost `/` is the"
        " empty path or `%2F`). A secret.",
    )
    rabbitmq_ca_file: Annotated[TlsFile, AfterValidator(_ca_file)] = Field(
        default=None,
        description="PEM file with the certificates that the broker's certificate is checked against, with"
        " `amqps://` only. Without it the operating system's are used.",
    )
    rabbitmq_cert_file: TlsFile = Field(
        default=None,
        description="PEM file with the worker's own certificate, for a broker that asks for one; with"
        " `amqps://` only, and together with `VQA_RABBITMQ_KEY_FILE`.",
    )
    rabbitmq_key_file: Annotated[TlsFile, AfterValidator(_key_file)] = Field(
        default=None,
        description="PEM file with the unencrypted private key of `VQA_RABBITMQ_CERT_FILE`.",
    )

    jobs_queue: QueueName = Field(
        default="vqa.jobs",
        description="The queue that jobs are taken from. The retry queues are named after it:"
        " `<jobs>.retry.<seconds>s`.",
    )
    results_queue: QueueName = Field(
        default="vqa.results",
        description="The queue for results of jobs without a (permitted) `reply_to`.",
    )
    dead_letter_queue: Annotated[
        QueueName, _default(lambda data: f"{data.get('jobs_queue', 'vqa.jobs')}.dead")
    ] = Field(
        default=_DERIVED,
        description="The queue for jobs that a person must look at: attempts used up, or not readable.",
        json_schema_extra={"default_text": "`<jobs>.dead`"},
    )
    allowed_reply_to: Annotated[CommaList, _default(_standard_reply_queues)] = Field(
        default=_DERIVED,
        description="Comma list of globs on the whole name: which `reply_to` a job may ask for. The result"
        " of a job that asks for another goes to the results queue. Empty: none may be asked"
        " for.",
        json_schema_extra={
            "default_text": "the results queue, `vqa.results.*`, `amq.rabbitmq.reply-to.*`, `amq.gen-*`"
        },
    )
    reply_exchange: Annotated[str, AfterValidator(lambda name: name and _name(name))] = Field(
        default="",
        description="The exchange that results are published to, with the reply queue's name as routing"
        " key. Set it to a direct exchange of your own where the worker's user may not write to"
        " the default exchange (which reaches every queue); you then bind the queues. Direct"
        " reply-to always goes by the default exchange.",
        json_schema_extra={"default_text": "the default exchange"},
    )
    declare_topology: bool = Field(
        default=True,
        description="Whether the worker declares its queues at the start. `false`: it only checks that they"
        " are there.",
    )
    delivery_limit: Annotated[int, Field(ge=1, lt=BROKER_DELIVERY_LIMIT)] = Field(
        default=20,
        description="How many times a job may be delivered without coming to an end (it kills its worker,"
        " say) before it fails with `attempts_exhausted`. Under 100, which is the broker's own"
        " limit behind it.",
    )

    max_attempts: Count = Field(
        default=5,
        description="How many times a job is tried when attempts fail for a passing reason of its own"
        " (time-outs, 5xx answers). Rate limits and outages don't count.",
    )
    retry_delays: Annotated[
        tuple[int, ...], BeforeValidator(_whole_seconds), AfterValidator(_retry_queues_fit)
    ] = Field(
        default=(1, 5, 30, 120),
        description="Comma list of whole seconds to wait before the second, third, … attempt; the last one"
        " repeats. Each value is a queue of its own. Take a value away only when its queue is"
        " empty.",
    )
    max_job_bytes: Count = Field(
        default=16_000_000,
        description="Largest body of a job in bytes; a larger one is `invalid_job`. RabbitMQ 4 itself"
        " refuses messages over 16 MiB unless told otherwise.",
    )

    s3_endpoint_url: HttpUrl | None = Field(
        default=None,
        description="Base URL of an S3-compatible store that is not AWS, e.g. `https://minio.example:9000`."
        " Credentials and region come from the usual AWS chain (`AWS_ACCESS_KEY_ID`, a profile, a role).",
        json_schema_extra={"default_text": "none: AWS"},
    )
    s3_addressing_style: Annotated[Literal["auto", "path", "virtual"], BeforeValidator(_lower)] = Field(
        default="auto",
        description="Where the bucket stands in S3 URLs: `path` (`host/bucket/key`), `virtual`"
        " (`bucket.host/key`), or `auto`: path for a custom endpoint, virtual for AWS.",
    )
    allowed_buckets: Annotated[CommaList, AfterValidator(_bucket_globs)] = Field(
        description="Comma list of globs: the buckets that jobs may name. `*` says any, in so many words.",
        json_schema_extra={"default_text": "required"},
    )
    allowed_link_hosts: Annotated[CommaList, AfterValidator(_host_globs)] = Field(
        default=("*",),
        description="Comma list of globs: the hosts of `https://` images that jobs may pass on to the API."
        " Empty: none.",
    )
    image_delivery: Annotated[Literal["inline", "link"], BeforeValidator(_lower)] = Field(
        default="inline",
        description="How S3 images reach the API. `inline`: read by the worker and sent as base64 in the"
        " request. `link`: as a presigned URL, so that the bytes never pass through the worker;"
        " the store must be reachable from the provider, and providers often fail to fetch.",
    )
    max_image_bytes: Count = Field(
        default=20_000_000,
        description="Largest image in bytes, before base64. Keep to what your provider accepts.",
    )
    max_images_per_job: Count = Field(
        default=16,
        description="Most images in one job.",
    )
    send_image_detail: bool = Field(
        default=False,
        description="Whether the field `detail` of a job's `image_url` is passed on to the API. DeepInfra"
        " does not take it, OpenAI does.",
    )

    model_base_url: HttpUrl = Field(
        default="https://api.deepinfra.com/v1/openai",
        description="Base URL of the OpenAI-compatible API; `/chat/completions` is appended to it.",
    )
    model_api_key: Annotated[SecretStr, AfterValidator(_api_key)] = Field(
        description="The API's key. Without it, `DEEPINFRA_TOKEN` is used for DeepInfra's host and"
        " `OPENAI_API_KEY` for OpenAI's, never one for the other. Any word for a server that"
        " wants none. A secret.",
        json_schema_extra={"default_text": "required"},
    )
    model: Annotated[str, AfterValidator(_printable)] = Field(
        default="meta-llama/Llama-3.2-90B-Vision-Instruct",
        description="The model for jobs that name none.",
    )
    allowed_models: Annotated[
        CommaList,
        AfterValidator(_model_is_allowed),
        _default(lambda data: (data["model"],) if "model" in data else ()),
    ] = Field(
        default=_DERIVED,
        description="Comma list of the models that jobs may name, `VQA_MODEL` among them.",
        json_schema_extra={"default_text": "the value of `VQA_MODEL`"},
    )
    model_timeout: Seconds = Field(
        default=120,
        description="Seconds that one call to the API may take. Raise it for long answers or slow models.",
    )
    job_timeout: Annotated[Seconds, Field(lt=JOB_TIMEOUT_CEILING_S)] = Field(
        default=600,
        description="Seconds for one delivery of a job from receipt to its end: waiting, images, calls and"
        " publishing. Under 1740, because RabbitMQ takes back what is not acked in 30 minutes.",
    )
    model_headers: Annotated[dict[str, SecretStr], BeforeValidator(_headers)] = Field(
        default={},
        description='JSON object of extra headers for every call to the API, e.g. `{"X-Project":'
        ' "vision"}`. The values are treated as secrets.',
    )
    max_concurrency: Annotated[int, Field(ge=1, le=MAX_PREFETCH)] = Field(
        default=64,
        description="Most jobs in flight in one process. The limit in force starts at 32 at most and moves"
        " by itself: down when the API says it is too much, up again while it copes.",
    )

    result_store: Annotated[str | None, AfterValidator(_result_store)] = Field(
        default=None,
        description="`s3://bucket/prefix` where answers are kept, so that no worker pays twice for one job."
        " Not supported by this version yet: setting it is a fault.",
    )
    prices: Annotated[dict[str, Price], BeforeValidator(_json_object)] = Field(
        default={},
        description='JSON object: what models cost in USD per million tokens, `{"model": {"prompt": 0.35,'
        ' "completion": 0.4}}` or `{"model": [0.35, 0.4]}`. Used for `cost_usd` where the'
        " provider gives no figure of its own.",
    )
    include_response: bool = Field(
        default=False,
        description="Whether every result carries the API's whole response body. Otherwise only those do"
        " whose answer is more than plain text.",
    )

    http_host: Annotated[str, AfterValidator(_printable)] = Field(
        default="0.0.0.0",  # noqa: S104  # probes and scrapes come from outside the container
        description="The address that `/livez`, `/readyz` and `/metrics` are served on.",
    )
    http_port: Annotated[int, Field(ge=0, le=65_535)] = Field(
        default=8080,
        description="The port for them; `0` takes any free one.",
    )
    shutdown_grace: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=150,
        description="Seconds that SIGTERM leaves to the jobs in flight; what is not done by then goes back"
        " to the queue. Keep it above `VQA_MODEL_TIMEOUT`, and the orchestrator's own grace"
        " period above this.",
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = Field(
        default="info",
        description="`debug`, `info`, `warning` or `error`.",
    )
    log_format: Annotated[Literal["json", "console"] | None, BeforeValidator(_lower)] = Field(
        default=None,
        description="`json`: one object a line; `console`: for a person.",
        json_schema_extra={"default_text": "`json` on a pipe, `console` on a terminal"},
    )
    secrets_dir: Annotated[Path | None, AfterValidator(_existing_folder)] = Field(
        default=None,
        description="A folder of files named as the settings (in any case), each holding one value, e.g. a"
        " mounted secret. The environment and `.env` come before it.",
    )

    # Variables that look like settings and are none, each with the place it stands in.
    _strays: tuple[tuple[str, str], ...] = ()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  # the signature is the library's
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what the constructor is given; `load_settings` brings its own sources."""
        return (init_settings,)

    @property
    def rabbitmq_address(self) -> str:
        """Where the broker is, without credentials, fit for logs."""
        parts = urlsplit(self.rabbitmq_url.get_secret_value())
        host = parts.hostname or ""
        host = f"[{host}]" if ":" in host else host
        return f"{parts.scheme}://{host}:{parts.port or AMQP_PORTS[parts.scheme]}{parts.path or '/'}"

    def secret_values(self) -> tuple[str, ...]:
        """Every value that must never be shown, as it stands in the settings and, for the broker, decoded."""
        password = urlsplit(self.rabbitmq_url.get_secret_value()).password or ""
        values = [self.model_api_key, *self.model_headers.values()]
        secrets = [password, unquote(password), *(value.get_secret_value() for value in values)]
        return tuple(secret for secret in secrets if secret and secret not in PUBLIC_PASSWORDS)

    def warnings(self) -> list[str]:
        """What is allowed and yet probably not meant, one line each, with the variable's name first."""
        return [*self._odd_combinations(), *_stray_warnings(self._strays)]

    def _odd_combinations(self) -> Iterator[str]:
        if self.shutdown_grace < self.model_timeout:
            yield (
                f"VQA_SHUTDOWN_GRACE: {self.shutdown_grace:g} s are less than VQA_MODEL_TIMEOUT"
                f" ({self.model_timeout:g} s): a stop can cut off calls that are paid for"
            )
        if self.job_timeout < self.model_timeout:
            yield (
                f"VQA_JOB_TIMEOUT: {self.job_timeout:g} s are less than VQA_MODEL_TIMEOUT"
                f" ({self.model_timeout:g} s), which can then never be reached"
            )
        if self.model_base_url.lower().startswith("http://") and not _is_loopback(
            host_of(self.model_base_url)
        ):
            yield "VQA_MODEL_BASE_URL: the API key goes over the network in clear; use https://"


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def broker_ssl_context(settings: Settings) -> ssl.SSLContext | None:
    """How to speak TLS with the broker; None where it is not spoken."""
    if not settings.rabbitmq_address.startswith("amqps:"):
        return None
    context = ssl.create_default_context(cafile=settings.rabbitmq_ca_file)
    if settings.rabbitmq_cert_file and settings.rabbitmq_key_file:
        _load_certificate(context, settings.rabbitmq_cert_file, settings.rabbitmq_key_file)
    return context


# Reading


KNOWN_VARIABLES: Final = frozenset(variable(field) for field in Settings.model_fields)

# Variables that Kubernetes sets in every pod for each Service, here for one whose name begins with "vqa".
_SERVICE_LINK: Final = re.compile(
    r"_SERVICE_HOST$|_SERVICE_PORT(_[A-Z0-9_]+)?$|_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$"
)
_LINK_VALUE: Final = re.compile(r"(tcp|udp|sctp)://")


def _is_service_link(name: str, text: str) -> bool:
    """`…_PORT` alone could be a misspelt setting; Kubernetes gives it a URL."""
    return bool(_SERVICE_LINK.search(name) or (name.endswith("_PORT") and _LINK_VALUE.match(text)))


def _is_ours(name: str) -> bool:
    return name.startswith(PREFIX) or name in FALLBACK_KEYS


class Layer(PydanticBaseSettingsSource):
    """One place that settings come from: variable names in upper case → text without outer blanks."""

    def __init__(self, place: str, texts: Mapping[str, str]) -> None:
        super().__init__(Settings)
        self.place = place
        self.texts = texts

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        """The text of a field; None where there is none, or an empty one that means as much."""
        text = self.texts.get(variable(field_name))
        return (text if text or field_name in EMPTY_MEANS_NONE else None), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Give the texts that there are, by field."""
        values = {name: self.get_field_value(field, name)[0] for name, field in Settings.model_fields.items()}
        return {name: value for name, value in values.items() if value is not None}

    def strays(self) -> Iterator[tuple[str, str]]:
        """Names with the settings' prefix that are no settings."""
        for name in sorted(self.texts):
            known = name in KNOWN_VARIABLES or not re.fullmatch(PREFIX + "[A-Z0-9_]+", name)
            if not known and not _is_service_link(name, self.texts[name]):
                yield name, self.place


class RequiredLast(PydanticBaseSettingsSource):
    """Comes after all layers: the stand-in for the API key, and empty text for what is required and missing.

    The empty text goes through the field's own check, which says what is missing better than pydantic can.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(Settings)
        self.layers = layers
        self.fallback: str | None = None  # the variable that the key was taken from

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        """Not used: this source gives two fields only."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """Give both fields; what a layer has comes first."""
        return {"allowed_buckets": "", "model_api_key": self._fallback_key()}

    def _fallback_key(self) -> str:
        base_url = self.current_state.get("model_base_url", Settings.model_fields["model_base_url"].default)
        name = fallback_key_variable(base_url)
        key = next((layer.texts[name] for layer in self.layers if name and layer.texts.get(name)), "")
        if key and "model_api_key" not in self.current_state:
            self.fallback = name
        return key


def load_settings(
    environ: Mapping[str, str] | None = None, *, env_file: Path | None = Path(".env")
) -> Settings:
    """Read the settings.

    Args:
        environ: instead of the process's environment.
        env_file: the file of `NAME=value` lines; it need not exist. None: not looked for.

    Raises:
        SettingsError: with every fault there is.
    """
    faults: list[str] = []
    layers = _layers(os.environ if environ is None else environ, env_file, faults)
    last = RequiredLast(layers)
    try:
        settings = Settings(_build_sources=((*layers, last), {}))
    except ValidationError as error:
        # The original is not chained: a traceback would show the values that it holds.
        raise SettingsError([*faults, *_fault_lines(error, last.fallback)]) from None
    if faults:
        raise SettingsError(faults)
    settings._strays = tuple(stray for layer in layers for stray in layer.strays())  # noqa: SLF001  # its own module
    return settings


def _layers(environ: Mapping[str, str], env_file: Path | None, faults: list[str]) -> list[Layer]:
    """The places that settings come from, first ones first."""
    layers = [
        Layer("the environment", _tidy(environ, faults)),
        Layer(str(env_file), _tidy(_dotenv(env_file, faults), faults)),
    ]
    folder = next((text for layer in layers if (text := layer.texts.get(variable("secrets_dir")))), None)
    layers.append(Layer("the folder of VQA_SECRETS_DIR", _tidy(_secret_files(folder, faults), faults)))
    return layers


def _tidy(texts: Mapping[str, str | None], faults: list[str]) -> dict[str, str]:
    """Names in upper case, values without outer blanks (files edited on Windows bring a CR along)."""
    tidy: dict[str, str] = {}
    for name in sorted(texts):  # upper case sorts first, and wins
        text = texts[name]
        if text is None or not _is_ours(name.upper()):
            continue
        if not _is_unicode(text):
            faults.append(f"{name.upper()}: is not UTF-8 text")
            continue
        tidy.setdefault(name.upper(), text.strip())
    return tidy


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _dotenv(path: Path | None, faults: list[str]) -> Mapping[str, str | None]:
    if path is None:
        return {}
    try:
        return DotEnvSettingsSource(Settings, env_file=path).env_vars
    except (OSError, ValueError) as error:
        faults.append(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}")
        return {}


def _secret_files(folder: str | None, faults: list[str]) -> dict[str, str]:
    """The files of a folder that are named as variables, in any case.

    A missing folder is the field's own fault. Files that are not settings are named, and not read.
    """
    if folder is None or not Path(folder).is_dir():
        return {}
    texts: dict[str, str] = {}
    try:
        paths = sorted(Path(folder).iterdir())
    except OSError as error:
        faults.append(f"{variable('secrets_dir')}: {_shown(folder)} cannot be listed: {error.strerror}")
        return {}
    for path in paths:
        name = path.name.upper()
        if not _is_ours(name):
            continue
        try:
            is_read = name in KNOWN_VARIABLES or name in FALLBACK_KEYS
            texts[path.name] = path.read_text(encoding="utf-8") if is_read else ""
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            faults.append(f"{name}: {_shown(path)} cannot be read: {reason}")
    return texts


# Faults and warnings as lines

_REASONS: Final = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of a sensible size",
    "less_than": "must be under {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be {expected}",
    "missing": "is missing",
    "extra_forbidden": "is not known here",
}


def _fault_lines(error: ValidationError, key_fallback: str | None) -> Iterator[str]:
    for detail in error.errors(include_url=False):
        field, *place = detail["loc"]
        name = variable(str(field))
        if field == "model_api_key" and key_fallback:
            name = f"{name} (taken from {key_fallback})"
        where = f"{_shown('/'.join(map(str, place)))} " if place else ""
        yield f"{name}: {where}{_reason(detail)}"


def _reason(detail: Mapping[str, Any]) -> str:
    kind, context, given = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "value_error":
        return str(context["error"])
    reason = _REASONS.get(kind, "").format(**context) or detail["msg"].lower()
    # Only plain numbers, switches and choices get here with text: none of them is a secret.
    given_text = f", not {_shown(given)}" if isinstance(given, str | int | float) else ""
    link_hint = (
        " (Kubernetes sets this for a Service of that name; `enableServiceLinks: false` for the pod ends it)"
        if isinstance(given, str) and _LINK_VALUE.match(given)
        else ""
    )
    return f"{reason}{given_text}{link_hint}"


def _shown(value: object) -> str:
    """A value in a message: quoted, on one line, not too long."""
    text = repr(str(value))
    return text if len(text) <= 80 else f"{text[:78]}…'"  # noqa: PLR2004  # a line's worth


def _stray_warnings(strays: Sequence[tuple[str, str]]) -> Iterator[str]:
    bare = {name.removeprefix(PREFIX): name for name in KNOWN_VARIABLES}
    for name, place in strays:
        close = difflib.get_close_matches(name.removeprefix(PREFIX), bare, n=1)
        hint = f"; did you mean {bare[close[0]]}?" if close else ""
        yield f"{name}: in {place}, is not a setting and is ignored{hint}"
