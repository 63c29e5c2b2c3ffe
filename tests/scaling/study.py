"""The simulation at sizes that no single machine has, and with one number changed at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from tests.scaling.load import Phase, arrivals
from tests.scaling.record import Sample, Summary
from tests.scaling.release import Release
from tests.scaling.scaled_object import Numbers
from tests.scaling.simulation import World, simulate

SIZES: Final = (10, 100, 1000)
CALL_S: Final = 10.0
START_S: Final = 20.0
# Of DeepInfra, for each model: what the chart takes for the provider's limit.
PROVIDER: Final = 200
_STEP_S: Final = 0.5
_SAMPLE_S: Final = 5.0

# Rates as shares of what all pods manage.
TIDE: Final = (Phase(120, 0, 1.5), Phase(180, 1.5, 1.5), Phase(60, 1.5, 0))
WAVES: Final = (Phase(120, 0.1, 0.6), Phase(120, 0.6, 0.1)) * 6


@dataclass(frozen=True)
class Course:
    """A simulated run."""

    samples: list[Sample]
    summary: Summary


def course(world: World, phases: Sequence[Phase], full: float) -> Course:
    """One run under a load whose rates are shares of so many jobs a second."""
    jobs = arrivals(replace(it, rate_from=it.rate_from * full, rate_to=it.rate_to * full) for it in phases)
    samples = simulate(world, jobs, step_s=_STEP_S, sample_s=_SAMPLE_S)
    summary = Summary.of(
        samples, call_s=world.call_s, concurrency=world.concurrency, maximum=world.numbers.maximum
    )
    return Course(samples, summary)


def times(phases: Iterable[Phase], full: float) -> list[Phase]:
    """The phases in jobs a second, their rates being shares of so many."""
    return [replace(it, rate_from=it.rate_from * full, rate_to=it.rate_to * full) for it in phases]


def most_per_s(pods: int, concurrency: int, call_s: float = CALL_S) -> float:
    """The capacity formula: jobs a second that so many pods manage."""
    return pods * concurrency / call_s


def world_of(pods: int, **changes: Any) -> World:
    """A cluster with the chart's own values, before a provider that can do with so many pods."""
    release = Release.usual(pods=pods)
    usual = World(release.numbers, release.concurrency, CALL_S, (START_S,))
    return replace(usual, **changes)


def sizes(tell: Callable[[str], None], numbers: Iterable[int] = SIZES) -> dict[int, Course]:
    """The same tide for each number of pods, as high as fits it."""
    found = {}
    for pods in numbers:
        tell(f"Simulating {pods} pods")
        world = world_of(pods)
        found[pods] = course(world, TIDE, most_per_s(pods, world.concurrency))
    return found


def variants() -> Iterator[tuple[str, str, Summary]]:
    """With one number changed at a time: the load's name, what is changed, and how it goes."""
    usual = world_of(10)
    per_s = most_per_s(10, usual.concurrency)
    numbers, value = usual.numbers, usual.numbers.value
    changed: dict[str, World] = {
        "as the chart has it": usual,
        "pods start in 5 s": replace(usual, start_s=(5.0,)),
        "pods start in 120 s (new nodes)": replace(usual, start_s=(120.0,)),
        f"`value` {value / 2:.0f}, half the concurrency": _with(usual, value=value / 2),
        f"`value` {2 * value:.0f}, twice the concurrency": _with(usual, value=2 * value),
        "no stabilisation on the way down": _with(usual, down=_window(numbers, 0)),
        "stabilisation 600 s": _with(usual, down=_window(numbers, 600)),
        "`cooldownPeriod` 60": _with(usual, cooldown_s=60.0),
        "`cooldownPeriod` 1800": _with(usual, cooldown_s=1800.0),
    }
    for load, phases in (("tide", TIDE), ("waves", WAVES)):
        for name, world in changed.items():
            yield load, name, course(world, phases, per_s).summary


def beyond_the_provider() -> dict[int, Summary]:
    """As many pods as the provider has calls for, and more; the same load for all."""
    fits = world_of(1, provider=PROVIDER)
    pods = [PROVIDER // fits.concurrency, 5, 10]
    per_s = most_per_s(pods[0], fits.concurrency)
    return {it: course(world_of(it, provider=PROVIDER), TIDE, per_s).summary for it in pods}


def _with(world: World, **changes: Any) -> World:
    return replace(world, numbers=replace(world.numbers, **changes))


def _window(numbers: Numbers, seconds: float) -> Any:
    return numbers.down.model_copy(update={"stabilization_window_seconds": seconds})
