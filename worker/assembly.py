"""Puts together what answers jobs. Importing it loads the SDKs, half a second's work: see `app.run`."""

import asyncio
from contextlib import AsyncExitStack

from worker.health import Health
from worker.images.load import Images, LinkPolicy
from worker.images.source import SourcePolicy
from worker.limiter import Gate
from worker.model.client import Model
from worker.processor import Processor, Rules
from worker.redact import Redactor
from worker.retry import RetryPolicy
from worker.s3.aws import Aws, Endpoint
from worker.s3.client import S3
from worker.settings import Settings


async def assemble(settings: Settings, *, gate: Gate, health: Health, stack: AsyncExitStack) -> Processor:
    """The processor with its clients, which `stack` closes.

    Raises:
        S3ConfigurationError: the AWS configuration makes no sense; the message names what is wrong.
    """
    redact = Redactor(settings.secret_values())
    return Processor(
        await _images(settings, stack),
        _model(settings, redact, stack),
        gate=gate,
        health=health,
        rules=_rules(settings),
        redact=redact,
    )


async def _images(settings: Settings, stack: AsyncExitStack) -> Images:
    endpoint = Endpoint(settings.s3_endpoint_url, settings.s3_addressing_style)
    # In a thread: it reads the AWS configuration, and the SDK's rules where they are needed.
    s3 = S3(await asyncio.to_thread(Aws, endpoint))
    stack.push_async_callback(s3.close)
    # A presigned link has to outlive the job and the last call made for it.
    outlives_job_s = int(settings.job_timeout + settings.model_timeout)
    by_link = settings.image_delivery == "link"
    return Images(
        s3,
        SourcePolicy(settings.allowed_buckets, settings.allowed_link_hosts),
        max_bytes=settings.max_image_bytes,
        max_per_job=settings.max_images_per_job,
        buffer_bytes=settings.image_buffer_bytes,
        links=LinkPolicy(outlives_job_s, look=settings.check_linked_images) if by_link else None,
    )


def _model(settings: Settings, redact: Redactor, stack: AsyncExitStack) -> Model:
    model = Model(
        base_url=settings.model_base_url,
        api_key=settings.model_api_key.get_secret_value(),
        headers={name: value.get_secret_value() for name, value in settings.model_headers.items()},
        timeout_s=settings.model_timeout,
        prices=settings.prices,
        redact=redact,
    )
    stack.push_async_callback(model.close)
    return model


def _rules(settings: Settings) -> Rules:
    return Rules(
        default_model=settings.model,
        allowed_models=frozenset(settings.allowed_models),
        max_job_bytes=settings.max_job_bytes,
        delivery_limit=settings.delivery_limit,
        job_timeout_s=settings.job_timeout,
        send_image_detail=settings.send_image_detail,
        include_response=settings.include_response,
        retry=RetryPolicy(settings.max_attempts, settings.retry_delays),
    )
