"""The outage detector: the effect of each result of a call."""

from collections import Counter
from itertools import pairwise
from random import Random
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import (
    HTTP_500,
    MALFORMED_RESPONSE,
    Dependency,
    DependencyDownError,
    RateLimitedError,
    TransientError,
)
from worker.observability import metrics
from worker.resilience.outage_detector import (
    DISTINCT_JOBS,
    FREE_PROBES,
    MAX_FAILURES_DESPITE_SUCCESSES,
    MAX_MODEL_PROBE_S,
    MAX_OVERLOADS_DESPITE_SUCCESSES,
    RECENT_SUCCESS_S,
    RELAPSE_S,
    REMEMBERED_JOBS,
    SLOTS_PER_FAILING_JOB,
    Diagnosis,
    Outage,
    OutageDetector,
    RequestResult,
    Success,
)

MODEL, S3, STORE = Dependency.MODEL, Dependency.S3, Dependency.RESULT_STORE
OUTAGE, CLEARED, PENDING = Diagnosis.OUTAGE, Diagnosis.CLEARED, Diagnosis.PENDING
BOTH = pytest.mark.parametrize("dependency", [MODEL, S3])
MOST_FAILURES = MAX_FAILURES_DESPITE_SUCCESSES


def transient(dependency: Dependency = MODEL, reason: str = "http_5xx") -> TransientError:
    return TransientError(dependency, reason, "it failed")


def refused() -> TransientError:
    return TransientError(MODEL, "http_403", "it is forbidden", refused=True)


def rejected() -> TransientError:
    error = TransientError(MODEL, "http_400", "it is invalid", refused=True)
    error.is_likely_the_jobs = True
    return error


def unavailable(dependency: Dependency = MODEL, reason: str = "the key is wrong") -> DependencyDownError:
    return DependencyDownError(dependency, reason)


def partial(dependency: Dependency = MODEL) -> DependencyDownError:
    return DependencyDownError(dependency, "SlowDown", may_be_the_jobs=True)


def jobs(count: int) -> list[str]:
    return [f"job {n}" for n in range(count)]


def test_the_reason_of_an_outage_has_the_cause_for_operators() -> None:
    detector = Detector()
    failure = transient()
    failure.cause = "the API's own words"
    for n, job in enumerate(jobs(10)):
        detector.observe(MODEL, job, failure, float(n))
    assert detector.outages[MODEL].reason.endswith(
        " different jobs in a row failed: http_5xx, the API's own words"
    )


class Detector(OutageDetector):
    """An outage detector with short methods to report results."""

    def __init__(self, in_flight: int = 0) -> None:
        super().__init__(lambda: in_flight)

    def fail(self, job: str, now: float, dependency: Dependency = MODEL) -> Diagnosis:
        return self.observe(dependency, job, transient(dependency), now)

    def fail_all(self, count: int, now: float = 0.0, dependency: Dependency = MODEL) -> list[Diagnosis]:
        return [self.fail(job, now, dependency) for job in jobs(count)]

    def succeed(self, started: float, now: float, dependency: Dependency = MODEL) -> Diagnosis:
        return self.observe(dependency, "another", Success(started), now)

    def go_down(self, now: float, dependency: Dependency = MODEL, reason: str = "the key is wrong") -> None:
        assert self.observe(dependency, "any", unavailable(dependency, reason), now) is OUTAGE


def up(dependency: Dependency) -> float | None:
    return metrics.REGISTRY.get_sample_value("vqa_dependency_up", {"dependency": dependency})


# The table in the docstring of OutageDetector, row by row


class Observed(NamedTuple):
    """A result, with its job and its time."""

    now: float
    job: str
    result: RequestResult


def again(times: int, failure: RequestResult) -> list[Observed]:
    """Return failures of a job, each followed by another job's success."""
    return [
        observed
        for n in range(times)
        for observed in (Observed(n, "job", failure), Observed(n + 0.5, "other", Success(n + 0.2)))
    ]


DUPLICATE = TransientError(MODEL, "http_5xx", "it failed", is_duplicate=True)
OVERLOADED = RateLimitedError(None, "it says 503", is_overloaded=True)
OTHERS_FAIL = [Observed(90, job, transient()) for job in jobs(2)]
SUCCESS = Observed(90, "other", Success(89))
DOWN = Observed(95, "other", unavailable())

TABLE = [
    pytest.param([DOWN], Success(94), OUTAGE, id="success, begun before the outage"),
    pytest.param([DOWN], Success(95), CLEARED, id="success, begun during the outage"),
    pytest.param([], Success(95), CLEARED, id="success, without an outage"),
    pytest.param([DOWN], transient(), OUTAGE, id="transient error, during an outage"),
    pytest.param([DOWN], unavailable(), OUTAGE, id="unavailable, during an outage"),
    pytest.param([DOWN], refused(), OUTAGE, id="refusal, during an outage"),
    pytest.param(
        [DOWN, *[Observed(96, "job", transient(reason=HTTP_500))] * (FREE_PROBES - 1)],
        transient(reason=HTTP_500),
        OUTAGE,
        id="500, the third probe of this job",
    ),
    pytest.param(
        [DOWN, *[Observed(96, "job", transient(reason=HTTP_500))] * FREE_PROBES],
        transient(reason=HTTP_500),
        CLEARED,
        id="500, the fourth probe of this job",
    ),
    pytest.param(
        [DOWN, *[Observed(96, "job", transient(reason=MALFORMED_RESPONSE))] * (FREE_PROBES - 1)],
        transient(reason=MALFORMED_RESPONSE),
        OUTAGE,
        id="malformed answer, the third probe of this job",
    ),
    pytest.param(
        [DOWN, *[Observed(96, "job", transient(reason=MALFORMED_RESPONSE))] * FREE_PROBES],
        transient(reason=MALFORMED_RESPONSE),
        CLEARED,
        id="malformed answer, the fourth probe of this job",
    ),
    pytest.param(
        [DOWN, *[Observed(96, "job", transient())] * 9],
        transient(),
        OUTAGE,
        id="another 5xx, the tenth probe of this job",
    ),
    pytest.param([DOWN], OVERLOADED, OUTAGE, id="overloaded, during an outage"),
    pytest.param([], OVERLOADED, PENDING, id="overloaded, for the first time"),
    pytest.param([Observed(95.1, "other", OVERLOADED)], OVERLOADED, PENDING, id="overloaded, for 4.9 s"),
    pytest.param([Observed(95, "job", OVERLOADED)], OVERLOADED, OUTAGE, id="overloaded, for 5 s"),
    pytest.param(
        [Observed(80, "job", OVERLOADED), Observed(99, "other", Success(70))],
        OVERLOADED,
        PENDING,
        id="overloaded, a request succeeded",
    ),
    pytest.param([DOWN], DUPLICATE, OUTAGE, id="duplicate, during an outage"),
    pytest.param(OTHERS_FAIL, DUPLICATE, PENDING, id="duplicate"),
    pytest.param([], rejected(), CLEARED, id="rejection, the first"),
    pytest.param(
        [Observed(90, job, rejected()) for job in jobs(2)],
        rejected(),
        CLEARED,
        id="rejection, three in a row",
    ),
    pytest.param(
        [Observed(90, job, rejected()) for job in jobs(3)], rejected(), OUTAGE, id="rejection, four in a row"
    ),
    pytest.param(
        [*(Observed(89, job, rejected()) for job in jobs(3)), SUCCESS],
        rejected(),
        CLEARED,
        id="rejection, not in a row",
    ),
    pytest.param(
        [SUCCESS, *(Observed(91, job, rejected()) for job in jobs(3))],
        rejected(),
        OUTAGE,
        id="rejection, four in a row, others just succeeded",
    ),
    pytest.param([DOWN], rejected(), OUTAGE, id="rejection, during an outage"),
    pytest.param([], refused(), PENDING, id="refusal, the first"),
    pytest.param([SUCCESS], refused(), PENDING, id="refusal, the first, after a success"),
    pytest.param(
        [Observed(80, "job", refused()), SUCCESS], refused(), CLEARED, id="refusal, a later request succeeded"
    ),
    pytest.param(
        [Observed(89.5, "job", refused()), SUCCESS],
        refused(),
        PENDING,
        id="refusal, a request begun before it succeeded",
    ),
    pytest.param(
        [Observed(80, "job", refused()), SUCCESS, Observed(91, "other", transient())],
        refused(),
        PENDING,
        id="refusal, another job fails too",
    ),
    pytest.param(
        again(MOST_FAILURES, transient()),
        transient(),
        PENDING,
        id="transient error, 3 despite successes",
    ),
    pytest.param(
        again(MOST_FAILURES + 1, transient()),
        transient(),
        CLEARED,
        id="transient error, 4 despite successes",
    ),
    pytest.param(
        again(MOST_FAILURES + 1, partial()),
        partial(),
        CLEARED,
        id="partly unavailable, 4 despite successes",
    ),
    pytest.param(
        again(MOST_FAILURES + 1, unavailable()),
        unavailable(),
        CLEARED,
        id="unavailable, 4 despite successes",
    ),
    pytest.param(
        [*again(MOST_FAILURES + 1, transient()), Observed(99, "job", transient())],
        transient(),
        CLEARED,
        id="transient error, 4 despite successes and another one",
    ),
    pytest.param(
        [*again(MOST_FAILURES + 1, unavailable()), Observed(99, "job", unavailable())],
        unavailable(),
        OUTAGE,
        id="unavailable, 4 despite successes and another one",
    ),
    pytest.param(
        [*again(MOST_FAILURES + 1, partial()), Observed(99, "job", partial())],
        partial(),
        CLEARED,
        id="partly unavailable, 4 despite successes and another one",
    ),
    pytest.param([], transient(), PENDING, id="transient error, the first"),
    pytest.param([Observed(90, "job", transient())] * 9, transient(), PENDING, id="transient error, one job"),
    pytest.param(OTHERS_FAIL[:1], transient(), PENDING, id="transient error, two jobs"),
    pytest.param(OTHERS_FAIL, transient(), OUTAGE, id="transient error, three jobs in a row"),
    pytest.param([*OTHERS_FAIL, SUCCESS], transient(), PENDING, id="transient error, not in a row"),
    pytest.param([SUCCESS], partial(), PENDING, id="partly unavailable, others just succeeded"),
    pytest.param([], partial(), OUTAGE, id="partly unavailable, nothing succeeded yet"),
    pytest.param(
        [Observed(100 - RECENT_SUCCESS_S, "other", Success(39))],
        partial(),
        OUTAGE,
        id="partly unavailable, the last success is old",
    ),
    pytest.param(
        [SUCCESS, Observed(91, "job", partial())],
        partial(),
        OUTAGE,
        id="partly unavailable, the same job again",
    ),
    pytest.param(
        [SUCCESS, *(Observed(91, job, partial()) for job in jobs(2))],
        partial(),
        OUTAGE,
        id="partly unavailable, three jobs in a row",
    ),
    pytest.param([SUCCESS], unavailable(), OUTAGE, id="unavailable"),
]


@pytest.mark.parametrize(("history", "result", "diagnosis"), TABLE)
def test_each_row_of_the_table(history: list[Observed], result: RequestResult, diagnosis: Diagnosis) -> None:
    detector = OutageDetector()
    for observed in history:
        detector.observe(MODEL, observed.job, observed.result, observed.now)
    assert detector.observe(MODEL, "job", result, 100.0) is diagnosis


def test_an_overload_is_no_outage_while_a_request_begun_before_runs() -> None:
    oldest = 89.0
    detector = OutageDetector(oldest_request=lambda: oldest)
    assert detector.observe(MODEL, "job", OVERLOADED, 90.0) is PENDING
    assert detector.observe(MODEL, "job", OVERLOADED, 120.0) is PENDING
    oldest = 90.0
    assert detector.observe(MODEL, "job", OVERLOADED, 121.0) is OUTAGE
    assert detector.outages[MODEL].reason == "nothing succeeded for 5 s: it says 503"


def test_a_job_for_which_the_api_is_always_overloaded_is_cleared_while_others_succeed() -> None:
    detector = Detector()
    found = []
    for n in range(MAX_OVERLOADS_DESPITE_SUCCESSES + 2):
        detector.succeed(n, n + 0.1)
        found.append(detector.observe(MODEL, "job", OVERLOADED, n + 0.2))
        assert detector.observe(MODEL, f"another {n}", OVERLOADED, n + 0.2) is PENDING
    assert found == [PENDING] * MAX_OVERLOADS_DESPITE_SUCCESSES + [CLEARED, PENDING]


def test_a_service_tier_without_capacity_uses_no_attempt_while_the_default_tier_answers() -> None:
    detector, busy = Detector(), RateLimitedError(None, "flex is busy", is_overloaded=True)
    busy.concerns_tier = True
    for n in range(3 * MAX_OVERLOADS_DESPITE_SUCCESSES):
        detector.succeed(n, n + 0.1)
        assert detector.observe(MODEL, "job", busy, n + 0.2) is PENDING


# One of several models


def of_model(model: str = "m") -> DependencyDownError:
    return DependencyDownError(MODEL, f"{model} is missing", model=model)


def several_models() -> OutageDetector:
    return OutageDetector(has_several_models=True)


def test_an_outage_of_one_of_several_models_pauses_only_this_model() -> None:
    detector = several_models()
    assert detector.observe(MODEL, "job", of_model(), 1.0) is OUTAGE
    assert (detector.outages, up(MODEL)) == ({}, 1)
    assert {name: it.reason for name, it in detector.paused_models.items()} == {"m": "m is missing"}
    assert detector.changed.is_set()
    assert detector.may_request("other", 1.0)
    detector.observe(MODEL, "another", Success(2.0, "other"), 3.0)
    assert set(detector.paused_models) == {"m"}
    detector.observe(MODEL, "another", Success(4.0, "m"), 5.0)
    assert detector.paused_models == {}
    assert detector.may_request("m", 5.0)


def test_a_first_failure_of_a_model_after_its_successes_may_concern_one_job() -> None:
    detector = several_models()
    detector.observe(MODEL, "another", Success(0.0, "m"), 1.0)
    refusal = DependencyDownError(MODEL, "no such model", model="m", may_be_the_jobs=True)
    assert detector.observe(MODEL, "job", refusal, 2.0) is PENDING
    assert detector.paused_models == {}
    assert detector.observe(MODEL, "job", refusal, 3.0) is OUTAGE
    assert detector.next_probe_s("m", 3.5) == 0.5


def test_an_outage_of_the_only_model_is_one_of_the_api() -> None:
    detector = OutageDetector()
    assert detector.observe(MODEL, "job", of_model(), 1.0) is OUTAGE
    assert (set(detector.outages), detector.paused_models) == ({MODEL}, {})


def test_a_paused_model_is_tried_at_growing_intervals() -> None:
    detector = several_models()
    detector.observe(MODEL, "job", of_model(), 0.0)
    tried = [now for now in range(200) if detector.may_request("m", float(now))]
    intervals = [later - earlier for earlier, later in pairwise(tried)]
    assert (tried[0], intervals[:4]) == (1, [2, 4, 8, 16])
    assert set(intervals[4:]) == {MAX_MODEL_PROBE_S}


def test_jobs_refused_for_one_model_pause_this_model_after_three() -> None:
    detector = several_models()
    failure = TransientError(MODEL, "http_404", "no images", refused=True, model="m")
    detector.observe(MODEL, "another", Success(0.0, "other"), 0.5)
    found = [detector.observe(MODEL, job, failure, 1.0) for job in jobs(3)]
    assert found == [PENDING, PENDING, OUTAGE]
    assert (set(detector.paused_models), detector.outages) == ({"m"}, {})
    assert detector.diagnosis(MODEL, 1.0, "m") is OUTAGE
    assert detector.diagnosis(MODEL, 1.0) is PENDING


def test_a_job_refused_for_a_model_that_answers_others_is_cleared() -> None:
    detector = several_models()
    failure = TransientError(MODEL, "http_404", "no tools", refused=True, model="m")
    assert detector.observe(MODEL, "job", failure, 1.0) is PENDING
    detector.observe(MODEL, "another", Success(2.0, "other"), 3.0)
    assert detector.observe(MODEL, "job", failure, 4.0) is PENDING
    detector.observe(MODEL, "another", Success(5.0, "m"), 6.0)
    assert detector.observe(MODEL, "job", failure, 7.0) is CLEARED


# How many jobs are an outage


@BOTH
def test_everything_is_up_at_the_start(dependency: Dependency) -> None:
    detector = Detector()
    assert detector.outages == {}
    assert not detector.changed.is_set()
    assert up(dependency) == 1


@BOTH
@given(times=st.integers(1, 200))
def test_a_single_job_that_fails_many_times_is_never_an_outage(dependency: Dependency, times: int) -> None:
    detector = Detector()
    assert {detector.fail("job", float(now), dependency) for now in range(times)} == {PENDING}
    assert detector.outages == {}


@BOTH
def test_two_jobs_that_fail_many_times_are_not_an_outage(dependency: Dependency) -> None:
    detector = Detector()
    for now in range(20):
        assert detector.fail_all(2, float(now), dependency) == [PENDING, PENDING]
    assert detector.outages == {}


@BOTH
def test_three_distinct_jobs_that_fail_in_a_row_are_an_outage(dependency: Dependency) -> None:
    detector = Detector()
    assert DISTINCT_JOBS == 3
    assert detector.fail_all(3, dependency=dependency) == [PENDING, PENDING, OUTAGE]
    assert detector.changed.is_set()
    assert set(detector.outages) == {dependency}
    assert "http_5xx" in detector.outages[dependency].reason
    assert up(dependency) == 0


@pytest.mark.parametrize("slots_in_use", [0, 64])
def test_three_jobs_in_a_row_may_end_and_the_next_failure_is_an_outage(slots_in_use: int) -> None:
    detector = Detector(slots_in_use)
    for job in jobs(3):
        assert {detector.fail(job, float(now)) for now in range(3)} == {PENDING}
        detector.end_job(MODEL, job)
    detector.end_job(MODEL, "unknown")
    assert detector.fail("fourth", 9.0) is OUTAGE
    assert detector.outages[MODEL].reason.startswith("4 different jobs in a row failed: http_5xx, ")


def test_a_success_clears_jobs_that_have_ended() -> None:
    detector = Detector()
    for job in jobs(4):
        detector.fail(job, 0.0)
        detector.end_job(MODEL, job)
    detector.succeed(1.0, 1.0)
    assert set(detector.fail_all(2, 2.0)) == {PENDING}


@pytest.mark.parametrize("slots_in_use", [0, 12, 16, 64, 200])
def test_with_many_slots_in_use_more_jobs_must_fail_in_a_row(slots_in_use: int) -> None:
    enough = max(DISTINCT_JOBS, slots_in_use // SLOTS_PER_FAILING_JOB)
    assert Detector(slots_in_use).fail_all(enough) == [PENDING] * (enough - 1) + [OUTAGE]


@pytest.mark.parametrize(("in_flight", "rate"), [(31, 0.1), (63, 0.2)])
def test_sporadic_failures_among_many_calls_are_never_an_outage(in_flight: int, rate: float) -> None:
    detector, chance = Detector(in_flight), Random(7)  # noqa: S311 - no cryptography
    for n in range(5000):
        if chance.random() < rate:
            assert detector.fail(f"job {n}", float(n)) is PENDING
        else:
            detector.succeed(n - 20.0, float(n))


def test_dependencies_are_diagnosed_independently() -> None:
    detector = Detector()
    detector.fail_all(2, dependency=MODEL)
    assert set(detector.fail_all(2, dependency=S3)) == {PENDING}
    detector.go_down(1.0, S3)
    assert set(detector.outages) == {S3}
    detector.succeed(2.0, 3.0, MODEL)
    assert set(detector.outages) == {S3}


# The course of an outage


def test_an_outage_keeps_its_start_and_its_first_reason() -> None:
    detector = Detector()
    detector.go_down(1.0, reason="first")
    detector.changed.clear()
    detector.go_down(2.0, reason="second")
    detector.fail_all(6, 3.0)
    assert detector.outages == {MODEL: Outage(1.0, "first")}
    assert not detector.changed.is_set()


@pytest.mark.parametrize(("started", "is_over"), [(4.9, False), (5.0, True), (5.1, True)])
def test_only_a_call_begun_after_the_start_of_an_outage_ends_it(started: float, is_over: bool) -> None:
    detector = Detector()
    detector.go_down(5.0)
    detector.changed.clear()
    detector.succeed(started, 10.0)
    assert (MODEL not in detector.outages) is is_over
    assert detector.changed.is_set() is is_over
    assert up(MODEL) == (1 if is_over else 0)


@pytest.mark.parametrize(
    ("successes", "later_s", "is_relapse"),
    [(1, 1.0, True), (2, RELAPSE_S - 1, True), (3, 1.0, False), (1, RELAPSE_S, False)],
)
def test_an_outage_soon_after_another_is_a_relapse(successes: int, later_s: float, is_relapse: bool) -> None:
    detector = Detector()
    detector.go_down(1.0)
    assert not detector.outages[MODEL].is_relapse
    for _ in range(successes):
        detector.succeed(2.0, 3.0)
    detector.go_down(3.0 + later_s, S3)
    detector.go_down(3.0 + later_s, MODEL)
    assert detector.outages[MODEL].is_relapse is is_relapse
    assert not detector.outages[S3].is_relapse


def test_the_next_outage_takes_as_many_jobs_as_the_first() -> None:
    detector = Detector()
    detector.fail_all(3)
    detector.succeed(1.0, 2.0)
    assert detector.fail_all(3, 3.0) == [PENDING, PENDING, OUTAGE]


def test_the_result_store_is_diagnosed_separately_from_the_images_s3_and_reported_as_s3() -> None:
    detector = Detector()
    detector.go_down(1.0, S3)
    detector.succeed(2.0, 3.0, STORE)
    assert set(detector.outages) == {S3}
    detector.go_down(4.0, STORE)
    detector.succeed(5.0, 6.0, S3)
    assert (set(detector.outages), up(S3)) == ({STORE}, 0)
    detector.succeed(7.0, 8.0, STORE)
    assert (detector.outages, up(S3)) == ({}, 1)


def test_the_outages_are_a_copy() -> None:
    detector = Detector()
    detector.outages[MODEL] = Outage(0.0, "made up")
    assert detector.outages == {}


# Jobs that fail many times


def test_a_job_that_causes_outages_alone_is_cleared_after_four() -> None:
    detector = Detector()
    for n in range(MOST_FAILURES + 1):
        assert detector.observe(S3, "job", unavailable(S3), n + 0.1) is OUTAGE
        detector.succeed(n + 0.2, n + 0.3, S3)
    assert detector.observe(S3, "job", unavailable(S3), 9.0) is CLEARED
    assert detector.outages == {}
    # Without a success since then it may be an outage again.
    assert detector.observe(S3, "job", unavailable(S3), 10.0) is OUTAGE


def test_jobs_of_one_outage_also_count_for_the_next() -> None:
    detector = Detector()
    for now in (1.0, 5.0):
        assert {detector.observe(MODEL, job, unavailable(), now) for job in jobs(12)} == {OUTAGE}
        detector.succeed(now + 1, now + 2)
    assert OUTAGE in detector.fail_all(12, 9.0)


def test_failing_again_during_an_outage_does_not_count_as_a_repeat() -> None:
    detector = Detector()
    detector.succeed(0.0, 0.5)
    for n in range(9):
        assert detector.observe(MODEL, "job", unavailable(), n + 1.0) is OUTAGE


def test_a_batch_of_bad_jobs_causes_four_outages_at_most() -> None:
    """Each time another job's success shows that the dependency is up."""
    detector = Detector()
    found = []
    for now in range(10):
        found.append(OUTAGE in detector.fail_all(10, float(now)))
        detector.succeed(now + 0.5, now + 0.5)
    assert found == [True] * (MOST_FAILURES + 1) + [False] * (9 - MOST_FAILURES)
    assert set(detector.fail_all(10, 20.0)) == {CLEARED}


def test_during_an_outage_failures_of_a_known_bad_job_count_as_the_outage() -> None:
    detector = Detector()
    for now in range(10):
        detector.fail("bad", float(now))
        detector.succeed(now + 0.5, now + 0.5)
    assert detector.fail("bad", 20.0) is CLEARED
    detector.go_down(21.0)
    assert detector.fail("bad", 22.0) is OUTAGE


def test_a_failing_object_is_cleared_after_four_repeats() -> None:
    detector = Detector()
    found = []
    for now in range(MOST_FAILURES + 3):
        detector.succeed(float(now), float(now), S3)
        found.append(detector.observe(S3, "job", partial(S3), now + 0.5))
    assert found == [PENDING] * (MOST_FAILURES + 1) + [CLEARED, CLEARED]
    assert detector.outages == {}


def test_the_number_of_remembered_failing_jobs_is_bounded() -> None:
    detector = Detector(10**6)
    for n in range(REMEMBERED_JOBS + 1):
        detector.observe(MODEL, f"job {n}", refused(), float(n))
    detector.succeed(1e6, 1e6)
    assert detector.observe(MODEL, "job 1", refused(), 2e6) is CLEARED
    assert detector.observe(MODEL, "job 0", refused(), 2e6) is PENDING


# The later diagnosis of a failure


def test_a_failure_is_pending_until_an_outage_or_a_success_of_a_later_call() -> None:
    detector = Detector()
    detector.fail("job", 1.0)
    assert detector.diagnosis(MODEL, 1.0) is PENDING
    detector.succeed(0.9, 2.0)
    detector.succeed(1.5, 2.0, S3)
    assert detector.diagnosis(MODEL, 1.0) is PENDING
    detector.succeed(1.0, 3.0)
    assert detector.diagnosis(MODEL, 1.0) is CLEARED
    assert detector.diagnosis(MODEL, 1.1) is PENDING
    detector.go_down(4.0)
    assert detector.diagnosis(MODEL, 1.0) is OUTAGE


# Attempts counted while the diagnosis was pending


def test_an_outage_restores_counted_attempts_once() -> None:
    detector = Detector()
    detector.count_attempt(MODEL, "job", 1.0)
    detector.count_attempt(MODEL, "job", 2.0)
    detector.count_attempt(MODEL, "another", 2.0)
    assert detector.take_restored_attempts("job") == 0
    detector.go_down(3.0)
    assert (detector.take_restored_attempts("job"), detector.take_restored_attempts("another")) == (2, 1)
    assert (detector.take_restored_attempts("job"), detector.take_restored_attempts("unknown")) == (0, 0)
    detector.succeed(4.0, 4.0)
    detector.go_down(5.0)
    assert detector.take_restored_attempts("job") == 0


def test_attempts_are_not_restored_after_a_later_call_succeeded() -> None:
    detector = Detector()
    for job, failed_at in (("early", 1.0), ("late", 3.0)):
        detector.count_attempt(MODEL, job, failed_at)
    detector.succeed(2.0, 4.0)
    detector.succeed(4.0, 4.0, S3)
    detector.go_down(5.0)
    assert (detector.take_restored_attempts("early"), detector.take_restored_attempts("late")) == (0, 1)


def test_only_an_outage_of_the_dependency_that_failed_restores_attempts() -> None:
    detector = Detector()
    detector.count_attempt(MODEL, "job", 1.0)
    detector.go_down(2.0, S3)
    assert detector.take_restored_attempts("job") == 0
    detector.count_attempt(S3, "other", 3.0)
    assert detector.take_restored_attempts("other") == 0


def test_the_number_of_remembered_attempts_is_bounded() -> None:
    detector = Detector()
    for n in range(REMEMBERED_JOBS + 1):
        detector.count_attempt(MODEL, f"job {n}", 1.0)
    detector.go_down(2.0)
    for n in range(REMEMBERED_JOBS - 1):
        detector.count_attempt(S3, f"other {n}", 3.0)
    detector.go_down(4.0, S3)
    assert [detector.take_restored_attempts(f"job {n}") for n in (0, 1, REMEMBERED_JOBS)] == [0, 0, 1]
    assert detector.take_restored_attempts("other 0") == 1


EVENTS = st.lists(
    st.tuples(st.just("failed"), st.sampled_from(jobs(8)))
    | st.tuples(st.just("succeeded"), st.integers(0, 3))
    | st.tuples(st.just("down"), st.just("any")),
    max_size=60,
)


@given(events=EVENTS)
def test_outages_follow_the_rules_for_any_sequence_of_results(events: list[tuple[str, str | int]]) -> None:
    """A simple model of the rules: a set of failing jobs that a later call's success clears."""
    detector = Detector()
    failing: set[str | int] = set()
    since: float | None = None
    # For each job: whether others have succeeded since its last failure, and its later failures.
    others_succeeded, repeats = dict[str | int, bool](), Counter[str | int]()
    for now, (event, what) in enumerate(events):
        match event:
            case "failed":
                repeats[what] += others_succeeded.get(what, False)
                others_succeeded[what] = False
                is_cleared = since is None and repeats[what] > MOST_FAILURES
                if since is None and not is_cleared:
                    failing.add(what)
                    since = now if len(failing) >= DISTINCT_JOBS else None
                expected = CLEARED if is_cleared else PENDING if since is None else OUTAGE
                assert detector.fail(str(what), now) is expected
            case "succeeded":
                started = now - int(what)
                if since is None or started >= since:
                    failing, since = set(), None
                    others_succeeded = dict.fromkeys(others_succeeded, True)
                detector.succeed(started, now)
            case _:
                since = now if since is None else since
                # Each failure is of a new job, so that none is cleared.
                detector.observe(MODEL, f"new {now}", unavailable(), now)
        assert (MODEL in detector.outages) is (since is not None)
        if since is not None:
            assert detector.outages[MODEL].since == since
