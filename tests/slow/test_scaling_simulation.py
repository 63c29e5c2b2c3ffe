"""The simulated cluster, its load, and the figures of a run."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scaling.load import Phase, arrivals
from tests.scaling.record import Sample, Summary, area, difference, rates, statistics_age
from tests.scaling.scaled_object import DownRules, Policy, Rules, ScalerConfig
from tests.scaling.simulation import ClusterModel, RecordedStatistics, Statistics, simulate

CONCURRENCY: Final = 8
CALL_S: Final = 10.0
CHART: Final = ScalerConfig(
    host="",
    vhost="/",
    queue="vqa.jobs",
    value=CONCURRENCY,
    activation=0,
    minimum=0,
    maximum=10,
    polling_s=15,
    cooldown_s=300,
    up=Rules(),
    down=DownRules(
        stabilizationWindowSeconds=120, policies=(Policy(type="Percent", value=50, periodSeconds=60),)
    ),
)
CAPACITY_PER_S: Final = CHART.maximum * CONCURRENCY / CALL_S
PEAK: Final = arrivals(
    [Phase(120, 0, 1.5 * CAPACITY_PER_S), Phase(180, 1.5 * CAPACITY_PER_S, 1.5 * CAPACITY_PER_S)]
)


def model(**changes: Any) -> ClusterModel:
    default = ClusterModel(scaler=CHART, concurrency=CONCURRENCY, call_s=CALL_S, start_s=(20.0,))
    return replace(default, **changes)


def simulated(jobs: Sequence[float] = PEAK, seed: int = 0, **changes: Any) -> list[Sample]:
    return simulate(model(**changes), jobs, step_s=0.5, sample_s=1.0, seed=seed)


def summary(samples: Sequence[Sample]) -> Summary:
    return Summary.of(samples, call_s=CALL_S, concurrency=CONCURRENCY, maximum=CHART.maximum)


def steady(jobs_per_s: float) -> list[float]:
    return arrivals([Phase(1200, jobs_per_s, jobs_per_s)])


def test_every_job_is_answered_and_all_pods_stop() -> None:
    samples = simulated()
    assert (samples[-1].answered, samples[-1].rate_limited) == (len(PEAK), 0)
    assert (samples[-1].replicas, samples[-1].ready, samples[-1].terminating) == (0, 0, 0)
    assert summary(samples).max_replicas == CHART.maximum


@pytest.mark.parametrize("pods", [1.5, 3.5, 6.5])
def test_the_number_of_pods_follows_the_capacity_formula(pods: float) -> None:
    # Arrival rate × seconds per job ÷ concurrency.
    rate = pods * CONCURRENCY / CALL_S
    late = [it.replicas for it in simulated(steady(rate)) if 600 < it.at < 1200]
    assert pods <= sum(late) / len(late) < pods + 1.5


def test_half_the_value_gives_twice_the_pods() -> None:
    jobs = steady(3.5 * CONCURRENCY / CALL_S)
    default, half = (
        simulated(jobs, scaler=replace(CHART, value=it)) for it in (CONCURRENCY, CONCURRENCY / 2)
    )
    assert summary(half).pod_s == pytest.approx(2 * summary(default).pod_s, rel=0.25)


def test_the_backlog_grows_beyond_the_capacity() -> None:
    late = [it for it in simulated(steady(1.2 * CAPACITY_PER_S)) if 600 < it.at < 1200]
    assert {it.replicas for it in late} == {CHART.maximum}
    grown = (late[-1].backlog - late[0].backlog) / (late[-1].at - late[0].at)
    assert grown == pytest.approx(0.2 * CAPACITY_PER_S, rel=0.1)


def test_the_backlog_is_drained_in_about_the_ideal_time() -> None:
    found = summary(simulated())
    assert found.ideal_drain_s < found.drain_s < 1.2 * found.ideal_drain_s + 2 * CALL_S


def test_slow_pod_starts_increase_the_backlog() -> None:
    quick, slow = (summary(simulated(start_s=(seconds,))) for seconds in (1.0, 120.0))
    assert slow.first_pod_s == pytest.approx(quick.first_pod_s + 119, abs=2)
    assert slow.max_backlog > quick.max_backlog + 60 * CAPACITY_PER_S


def test_a_stopped_pod_finishes_its_calls() -> None:
    falling = arrivals(
        [Phase(300, CAPACITY_PER_S, CAPACITY_PER_S), Phase(600, 0.3 * CAPACITY_PER_S, 0.3 * CAPACITY_PER_S)]
    )
    samples = simulated(falling)
    assert max(it.terminating for it in samples) > 0
    assert samples[-1].answered == len(falling)


def test_pods_beyond_the_provider_s_limit_only_cause_429s() -> None:
    provider_limit = 4 * CONCURRENCY
    capped = simulated(scaler=replace(CHART, maximum=4), provider=provider_limit)
    over = simulated(provider=provider_limit)
    assert capped[-1].rate_limited == 0
    assert over[-1].rate_limited > 100
    assert summary(over).drain_s > 0.98 * summary(capped).drain_s
    assert summary(over).pod_s > 2 * summary(capped).pod_s


def test_the_seed_changes_little() -> None:
    one, other = simulated(seed=1), simulated(seed=2)
    assert one != other
    assert difference(one, other, lambda it: it.replicas) < 0.05


@pytest.mark.parametrize(
    "change",
    [
        {"maximum": 8},
        {"down": DownRules(stabilizationWindowSeconds=0)},
        {"down": DownRules(stabilizationWindowSeconds=600)},
        {"up": Rules(policies=(Policy(type="Pods", value=1, periodSeconds=60),))},
        {"cooldown_s": 2700.0},
    ],
    ids=str,
)
def test_another_configuration_differs_by_more_than_the_tolerance_of_a_real_run(
    change: dict[str, Any],
) -> None:
    # The load and the tolerance of tests/slow/test_scaling.py.
    phases = (Phase(240, 0.1, 0.9), Phase(300, 0.35, 0.35), Phase(300, 0.35, 2.2))
    jobs = arrivals(
        Phase(it.seconds, it.rate_from * CAPACITY_PER_S, it.rate_to * CAPACITY_PER_S) for it in phases
    )
    default, other = simulated(jobs), simulated(jobs, scaler=replace(CHART, **change))
    assert difference(default, other, lambda it: it.replicas) > 0.15


def test_a_simulation_that_does_not_finish_fails() -> None:
    with pytest.raises(RuntimeError, match="not finished"):
        simulated(scaler=replace(CHART, activation=10**6))


def test_the_queue_length_has_the_age_of_the_broker_s_statistics() -> None:
    figures = Statistics(report_s=5, sampling_s=5)
    shown = [figures.at(now, now) for now in range(16)]
    # Reported at 2.5, 7.5, …, and sampled at 5, 10, ….
    assert shown == [0] * 5 + [3] * 5 + [8] * 5 + [13]


def test_the_queue_length_can_have_a_recorded_age() -> None:
    # Two seconds old, then current, then one second old.
    figures = RecordedStatistics([(0, 0), (1, 0), (2, 0), (3, 1), (4, 4), (5, 4)])
    assert [figures.at(now, 10 * now) for now in range(8)] == [0, 0, 0, 10, 40, 40, 50, 60]


def test_the_age_of_statistics_is_estimated_from_the_backlog() -> None:
    shown = [0, 0, 0, 4, 4, 8, 3]
    backlog = [0, 2, 4, 6, 8, 5, 3]
    samples = [
        sample(at, messages=messages, published=count)
        for at, (messages, count) in enumerate(zip(shown, backlog, strict=True))
    ]
    assert statistics_age(samples) == [(0, 0), (0, 0), (1, 0), (2, 2), (3, 2), (4, 4), (5, 6)]


def test_jobs_arrive_at_the_rate_of_their_phase() -> None:
    assert arrivals([Phase(2, 2, 2)]) == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert arrivals([Phase(2, 0, 4)]) == pytest.approx([1.0, 2**0.5, 3**0.5, 2.0])
    assert arrivals([Phase(2, 4, 0)])[-1] == pytest.approx(2.0)
    assert arrivals([Phase(1, 1, 1), Phase(5, 0, 0), Phase(1, 1, 1)]) == pytest.approx([1.0, 7.0])


@given(
    st.lists(
        st.builds(Phase, st.floats(0.5, 100), st.floats(0, 50), st.floats(0, 50)), min_size=1, max_size=4
    )
)
def test_arrivals_are_ordered_and_match_the_rates(phases: list[Phase]) -> None:
    found = arrivals(phases)
    assert len(found) == pytest.approx(sum(it.jobs for it in phases), abs=1.01)
    assert all(one <= other + 1e-6 for one, other in itertools.pairwise(found))
    assert not found or -1e-6 <= found[0] <= found[-1] <= sum(it.seconds for it in phases) + 1e-6


def test_a_phase_can_continue_with_its_last_rate() -> None:
    assert Phase(2, 1, 3).at(4) == pytest.approx(2.0)
    assert Phase(2, 1, 3).at(7) == pytest.approx(3.0)
    assert Phase(0, 0, 0).at(1) == float("inf")


def sample(at: float, **figures: int) -> Sample:
    nothing = {"messages": 0, "replicas": 0, "ready": 0, "terminating": 0, "published": 0, "answered": 0}
    return Sample(at=at, **{**nothing, **figures})


RUN: Final = [
    sample(0),
    sample(10, published=4),
    sample(20, published=20, replicas=2),
    sample(30, published=40, replicas=2, ready=1),
    sample(40, published=40, answered=10, replicas=2, ready=2),
    sample(60, published=40, answered=40, replicas=2, ready=2),
    sample(70, published=40, answered=40, terminating=2),
    sample(80, published=40, answered=40),
]


def test_the_figures_of_a_run() -> None:
    found = Summary.of(RUN, call_s=5, concurrency=5, maximum=2)
    assert (found.jobs, found.max_backlog, found.max_replicas) == (40, 40, 2)
    assert (found.first_pod_s, found.all_ready_s) == (20, 30)
    assert (found.drain_s, found.ideal_drain_s, found.scale_down_s) == (30, 20, 10)
    assert (found.pod_s, found.busy_s) == (120, 40)
    assert found.idle == pytest.approx(2 / 3)
    assert (found.starts, found.rate_limited) == (2, 0)
    # 4 × 10 + 20 × 10 + 40 × 10 + 30 × 20 job-seconds of backlog.
    assert found.wait_s == pytest.approx(1240 / 40 - 5)


def test_the_difference_of_two_runs_is_the_area_between_their_curves() -> None:
    assert area(RUN, lambda it: it.replicas) == 100
    assert difference(RUN, RUN, lambda it: it.replicas) == 0
    later = [replace(it, at=it.at + 5) for it in RUN]
    assert difference(RUN, later, lambda it: it.replicas) == pytest.approx(0.2)
    # The longer run counts until its end.
    assert difference(RUN[:6], RUN, lambda it: it.replicas) == pytest.approx(0.25)


def test_rates_are_computed_over_a_window() -> None:
    assert rates(RUN, lambda it: it.published, over_s=10) == pytest.approx([0, 0.4, 1.6, 2, 0, 0, 0, 0])
