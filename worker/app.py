"""The composition root: builds everything, runs it, stops it in two phases."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import structlog
from aiohttp import web

from worker import __version__, http
from worker.health import Health
from worker.http import Heartbeat, Readiness
from worker.images.aws import S3ConfigurationError
from worker.images.load import Images, LinkPolicy
from worker.images.s3 import S3
from worker.images.source import SourcePolicy
from worker.inflight import InFlight
from worker.limiter import AdaptiveLimit, Gate
from worker.model.client import Model
from worker.outcome import Outcome
from worker.pause import PauseKeeper
from worker.processor import Processor, Rules
from worker.rabbit.connection import Broker
from worker.rabbit.consumer import Consumer
from worker.rabbit.publisher import Publisher
from worker.rabbit.topology import Topology
from worker.rabbit.wire import install_tolerant_decoders
from worker.redact import Redactor
from worker.retry import RetryPolicy
from worker.settings import Settings, broker_ssl_context
from worker.settlement import ReplyPolicy, Settlement

log = structlog.get_logger(__name__)

# After the grace: time to hand back what was cut off. Kubernetes' own grace must leave room for it.
GIVE_BACK_S = 10.0
HOLD_TIMEOUT_S = 5.0


class StartError(Exception):
    """The worker cannot start as it is set up; the message names the setting."""


@dataclass(frozen=True)
class _Parts:
    """What lives as long as the worker does."""

    publisher: Publisher
    consumer: Consumer
    in_flight: InFlight
    pause: PauseKeeper
    health: Health
    gate: Gate


async def run(settings: Settings) -> bool:
    """Work until SIGTERM or SIGINT, then finish what is in flight.

    Returns:
        Whether everything came to its end; False if something had to be cut off.

    Raises:
        StartError: the HTTP address cannot be bound.
        BrokerRefusedError, TopologyError: see `Consumer.run`; in an ExceptionGroup.
    """
    stop = asyncio.Event()
    _handle_signals(stop)
    for warning in settings.warnings():
        log.warning("setting", warning=warning)
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        parts = _build(settings, tasks, stack)
        heartbeat = Heartbeat()
        app = http.application(heartbeat, lambda: _readiness(parts, stopping=stop.is_set()))
        port = await _serve_http(stack, app, settings)
        background = {
            name: tasks.create_task(_without_end(name, run), name=name)
            for name, run in {
                "heartbeat": heartbeat.run,
                "publisher": parts.publisher.run,
                "consumer": parts.consumer.run,
                "pause": parts.pause.run,
            }.items()
        }
        log.info("started", version=__version__, rabbitmq=settings.rabbitmq_address, http_port=port)
        await stop.wait()
        background.pop("pause").cancel()
        all_done = await _drain(parts, settings.shutdown_grace)
        for task in background.values():
            task.cancel()
    log.info("stopped", everything_finished=all_done)
    return all_done


def _build(settings: Settings, tasks: asyncio.TaskGroup, stack: AsyncExitStack) -> _Parts:
    install_tolerant_decoders()
    redact = Redactor(settings.secret_values())
    topology = Topology.from_settings(settings)
    broker = Broker(
        url=settings.rabbitmq_url.get_secret_value(),
        ssl_context=broker_ssl_context(settings),
        name=f"vqa-worker@{socket.gethostname()}",
    )
    health = Health()
    gate = Gate(AdaptiveLimit(settings.max_concurrency))
    publisher = Publisher(broker, topology)
    processor = Processor(
        _images(settings, stack),
        _model(settings, redact, stack),
        gate=gate,
        health=health,
        rules=_rules(settings),
        redact=redact,
    )
    settlement = Settlement(publisher, topology, ReplyPolicy(settings.allowed_reply_to))
    in_flight = InFlight(tasks, processor.process, settlement)
    consumer = Consumer(
        broker,
        topology,
        prefetch=settings.max_concurrency,
        on_delivery=lambda it: _ignore(in_flight.accept(it)),
    )
    return _Parts(
        publisher, consumer, in_flight, PauseKeeper(health, gate, consumer, in_flight), health, gate
    )


def _images(settings: Settings, stack: AsyncExitStack) -> Images:
    try:
        s3 = S3(endpoint_url=settings.s3_endpoint_url, addressing_style=settings.s3_addressing_style)
    except S3ConfigurationError as error:
        raise StartError(str(error)) from None
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


async def _serve_http(stack: AsyncExitStack, app: web.Application, settings: Settings) -> int:
    try:
        return await stack.enter_async_context(http.serve(app, settings.http_host, settings.http_port))
    except OSError as error:
        address = f"{settings.http_host}:{settings.http_port}"
        raise StartError(
            f"VQA_HTTP_HOST, VQA_HTTP_PORT: cannot listen on {address}: {error.strerror}"
        ) from None


async def _drain(parts: _Parts, grace_s: float) -> bool:
    """Stop taking jobs, give the unstarted back, finish the rest in `grace_s` seconds or cut it off."""
    ends = time.monotonic() + grace_s
    log.info("stopping", grace_s=grace_s)
    parts.gate.close("the worker stops")
    try:
        async with asyncio.timeout(HOLD_TIMEOUT_S):
            await parts.consumer.hold()
    except TimeoutError:
        log.warning("rabbitmq_silent", what="did not answer to the end of consuming")
    if await _in_time(parts.in_flight.drained(), max(0.0, ends - time.monotonic())):
        return True
    log.warning("cut_off", after_s=grace_s)
    parts.in_flight.cut_off()
    if not await _in_time(parts.in_flight.drained(), GIVE_BACK_S):
        parts.in_flight.abandon()
    return False


async def _without_end(name: str, run: Callable[[], Awaitable[None]]) -> None:
    """Run a background task; one that ends by itself ends the worker, loudly.

    Raises:
        RuntimeError: it returned, or was cancelled by somebody else, which a TaskGroup passes over.
    """
    try:
        await run()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
    raise RuntimeError(f"the background task {name} ended")


async def _in_time(waiting: Awaitable[None], seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await waiting
    except TimeoutError:
        return False
    return True


def _readiness(parts: _Parts, *, stopping: bool) -> Readiness:
    if stopping:
        return Readiness(is_ready=False, status="stopping", reasons=("the worker was told to stop",))
    if not parts.consumer.is_connected:
        return Readiness(is_ready=False, status="no_broker", reasons=("not connected to RabbitMQ",))
    if outages := parts.health.outages:
        reasons = tuple(f"{dependency}: {outage.reason}" for dependency, outage in outages.items())
        return Readiness(is_ready=True, status="paused", reasons=reasons)
    return Readiness(is_ready=True, status="ready")


def _handle_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, number, stop)


def _on_signal(number: signal.Signals, stop: asyncio.Event) -> None:
    if stop.is_set():
        # Told twice: go at once. Whatever is unsettled, the broker delivers again.
        os._exit(128 + number)
    stop.set()


def _ignore(_: asyncio.Task[Outcome | None]) -> None:
    """The task group watches the task."""


def unwrap(error: BaseException) -> BaseException:
    """The first single exception in a group of groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
