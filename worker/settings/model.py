"""All settings, each with its default and its description; the source of `docs/settings.md`.

They are validated together before the first connection.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, TypeAlias

from pydantic import (
    AfterValidator,
    DirectoryPath,
    Field,
    SecretStr,
    ValidationInfo,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from worker.providers import Profile, load_profile
from worker.settings.broker import BrokerSettings, secrets
from worker.settings.faults import shown, variable
from worker.settings.providers import ProfileFile, Provider, provider_name
from worker.settings.urls import ApiKey, HttpUrl, ModelUrl, StoreUrl, host_of, shows_key
from worker.settings.values import (
    DERIVED,
    METADATA,
    AnyCase,
    BucketGlobs,
    Buckets,
    CommaList,
    Count,
    CountOrOff,
    Headers,
    Hosts,
    JsonObject,
    MetadataField,
    Printable,
    Seconds,
    default,
)

INITIAL_CONCURRENCY: Final = 32
MAX_PREFETCH: Final = 65_535  # basic.qos carries the prefetch in 16 bits
# The `x-delivery-limit` of the jobs queue, a backstop: the worker's own limit is lower and reports a failure.
BROKER_DELIVERY_LIMIT: Final = 100
# One minute less than RabbitMQ's `consumer_timeout`, after which it requeues unacknowledged deliveries.
JOB_TIMEOUT_CEILING_S: Final = 1740

# Memory of an image that is being sent: receive buffer, a chunk of 256 KiB, and its base64.
IMAGE_ON_ITS_WAY_BYTES: Final = 768 * 1024
DEFAULT_MAX_IMAGE_PROCESSES: Final = 4
MAX_IMAGE_PROCESSES: Final = 64
# Less would not hold the libraries and a small photo.
MIN_IMAGE_DECODE_BYTES: Final = 64 * 1024 * 1024
# Of a job's `image_max_edge`, see `vqa_worker.messages.job`, which would delay the start.
MIN_EDGE: Final = 64
MAX_EDGE: Final = 16_384
# Enough for one image.
MIN_IMAGE_BUFFER_BYTES: Final = 1024 * 1024


def _standard_reply_queues(above: Mapping[str, Any]) -> tuple[str, ...]:
    results = above.get("results_queue", "vqa.results")
    return (results, "vqa.results.*", "amq.rabbitmq.reply-to.*", "amq.gen-*")


def _model_is_allowed(models: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    model = info.data.get("model")
    if model is not None and model not in models:
        raise ValueError(
            f"does not include {shown(model)}, the value of {variable('model')}: add it, or change that one"
        )
    return models


AllowedModels: TypeAlias = Annotated[
    CommaList,
    AfterValidator(_model_is_allowed),
    default(lambda above: (above["model"],) if "model" in above else ()),
]


def _default_image_processes() -> int:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(DEFAULT_MAX_IMAGE_PROCESSES, cpus)


def _not_the_result_store(url: str, info: ValidationInfo) -> str:
    if url == info.data.get("result_store"):
        raise ValueError(f"is the same as {variable('result_store')}: use another prefix")
    return url


def _at_most_max_concurrency(initial: int, info: ValidationInfo) -> int:
    maximum = info.data.get("max_concurrency")
    if maximum is not None and initial > maximum:
        raise ValueError(
            f"is more than {variable('max_concurrency')} ({maximum}): lower it, or raise that one"
        )
    return initial


class Price(NamedTuple):
    """Price of a model in USD per million tokens: `{"prompt": x, "completion": y}` or `[x, y]`.

    `cached_prompt`: of prompt tokens that the provider has in its cache; None: as other prompt tokens.
    """

    prompt: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    completion: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    cached_prompt: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None


class _EmptyLists(PydanticBaseSettingsSource):
    """Read an empty value of these lists as "nothing is allowed".

    For all other settings an empty value means "not set", because Compose files and charts pass empty strings
    for values that are not filled in.
    """

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        """Return the empty string if the environment has it, else None."""
        is_empty = field_name in Settings.MAY_BE_EMPTY and os.environ.get(variable(field_name)) == ""
        return ("" if is_empty else None), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return only the empty fields."""
        fields = Settings.model_fields
        values = {name: self.get_field_value(fields[name], name)[0] for name in Settings.MAY_BE_EMPTY}
        return {name: value for name, value in values.items() if value is not None}


class Settings(BrokerSettings):
    """All settings, from the environment, `.env` and files. Use `load_settings` for readable errors."""

    MAY_BE_EMPTY: ClassVar[tuple[str, ...]] = ("allowed_reply_to", "allowed_link_hosts")

    allowed_reply_to: Annotated[CommaList, default(_standard_reply_queues)] = DERIVED
    """Comma-separated globs for the `reply_to` queues that jobs may use; they match the whole name. Results
    for other queues go to the results queue. Empty: no `reply_to` is allowed."""
    delivery_limit: Annotated[int, Field(ge=1, lt=BROKER_DELIVERY_LIMIT)] = 20
    """How many deliveries of a job may end without an outcome (because it crashes the worker, for example)
    before it fails with `attempts_exhausted`. Less than 100, the delivery limit of the queue itself."""

    max_attempts: Count = 5
    """Maximum number of attempts when they fail with transient errors of the job (timeouts, 5xx). Rate limits
    and outages are not counted."""
    max_job_bytes: Count = 16_000_000
    """Maximum size of a job's body in bytes; a larger one is `invalid_job`. RabbitMQ 4 rejects messages over
    16 MiB by default."""

    s3_endpoint_url: HttpUrl | None = None
    """Base URL of an S3-compatible server other than AWS, e.g. `https://minio.example:9000`. Credentials and
    region come from the AWS SDK's default chain (`AWS_ACCESS_KEY_ID`, a profile, a role)."""
    s3_addressing_style: Annotated[Literal["auto", "path", "virtual"], AnyCase] = "auto"
    """Position of the bucket in S3 URLs: `path` (`host/bucket/key`), `virtual` (`bucket.host/key`), or
    `auto`: path for a custom endpoint, virtual for AWS."""
    s3_requester_pays: bool = False
    """Whether the worker agrees to pay for reading images from requester-pays buckets."""
    s3_unsigned: BucketGlobs = ()
    """Comma-separated globs for public buckets whose images are read without credentials (`*`: all)."""
    allowed_buckets: Buckets = ()
    """Comma-separated globs for the buckets that jobs may use. `*` allows every bucket. Access points need
    `*` or a glob for their ARN, such as `arn:aws:s3:eu-central-1:123456789012:accesspoint/*`."""
    allowed_link_hosts: Hosts = ("*",)
    """Comma-separated globs for the hosts of `https://` images, which are passed to the model API as links.
    Empty: no links are allowed."""
    image_delivery: Annotated[Literal["inline", "link"], AnyCase] = "inline"
    """How S3 images are sent to the model API. `inline`: the worker reads them and sends base64. `link`: the
    worker sends a presigned URL and never reads the image; the S3 server must be reachable from the provider,
    and providers often fail to fetch links."""
    check_linked_images: bool = False
    """Whether the worker checks size and type of an S3 image before it sends a link to it. Only with
    `VQA_IMAGE_DELIVERY=link`; costs one small S3 request per image."""
    max_image_bytes: Count = 20_000_000
    """Maximum size of an image in bytes, before base64. Set it to your provider's limit."""
    image_convert: Annotated[Literal["auto", "never"], AnyCase] = "auto"
    """`auto`: images that the model API takes are sent unchanged; others that can be decoded (HEIC, AVIF,
    GIF, TIFF, BMP, JPEG 2000, PDF, CMYK, 16 bits), that lie on their side, or that exceed a limit are
    converted. Needs the extra `images`, which the container image has. `never`: they are refused, or sent as
    they are. See [images](images.md)."""
    image_max_edge: Annotated[int, Field(ge=MIN_EDGE, le=MAX_EDGE)] | None = None
    """The longest side in pixels that images are sent with; larger ones are scaled down, which saves tokens.
    Jobs can ask for less. Not for images sent as links."""
    image_max_pixels: Count = 200_000_000
    """Maximum number of pixels of an image or page; one with more is `image_too_large`."""
    max_source_bytes: Count = 100_000_000
    """Maximum size in bytes of an image or document that is read to be converted."""
    image_processes: Annotated[
        int, Field(ge=1, le=MAX_IMAGE_PROCESSES), default(lambda _: _default_image_processes())
    ] = DERIVED
    """Maximum number of processes that convert images. They are started when they are needed, and end after a
    minute without work."""
    image_decode_bytes: Annotated[int, Field(ge=MIN_IMAGE_DECODE_BYTES)] = 1024 * 1024 * 1024
    """Memory budget in bytes for decoding images, of all these processes together, in addition to
    `VQA_IMAGE_BUFFER_BYTES`. A photo of 12 megapixels takes 125 MB of it as JPEG and 220 MB as HEIC. A JPEG
    that needs more than the whole budget is scaled down, another image is `image_too_large`."""
    pdf_dpi: Annotated[int, Field(ge=36, le=600)] = 150
    """Resolution in dots per inch that pages of a PDF are rendered with."""
    pdf_max_pages: Annotated[int, Field(ge=1, le=1000)] = 20
    """Maximum number of pages that are sent of one PDF or TIFF."""
    image_buffer_bytes: Annotated[int, Field(ge=MIN_IMAGE_BUFFER_BYTES)] = 64 * 1024 * 1024
    """Memory budget in bytes for images that are being sent from S3 to the model API, per process; further
    jobs wait. An image reserves 768 KiB while it is sent, regardless of its size. See
    [performance](performance.md) for the memory that a pod needs."""
    max_images_per_job: Count = 16
    """Maximum number of images in a job."""
    # The job's `PromptOrder`, whose module loads the client: a wrong setting is reported sooner without.
    prompt_order: Annotated[Literal["images_first", "question_first"], AnyCase] = "images_first"
    """Whether the images or the question come first in the request, for jobs in the short form without
    `prompt_order`. Providers cache common prefixes: use `question_first` if many jobs have the same question,
    `images_first` if many have the same images."""
    send_image_detail: bool = False
    """Whether the field `detail` of a job's `image_url` is sent to the model API, also if the
    [provider profile](providers.md) does not say so. DeepInfra does not support it."""

    provider: Provider = None
    """Name of the [provider profile](providers.md): what the model API accepts, and what its error answers
    mean. By default the host of `VQA_MODEL_BASE_URL` decides; `generic` if no profile has it."""
    model_base_url: ModelUrl = "https://api.deepinfra.com/v1/openai"
    """Base URL of the OpenAI-compatible model API; `/chat/completions` is appended to it. A query is accepted
    only as `?api-version=…` (Azure). If the URL of a known provider has no path, that of its profile is used.
    """
    provider_profile: ProfileFile = None
    """TOML file that overrides values of the provider profile; its rules come before the built-in ones. See
    [providers](providers.md)."""
    deepinfra_token: SecretStr = Field(default=SecretStr(""), validation_alias="DEEPINFRA_TOKEN")
    """Used if `VQA_MODEL_API_KEY` is not set and the model API is DeepInfra's. Secret."""
    openai_api_key: SecretStr = Field(default=SecretStr(""), validation_alias="OPENAI_API_KEY")
    """Used if `VQA_MODEL_API_KEY` is not set and the model API is OpenAI's. Secret."""
    model_api_key: ApiKey = SecretStr("")
    """API key of the model API. If not set, `DEEPINFRA_TOKEN` is used for DeepInfra's host and
    `OPENAI_API_KEY` for OpenAI's host, and for no other. Use any non-empty value if the server requires no
    key. Secret."""
    model: Printable = "meta-llama/Llama-3.2-90B-Vision-Instruct"
    """Model for jobs without `model`."""
    allowed_models: AllowedModels = DERIVED
    """Comma-separated models that jobs may use; must include `VQA_MODEL`."""
    model_timeout: Seconds = 120
    """Timeout of one model request in seconds. Raise it for long answers or slow models. A request in a
    slower service tier, such as `flex`, may take as long as the [provider profile](providers.md) says, within
    `VQA_JOB_TIMEOUT`."""
    flex_fallback: bool = False
    """Whether a job with `"service_tier": "flex"` is sent in the default tier, which costs more, if the tier
    `flex` has no capacity. Otherwise it waits, as for any rate limit; so it does at the account's limit."""
    job_timeout: Annotated[Seconds, Field(lt=JOB_TIMEOUT_CEILING_S)] = 600
    """Timeout of one delivery of a job in seconds, from receipt to ack: waiting, images, model requests and
    publishing. Less than 1740, because RabbitMQ's consumer timeout is 30 minutes."""
    schema_repairs: CountOrOff = 1
    """How many further model requests may follow an answer that does not satisfy the job's JSON schema
    (`response_format`); each shows the model its answer and the errors. `0`: the answer is only validated.
    `off`: it is not validated, and results have no `parsed`. See [structured answers](structured-answers.md).
    """
    default_max_tokens: Count | None = None
    """Token limit (`max_tokens`) of jobs whose `params` have none. Default: that of the model API."""
    max_tokens_limit: Count | None = None
    """Highest token limit that is sent: a job's higher one is lowered to it, and a job without one gets it,
    or `VQA_DEFAULT_MAX_TOKENS` if that is lower. It bounds what one answer can cost."""
    model_headers: Headers = {}  # noqa: RUF012 - pydantic copies it
    """JSON object with extra HTTP headers for every model request, e.g. `{"X-Project": "vision"}`. Values are
    treated as secrets."""
    max_concurrency: Annotated[int, Field(ge=1, le=MAX_PREFETCH)] = 64
    """Maximum number of jobs in flight per process. The concurrency limit starts at `VQA_INITIAL_CONCURRENCY`
    and adapts automatically: down on 429, up again otherwise."""
    initial_concurrency: Annotated[
        Count,
        AfterValidator(_at_most_max_concurrency),
        default(lambda above: min(INITIAL_CONCURRENCY, above.get("max_concurrency", INITIAL_CONCURRENCY))),
    ] = DERIVED
    """Initial concurrency limit of each model, at most `VQA_MAX_CONCURRENCY`. Until the first 429 it doubles
    with each round of requests."""

    result_store: StoreUrl | None = None
    """`s3://bucket/prefix` where answers are stored, so that no job is billed twice: see
    [reliability](reliability.md). On the same S3 server as the images. The worker needs permission to get,
    put, delete and list objects there. Set a lifecycle rule that expires old objects."""
    large_results: Annotated[StoreUrl, AfterValidator(_not_the_result_store)] | None = None
    """`s3://bucket/prefix` where results are written that RabbitMQ refuses because of their size, or that are
    larger than `VQA_MAX_RESULT_BYTES`; their message has the field `result_url` instead of the answer. Not
    the prefix of `VQA_RESULT_STORE`. On the same S3 server as the images. The worker needs permission to put
    objects there, and the readers of results to get them. Set a lifecycle rule that expires old objects. See
    [reliability](reliability.md#large-results)."""
    max_result_bytes: Count | None = None
    """Size in bytes above which a result is written to `VQA_LARGE_RESULTS`; without that setting, it becomes
    `result_too_large`. RabbitMQ's own limit is 16 MiB in RabbitMQ 4 and 128 MiB before."""
    prices: Annotated[dict[str, Price], JsonObject] = {}  # noqa: RUF012 - pydantic copies it
    """JSON object with prices in USD per million tokens: `{"model": {"prompt": 0.35, "completion": 0.4}}` or
    `{"model": [0.35, 0.4]}`. `cached_prompt` is the price of prompt tokens in the provider's cache; without
    it, they cost as much as the others. Used for `cost_usd` if the provider does not report the cost."""
    include_response: bool = False
    """Whether every result includes the whole response body of the model API. By default only results whose
    answer is more than plain text do."""

    tenant_from: MetadataField | None = None
    """Field of the job that names its tenant: `metadata.` and the name of a metadata field, e.g.
    `metadata.team`. Jobs, tokens and cost are then also counted by tenant (`vqa_tenant_…`)."""
    tenants: CommaList = ()
    """Comma-separated tenants to report separately; all others are counted as `other`. Each tenant adds a few
    time series per model."""

    http_host: Printable = "0.0.0.0"  # noqa: S104  # probes and scrapes come from outside the container
    """Listen address for `/livez`, `/readyz` and `/metrics`."""
    http_port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    """Listen port for them; `0` selects a free port."""
    shutdown_grace: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 150
    """Seconds that jobs in flight have to finish after SIGTERM; the others are then requeued. Set it higher
    than `VQA_MODEL_TIMEOUT`, and the pod's `terminationGracePeriodSeconds` higher than this."""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], AnyCase] = "info"
    """`debug`, `info`, `warning` or `error`."""
    log_format: Annotated[Literal["json", "console"] | None, AnyCase] = None
    """`json`: one object per line; `console`: readable text."""
    secrets_dir: DirectoryPath | None = None
    """Folder with one file per setting, named like the variable (in any case), e.g. a mounted Secret. The
    environment and `.env` take precedence."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *args: Any, **sources: PydanticBaseSettingsSource
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return pydantic-settings' sources, with empty lists before the environment."""
        usual = super().settings_customise_sources(settings_cls, *args, **sources)
        return (usual[0], _EmptyLists(settings_cls), *usual[1:])

    @property
    def tenant_key(self) -> str | None:
        """Return the name of the metadata field with the tenant."""
        return self.tenant_from and self.tenant_from.removeprefix(METADATA)

    @property
    def profile(self) -> Profile:
        """Return the provider's profile."""
        name = provider_name({"provider": self.provider, "model_base_url": self.model_base_url})
        return load_profile(name, self.provider_profile)

    def secret_values(self) -> tuple[str, ...]:
        """Return every secret value: those of the broker, the API key, and extra headers."""
        values = [self.model_api_key, *self.model_headers.values()]
        return super().secret_values() + secrets(*(value.get_secret_value() for value in values))

    def warnings(self) -> list[str]:
        """Return a line for each valid but suspicious setting, with the variable's name first."""
        return [*self._odd_combinations(), *self._slow_tiers(), *self._unknown_variables]

    def _slow_tiers(self) -> Iterator[str]:
        # Without a fallback it is not known whether any job uses a tier.
        longest_s = max((tier.timeout_s for tier in self.profile.tiers.values()), default=0.0)
        if self.flex_fallback and longest_s > self.job_timeout:
            yield (
                f"VQA_JOB_TIMEOUT: {self.job_timeout:g} s are less than a request in the tier `flex` may take"
                f" at {self.profile.title} ({longest_s:g} s): it can time out before the fallback"
            )

    def _odd_combinations(self) -> Iterator[str]:
        if self.shutdown_grace < self.model_timeout:
            yield (
                f"VQA_SHUTDOWN_GRACE: {self.shutdown_grace:g} s are less than VQA_MODEL_TIMEOUT"
                f" ({self.model_timeout:g} s): a shutdown can abort model requests that are billed"
            )
        if self.job_timeout < self.model_timeout:
            yield (
                f"VQA_JOB_TIMEOUT: {self.job_timeout:g} s are less than VQA_MODEL_TIMEOUT"
                f" ({self.model_timeout:g} s), which can then never be reached"
            )
        if self.check_linked_images and self.image_delivery == "inline":
            yield "VQA_CHECK_LINKED_IMAGES: has no effect without VQA_IMAGE_DELIVERY=link"
        if self.image_convert == "never" and self.image_max_edge is not None:
            yield "VQA_IMAGE_MAX_EDGE: larger images are refused, because VQA_IMAGE_CONVERT is never"
        needed = self.max_images_per_job * IMAGE_ON_ITS_WAY_BYTES
        if self.image_delivery == "inline" and self.image_buffer_bytes < needed:
            yield (
                f"VQA_IMAGE_BUFFER_BYTES: a job of VQA_MAX_IMAGES_PER_JOB ({self.max_images_per_job}) images"
                f" reserves up to {needed} bytes, also if this is lower"
            )
        if self.tenants and self.tenant_from is None:
            yield "VQA_TENANTS: has no effect without VQA_TENANT_FROM"
        if self.tenant_from is not None and not self.tenants:
            yield "VQA_TENANT_FROM: without VQA_TENANTS the jobs of all tenants are counted as `other`"
        if shows_key(self.model_base_url):
            yield "VQA_MODEL_BASE_URL: sends the API key unencrypted over the network; use https://"
        form = self.profile.base_url
        if host_of(form) == host_of(self.model_base_url) and form != self.model_base_url:
            yield f"VQA_MODEL_BASE_URL: the API of {self.profile.title} is at {form}"
