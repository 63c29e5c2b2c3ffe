"""Inject each kind of fault and remove it again."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final

from deploy.local.model_simulator.behavior import Error, Hang, Malformed, Outcome, Reset, Rule
from tests.chaos.backend import Backend
from tests.chaos.environment import Environment, WorkerSlot
from tests.chaos.plan import Fault
from tests.proxy import Proxy

Inject = Callable[[Environment, Backend, Fault], AbstractAsyncContextManager[None]]

_ALARM: Final = ("set_vm_memory_high_watermark", "0.00001")
_NO_ALARM: Final = ("set_vm_memory_high_watermark", "0.4")
_FULL: Final = '{"max-length": 1, "overflow": "reject-publish"}'


@dataclass(frozen=True)
class InjectedFault:
    """An injected fault with its actual start and end (Unix time)."""

    fault: Fault
    started: float
    ended: float


class Injector:
    """Inject the faults of a plan and record them in `injected`."""

    def __init__(self, environment: Environment, backend: Backend) -> None:
        self._environment = environment
        self._backend = backend
        # A broker can take longer to restart than planned: the next fault of the same part waits.
        self._parts: dict[str, asyncio.Lock] = {}
        self.injected: list[InjectedFault] = []
        self.started = time.time()

    async def inject_all(self, plan: list[Fault], log: Callable[[str], None]) -> None:
        """Inject every fault at its time; return after the last one ends."""
        started = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for fault in plan:
                tasks.create_task(self._inject(fault, started, log))

    async def _inject(self, fault: Fault, run_started: float, log: Callable[[str], None]) -> None:
        await asyncio.sleep(run_started + fault.at_s - time.monotonic())
        async with self._parts.setdefault(fault.part, asyncio.Lock()):
            log(f"  {time.monotonic() - run_started:6.1f} s: {fault}")
            started = time.time()
            async with INJECTED[fault.kind](self._environment, self._backend, fault):
                await asyncio.sleep(fault.lasts_s)
            self.injected.append(InjectedFault(fault, started, time.time()))


@contextlib.asynccontextmanager
async def _worker_killed(environment: Environment, _: Backend, fault: Fault) -> AsyncIterator[None]:
    (slot,) = environment.slots_of(fault.who)
    await environment.kill_worker(slot)
    yield
    await environment.start_worker(slot)


@contextlib.asynccontextmanager
async def _worker_terminated(environment: Environment, _: Backend, fault: Fault) -> AsyncIterator[None]:
    (slot,) = environment.slots_of(fault.who)
    await environment.stop_worker(slot)
    yield
    await environment.start_worker(slot)


@contextlib.asynccontextmanager
async def _worker_frozen(environment: Environment, _: Backend, fault: Fault) -> AsyncIterator[None]:
    (slot,) = environment.slots_of(fault.who)
    process = slot.process.worker.process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    yield
    process.send_signal(signal.SIGCONT)


@contextlib.asynccontextmanager
async def _broker_killed(environment: Environment, _: Backend, __: Fault) -> AsyncIterator[None]:
    await asyncio.to_thread(environment.stack.rabbitmq.kill)
    yield
    await asyncio.to_thread(environment.stack.rabbitmq.start)


@contextlib.asynccontextmanager
async def _broker_restarted(environment: Environment, _: Backend, __: Fault) -> AsyncIterator[None]:
    """Kill the broker once it has closed its connections: the rest of its shutdown takes long."""
    os.kill(environment.stack.rabbitmq.pids[0], signal.SIGTERM)
    await asyncio.sleep(2)
    await asyncio.to_thread(environment.stack.rabbitmq.kill)
    yield
    await asyncio.to_thread(environment.stack.rabbitmq.start)


@contextlib.asynccontextmanager
async def _broker_out_of_memory(environment: Environment, _: Backend, __: Fault) -> AsyncIterator[None]:
    await asyncio.to_thread(environment.stack.rabbitmq.ctl, *_ALARM)
    try:
        yield
    finally:
        await asyncio.to_thread(environment.stack.rabbitmq.ctl, *_NO_ALARM)


@contextlib.asynccontextmanager
async def _broker_refuses_results(
    environment: Environment, backend: Backend, _: Fault
) -> AsyncIterator[None]:
    """Limit the results queue to one message by a policy, without a consumer."""
    ctl, queue = environment.stack.rabbitmq.ctl, environment.slots[0].process.worker.results_queue
    async with backend.results_paused():
        await asyncio.to_thread(ctl, "set_policy", "full", f"^{queue}$", _FULL, "--apply-to", "queues")
        try:
            yield
        finally:
            await asyncio.to_thread(ctl, "clear_policy", "full")


@contextlib.asynccontextmanager
async def _s3_stopped(environment: Environment, _: Backend, __: Fault) -> AsyncIterator[None]:
    """Block connections until the restart is complete: a starting S3 server answers 404 for every object."""
    await _disconnect([slot.s3 for slot in environment.slots])
    await asyncio.to_thread(environment.stack.s3.kill)
    yield
    await asyncio.to_thread(environment.stack.s3.start)
    await _reconnect([slot.s3 for slot in environment.slots])


@contextlib.asynccontextmanager
async def _s3_truncates(environment: Environment, _: Backend, fault: Fault) -> AsyncIterator[None]:
    proxies = [slot.s3 for slot in environment.slots_of(fault.who)]

    def cut_after(amount: int | None) -> None:
        for proxy in proxies:
            proxy.cut_after = amount
            proxy.reset()

    assert isinstance(fault.value, int)
    cut_after(fault.value)
    yield
    cut_after(None)


@contextlib.asynccontextmanager
async def _s3_answers(environment: Environment, __: Backend, fault: Fault) -> AsyncIterator[None]:
    """Answer every request with a status, and with an error code of S3 or a page."""
    proxies = [slot.s3 for slot in environment.slots_of(fault.who)]
    status, _, code = str(fault.value).partition(" ")
    body = f"<Error><Code>{code}</Code></Error>" if code else "<html><title>A proxy</title></html>"
    head = f"HTTP/1.1 {status} Fault\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"

    def answer(response: bytes | None) -> None:
        for proxy in proxies:
            proxy.answers = response
            proxy.reset()

    answer((head + body).encode())
    yield
    answer(None)


@contextlib.asynccontextmanager
async def _model_restarted(environment: Environment, _: Backend, __: Fault) -> AsyncIterator[None]:
    """Freeze the proxies, save the recorded calls, then restart the simulator."""
    proxies = [slot.model for slot in environment.slots]
    for proxy in proxies:
        proxy.freeze()
    await asyncio.to_thread(environment.save_calls)
    await asyncio.to_thread(environment.stack.model.kill)
    await _disconnect(proxies)
    for proxy in proxies:
        proxy.thaw()
    yield
    await asyncio.to_thread(environment.stack.model.start)
    await asyncio.to_thread(environment.reset_model)
    await _reconnect(proxies)


def _reset(of: Callable[[WorkerSlot], Proxy]) -> Inject:
    """Reset connections; accept new ones."""

    @contextlib.asynccontextmanager
    async def inject(environment: Environment, _: Backend, fault: Fault) -> AsyncIterator[None]:
        for slot in environment.slots_of(fault.who):
            of(slot).reset()
        yield

    return inject


def _unreachable(of: Callable[[WorkerSlot], Proxy]) -> Inject:
    """Reset connections and refuse new ones."""

    @contextlib.asynccontextmanager
    async def inject(environment: Environment, _: Backend, fault: Fault) -> AsyncIterator[None]:
        proxies = [of(slot) for slot in environment.slots_of(fault.who)]
        await _disconnect(proxies)
        yield
        await _reconnect(proxies)

    return inject


def _silent(of: Callable[[WorkerSlot], Proxy]) -> Inject:
    """Keep connections open and pass no bytes on."""

    @contextlib.asynccontextmanager
    async def inject(environment: Environment, _: Backend, fault: Fault) -> AsyncIterator[None]:
        proxies = [of(slot) for slot in environment.slots_of(fault.who)]
        for proxy in proxies:
            proxy.freeze()
        yield
        for proxy in proxies:
            if fault.value == "then resets":
                proxy.reset()
            proxy.thaw()

    return inject


def _slow(of: Callable[[WorkerSlot], Proxy]) -> Inject:
    """Delay every chunk by `fault.value` seconds."""

    @contextlib.asynccontextmanager
    async def inject(environment: Environment, _: Backend, fault: Fault) -> AsyncIterator[None]:
        proxies = [of(slot) for slot in environment.slots_of(fault.who)]
        for proxy in proxies:
            assert isinstance(fault.value, float)
            proxy.delay_s = fault.value
        yield
        for proxy in proxies:
            proxy.delay_s = 0.0

    return inject


def _model_behaviour(**behaviour: Callable[[Fault], object]) -> Inject:
    """Change settings of `model_simulator.behavior.Behavior`."""

    @contextlib.asynccontextmanager
    async def inject(environment: Environment, _: Backend, fault: Fault) -> AsyncIterator[None]:
        changes = {name: value(fault) for name, value in behaviour.items()}
        await asyncio.to_thread(environment.reset_model, **changes)
        yield
        await asyncio.to_thread(environment.reset_model)

    return inject


def _model_rule(outcome: Callable[[Fault], Outcome]) -> Inject:
    """Apply this outcome to every call, before the rules by marker."""

    @contextlib.asynccontextmanager
    async def inject(environment: Environment, _: Backend, fault: Fault) -> AsyncIterator[None]:
        rule = Rule(outcome=outcome(fault), times=None)
        await asyncio.to_thread(environment.reset_model, rule)
        yield
        await asyncio.to_thread(environment.reset_model)

    return inject


async def _disconnect(proxies: list[Proxy]) -> None:
    for proxy in proxies:
        await proxy.refuse()
        proxy.reset()


async def _reconnect(proxies: list[Proxy]) -> None:
    for proxy in proxies:
        await proxy.accept()


def _broker_proxy(slot: WorkerSlot) -> Proxy:
    return slot.broker


def _s3_proxy(slot: WorkerSlot) -> Proxy:
    return slot.s3


def _model_proxy(slot: WorkerSlot) -> Proxy:
    return slot.model


def _status(fault: Fault) -> Outcome:
    assert isinstance(fault.value, int)
    return Error(status=fault.value)


def _rate_limited(fault: Fault) -> Outcome:
    return Error(status=429, headers={"Retry-After": str(fault.value)})


def _quota_used_up(_: Fault) -> Outcome:
    """Not a rate limit: the worker pauses."""
    error = {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": None}
    return Error(status=429, body={"error": error})


def _malformed(fault: Fault) -> Outcome:
    return Malformed.model_validate({"how": fault.value})


INJECTED: Final[dict[str, Inject]] = {
    "worker killed": _worker_killed,
    "worker terminated": _worker_terminated,
    "worker frozen": _worker_frozen,
    "broker killed": _broker_killed,
    "broker restarted": _broker_restarted,
    "broker connections reset": _reset(_broker_proxy),
    "broker silent": _silent(_broker_proxy),
    "broker slow": _slow(_broker_proxy),
    "broker out of memory": _broker_out_of_memory,
    "broker refuses results": _broker_refuses_results,
    "S3 stopped": _s3_stopped,
    "S3 unreachable": _unreachable(_s3_proxy),
    "S3 truncates responses": _s3_truncates,
    "S3 slow": _slow(_s3_proxy),
    "S3 silent": _silent(_s3_proxy),
    "S3 throttles": _s3_answers,
    "S3 refuses all requests": _s3_answers,
    "S3 behind a proxy's page": _s3_answers,
    "model fails": _model_rule(_status),
    "model rejects all requests": _model_rule(_status),
    "model hangs": _model_rule(lambda _: Hang()),
    "model resets connections": _model_rule(lambda _: Reset()),
    "model malformed": _model_rule(_malformed),
    "model interrupts answers": _model_rule(lambda _: Malformed(how="interrupted")),
    "model wraps answers": _model_behaviour(wrapping=lambda fault: fault.value),
    "model answers early": _model_behaviour(early_status=lambda fault: fault.value),
    "model's quota used up": _model_rule(_quota_used_up),
    "model limits concurrency": _model_behaviour(max_concurrent=lambda fault: fault.value),
    "model overloaded": _model_behaviour(max_concurrent=lambda fault: fault.value, busy_status=lambda _: 503),
    "model sends Retry-After": _model_rule(_rate_limited),
    "model slow": _model_behaviour(latency=lambda fault: fault.value),
    "model restarted": _model_restarted,
    "model connections reset": _reset(_model_proxy),
    "model unreachable": _unreachable(_model_proxy),
    "model silent": _silent(_model_proxy),
}
