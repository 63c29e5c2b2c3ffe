"""A run with real processes: publish jobs, poll the queue, start and stop workers."""

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
from tests.scaling.record import Sample, Summary, statistics_age
from tests.scaling.release import Release
from tests.scaling.scaled_object import ScalerConfig
from tests.scaling.simulation import ClusterModel, simulate

_TICK_S: Final = 0.05
_PATIENCE_S: Final = 600.0


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        release: the release of the chart.
        factor: the factor by which all durations are divided.
        call_s: the duration of a model request, in seconds of the run.
        phases: the load, in seconds of the run.
        image: the URL of the image of every job.
    """

    release: Release
    factor: float
    call_s: float
    phases: Sequence[Phase]
    image: str

    @property
    def scaler(self) -> ScalerConfig:
        """The configuration of the control loop, in seconds of the run."""
        return self.release.scaler.sped_up(self.factor)


@dataclass
class RunResult:
    """The records of a finished run; times of samples and jobs count from its start."""

    plan: Plan
    samples: list[Sample]
    pods: list[Pod]
    published: dict[str, float]
    """The time of the confirm, by job id."""
    results: dict[str | None, list[dict[str, Any]]]
    """The bodies of the results, by job id."""
    calls: list[Call]
    remaining_messages: dict[str, int]
    """The depth of each queue."""

    def errors(self) -> list[str]:
        """Return the unexpected results, requests, exit codes and messages."""
        billed = Counter(call.question.split()[-1] for call in self.calls if call.status == 200)
        statuses = {job: [it["status"] for it in self.results.get(job, [])] for job in self.published}
        errors = [f"{job}: results: {found}" for job, found in statuses.items() if found != ["succeeded"]]
        errors += [f"{job}: billed {billed[job]} times" for job in self.published if billed[job] != 1]
        errors += [f"a model request with status {call.status}" for call in self.calls if call.status != 200]
        errors += [
            f"pod {pod.number} exited with {pod.code}" for pod in self.pods if not _exit_is_expected(pod)
        ]
        errors += [
            f"{count} messages in {queue}" for queue, count in self.remaining_messages.items() if count
        ]
        return errors

    def interrupted(self) -> list[Pod]:
        """Return the pods that were stopped during model requests."""
        return [pod for pod in self.pods if pod.stopped_at and self.calls_of(pod, pod.stopped_at)]

    def calls_of(self, pod: Pod, moment: float) -> list[Call]:
        """Return the open calls of a pod at this time."""
        return [
            call
            for call in self.calls
            if call.headers.get(POD_HEADER) == str(pod.number)
            and call.started < moment < (call.ended or moment)
        ]

    def start_s(self) -> list[float]:
        """Return the seconds from creation to readiness of each pod."""
        return [pod.ready_at - pod.created_at for pod in self.pods if pod.ready_at]

    def job_s(self) -> float:
        """Return the mean duration of a job in a worker."""
        return fmean(it["timings"]["total_s"] for found in self.results.values() for it in found)

    def summary_of(self, samples: Sequence[Sample]) -> Summary:
        """Return the figures of samples of this run or of its simulation."""
        return Summary.of(
            samples,
            call_s=self.plan.call_s,
            concurrency=self.plan.release.concurrency,
            maximum=self.plan.scaler.maximum,
        )

    def simulated(self) -> list[Sample]:
        """Simulate the run with the same arrival times, pod start times and age of statistics."""
        model = ClusterModel(
            scaler=self.plan.scaler,
            concurrency=self.plan.release.concurrency,
            call_s=self.job_s(),
            start_s=self.start_s(),
            statistics_age=statistics_age(self.samples),
        )
        return simulate(model, sorted(self.published.values()), step_s=_TICK_S / 2, sample_s=_TICK_S)


def _exit_is_expected(pod: Pod) -> bool:
    # Before Python has installed a handler, SIGTERM kills it.
    return pod.code == 0 or (pod.code == -15 and pod.ready_at is None)


async def run(
    stack: Stack, folder: Path, plan: Plan, log: Callable[[str], None] = lambda _: None
) -> RunResult:
    """Run the plan; write the workers' logs to the folder."""
    marker = f"scaling-{uuid.uuid4().hex[:8]}"
    stack.model.play(Answer(after=plan.call_s), times=None, marker=marker)
    async with installed(stack, folder, plan.release) as cluster:
        loop = _ControlLoop(plan, cluster, marker)
        await loop.run(log)
        client, deployment = cluster.client, cluster.deployment
        return RunResult(
            plan=plan,
            samples=loop.samples,
            pods=deployment.pods,
            published=loop.published,
            results={job: [it.body for it in replies] for job, replies in client.replies.items()},
            calls=calls_with(stack, marker),
            remaining_messages={queue: await client.depth(queue) for queue in cluster.queues},
        )


class _ControlLoop:
    """Publish jobs and scale workers."""

    def __init__(self, plan: Plan, cluster: Cluster, marker: str) -> None:
        self._plan = plan
        self._client = cluster.client
        self._deployment = cluster.deployment
        self._queue_depth = cluster.queue_depth
        self._marker = marker
        self._all_published = False
        self._messages = 0
        self._started = time.time()
        self.published: dict[str, float] = {}
        self.samples: list[Sample] = []

    async def run(self, log: Callable[[str], None]) -> None:
        """Run until all jobs are answered and all pods have stopped."""
        try:
            async with asyncio.timeout(_PATIENCE_S), asyncio.TaskGroup() as tasks:
                tasks.create_task(self._publish_all())
                tasks.create_task(self._control(log))
        except TimeoutError:
            raise AssertionError(f"not finished within {_PATIENCE_S:.0f} s: {self.samples[-1:]}") from None

    async def _control(self, log: Callable[[str], None]) -> None:
        """Poll the queue when a decision is due, and scale the Deployment."""
        autoscaler = Autoscaler(self._plan.scaler)
        while not self._is_over():
            now = self._now()
            if autoscaler.next_at <= now:
                self._messages = await self._queue_depth()
                before = len(self._deployment.desired)
                replicas = autoscaler.decide(now, self._messages, before)
                if replicas != before:
                    log(f"  {now:6.1f} s: {self._messages} messages, pods {before} -> {replicas}")
                self._deployment.scale(replicas)
            self.samples.append(self._sample())
            await asyncio.sleep(_TICK_S)
        self.samples.append(self._sample())

    def _is_over(self) -> bool:
        is_answered = self._all_published and len(self._client.replies) >= len(self.published)
        return is_answered and not self._deployment.desired and not self._deployment.terminating

    def _sample(self) -> Sample:
        return Sample(
            at=self._now(),
            messages=self._messages,
            replicas=len(self._deployment.desired),
            ready=self._deployment.ready,
            terminating=self._deployment.terminating,
            published=len(self.published),
            answered=len(self._client.replies),
        )

    async def _publish_all(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for phase in self._plan.phases:
                started = self._now()
                for number in itertools.count(1):
                    if await self._is_over_before(phase, started, started + phase.at(number)):
                        break
                    tasks.create_task(self._publish(uuid.uuid4().hex))
        self._all_published = True

    async def _is_over_before(self, phase: Phase, started: float, due: float) -> bool:
        """Wait until the next job is due; return True if the phase ends before."""
        while True:
            now = self._now()
            if now >= started + phase.seconds and (phase.until is None or phase.until(self.samples)):
                return True
            if now >= due:
                return False
            await asyncio.sleep(min(_TICK_S, due - now))

    async def _publish(self, job: str) -> None:
        question = f"{self._marker} {job}"
        await self._client.publish({"id": job, "question": question, "images": [self._plan.image]})
        self.published[job] = self._now()

    def _now(self) -> float:
        return time.time() - self._started
