"""What a demonstration has found, kept as JSON so that page and pictures can be made of it again."""

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Self

from tests.scaling.costs import Costs
from tests.scaling.record import Sample, Summary
from tests.scaling.run import Ended
from tests.scaling.study import Course

# Samples are kept this far apart, in seconds of the run.
_KEPT_S = 0.5


@dataclass(frozen=True)
class Run:
    """The run with real parts, and what the simulation makes of it."""

    factor: float
    pods: int
    concurrency: int
    call_s: float
    calls: int
    start_s: list[float]
    interrupted: list[int]
    """How many calls each of the pods had open that were asked to stop in the middle of some."""
    real: Course
    simulated: Course

    @classmethod
    def of(cls, ended: Ended) -> Self:
        """With what is to be kept of it."""
        plan, reported = ended.plan, [pod for pod in ended.pods if pod.told_at]
        simulated = ended.simulated()
        open_calls = [len(ended.calls_of(pod, pod.told_at)) for pod in reported if pod.told_at]
        return cls(
            factor=plan.factor,
            pods=plan.numbers.maximum,
            concurrency=plan.release.concurrency,
            call_s=plan.call_s,
            calls=len(ended.calls),
            start_s=sorted(ended.start_s()),
            interrupted=[it for it in open_calls if it],
            real=Course(thinned(ended.samples), ended.summary_of(ended.samples)),
            simulated=Course(thinned(simulated), ended.summary_of(simulated)),
        )


@dataclass(frozen=True)
class Variant:
    """A simulated run with something changed."""

    load: str
    name: str
    summary: Summary


@dataclass(frozen=True)
class Findings:
    """All of it.

    Attributes:
        about: what it was made on and with.
        sizes: simulated runs by the number of pods.
        beyond: simulated runs before a provider with a limit, by the number of pods.
    """

    about: dict[str, str]
    run: Run
    costs: Costs
    sizes: dict[int, Course]
    variants: list[Variant]
    beyond: dict[int, Summary]

    def save(self, path: Path) -> None:
        """Keep it."""
        content = asdict(self)
        content["run"]["real"] = _course_to_json(self.run.real)
        content["run"]["simulated"] = _course_to_json(self.run.simulated)
        content["sizes"] = {pods: _course_to_json(it) for pods, it in self.sizes.items()}
        path.write_text(json.dumps(content, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """What `save` kept."""
        content = json.loads(path.read_text())
        run = content["run"]
        real, simulated = (_course_of_json(run.pop(name)) for name in ("real", "simulated"))
        return cls(
            about=content["about"],
            run=Run(**run, real=real, simulated=simulated),
            costs=Costs(**content["costs"]),
            sizes={int(pods): _course_of_json(it) for pods, it in content["sizes"].items()},
            variants=[
                Variant(it["load"], it["name"], Summary(**it["summary"])) for it in content["variants"]
            ],
            beyond={int(pods): Summary(**it) for pods, it in content["beyond"].items()},
        )


def thinned(samples: Sequence[Sample]) -> list[Sample]:
    """Some of them: the changes of the number of pods are all there."""
    kept = [samples[0]]
    for sample in samples[1:]:
        pods, before = ((it.replicas, it.ready, it.ending) for it in (sample, kept[-1]))
        if sample.at - kept[-1].at >= _KEPT_S or pods != before:
            kept.append(sample)
    return kept


def _course_to_json(course: Course) -> dict[str, Any]:
    samples = [[round(it, 2) for it in astuple(sample)] for sample in course.samples]
    return {"summary": asdict(course.summary), "samples": samples}


def _course_of_json(content: dict[str, Any]) -> Course:
    return Course([Sample(*it) for it in content["samples"]], Summary(**content["summary"]))
