"""The results of a demonstration, stored as JSON so that page and charts can be generated again."""

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Self

from tests.scaling.costs import Costs
from tests.scaling.record import Sample, Summary
from tests.scaling.run import RunResult
from tests.scaling.study import Recording

# The minimum interval of stored samples, in seconds of the run.
_SAMPLE_INTERVAL_S = 0.5


@dataclass(frozen=True)
class Run:
    """The real run and its simulation."""

    factor: float
    pods: int
    concurrency: int
    call_s: float
    calls: int
    start_s: list[float]
    interrupted: list[int]
    """The number of open model requests of each pod that was stopped during requests."""
    real: Recording
    simulated: Recording

    @classmethod
    def of(cls, ended: RunResult) -> Self:
        """Return the part of a result that is stored."""
        plan, reported = ended.plan, [pod for pod in ended.pods if pod.stopped_at]
        simulated = ended.simulated()
        open_calls = [len(ended.calls_of(pod, pod.stopped_at)) for pod in reported if pod.stopped_at]
        return cls(
            factor=plan.factor,
            pods=plan.scaler.maximum,
            concurrency=plan.release.concurrency,
            call_s=plan.call_s,
            calls=len(ended.calls),
            start_s=sorted(ended.start_s()),
            interrupted=[it for it in open_calls if it],
            real=Recording(thinned(ended.samples), ended.summary_of(ended.samples)),
            simulated=Recording(thinned(simulated), ended.summary_of(simulated)),
        )


@dataclass(frozen=True)
class Variant:
    """A simulated run with one changed parameter."""

    load: str
    name: str
    summary: Summary


@dataclass(frozen=True)
class Findings:
    """The results of a demonstration.

    Attributes:
        about: the machine and the software.
        sizes: simulated runs by the number of pods.
        over_limit: simulated runs with a provider's limit, by the number of pods.
    """

    about: dict[str, str]
    run: Run
    costs: Costs
    sizes: dict[int, Recording]
    variants: list[Variant]
    over_limit: dict[int, Summary]

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        content = asdict(self)
        content["run"]["real"] = _recording_to_json(self.run.real)
        content["run"]["simulated"] = _recording_to_json(self.run.simulated)
        content["sizes"] = {pods: _recording_to_json(it) for pods, it in self.sizes.items()}
        path.write_text(json.dumps(content, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        content = json.loads(path.read_text())
        run = content["run"]
        real, simulated = (_recording_of_json(run.pop(name)) for name in ("real", "simulated"))
        return cls(
            about=content["about"],
            run=Run(**run, real=real, simulated=simulated),
            costs=Costs(**content["costs"]),
            sizes={int(pods): _recording_of_json(it) for pods, it in content["sizes"].items()},
            variants=[
                Variant(it["load"], it["name"], Summary(**it["summary"])) for it in content["variants"]
            ],
            over_limit={int(pods): Summary(**it) for pods, it in content["over_limit"].items()},
        )


def thinned(samples: Sequence[Sample]) -> list[Sample]:
    """Return a part of the samples, including all changes of the number of pods."""
    kept = [samples[0]]
    for sample in samples[1:]:
        pods, before = ((it.replicas, it.ready, it.terminating) for it in (sample, kept[-1]))
        if sample.at - kept[-1].at >= _SAMPLE_INTERVAL_S or pods != before:
            kept.append(sample)
    return kept


def _recording_to_json(recording: Recording) -> dict[str, Any]:
    samples = [[round(it, 2) for it in astuple(sample)] for sample in recording.samples]
    return {"summary": asdict(recording.summary), "samples": samples}


def _recording_of_json(content: dict[str, Any]) -> Recording:
    return Recording([Sample(*it) for it in content["samples"]], Summary(**content["summary"]))
