"""How each fault of the plan is brought about, and how it ends."""

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
from tests.chaos.plan import Fault
from tests.chaos.scene import Place, Scene
from tests.proxy import Proxy

Inject = Callable[[Scene, Backend, Fault], AbstractAsyncContextManager[None]]

_ALARM: Final = ("set_vm_memory_high_watermark", "0.00001")
_NO_ALARM: Final = ("set_vm_memory_high_watermark", "0.4")
_FULL: Final = '{"max-length": 1, "overflow": "reject-publish"}'


@dataclass(frozen=True)
class Happened:
    """A fault that was injected, and when it really began and had ended (Unix time)."""

    fault: Fault
    began: float
    ended: float


class Injector:
    """Carries out a plan; what has happened is in `happened`."""

    def __init__(self, scene: Scene, backend: Backend) -> None:
        self._scene = scene
        self._backend = backend
        # A broker takes its own time to come back, whatever the plan says: the next fault waits for it.
        self._parts: dict[str, asyncio.Lock] = {}
        self.happened: list[Happened] = []
        self.began = time.time()

    async def carry_out(self, plan: list[Fault], tell: Callable[[str], None]) -> None:
        """Inject every fault at its time, and return when the last one has ended."""
        started = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for fault in plan:
                tasks.create_task(self._carry_out(fault, started, tell))

    async def _carry_out(self, fault: Fault, started: float, tell: Callable[[str], None]) -> None:
        await asyncio.sleep(started + fault.at_s - time.monotonic())
        async with self._parts.setdefault(fault.part, asyncio.Lock()):
            tell(f"  {time.monotonic() - started:6.1f} s: {fault}")
            began = time.time()
            async with INJECTED[fault.kind](self._scene, self._backend, fault):
                await asyncio.sleep(fault.lasts_s)
            self.happened.append(Happened(fault, began, time.time()))


@contextlib.asynccontextmanager
async def _worker_killed(scene: Scene, _: Backend, fault: Fault) -> AsyncIterator[None]:
    (place,) = scene.hit_by(fault.who)
    await scene.kill_worker(place)
    yield
    await scene.start_worker(place)


@contextlib.asynccontextmanager
async def _worker_told_to_stop(scene: Scene, _: Backend, fault: Fault) -> AsyncIterator[None]:
    (place,) = scene.hit_by(fault.who)
    await scene.stop_worker(place)
    yield
    await scene.start_worker(place)


@contextlib.asynccontextmanager
async def _worker_frozen(scene: Scene, _: Backend, fault: Fault) -> AsyncIterator[None]:
    (place,) = scene.hit_by(fault.who)
    process = place.life.worker.process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    yield
    process.send_signal(signal.SIGCONT)


@contextlib.asynccontextmanager
async def _broker_killed(scene: Scene, _: Backend, __: Fault) -> AsyncIterator[None]:
    await asyncio.to_thread(scene.stack.rabbitmq.kill)
    yield
    await asyncio.to_thread(scene.stack.rabbitmq.start)


@contextlib.asynccontextmanager
async def _broker_restarted(scene: Scene, _: Backend, __: Fault) -> AsyncIterator[None]:
    """What it does after it has closed its connections takes long, and is not a matter here."""
    os.kill(scene.stack.rabbitmq.pids[0], signal.SIGTERM)
    await asyncio.sleep(2)
    await asyncio.to_thread(scene.stack.rabbitmq.kill)
    yield
    await asyncio.to_thread(scene.stack.rabbitmq.start)


@contextlib.asynccontextmanager
async def _broker_out_of_memory(scene: Scene, _: Backend, __: Fault) -> AsyncIterator[None]:
    await asyncio.to_thread(scene.stack.rabbitmq.ctl, *_ALARM)
    try:
        yield
    finally:
        await asyncio.to_thread(scene.stack.rabbitmq.ctl, *_NO_ALARM)


@contextlib.asynccontextmanager
async def _broker_refuses_results(scene: Scene, backend: Backend, _: Fault) -> AsyncIterator[None]:
    """A policy says that the queue is full, and nobody reads it."""
    ctl, queue = scene.stack.rabbitmq.ctl, scene.places[0].life.worker.results_queue
    async with backend.reading_no_results():
        await asyncio.to_thread(ctl, "set_policy", "full", f"^{queue}$", _FULL, "--apply-to", "queues")
        try:
            yield
        finally:
            await asyncio.to_thread(ctl, "clear_policy", "full")


@contextlib.asynccontextmanager
async def _s3_stopped(scene: Scene, _: Backend, __: Fault) -> AsyncIterator[None]:
    """Until it works again nobody reaches it: while it starts it says of every object that there is none."""
    await _cut([place.s3 for place in scene.places])
    await asyncio.to_thread(scene.stack.s3.kill)
    yield
    await asyncio.to_thread(scene.stack.s3.start)
    await _mend([place.s3 for place in scene.places])


@contextlib.asynccontextmanager
async def _s3_cuts_off(scene: Scene, _: Backend, fault: Fault) -> AsyncIterator[None]:
    proxies = [place.s3 for place in scene.hit_by(fault.who)]

    def cut_after(amount: int | None) -> None:
        for proxy in proxies:
            proxy.cut_after = amount
            proxy.reset()

    assert isinstance(fault.value, int)
    cut_after(fault.value)
    yield
    cut_after(None)


@contextlib.asynccontextmanager
async def _model_restarted(scene: Scene, _: Backend, __: Fault) -> AsyncIterator[None]:
    """Its calls are asked for first, when it can get no more; what it says from then on reaches nobody."""
    proxies = [place.model for place in scene.places]
    for proxy in proxies:
        proxy.freeze()
    await asyncio.to_thread(scene.remember_calls)
    await asyncio.to_thread(scene.stack.model.kill)
    await _cut(proxies)
    for proxy in proxies:
        proxy.thaw()
    yield
    await asyncio.to_thread(scene.stack.model.start)
    await asyncio.to_thread(scene.calm_the_model)
    await _mend(proxies)


def _reset(of: Callable[[Place], Proxy]) -> Inject:
    """Connections are interrupted; new ones are fine."""

    @contextlib.asynccontextmanager
    async def inject(scene: Scene, _: Backend, fault: Fault) -> AsyncIterator[None]:
        for place in scene.hit_by(fault.who):
            of(place).reset()
        yield

    return inject


def _unreachable(of: Callable[[Place], Proxy]) -> Inject:
    """Connections are interrupted, and new ones are refused."""

    @contextlib.asynccontextmanager
    async def inject(scene: Scene, _: Backend, fault: Fault) -> AsyncIterator[None]:
        proxies = [of(place) for place in scene.hit_by(fault.who)]
        await _cut(proxies)
        yield
        await _mend(proxies)

    return inject


def _silent(of: Callable[[Place], Proxy]) -> Inject:
    """A black hole: connections stay open, and nothing comes through."""

    @contextlib.asynccontextmanager
    async def inject(scene: Scene, _: Backend, fault: Fault) -> AsyncIterator[None]:
        proxies = [of(place) for place in scene.hit_by(fault.who)]
        for proxy in proxies:
            proxy.freeze()
        yield
        for proxy in proxies:
            if fault.value == "and is interrupted":
                proxy.reset()
            proxy.thaw()

    return inject


def _late(of: Callable[[Place], Proxy]) -> Inject:
    """Every piece comes so many seconds late."""

    @contextlib.asynccontextmanager
    async def inject(scene: Scene, _: Backend, fault: Fault) -> AsyncIterator[None]:
        proxies = [of(place) for place in scene.hit_by(fault.who)]
        for proxy in proxies:
            assert isinstance(fault.value, float)
            proxy.delay_s = fault.value
        yield
        for proxy in proxies:
            proxy.delay_s = 0.0

    return inject


def _model(**behaviour: Callable[[Fault], object]) -> Inject:
    """The simulator behaves otherwise: settings of `model_simulator.behavior.Behavior`."""

    @contextlib.asynccontextmanager
    async def inject(scene: Scene, _: Backend, fault: Fault) -> AsyncIterator[None]:
        changes = {name: value(fault) for name, value in behaviour.items()}
        await asyncio.to_thread(scene.calm_the_model, **changes)
        yield
        await asyncio.to_thread(scene.calm_the_model)

    return inject


def _model_plays(outcome: Callable[[Fault], Outcome]) -> Inject:
    """The simulator treats every call so, those of the jobs with a fate of their own too."""

    @contextlib.asynccontextmanager
    async def inject(scene: Scene, _: Backend, fault: Fault) -> AsyncIterator[None]:
        rule = Rule(outcome=outcome(fault), times=None)
        await asyncio.to_thread(scene.calm_the_model, rule)
        yield
        await asyncio.to_thread(scene.calm_the_model)

    return inject


async def _cut(proxies: list[Proxy]) -> None:
    for proxy in proxies:
        await proxy.refuse()
        proxy.reset()


async def _mend(proxies: list[Proxy]) -> None:
    for proxy in proxies:
        await proxy.accept()


def _broker(place: Place) -> Proxy:
    return place.broker


def _s3(place: Place) -> Proxy:
    return place.s3


def _to_model(place: Place) -> Proxy:
    return place.model


def _status(fault: Fault) -> Outcome:
    assert isinstance(fault.value, int)
    return Error(status=fault.value)


def _asks_to_wait(fault: Fault) -> Outcome:
    return Error(status=429, headers={"Retry-After": str(fault.value)})


def _malformed(fault: Fault) -> Outcome:
    return Malformed.model_validate({"how": fault.value})


INJECTED: Final[dict[str, Inject]] = {
    "worker killed": _worker_killed,
    "worker asked to stop": _worker_told_to_stop,
    "worker frozen": _worker_frozen,
    "broker killed": _broker_killed,
    "broker restarted": _broker_restarted,
    "broker connections reset": _reset(_broker),
    "broker silent": _silent(_broker),
    "broker slow": _late(_broker),
    "broker out of memory": _broker_out_of_memory,
    "broker refuses results": _broker_refuses_results,
    "S3 stopped": _s3_stopped,
    "S3 unreachable": _unreachable(_s3),
    "S3 cuts off": _s3_cuts_off,
    "S3 slow": _late(_s3),
    "S3 silent": _silent(_s3),
    "model fails": _model_plays(_status),
    "model refuses everybody": _model_plays(_status),
    "model hangs": _model_plays(lambda _: Hang()),
    "model resets": _model_plays(lambda _: Reset()),
    "model malformed": _model_plays(_malformed),
    "model takes few calls": _model(max_concurrent=lambda fault: fault.value),
    "model asks to wait": _model_plays(_asks_to_wait),
    "model slow": _model(latency=lambda fault: fault.value),
    "model restarted": _model_restarted,
    "model connections reset": _reset(_to_model),
    "model unreachable": _unreachable(_to_model),
    "model silent": _silent(_to_model),
}
