"""All settings, each with its default and its description; `docs/settings.md` is made of these.

They are checked as a whole before any connection is made.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    DirectoryPath,
    Field,
    SecretStr,
    ValidationInfo,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from worker.settings.broker import BrokerSettings, secrets
from worker.settings.faults import shown, variable
from worker.settings.urls import ApiKey, HttpUrl, StoreUrl, shows_key
from worker.settings.values import (
    DERIVED,
    METADATA,
    AnyCase,
    Buckets,
    CommaList,
    Count,
    Headers,
    Hosts,
    JsonObject,
    MetadataField,
    Printable,
    Seconds,
    default,
)

MAX_PREFETCH: Final = 65_535  # basic.qos carries the prefetch in 16 bits
# The `x-delivery-limit` of the jobs queue, a backstop only: the worker's own limit comes first, and tells the
# publisher.
BROKER_DELIVERY_LIMIT: Final = 100
# RabbitMQ takes back what was not acked in 30 minutes (`consumer_timeout`); one minute is kept in hand.
JOB_TIMEOUT_CEILING_S: Final = 1740

# What an image takes while it is on its way: what was received and not yet read, a piece of a quarter of a
# megabyte, and its base64, some of it not yet sent.
IMAGE_ON_ITS_WAY_BYTES: Final = 768 * 1024
# Room for one.
MIN_IMAGE_BUFFER_BYTES: Final = 1024 * 1024


def _standard_reply_queues(above: Mapping[str, Any]) -> tuple[str, ...]:
    results = above.get("results_queue", "vqa.results")
    return (results, "vqa.results.*", "amq.rabbitmq.reply-to.*", "amq.gen-*")


def _model_is_allowed(models: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    model = info.data.get("model")
    if model is not None and model not in models:
        raise ValueError(
            f"lacks {shown(model)}, the value of {variable('model')}: add it, or change that one"
        )
    return models


class Price(NamedTuple):
    """What a model costs in USD per million tokens: `{"prompt": x, "completion": y}` or `[x, y]`."""

    prompt: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    completion: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _SaysNone(PydanticBaseSettingsSource):
    """Lists for which an empty value is an answer: nothing is allowed.

    Everywhere else it is the same as no value at all, because compose files and charts hand empty strings on
    for whatever nobody has filled in.
    """

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        """The empty text, if that is what the environment says."""
        is_empty = field_name in Settings.MAY_BE_EMPTY and os.environ.get(variable(field_name)) == ""
        return ("" if is_empty else None), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Only the fields that are empty."""
        fields = Settings.model_fields
        values = {name: self.get_field_value(fields[name], name)[0] for name in Settings.MAY_BE_EMPTY}
        return {name: value for name, value in values.items() if value is not None}


class Settings(BrokerSettings):
    """All settings, from the environment, `.env` and files; `load_settings` puts faults into words."""

    MAY_BE_EMPTY: ClassVar[tuple[str, ...]] = ("allowed_reply_to", "allowed_link_hosts")

    allowed_reply_to: Annotated[CommaList, default(_standard_reply_queues)] = DERIVED
    """Comma list of globs on the whole name: which `reply_to` a job may ask for. The result of a job that
    asks for another goes to the results queue. Empty: none may be asked for."""
    delivery_limit: Annotated[int, Field(ge=1, lt=BROKER_DELIVERY_LIMIT)] = 20
    """How many times a job may be delivered without coming to an end (it kills its worker, say) before it
    fails with `attempts_exhausted`. Under 100, which is the broker's own limit behind it."""

    max_attempts: Count = 5
    """How many times a job is tried when attempts fail for a passing reason of its own (time-outs, 5xx
    answers). Rate limits and outages don't count."""
    max_job_bytes: Count = 16_000_000
    """Largest body of a job in bytes; a larger one is `invalid_job`. RabbitMQ 4 itself refuses messages over
    16 MiB unless told otherwise."""

    s3_endpoint_url: HttpUrl | None = None
    """Base URL of an S3-compatible store that is not AWS, e.g. `https://minio.example:9000`. Credentials and
    region come from the usual AWS chain (`AWS_ACCESS_KEY_ID`, a profile, a role)."""
    s3_addressing_style: Annotated[Literal["auto", "path", "virtual"], AnyCase] = "auto"
    """Where the bucket stands in S3 URLs: `path` (`host/bucket/key`), `virtual` (`bucket.host/key`), or
    `auto`: path for a custom endpoint, virtual for AWS."""
    allowed_buckets: Buckets = ()
    """Comma list of globs: the buckets that jobs may name. `*` says any, in so many words."""
    allowed_link_hosts: Hosts = ("*",)
    """Comma list of globs: the hosts of `https://` images that jobs may pass on to the API. Empty: none."""
    image_delivery: Annotated[Literal["inline", "link"], AnyCase] = "inline"
    """How S3 images reach the API. `inline`: read by the worker and sent as base64 in the request. `link`: as
    a presigned URL, so that the bytes never pass through the worker; the store must be reachable from the
    provider, and providers often fail to fetch."""
    check_linked_images: bool = False
    """Whether the worker looks at size and first bytes of an S3 image before it hands on a link to it.
    With `VQA_IMAGE_DELIVERY=link` only; costs one small request to S3 for each image."""
    max_image_bytes: Count = 20_000_000
    """Largest image in bytes, before base64. Keep to what your provider accepts."""
    image_buffer_bytes: Annotated[int, Field(ge=MIN_IMAGE_BUFFER_BYTES)] = 64 * 1024 * 1024
    """Bytes of images that one process may hold at a time while they are on their way from S3 to the API;
    jobs wait for their turn. An image takes 768 KiB of it while it is sent, whatever its size. What memory a
    pod needs is told in [performance](performance.md)."""
    max_images_per_job: Count = 16
    """Most images in one job."""
    send_image_detail: bool = False
    """Whether the field `detail` of a job's `image_url` is passed on to the API. DeepInfra does not take it,
    OpenAI does."""

    model_base_url: HttpUrl = "https://api.deepinfra.com/v1/openai"
    """Base URL of the OpenAI-compatible API; `/chat/completions` is appended to it."""
    deepinfra_token: SecretStr = Field(default=SecretStr(""), validation_alias="DEEPINFRA_TOKEN")
    """Used for `VQA_MODEL_API_KEY` where that is not set and the API is DeepInfra's. A secret."""
    openai_api_key: SecretStr = Field(default=SecretStr(""), validation_alias="OPENAI_API_KEY")
    """Used for `VQA_MODEL_API_KEY` where that is not set and the API is OpenAI's. A secret."""
    model_api_key: ApiKey = SecretStr("")
    """The API's key. Without it, `DEEPINFRA_TOKEN` is used for DeepInfra's host and `OPENAI_API_KEY` for
    OpenAI's, never one for the other. Any word for a server that wants none. A secret."""
    model: Printable = "meta-llama/Llama-3.2-90B-Vision-Instruct"
    """The model for jobs that name none."""
    allowed_models: Annotated[
        CommaList,
        AfterValidator(_model_is_allowed),
        default(lambda above: (above["model"],) if "model" in above else ()),
    ] = DERIVED
    """Comma list of the models that jobs may name, `VQA_MODEL` among them."""
    model_timeout: Seconds = 120
    """Seconds that one call to the API may take. Raise it for long answers or slow models."""
    job_timeout: Annotated[Seconds, Field(lt=JOB_TIMEOUT_CEILING_S)] = 600
    """Seconds for one delivery of a job from receipt to its end: waiting, images, calls and publishing. Under
    1740, because RabbitMQ takes back what is not acked in 30 minutes."""
    model_headers: Headers = {}  # noqa: RUF012 - pydantic copies it
    """JSON object of extra headers for every call to the API, e.g. `{"X-Project": "vision"}`. The values are
    treated as secrets."""
    max_concurrency: Annotated[int, Field(ge=1, le=MAX_PREFETCH)] = 64
    """Most jobs in flight in one process. The limit in force starts at 32 at most and moves by itself: down
    when the API says it is too much, up again while it copes."""

    result_store: StoreUrl | None = None
    """`s3://bucket/prefix` where answers are kept, in the S3 that images come from, so that no worker pays
    twice for one job: see [reliability](reliability.md). The worker must be allowed to get, put and delete
    objects there, and to list them. Let the bucket expire old objects."""
    prices: Annotated[dict[str, Price], JsonObject] = {}  # noqa: RUF012 - pydantic copies it
    """JSON object: what models cost in USD per million tokens, `{"model": {"prompt": 0.35, "completion":
    0.4}}` or `{"model": [0.35, 0.4]}`. Used for `cost_usd` where the provider gives no figure of its own."""
    include_response: bool = False
    """Whether every result carries the API's whole response body. Otherwise only those do whose answer is
    more than plain text."""

    tenant_from: MetadataField | None = None
    """Where a job names the tenant that it is for: `metadata.` and the name of a field of its metadata, e.g.
    `metadata.team`. Jobs, tokens and costs are then counted by tenant as well (`vqa_tenant_…`)."""
    tenants: CommaList = ()
    """Comma list of the tenants that are told apart; the jobs of all others count as `other`. Each is a
    handful of time series for each model."""

    http_host: Printable = "0.0.0.0"  # noqa: S104  # probes and scrapes come from outside the container
    """The address that `/livez`, `/readyz` and `/metrics` are served on."""
    http_port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    """The port for them; `0` takes any free one."""
    shutdown_grace: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 150
    """Seconds that SIGTERM leaves to the jobs in flight; what is not done by then goes back to the queue.
    Keep it above `VQA_MODEL_TIMEOUT`, and the orchestrator's own grace period above this."""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], AnyCase] = "info"
    """`debug`, `info`, `warning` or `error`."""
    log_format: Annotated[Literal["json", "console"] | None, AnyCase] = None
    """`json`: one object a line; `console`: for a person."""
    secrets_dir: DirectoryPath | None = None
    """A folder of files named as the settings (in any case), each holding one value, e.g. a mounted secret.
    The environment and `.env` come before it."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *args: Any, **sources: PydanticBaseSettingsSource
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The library's own sources in its own order, and before them the lists that say none."""
        usual = super().settings_customise_sources(settings_cls, *args, **sources)
        return (usual[0], _SaysNone(settings_cls), *usual[1:])

    @property
    def tenant_key(self) -> str | None:
        """The field of a job's metadata that names its tenant."""
        return self.tenant_from and self.tenant_from.removeprefix(METADATA)

    def secret_values(self) -> tuple[str, ...]:
        """Every value that must never be shown: those of the broker, the API's key, and extra headers."""
        values = [self.model_api_key, *self.model_headers.values()]
        return super().secret_values() + secrets(*(value.get_secret_value() for value in values))

    def warnings(self) -> list[str]:
        """What is allowed and yet probably not meant, one line each, with the variable's name first."""
        return [*self._odd_combinations(), *self._strays]

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
        if self.check_linked_images and self.image_delivery == "inline":
            yield "VQA_CHECK_LINKED_IMAGES: means nothing without VQA_IMAGE_DELIVERY=link; all are looked at"
        needed = self.max_images_per_job * IMAGE_ON_ITS_WAY_BYTES
        if self.image_delivery == "inline" and self.image_buffer_bytes < needed:
            yield (
                f"VQA_IMAGE_BUFFER_BYTES: a job of VQA_MAX_IMAGES_PER_JOB ({self.max_images_per_job}) images"
                f" takes up to {needed} bytes, whatever this says"
            )
        if self.tenants and self.tenant_from is None:
            yield "VQA_TENANTS: means nothing without VQA_TENANT_FROM, which says where jobs name them"
        if self.tenant_from is not None and not self.tenants:
            yield "VQA_TENANT_FROM: without VQA_TENANTS the jobs of all tenants count as `other`"
        if shows_key(self.model_base_url):
            yield "VQA_MODEL_BASE_URL: the API key goes over the network in clear; use https://"
