"""One run with real parts: jobs come, the control loop looks at the queue, workers come and go."""

import asyncio
import itertools
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from deploy.local.model_simulator.behavior import Answer
from deploy.local.model_simulator.calls import Call
from deploy.local.stack import Stack
from tests.running import calls_with
from tests.scaling.autoscaler import Autoscaler
from tests.scaling.cluster import Cluster, installed
from tests.scaling.deployment import POD_HEADER, Pod
from tests.scaling.load import Phase
from tests.scaling.record import Sample, Summary, seen
from tests.scaling.release import Release
from tests.scaling.scaled_object import Numbers
from tests.scaling.simulation import World, simulate

_TICK_S: Final = 0.05
_PATIENCE_S: Final = 600.0


@dataclass(frozen=True)
class Plan:
    """What to do.

    Attributes:
        release: of the chart.
        factor: how many times as fast as in a cluster time passes.
        call_s: what the model takes for a call; in seconds of the run, as the phases are.
        phases: the load.
        image: the URL of the picture that every job is about.
    """

    release: Release
    factor: float
    call_s: float
    phases: Sequence[Phase]
    image: str

    @property
    def numbers(self) -> Numbers:
        """What the control loop goes by, in seconds of the run."""
        return self.release.numbers.faster(self.factor)


@dataclass
class Ended:
    """All that is known of a run when it is over; times of samples and jobs count from its beginning."""

    plan: Plan
    samples: list[Sample]
    pods: list[Pod]
    published: dict[str, float]
    """When the broker had confirmed each job, by its id."""
    results: dict[str | None, list[dict[str, Any]]]
    """The bodies of the results for each job."""
    calls: list[Call]
    left_over: dict[str, int]
    """Messages that are left in the queues."""

    def faults(self) -> list[str]:
        """What must not be."""
        paid = Counter(call.question.split()[-1] for call in self.calls if call.status == 200)
        statuses = {job: [it["status"] for it in self.results.get(job, [])] for job in self.published}
        faults = [f"{job}: results: {found}" for job, found in statuses.items() if found != ["succeeded"]]
        faults += [f"{job}: paid {paid[job]} times" for job in self.published if paid[job] != 1]
        faults += [f"a call that got {call.status}" for call in self.calls if call.status != 200]
        faults += [f"pod {pod.number} ended with {pod.code}" for pod in self.pods if not _ended_well(pod)]
        faults += [f"{count} messages in {queue}" for queue, count in self.left_over.items() if count]
        return faults

    def interrupted(self) -> list[Pod]:
        """Pods that were asked to stop in the middle of calls."""
        return [pod for pod in self.pods if pod.told_at and self.calls_of(pod, pod.told_at)]

    def calls_of(self, pod: Pod, moment: float) -> list[Call]:
        """The calls that a pod had open then."""
        return [
            call
            for call in self.calls
            if call.headers.get(POD_HEADER) == str(pod.number)
            and call.started < moment < (call.ended or moment)
        ]

    def start_s(self) -> list[float]:
        """How long each pod took from the wish for it until it took jobs."""
        return [pod.ready_at - pod.wanted_at for pod in self.pods if pod.ready_at]

    def job_s(self) -> float:
        """What a job took in a worker, on average."""
        return fmean(it["timings"]["total_s"] for found in self.results.values() for it in found)

    def summary_of(self, samples: Sequence[Sample]) -> Summary:
        """These of the run, or of the simulation, in figures."""
        return Summary.of(
            samples,
            call_s=self.plan.call_s,
            concurrency=self.plan.release.concurrency,
            maximum=self.plan.numbers.maximum,
        )

    def simulated(self) -> list[Sample]:
        """The same in the simulation: jobs at the same times, pods that start as slowly, figures as old."""
        world = World(
            numbers=self.plan.numbers,
            concurrency=self.plan.release.concurrency,
            call_s=self.job_s(),
            start_s=self.start_s(),
            seen=seen(self.samples),
        )
        return simulate(world, sorted(self.published.values()), step_s=_TICK_S / 2, sample_s=_TICK_S)


def _ended_well(pod: Pod) -> bool:
    # Without a handler for signals as yet Python ends by the signal itself.
    return pod.code == 0 or (pod.code == -15 and pod.ready_at is None)


async def run(stack: Stack, folder: Path, plan: Plan, tell: Callable[[str], None] = lambda _: None) -> Ended:
    """Do it; the workers' logs go to the folder."""
    marker = f"scaling-{uuid.uuid4().hex[:8]}"
    stack.model.play(Answer(after=plan.call_s), times=None, marker=marker)
    async with installed(stack, folder, plan.release) as cluster:
        going = _Going(plan, cluster, marker)
        await going.to_the_end(tell)
        client, deployment = cluster.client, cluster.deployment
        return Ended(
            plan=plan,
            samples=going.samples,
            pods=deployment.pods,
            published=going.published,
            results={job: [it.body for it in replies] for job, replies in client.replies.items()},
            calls=calls_with(stack, marker),
            left_over={queue: await client.depth(queue) for queue in cluster.queues},
        )


class _Going:
    """A run while it goes on."""

    def __init__(self, plan: Plan, cluster: Cluster, marker: str) -> None:
        self._plan = plan
        self._client = cluster.client
        self._deployment = cluster.deployment
        self._look = cluster.look
        self._marker = marker
        self._everything_came = False
        self._messages = 0
        self._began = time.time()
        self.published: dict[str, float] = {}
        self.samples: list[Sample] = []

    async def to_the_end(self, tell: Callable[[str], None]) -> None:
        """From no pod to no pod."""
        try:
            async with asyncio.timeout(_PATIENCE_S), asyncio.TaskGroup() as tasks:
                tasks.create_task(self._publish_all())
                tasks.create_task(self._control(tell))
        except TimeoutError:
            raise AssertionError(f"waited without success for the end: {self.samples[-1:]}") from None

    async def _control(self, tell: Callable[[str], None]) -> None:
        """The loop: look at the queue when it is time, and have as many pods as follow from that."""
        autoscaler = Autoscaler(self._plan.numbers)
        while not self._is_over():
            now = self._now()
            if autoscaler.next_at <= now:
                self._messages = await self._look()
                before = len(self._deployment.wanted)
                replicas = autoscaler.decide(now, self._messages, before)
                if replicas != before:
                    tell(f"  {now:6.1f} s: {self._messages} messages, pods {before} -> {replicas}")
                self._deployment.scale(replicas)
            self.samples.append(self._sample())
            await asyncio.sleep(_TICK_S)
        self.samples.append(self._sample())

    def _is_over(self) -> bool:
        is_answered = self._everything_came and len(self._client.replies) >= len(self.published)
        return is_answered and not self._deployment.wanted and not self._deployment.ending

    def _sample(self) -> Sample:
        return Sample(
            at=self._now(),
            messages=self._messages,
            replicas=len(self._deployment.wanted),
            ready=self._deployment.ready,
            ending=self._deployment.ending,
            published=len(self.published),
            answered=len(self._client.replies),
        )

    async def _publish_all(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for phase in self._plan.phases:
                began = self._now()
                for number in itertools.count(1):
                    if await self._is_over_before(phase, began, began + phase.at(number)):
                        break
                    tasks.create_task(self._publish(uuid.uuid4().hex))
        self._everything_came = True

    async def _is_over_before(self, phase: Phase, began: float, due: float) -> bool:
        """Wait until the next job is due, or until the phase is over: then no more of its jobs come."""
        while True:
            now = self._now()
            if now >= began + phase.seconds and (phase.until is None or phase.until(self.samples)):
                return True
            if now >= due:
                return False
            await asyncio.sleep(min(_TICK_S, due - now))

    async def _publish(self, job: str) -> None:
        question = f"{self._marker} {job}"
        await self._client.publish({"id": job, "question": question, "images": [self._plan.image]})
        self.published[job] = self._now()

    def _now(self) -> float:
        return time.time() - self._began
