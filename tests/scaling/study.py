"""Simulate large fleets, and the effect of single parameters."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from tests.scaling.load import Phase, arrivals
from tests.scaling.record import Sample, Summary
from tests.scaling.release import Release
from tests.scaling.scaled_object import ScalerConfig
from tests.scaling.simulation import ClusterModel, simulate

SIZES: Final = (10, 100, 1000)
CALL_S: Final = 10.0
START_S: Final = 20.0
# DeepInfra's limit per model, the default of the chart.
PROVIDER: Final = 200
_STEP_S: Final = 0.5
_SAMPLE_S: Final = 5.0

# Rates as fractions of the capacity of all pods.
PEAK: Final = (Phase(120, 0, 1.5), Phase(180, 1.5, 1.5), Phase(60, 1.5, 0))
WAVES: Final = (Phase(120, 0.1, 0.6), Phase(120, 0.6, 0.1)) * 6


@dataclass(frozen=True)
class Recording:
    """The samples and figures of a run."""

    samples: list[Sample]
    summary: Summary


def recording(model: ClusterModel, phases: Sequence[Phase], full: float) -> Recording:
    """Simulate a run with rates as fractions of `full` jobs per second."""
    jobs = arrivals(times(phases, full))
    samples = simulate(model, jobs, step_s=_STEP_S, sample_s=_SAMPLE_S)
    summary = Summary.of(
        samples, call_s=model.call_s, concurrency=model.concurrency, maximum=model.scaler.maximum
    )
    return Recording(samples, summary)


def times(phases: Iterable[Phase], full: float) -> list[Phase]:
    """Return the phases in jobs per second, from rates as fractions of `full`."""
    return [replace(it, rate_from=it.rate_from * full, rate_to=it.rate_to * full) for it in phases]


def capacity_per_s(pods: int, concurrency: int, call_s: float = CALL_S) -> float:
    """Return the capacity of the pods in jobs per second."""
    return pods * concurrency / call_s


def model_of(pods: int, **changes: Any) -> ClusterModel:
    """Return a cluster with default values, for a provider whose limit is `pods` pods."""
    release = Release.default(pods=pods)
    default = ClusterModel(release.scaler, release.concurrency, CALL_S, (START_S,))
    return replace(default, **changes)


def sizes(log: Callable[[str], None], counts: Iterable[int] = SIZES) -> dict[int, Recording]:
    """Simulate a load peak for each number of pods, scaled to their capacity."""
    found = {}
    for pods in counts:
        log(f"Simulating {pods} pods")
        model = model_of(pods)
        found[pods] = recording(model, PEAK, capacity_per_s(pods, model.concurrency))
    return found


def variants() -> Iterator[tuple[str, str, Summary]]:
    """Yield the name of the load, the changed parameter and the figures."""
    default = model_of(10)
    per_s = capacity_per_s(10, default.concurrency)
    scaler, value = default.scaler, default.scaler.value
    changed: dict[str, ClusterModel] = {
        "default values": default,
        "pods start in 5 s": replace(default, start_s=(5.0,)),
        "pods start in 120 s (new nodes)": replace(default, start_s=(120.0,)),
        f"`value` {value / 2:.0f}, half the concurrency": _with(default, value=value / 2),
        f"`value` {2 * value:.0f}, twice the concurrency": _with(default, value=2 * value),
        "no stabilisation window for scale-down": _with(default, down=_window(scaler, 0)),
        "stabilisation 600 s": _with(default, down=_window(scaler, 600)),
        "`cooldownPeriod` 60": _with(default, cooldown_s=60.0),
        "`cooldownPeriod` 1800": _with(default, cooldown_s=1800.0),
    }
    for load, phases in ((("peak", PEAK)), ("waves", WAVES)):
        for name, model in changed.items():
            yield load, name, recording(model, phases, per_s).summary


def over_provider_limit() -> dict[int, Summary]:
    """Simulate the same load with as many pods as the provider's limit allows, and with more."""
    fits = model_of(1, provider=PROVIDER)
    pods = [PROVIDER // fits.concurrency, 5, 10]
    per_s = capacity_per_s(pods[0], fits.concurrency)
    return {it: recording(model_of(it, provider=PROVIDER), PEAK, per_s).summary for it in pods}


def _with(model: ClusterModel, **changes: Any) -> ClusterModel:
    return replace(model, scaler=replace(model.scaler, **changes))


def _window(scaler: ScalerConfig, seconds: float) -> Any:
    return scaler.down.model_copy(update={"stabilization_window_seconds": seconds})
