"""Telling an outage from the trouble of a job."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.fakes import turns_of_the_loop
from worker.errors import Dependency
from worker.observability import metrics
from worker.resilience.outage_detector import (
    CROWD,
    DISTINCT_JOBS,
    FAIR_CHANCES,
    RECENT_S,
    RELAPSE_S,
    REMEMBERED_JOBS,
    Health,
    Outage,
    Verdict,
)

MODEL, S3 = Dependency.MODEL, Dependency.S3
DOWN, OWN, OPEN = Verdict.DOWN, Verdict.OWN, Verdict.OPEN
PATIENCE_S = 20.0
BOTH = pytest.mark.parametrize("dependency", [MODEL, S3])


def up(dependency: Dependency) -> float | None:
    return metrics.REGISTRY.get_sample_value("vqa_dependency_up", {"dependency": dependency})


def jobs(count: int) -> list[str]:
    return [f"job {n}" for n in range(count)]


def failing(
    health: Health, dependency: Dependency, count: int, now: float = 0.0, others: int = 0
) -> list[Verdict]:
    return [health.failed(dependency, job, "http_5xx", now, others=others) for job in jobs(count)]


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
    assert {health.failed(dependency, "job", "http_5xx", float(now)) for now in range(times)} == {OPEN}
    assert health.outages == {}


@BOTH
def test_two_different_jobs_that_fail_again_and_again_are_none(dependency: Dependency) -> None:
    health = Health()
    for now in range(20):
        assert failing(health, dependency, 2, float(now)) == [OPEN, OPEN]
    assert health.outages == {}


@BOTH
def test_three_different_jobs_in_a_row_are_one(dependency: Dependency) -> None:
    health = Health()
    assert DISTINCT_JOBS == 3
    assert failing(health, dependency, DISTINCT_JOBS) == [OPEN] * (DISTINCT_JOBS - 1) + [DOWN]
    assert health.changed.is_set()
    assert set(health.outages) == {dependency}
    assert "http_5xx" in health.outages[dependency].reason
    assert up(dependency) == 0


@BOTH
def test_a_success_in_between_starts_the_count_anew(dependency: Dependency) -> None:
    health = Health()
    failing(health, dependency, DISTINCT_JOBS - 1)
    health.succeeded(dependency, 0.0, 1.0)
    assert set(failing(health, dependency, DISTINCT_JOBS - 1)) == {OPEN}
    assert health.failed(dependency, "one more", "http_5xx", 2.0) is DOWN


def test_bad_jobs_that_come_to_their_end_one_after_the_other_are_an_outage_only_after_five() -> None:
    health = Health()
    for job in jobs(4):
        assert {health.failed(MODEL, job, "http_5xx", float(now)) for now in range(3)} == {OPEN}
        health.ended(MODEL, job)
    health.ended(MODEL, "nobody")
    assert health.failed(MODEL, "fifth", "http_5xx", 9.0) is DOWN
    assert health.outages[MODEL].reason == "5 different jobs in a row failed: http_5xx"


def test_those_that_are_no_more_are_forgotten_with_a_success() -> None:
    health = Health()
    for job in jobs(4):
        health.failed(MODEL, job, "http_5xx", 0.0)
        health.ended(MODEL, job)
    health.succeeded(MODEL, 1.0, 1.0)
    assert set(failing(health, MODEL, 2, 2.0)) == {OPEN}


@pytest.mark.parametrize("others", [0, CROWD * DISTINCT_JOBS, CROWD * DISTINCT_JOBS + CROWD, 64, 200])
def test_of_many_calls_at_once_more_have_to_fail_in_a_row(others: int) -> None:
    health = Health()
    enough = max(DISTINCT_JOBS, others // CROWD)
    assert failing(health, MODEL, enough, others=others) == [OPEN] * (enough - 1) + [DOWN]


@pytest.mark.parametrize(("others", "rate"), [(31, 0.1), (63, 0.2)])
def test_sporadic_failures_among_many_calls_are_never_an_outage(others: int, rate: float) -> None:
    health, chance = Health(), Random(7)  # noqa: S311 - it guards nothing
    for n in range(5000):
        if chance.random() < rate:
            assert health.failed(MODEL, f"job {n}", "http_5xx", float(n), others=others) is OPEN
        else:
            health.succeeded(MODEL, n - 20.0, float(n))


def test_the_two_dependencies_are_told_apart() -> None:
    health = Health()
    failing(health, MODEL, DISTINCT_JOBS - 1)
    assert set(failing(health, S3, DISTINCT_JOBS - 1)) == {OPEN}
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


@pytest.mark.parametrize(
    ("successes", "later_s", "is_relapse"),
    [(1, 1.0, True), (2, RELAPSE_S - 1, True), (3, 1.0, False), (1, RELAPSE_S, False)],
)
def test_what_was_hardly_up_falls_over_again_and_not_anew(
    successes: int, later_s: float, is_relapse: bool
) -> None:
    health = Health()
    health.down(MODEL, "gone", 1.0)
    assert not health.outages[MODEL].is_relapse
    for _ in range(successes):
        health.succeeded(MODEL, 2.0, 3.0)
    health.down(S3, "gone", 3.0 + later_s)
    health.down(MODEL, "gone", 3.0 + later_s)
    assert health.outages[MODEL].is_relapse is is_relapse
    assert not health.outages[S3].is_relapse


def test_failures_in_an_outage_are_answered_with_that_it_is_one() -> None:
    health = Health()
    health.down(MODEL, "gone", 1.0)
    assert health.failed(MODEL, "job", "timeout", 2.0) is DOWN
    assert health.failed(S3, "job", "timeout", 2.0) is OPEN


def test_after_an_outage_it_takes_as_many_jobs_as_before_it() -> None:
    health = Health()
    failing(health, MODEL, DISTINCT_JOBS)
    health.succeeded(MODEL, 1.0, 2.0)
    assert failing(health, MODEL, DISTINCT_JOBS, now=3.0) == [OPEN] * (DISTINCT_JOBS - 1) + [DOWN]


def test_the_result_store_is_told_apart_from_the_images_s3_and_shown_as_s3() -> None:
    health, store = Health(), Dependency.RESULT_STORE
    health.down(S3, "SlowDown", 1.0)
    health.succeeded(store, 2.0, 3.0)
    assert set(health.outages) == {S3}
    health.down(store, "VQA_RESULT_STORE: gone", 4.0)
    health.succeeded(S3, 5.0, 6.0)
    assert (set(health.outages), up(S3)) == ({store}, 0)
    health.succeeded(store, 7.0, 8.0)
    assert (health.outages, up(S3)) == ({}, 1)


def test_the_list_of_outages_is_a_copy() -> None:
    health = Health()
    health.outages[MODEL] = Outage(0.0, "made up")
    assert health.outages == {}


# Whether a 403 is meant for this job only


def test_a_first_403_is_never_the_jobs_own_whatever_went_well_before() -> None:
    health = Health()
    health.succeeded(MODEL, 0.0, 1.0)
    health.failed(MODEL, "job", "http_5xx", 1.5)
    health.succeeded(MODEL, 2.0, 2.5)
    assert not health.is_forbidden_alone(MODEL, "job", 3.0)
    assert not health.is_forbidden_alone(MODEL, "job", 4.0)


def test_an_outage_of_one_job_only_is_its_own_trouble_in_the_end() -> None:
    """But not the second time: what has just come up may be gone again."""
    health = Health()
    for n in range(FAIR_CHANCES + 1):
        assert health.refused_everybody(S3, "job", "broken bucket", n + 0.1) is DOWN
        health.succeeded(S3, n + 0.2, n + 0.3)
    assert health.refused_everybody(S3, "job", "broken bucket", 9.0) is OWN
    assert health.outages == {}
    assert health.refused_everybody(S3, "job", "no success since", 10.0) is DOWN


def test_jobs_that_were_in_one_outage_tell_of_the_next_as_well() -> None:
    health = Health()
    for now in (1.0, 5.0):
        assert {health.refused_everybody(MODEL, job, "gone", now) for job in jobs(12)} == {DOWN}
        health.succeeded(MODEL, now + 1, now + 2)
    assert DOWN in failing(health, MODEL, 12, 9.0)


def test_a_job_that_meets_an_outage_again_while_it_lasts_is_not_to_blame() -> None:
    health = Health()
    health.succeeded(S3, 0.0, 0.5)
    for n in range(3):
        assert health.refused_everybody(S3, "job", "down", float(n + 1)) is DOWN
    assert set(health.outages) == {S3}


def test_a_403_is_the_jobs_own_if_a_call_begun_since_the_first_one_went_well() -> None:
    health = Health()
    assert not health.is_forbidden_alone(MODEL, "job", 2.0)
    health.succeeded(MODEL, 1.5, 3.0)
    assert not health.is_forbidden_alone(MODEL, "job", 4.0)
    health.succeeded(MODEL, 2.5, 5.0)
    assert health.is_forbidden_alone(MODEL, "job", 6.0)
    assert not health.is_forbidden_alone(S3, "job", 7.0)
    assert not health.is_forbidden_alone(MODEL, "another", 7.0)


def test_a_403_is_not_the_jobs_own_while_another_fails_too() -> None:
    health = Health()
    health.is_forbidden_alone(MODEL, "job", 1.0)
    health.succeeded(MODEL, 1.5, 2.0)
    health.failed(MODEL, "another", "403", 3.0)
    assert not health.is_forbidden_alone(MODEL, "job", 3.5)
    health.succeeded(MODEL, 3.5, 4.0)
    assert health.is_forbidden_alone(MODEL, "job", 5.0)


def test_in_an_outage_no_403_is_the_jobs_own() -> None:
    health = Health()
    health.is_forbidden_alone(MODEL, "job", 1.0)
    health.succeeded(MODEL, 1.5, 2.0)
    health.down(MODEL, "gone", 3.0)
    assert not health.is_forbidden_alone(MODEL, "job", 4.0)
    health.succeeded(MODEL, 5.0, 6.0)
    assert health.is_forbidden_alone(MODEL, "job", 7.0)


def test_what_is_remembered_of_failing_jobs_has_an_end() -> None:
    health = Health()
    for n in range(REMEMBERED_JOBS + 1):
        health.is_forbidden_alone(MODEL, f"job {n}", float(n))
    health.succeeded(MODEL, 1e6, 1e6)
    assert health.is_forbidden_alone(MODEL, "job 1", 2e6)
    assert not health.is_forbidden_alone(MODEL, "job 0", 2e6)


# What may be one bucket's trouble, or one model's


def hiccup(health: Health, job: str, now: float, others: int = 0) -> Verdict:
    return health.refused_everybody(S3, job, "SlowDown", now, others=others, may_be_partial=True)


@pytest.mark.parametrize("success_at", [None, -RECENT_S], ids=["never", "long ago"])
def test_where_nobody_was_served_lately_a_hiccup_is_an_outage(success_at: float | None) -> None:
    health = Health()
    if success_at is not None:
        health.succeeded(S3, success_at, success_at)
    assert hiccup(health, "job", 0.0) is DOWN


def test_where_others_were_just_served_one_hiccup_stops_nobody_but_the_same_again_does() -> None:
    health = Health()
    health.succeeded(S3, 0.0, 1.0)
    assert hiccup(health, "job", 2.0) is OPEN
    assert health.outages == {}
    assert hiccup(health, "job", 3.0) is DOWN


def test_hiccups_of_several_jobs_in_a_row_are_an_outage() -> None:
    health = Health()
    health.succeeded(S3, 0.0, 1.0)
    assert [hiccup(health, job, 2.0) for job in jobs(DISTINCT_JOBS)] == [OPEN, OPEN, DOWN]
    health = Health()
    health.succeeded(S3, 0.0, 1.0)
    assert {hiccup(health, job, 2.0, others=40) for job in jobs(9)} == {OPEN}


def test_an_object_that_others_do_not_share_its_trouble_with_has_fair_chances_and_is_counted_then() -> None:
    health = Health()
    found = []
    for now in range(FAIR_CHANCES + 3):
        health.succeeded(S3, float(now), float(now))
        found.append(hiccup(health, "job", now + 0.5))
    assert found == [OPEN] * (FAIR_CHANCES + 1) + [OWN, OWN]
    assert health.outages == {}


# Jobs that fail again and again


def test_a_batch_of_bad_jobs_stops_the_worker_a_few_times_and_then_no_more() -> None:
    """Each time another job shows that all is well; in the end the bad ones are known for what they are."""
    health = Health()
    found = []
    for now in range(10):
        found.append(DOWN in failing(health, MODEL, 10, float(now)))
        health.succeeded(MODEL, now + 0.5, now + 0.5)
    assert found == [True] * (FAIR_CHANCES + 1) + [False] * (9 - FAIR_CHANCES)
    assert set(failing(health, MODEL, 10, 20.0)) == {OWN}


def test_what_is_known_of_bad_jobs_is_no_reason_to_count_them_in_an_outage() -> None:
    health = Health()
    for now in range(10):
        health.failed(MODEL, "bad", "http_5xx", float(now))
        health.succeeded(MODEL, now + 0.5, now + 0.5)
    assert health.failed(MODEL, "bad", "http_5xx", 20.0) is OWN
    health.down(MODEL, "gone", 21.0)
    assert health.failed(MODEL, "bad", "http_5xx", 22.0) is DOWN


# Verdicts that are waited for


@asynccontextmanager
async def waiting(health: Health, failed_at: float = 1.0) -> AsyncIterator[asyncio.Task[Verdict]]:
    task = asyncio.create_task(health.verdict(MODEL, failed_at, PATIENCE_S))
    await turns_of_the_loop()
    assert not task.done()
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_who_waits_is_told_that_the_dependency_is_down() -> None:
    health = Health()
    async with waiting(health) as first, waiting(health) as second:
        health.down(S3, "gone", 2.0)
        await turns_of_the_loop()
        assert not first.done()
        health.down(MODEL, "gone", 2.0)
        assert await first is await second is DOWN


async def test_a_call_begun_after_the_failure_that_goes_well_says_that_it_was_the_job_s_own() -> None:
    health = Health()
    async with waiting(health, failed_at=1.0) as task:
        health.succeeded(S3, 1.5, 2.0)
        health.succeeded(MODEL, 0.9, 2.0)
        await turns_of_the_loop()
        assert not task.done()
        health.succeeded(MODEL, 1.0, 3.0)
        assert await task is OWN


async def test_nobody_waits_longer_than_its_patience() -> None:
    assert await Health().verdict(MODEL, 1.0, 0.01) is OPEN
    assert await Health().verdict(MODEL, 1.0, 0.0) is OPEN
    assert await Health().verdict(MODEL, 1.0, -1.0) is OPEN


async def test_in_an_outage_nobody_has_to_wait() -> None:
    health = Health()
    health.down(MODEL, "gone", 1.0)
    assert await health.verdict(MODEL, 2.0, 0.0) is DOWN


async def test_a_stop_ends_the_waiting_and_nobody_begins_to_wait() -> None:
    health = Health()
    async with waiting(health) as task:
        health.end_verdicts()
        assert await task is OPEN
    async with asyncio.timeout(PATIENCE_S / 2):
        assert await health.verdict(MODEL, 1.0, PATIENCE_S) is OPEN


async def test_who_gives_up_waiting_is_not_told() -> None:
    health = Health()
    async with waiting(health):
        pass
    health.down(MODEL, "gone", 2.0)
    health.succeeded(MODEL, 3.0, 3.0)


# Attempts that were counted and turn out to have been an outage's


def test_what_was_counted_is_handed_back_once_when_the_outage_is_known() -> None:
    health = Health()
    health.counted(MODEL, "job", 1.0)
    health.counted(MODEL, "job", 2.0)
    health.counted(MODEL, "another", 2.0)
    assert health.take_restored_attempts("job") == 0
    health.down(MODEL, "gone", 3.0)
    assert (health.take_restored_attempts("job"), health.take_restored_attempts("another")) == (2, 1)
    assert (health.take_restored_attempts("job"), health.take_restored_attempts("nobody")) == (0, 0)
    health.succeeded(MODEL, 4.0, 4.0)
    health.down(MODEL, "again", 5.0)
    assert health.take_restored_attempts("job") == 0


def test_what_was_counted_stays_counted_once_a_call_begun_since_has_gone_well() -> None:
    health = Health()
    for job, failed_at in (("early", 1.0), ("late", 3.0)):
        health.counted(MODEL, job, failed_at)
    health.succeeded(MODEL, 2.0, 4.0)
    health.succeeded(S3, 4.0, 4.0)
    health.down(MODEL, "gone", 5.0)
    assert (health.take_restored_attempts("early"), health.take_restored_attempts("late")) == (0, 1)


def test_only_the_outage_of_what_failed_hands_back() -> None:
    health = Health()
    health.counted(MODEL, "job", 1.0)
    health.down(S3, "gone", 2.0)
    assert health.take_restored_attempts("job") == 0
    health.counted(S3, "other", 3.0)
    assert health.take_restored_attempts("other") == 0


def test_what_is_remembered_of_counted_attempts_has_an_end() -> None:
    health = Health()
    for n in range(REMEMBERED_JOBS + 1):
        health.counted(MODEL, f"job {n}", 1.0)
    health.down(MODEL, "gone", 2.0)
    for n in range(REMEMBERED_JOBS - 1):
        health.counted(S3, f"other {n}", 3.0)
    health.down(S3, "gone", 4.0)
    assert [health.take_restored_attempts(f"job {n}") for n in (0, 1, REMEMBERED_JOBS)] == [0, 0, 1]
    assert health.take_restored_attempts("other 0") == 1


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
    # Of each job: whether others have succeeded since it failed, and how often it failed after that.
    owes, again = dict[str | int, bool](), Counter[str | int]()
    for now, (event, what) in enumerate(events):
        match event:
            case "failed":
                again[what] += owes.get(what, False)
                owes[what] = False
                is_own = since is None and again[what] > FAIR_CHANCES
                if since is None and not is_own:
                    met.add(what)
                    since = now if len(met) >= DISTINCT_JOBS else None
                expected = OWN if is_own else OPEN if since is None else DOWN
                assert health.failed(MODEL, str(what), "5xx", now) is expected
            case "succeeded":
                started = now - int(what)
                if since is None or started >= since:
                    met, since = set(), None
                    owes = dict.fromkeys(owes, True)
                health.succeeded(MODEL, started, now)
            case _:
                since = now if since is None else since
                health.down(MODEL, "gone", now)
        assert (MODEL in health.outages) is (since is not None)
        if since is not None:
            assert health.outages[MODEL].since == since
