"""Build the processor and its clients. Importing this module loads the SDKs, which takes half a second."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

import structlog

from vqa_worker.messages.image_types import COMMON_TYPES
from worker.app.parts import Parts
from worker.errors import DependencyDownError
from worker.images.conversion import is_installed
from worker.images.conversion_pool import ConversionPool
from worker.images.loader import ImageLoader, LinkPolicy
from worker.images.preparation import ImageRules
from worker.images.source import SourcePolicy
from worker.jobs.outcome_builder import OutcomeBuilder
from worker.jobs.request import RequestRules
from worker.model.client import Model
from worker.observability.redaction import Redactor
from worker.processor import Processor, ProcessorDependencies
from worker.resilience.retry_policy import RetryPolicy
from worker.result_store.cancelled_jobs import CancelledJobStore
from worker.result_store.store import ResultStore
from worker.s3.aws import Aws, Endpoint
from worker.s3.client import S3
from worker.s3.conditional_store import ConditionalStore
from worker.s3.large_results import LargeResults
from worker.settings import Settings

log = structlog.get_logger(__name__)

# For reading the cancelled jobs at the start, or a test write. A stop signal takes effect only afterwards.
CATCH_UP_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Assembled:
    """The processor, and the background tasks that it needs, by name.

    Attributes:
        large_results: writes large results; None without `VQA_LARGE_RESULTS`.
    """

    processor: Processor
    background: Mapping[str, Callable[[], Awaitable[None]]]
    large_results: LargeResults | None


async def assemble(settings: Settings, parts: Parts, stack: AsyncExitStack) -> Assembled:
    """Build the processor and its clients, which `stack` closes.

    Raises:
        S3ConfigurationError: the AWS configuration is invalid; the message names the fault.
    """
    redact = Redactor(settings.secret_values())
    s3 = await open_s3(settings, stack)
    large_results = None
    if settings.large_results is not None:
        large_results = LargeResults(s3, settings.large_results, parts.clock)
        await _probe(large_results)
    store, background = None, {}
    if settings.result_store is not None:
        objects = conditional_store_at(settings.result_store, s3)
        store = ResultStore(objects, max_job_s=settings.job_timeout, clock=parts.clock)
        stack.push_async_callback(store.close)
        cancelled_job_store = CancelledJobStore(objects, parts.cancelled_jobs.remember)
        await _catch_up(cancelled_job_store)
        parts.cancelled_jobs.store_in(cancelled_job_store)
        background = {
            "result-store": store.send_heartbeats,
            "result-store-leftovers": store.tidy_up,
            "cancelled-jobs": cancelled_job_store.run,
        }
    dependencies = ProcessorDependencies(
        images=image_loader(settings, s3, stack),
        model=open_model(settings, redact, stack),
        store=store,
        limiter=parts.limiter,
        detector=parts.detector,
        outage_reports=parts.outage_reports,
        cancelled_jobs=parts.cancelled_jobs,
        tenants=parts.tenants,
        outcomes=OutcomeBuilder(redact, parts.clock, include_response=settings.include_response),
        rules=_rules(settings),
        retry=RetryPolicy(settings.max_attempts, settings.retry_delays),
        job_timeout_s=settings.job_timeout,
        clock=parts.clock,
    )
    return Assembled(Processor(dependencies), background, large_results)


async def open_s3(settings: Settings, stack: AsyncExitStack) -> S3:
    """Return the S3 client of the settings, which `stack` closes.

    Raises:
        S3ConfigurationError: the AWS configuration is invalid.
    """
    endpoint = Endpoint(
        settings.s3_endpoint_url,
        settings.s3_addressing_style,
        requester_pays=settings.s3_requester_pays,
        unsigned=settings.s3_unsigned,
    )
    # In a thread, since it reads files.
    max_bytes = image_rules(settings).max_read_bytes
    s3 = S3(await asyncio.to_thread(Aws, endpoint), max_unsized_bytes=max_bytes)
    stack.push_async_callback(s3.close)
    return s3


def conditional_store_at(url: str, s3: S3) -> ConditionalStore:
    """Return the store of the objects under `VQA_RESULT_STORE`."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return ConditionalStore(s3, bucket, f"{prefix}/" if prefix else "", setting="VQA_RESULT_STORE")


async def _catch_up(cancelled_job_store: CancelledJobStore) -> None:
    """Read the cancelled jobs before the first job; a failing or slow S3 does not delay the start further."""
    with suppress(DependencyDownError, TimeoutError):
        async with asyncio.timeout(CATCH_UP_TIMEOUT_S):
            await cancelled_job_store.catch_up()


async def _probe(large_results: LargeResults) -> None:
    """Report before the first job that large results cannot be written; do not delay the start further."""
    try:
        async with asyncio.timeout(CATCH_UP_TIMEOUT_S):
            await large_results.probe()
    except (DependencyDownError, TimeoutError) as error:
        log.warning("large_results_unavailable", reason=str(error) or "S3 does not answer")


def image_rules(settings: Settings) -> ImageRules:
    """Return what may be sent of images, and how the rest is converted."""
    accepted, why_not = settings.profile.images, _why_not_converted(settings)
    max_bytes = settings.max_image_bytes
    if not why_not and accepted.max_bytes is not None:
        max_bytes = min(max_bytes, accepted.max_bytes)
    return ImageRules(
        max_image_bytes=max_bytes,
        max_source_bytes=settings.max_source_bytes,
        max_edge=settings.image_max_edge,
        max_pixels=settings.image_max_pixels,
        pdf_dpi=settings.pdf_dpi,
        pdf_max_pages=settings.pdf_max_pages,
        types=accepted.types or COMMON_TYPES,
        takes_cmyk=bool(accepted.cmyk),
        takes_16_bit=bool(accepted.bits_16),
        why_not_converted=why_not,
    )


def _why_not_converted(settings: Settings) -> str:
    if settings.image_convert == "never":
        return "VQA_IMAGE_CONVERT is never"
    return "" if is_installed() else "the extra `images` is not installed (vqa-worker[images])"


def image_loader(settings: Settings, s3: S3, stack: AsyncExitStack) -> ImageLoader:
    """Return the loader of the settings; `stack` ends its processes."""
    # A presigned link must be valid for the whole job and its last call.
    expires_s = int(settings.job_timeout + settings.model_timeout)
    by_link = settings.image_delivery == "link"
    pool = ConversionPool(processes=settings.image_processes, memory_bytes=settings.image_decode_bytes)
    stack.push_async_callback(pool.close)
    return ImageLoader(
        s3,
        SourcePolicy(settings.allowed_buckets, settings.allowed_link_hosts),
        image_rules(settings),
        pool,
        max_per_job=settings.max_images_per_job,
        buffer_bytes=settings.image_buffer_bytes,
        links=LinkPolicy(expires_s, check_content=settings.check_linked_images) if by_link else None,
    )


def open_model(settings: Settings, redact: Redactor, stack: AsyncExitStack) -> Model:
    """Return the API client of the settings, which `stack` closes."""
    model = Model(
        base_url=settings.model_base_url,
        api_key=settings.model_api_key.get_secret_value(),
        headers={name: value.get_secret_value() for name, value in settings.model_headers.items()},
        timeout_s=settings.model_timeout,
        prices=settings.prices,
        redact=redact,
        profile=settings.profile,
    )
    stack.push_async_callback(model.close)
    return model


def _rules(settings: Settings) -> RequestRules:
    return RequestRules(
        default_model=settings.model,
        allowed_models=frozenset(settings.allowed_models),
        max_job_bytes=settings.max_job_bytes,
        delivery_limit=settings.delivery_limit,
        send_image_detail=settings.send_image_detail or settings.profile.images.detail == "sent",
        stores_results=settings.result_store is not None,
        prompt_order=settings.prompt_order,
        flex_fallback=settings.flex_fallback,
        max_schema_repairs=settings.schema_repairs,
        schema_in_prompt=settings.profile.request.json_schema is False,
        json_mode=settings.profile.request.json_object is True,
        token_limit=settings.profile.request.token_limit,
        default_max_tokens=settings.default_max_tokens,
        max_tokens_limit=settings.max_tokens_limit,
        stream_only_models=frozenset(filter(settings.profile.only_streams, settings.allowed_models)),
    )
