"""Telling an outage from the trouble of a job."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker import metrics
from worker.errors import Dependency
from worker.health import DISTINCT_JOBS, RECENT_S, REMEMBERED_JOBS, Health, Outage

MODEL, S3 = Dependency.MODEL, Dependency.S3
BOTH = pytest.mark.parametrize("dependency", [MODEL, S3])


def up(dependency: Dependency) -> float | None:
    return metrics.REGISTRY.get_sample_value("vqa_dependency_up", {"dependency": dependency})


def jobs(count: int) -> list[str]:
    return [f"job {n}" for n in range(count)]


def failing(health: Health, dependency: Dependency, count: int, now: float = 0.0) -> list[bool]:
    return [health.failed(dependency, job, "5xx", now) for job in jobs(count)]


@BOTH
def test_everything_is_up_until_told_otherwise(dependency: Dependency) -> None:
    health = Health()
    assert health.outages == {}
    assert not health.changed.is_set()
    assert up(dependency) == 1


@BOTH
@given(times=st.integers(1, 200))
def test_a_lone_job_that_fails_again_and_again_is_never_an_outage(dependency: Dependency, times: int) -> None:
    health = Health()
    assert not any(health.failed(dependency, "job", "5xx", float(now)) for now in range(times))
    assert health.outages == {}


@BOTH
def test_five_different_jobs_in_a_row_are_one(dependency: Dependency) -> None:
    health = Health()
    assert failing(health, dependency, DISTINCT_JOBS) == [False] * (DISTINCT_JOBS - 1) + [True]
    assert health.changed.is_set()
    assert set(health.outages) == {dependency}
    assert "5xx" in health.outages[dependency].reason
    assert up(dependency) == 0


@BOTH
def test_a_success_in_between_starts_the_count_anew(dependency: Dependency) -> None:
    health = Health()
    failing(health, dependency, DISTINCT_JOBS - 1)
    health.succeeded(dependency, 0.0, 1.0)
    assert not any(failing(health, dependency, DISTINCT_JOBS - 1))
    assert health.failed(dependency, "one more", "5xx", 2.0)


def test_the_two_dependencies_are_told_apart() -> None:
    health = Health()
    failing(health, MODEL, DISTINCT_JOBS - 1)
    assert not any(failing(health, S3, DISTINCT_JOBS - 1))
    health.down(S3, "gone", 1.0)
    assert set(health.outages) == {S3}
    health.succeeded(MODEL, 2.0, 3.0)
    assert set(health.outages) == {S3}


@BOTH
def test_what_refuses_everybody_is_down_at_once(dependency: Dependency) -> None:
    health = Health()
    health.down(dependency, "the key is wrong", 7.0)
    assert health.outages == {dependency: Outage(7.0, "the key is wrong")}
    assert up(dependency) == 0


def test_an_outage_keeps_its_beginning_and_its_first_reason() -> None:
    health = Health()
    health.down(MODEL, "first", 1.0)
    health.changed.clear()
    health.down(MODEL, "second", 2.0)
    failing(health, MODEL, 2 * DISTINCT_JOBS, now=3.0)
    assert health.outages == {MODEL: Outage(1.0, "first")}
    assert not health.changed.is_set()


@pytest.mark.parametrize(("started", "is_over"), [(4.9, False), (5.0, True), (5.1, True)])
def test_only_a_call_begun_after_the_outage_ends_it(started: float, is_over: bool) -> None:
    health = Health()
    health.down(MODEL, "gone", 5.0)
    health.changed.clear()
    health.succeeded(MODEL, started, 10.0)
    assert (MODEL not in health.outages) is is_over
    assert health.changed.is_set() is is_over
    assert up(MODEL) == (1 if is_over else 0)


def test_failures_in_an_outage_are_answered_with_that_it_is_one() -> None:
    health = Health()
    health.down(MODEL, "gone", 1.0)
    assert health.failed(MODEL, "job", "timeout", 2.0)
    assert not health.failed(S3, "job", "timeout", 2.0)


def test_after_an_outage_it_takes_as_many_jobs_as_before_it() -> None:
    health = Health()
    failing(health, MODEL, DISTINCT_JOBS)
    health.succeeded(MODEL, 1.0, 2.0)
    assert failing(health, MODEL, DISTINCT_JOBS, now=3.0) == [False] * (DISTINCT_JOBS - 1) + [True]


def test_the_list_of_outages_is_a_copy() -> None:
    health = Health()
    health.outages[MODEL] = Outage(0.0, "made up")
    assert health.outages == {}


# Whether others succeed where this job fails


def test_a_job_that_never_failed_is_not_compared_with_others() -> None:
    health = Health()
    health.succeeded(MODEL, 0.0, 1.0)
    assert not health.succeeds_for_others(MODEL, "job")


def test_a_success_shortly_before_the_first_failure_says_that_others_succeed() -> None:
    health = Health()
    health.succeeded(MODEL, 0.0, 100.0)
    health.failed(MODEL, "job", "403", 100.0 + RECENT_S - 1)
    assert health.succeeds_for_others(MODEL, "job")


def test_an_outage_of_one_job_only_is_its_own_trouble_the_second_time() -> None:
    health = Health()
    assert health.refused_everybody(S3, "job", "broken bucket", 1.0)
    health.succeeded(S3, 2.0, 3.0)
    assert not health.refused_everybody(S3, "job", "broken bucket", 4.0)
    assert health.outages == {}
    assert health.refused_everybody(S3, "job", "no success since", 5.0)


def test_a_job_that_meets_an_outage_again_while_it_lasts_is_not_to_blame() -> None:
    health = Health()
    health.succeeded(S3, 0.0, 0.5)
    for n in range(3):
        assert health.refused_everybody(S3, "job", "down", float(n + 1))
    assert set(health.outages) == {S3}


def test_others_succeed_if_a_call_went_well_since_the_job_first_failed() -> None:
    health = Health()
    health.succeeded(MODEL, 0.0, 1.0)
    health.failed(MODEL, "job", "403", 2.0 + RECENT_S)
    assert not health.succeeds_for_others(MODEL, "job")
    health.succeeded(MODEL, 2.5, 3.0 + RECENT_S)
    assert health.succeeds_for_others(MODEL, "job")
    health.failed(MODEL, "job", "403", 4.0)
    assert health.succeeds_for_others(MODEL, "job")
    assert not health.succeeds_for_others(S3, "job")
    assert not health.succeeds_for_others(MODEL, "another")


def test_others_do_not_succeed_while_another_fails_too() -> None:
    health = Health()
    health.failed(MODEL, "job", "403", 1.0)
    health.succeeded(MODEL, 1.5, 2.0)
    health.failed(MODEL, "another", "403", 3.0)
    assert not health.succeeds_for_others(MODEL, "job")
    health.succeeded(MODEL, 3.5, 4.0)
    assert health.succeeds_for_others(MODEL, "job")


def test_what_is_remembered_of_failing_jobs_has_an_end() -> None:
    health = Health()
    for n in range(REMEMBERED_JOBS + 1):
        health.failed(MODEL, f"job {n}", "403", float(n))
        health.succeeded(MODEL, float(n), float(n))
    health.succeeded(MODEL, 1e6, 1e6)
    assert not health.succeeds_for_others(MODEL, "job 0")
    assert health.succeeds_for_others(MODEL, "job 1")


EVENTS = st.lists(
    st.tuples(st.just("failed"), st.sampled_from(jobs(8)))
    | st.tuples(st.just("succeeded"), st.integers(0, 3))
    | st.tuples(st.just("down"), st.just(0)),
    max_size=60,
)


@given(events=EVENTS)
def test_an_outage_is_nothing_but_what_its_rules_say(events: list[tuple[str, str | int]]) -> None:
    """The rules once more, in other words: a set of failing jobs, cleared by a success that counts."""
    health = Health()
    met: set[str | int] = set()
    since: float | None = None
    for now, (event, what) in enumerate(events):
        match event:
            case "failed":
                met.add(what)
                if len(met) >= DISTINCT_JOBS and since is None:
                    since = now
                assert health.failed(MODEL, str(what), "5xx", now) is (since is not None)
            case "succeeded":
                started = now - int(what)
                if since is None or started >= since:
                    met, since = set(), None
                health.succeeded(MODEL, started, now)
            case _:
                since = now if since is None else since
                health.down(MODEL, "gone", now)
        assert (MODEL in health.outages) is (since is not None)
        if since is not None:
            assert health.outages[MODEL].since == since
