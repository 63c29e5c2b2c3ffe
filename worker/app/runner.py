"""The composition root: build everything, run it in one task group, stop it in two phases."""

import asyncio
import gc
import importlib
import os
import signal
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import structlog

from vqa_worker.messages.result import Result
from vqa_worker.rabbitmq.connection import Broker
from worker import __version__
from worker.app.background import Background
from worker.app.parts import Parts
from worker.clock import Clock
from worker.jobs.cancellation import CancelledJobs
from worker.jobs.in_flight_jobs import InFlightJobs
from worker.jobs.other_workers import OtherWorkers
from worker.observability import endpoints, metrics, tracing
from worker.observability.endpoints import Heartbeat, Readiness
from worker.observability.logs import IN_FLIGHT_LOGGER, log_suppressed_events
from worker.observability.tenants import Tenants
from worker.rabbitmq.consumer import Consumer
from worker.rabbitmq.control import Control
from worker.rabbitmq.properties import install_tolerant_decoders
from worker.rabbitmq.publisher import Publisher
from worker.rabbitmq.settlement import LargeResultPolicy, ReplyPolicy, Settlement
from worker.rabbitmq.topology import Topology
from worker.resilience.concurrency_limiter import ConcurrencyLimiter
from worker.resilience.consumer_controller import ConsumerController
from worker.resilience.outage_detector import OutageDetector
from worker.resilience.outage_reports import OutageReports
from worker.settings import Settings, broker_ssl_context, wants_traces

if TYPE_CHECKING:
    from aiohttp.web import Application

    from worker.app.assembly import Assembled
    from worker.jobs.outcome import Outcome

log = structlog.get_logger(__name__)
in_flight_log = structlog.get_logger(IN_FLIGHT_LOGGER)

# After the grace: time to requeue the cancelled jobs. The pod's termination grace period must include it.
REQUEUE_TIMEOUT_S = 10.0
# For RabbitMQ's reply to basic.cancel.
HOLD_TIMEOUT_S = 5.0
# The maximum of jobs that SIGUSR1 logs.
MAX_LOGGED_JOBS = 200
SUPPRESSED_EVENTS_INTERVAL_S = 5.0
# Net new objects before a collection of the youngest generation; Python's default is 700.
GC_THRESHOLD = 20_000


class StartError(Exception):
    """The worker cannot start with these settings; the message names the setting."""


async def run(settings: Settings) -> bool:
    """Run until SIGTERM or SIGINT, then finish the jobs in flight.

    Returns:
        Whether all of them finished; False if some were cancelled at the end of the grace.

    Raises:
        StartError: the HTTP address cannot be bound, or the configuration of AWS or OpenTelemetry is invalid.
        BrokerRefusedError, TopologyError: see `Consumer.run`; in an ExceptionGroup.
    """
    stop = asyncio.Event()
    _handle_stop_signals(stop)
    for warning in settings.warnings():
        log.warning("configuration_warning", warning=warning)
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        assembly: asyncio.Future[Assembled] = asyncio.Future()
        parts = _build(settings, tasks, assembly)
        _handle_status_signal(parts, stop)
        stack.callback(log_suppressed_events, flush=True)
        background = Background(tasks)
        background.start("suppressed-events", _log_suppressed_events)
        background.start("publisher", parts.publisher.run)
        background.start("consumer", parts.consumer.run)
        background.start("other-workers", lambda: parts.other_workers.run(parts.control.ask))
        # In a thread: connecting continues at the same time.
        traced = wants_traces(os.environ)
        await asyncio.to_thread(_load_slow_modules, traced=traced)
        if traced:
            _begin_traces(settings, parts.topology, stack)
        assembled = await _assembled(settings, parts, stack)
        assembly.set_result(assembled)
        for name, keep_going in assembled.background.items():
            background.start(name, keep_going)
        heartbeat = Heartbeat()
        background.start("heartbeat", heartbeat.run)
        app = endpoints.application(heartbeat, lambda: readiness(parts, stopping=stop.is_set()))
        port = await _serve_http(stack, app, settings)
        log.info("started", version=__version__, rabbitmq=settings.rabbitmq_address, http_port=port)
        background.start("consumer-controller", parts.controller.run)
        if not stop.is_set():
            await parts.consumer.resume()
        await stop.wait()
        background.stop("consumer-controller")
        all_done = await _drain(parts, settings.shutdown_grace)
        background.stop_all()
    log.info("stopped", everything_finished=all_done)
    return all_done


def _load_slow_modules(*, traced: bool) -> None:
    """Import the SDKs and the HTTP server, which takes half a second."""
    for module in (
        "aiohttp.web",
        "worker.app.assembly",
        *(["worker.observability.tracing.otlp"] if traced else []),
    ):
        importlib.import_module(module)
    # Exempt loaded modules from garbage collection, which is disabled until here.
    gc.freeze()
    # A job creates thousands of short-lived objects and hardly any cycles.
    gc.set_threshold(GC_THRESHOLD)
    gc.enable()


def _build(settings: Settings, tasks: asyncio.TaskGroup, assembly: "asyncio.Future[Assembled]") -> Parts:
    """Build all parts. What needs the SDKs follows before the consumer starts."""
    install_tolerant_decoders()
    topology = Topology.from_settings(settings)
    broker = Broker(
        url=settings.rabbitmq_url.get_secret_value(),
        ssl_context=broker_ssl_context(settings),
        name=f"vqa-worker@{socket.gethostname()}",
    )
    clock = Clock()
    limiter = ConcurrencyLimiter(
        settings.max_concurrency,
        initial=settings.initial_concurrency,
        models=len(settings.allowed_models),
        clock=clock,
    )
    detector = OutageDetector(
        lambda: limiter.slots_in_use,
        limiter.oldest_request,
        has_several_models=len(settings.allowed_models) > 1,
    )
    outage_reports = OutageReports(detector, limiter, clock)
    publisher = Publisher(broker, topology)
    tenants = Tenants(settings.tenant_key, settings.tenants)
    metrics.initialize_series(settings.allowed_models)
    tenants.initialize_series(settings.allowed_models)
    settlement = Settlement(
        publisher,
        topology,
        ReplyPolicy(settings.allowed_reply_to),
        tenants,
        LargeResultPolicy(
            settings.max_result_bytes,
            _large_result_writer(assembly) if settings.large_results is not None else None,
        ),
    )
    other_workers = OtherWorkers(max_s=settings.job_timeout / 2, clock=clock)
    in_flight = InFlightJobs(
        tasks,
        lambda delivery, attempt: assembly.result().processor.process(delivery, attempt),  # noqa: PLW0108 - later
        settlement,
        clock,
        # A result store has leases for this.
        other_workers if settings.result_store is None else None,
    )
    cancelled_jobs = CancelledJobs()
    control = Control(
        topology,
        on_cancel=cancelled_jobs.cancel,
        on_subscribed=cancelled_jobs.on_subscribed,
        publish=publisher.try_publish,
        states_of=in_flight.states_of,
        on_answer=other_workers.answered,
    )
    consumer = Consumer(
        broker,
        topology,
        control,
        prefetch=settings.max_concurrency,
        on_delivery=lambda delivery: _ignore(in_flight.accept(delivery)),
    )
    controller = ConsumerController(
        detector,
        limiter,
        consumer=consumer,
        jobs=in_flight,
        maximum=settings.max_concurrency,
        clock=clock,
    )
    return Parts(
        clock=clock,
        publisher=publisher,
        consumer=consumer,
        in_flight=in_flight,
        controller=controller,
        detector=detector,
        outage_reports=outage_reports,
        limiter=limiter,
        control=control,
        other_workers=other_workers,
        cancelled_jobs=cancelled_jobs,
        topology=topology,
        tenants=tenants,
    )


def _large_result_writer(assembly: "asyncio.Future[Assembled]") -> Callable[[Result, bytes], Awaitable[str]]:
    async def write(result: Result, body: bytes) -> str:
        large_results = assembly.result().large_results
        assert large_results is not None  # noqa: S101 - for the type checker: VQA_LARGE_RESULTS is set
        return await large_results.write(result, body)

    return write


def _begin_traces(settings: Settings, topology: Topology, stack: AsyncExitStack) -> None:
    from worker.observability.tracing.otlp import Otlp, Scene

    queues = frozenset(queue.name for queue in topology.queues())
    scene = Scene(topology.jobs, queues, settings.rabbitmq_address, settings.model_base_url)
    try:
        tracer = Otlp(scene)
    except ValueError as error:
        raise StartError(f"OTEL_BSP_…, or another of OpenTelemetry's variables: {error}") from None
    tracing.use(tracer)
    stack.push_async_callback(tracer.close)


async def _assembled(settings: Settings, parts: Parts, stack: AsyncExitStack) -> "Assembled":
    from worker.app.assembly import assemble
    from worker.s3.aws import S3ConfigurationError

    try:
        return await assemble(settings, parts, stack)
    except S3ConfigurationError as error:
        raise StartError(str(error)) from None


async def _serve_http(stack: AsyncExitStack, app: "Application", settings: Settings) -> int:
    try:
        return await stack.enter_async_context(endpoints.serve(app, settings.http_host, settings.http_port))
    except OSError as error:
        address = f"{settings.http_host}:{settings.http_port}"
        raise StartError(
            f"VQA_HTTP_HOST, VQA_HTTP_PORT: cannot listen on {address}: {error.strerror}"
        ) from None


async def _drain(parts: Parts, grace_s: float) -> bool:
    """Requeue jobs without a slot, finish the others within the grace, then cancel and requeue the rest."""
    ends = parts.clock.monotonic() + grace_s
    log.info("stopping", grace_s=grace_s)
    parts.limiter.close("the worker is shutting down")
    parts.outage_reports.stop()
    parts.other_workers.close()
    try:
        async with asyncio.timeout(HOLD_TIMEOUT_S):
            await parts.consumer.hold()
    except TimeoutError:
        log.warning("rabbitmq_shutdown_timeout", what="no confirmation that consuming has ended")
    if await _in_time(parts.in_flight.wait_until_drained(), max(0.0, ends - parts.clock.monotonic())):
        return True
    log.warning("grace_period_expired", after_s=grace_s)
    parts.in_flight.cancel_all()
    if not await _in_time(parts.in_flight.wait_until_drained(), REQUEUE_TIMEOUT_S):
        parts.in_flight.abandon_all()
    return False


async def _in_time(waiting: Awaitable[None], seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await waiting
    except TimeoutError:
        return False
    return True


def readiness(parts: Parts, *, stopping: bool) -> Readiness:
    """Return what `/readyz` answers: the status, and why the worker takes no jobs or fewer."""
    if stopping:
        return Readiness(is_ready=False, status="stopping", reasons=("the worker was asked to stop",))
    if not parts.consumer.is_connected:
        return Readiness(is_ready=False, status="no_broker", reasons=("not connected to RabbitMQ",))
    if outages := parts.detector.outages:
        reasons = tuple(f"{dependency.label}: {outage.reason}" for dependency, outage in outages.items())
        return Readiness(is_ready=True, status="paused", reasons=reasons)
    return Readiness(is_ready=True, status="ready", reasons=tuple(_restrictions(parts)))


def _restrictions(parts: Parts) -> Iterator[str]:
    """Yield what keeps a worker that is not paused from requests, and results from being published."""
    if reason := parts.publisher.delay_reason:
        yield f"rabbitmq: {reason}"
    for model, outage in parts.detector.paused_models.items():
        yield f"model: {model} is paused: {outage.reason}"
    lasting = parts.limiter.lasting_limits()
    for model, seconds in parts.limiter.backoffs().items():
        yield f"model: {model} may not be called for {seconds:.0f} s{_said(lasting.pop(model, ''))}"
    for model, message in lasting.items():
        yield f"model: {model} is rate-limited{_said(message)}"


def _said(message: str) -> str:
    return f" ({message})" if message else ""


def _handle_status_signal(parts: Parts, stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, lambda: _log_in_flight(parts, stopping=stop.is_set()))


def _log_in_flight(parts: Parts, *, stopping: bool) -> None:
    """Log how many jobs are in flight, and the oldest of them."""
    jobs, state = parts.in_flight.snapshot(), readiness(parts, stopping=stopping)
    in_flight_log.info(
        "in_flight_summary",
        status=state.status,
        reasons=state.reasons,
        jobs=len(jobs),
        stages=Counter(job["stage"] for job in jobs),
        not_shown=max(0, len(jobs) - MAX_LOGGED_JOBS),
    )
    for job in jobs[:MAX_LOGGED_JOBS]:
        in_flight_log.info("in_flight_job", **job)


async def _log_suppressed_events() -> None:
    while True:
        await asyncio.sleep(SUPPRESSED_EVENTS_INTERVAL_S)
        log_suppressed_events()


def _handle_stop_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, number, stop)


def _on_signal(number: signal.Signals, stop: asyncio.Event) -> None:
    if stop.is_set():
        # The second signal: exit immediately. The broker redelivers unsettled jobs.
        os._exit(128 + number)
    stop.set()


def _ignore(_: "asyncio.Task[Outcome | None]") -> None:
    """Do nothing: the task group watches the task."""


def unwrap(error: BaseException) -> BaseException:
    """Return the first exception in nested exception groups that is not a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
