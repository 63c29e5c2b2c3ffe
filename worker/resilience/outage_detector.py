"""Detect outages: distinguish a failing dependency from a failing job. No I/O; times are passed in."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, TypeAlias

from worker.errors import Dependency, DependencyDownError, TransientError
from worker.observability import metrics

# This many distinct failing jobs in a row are an outage. Fewer would report an outage for two bad jobs; with
# more, many requests would fail in an outage.
DISTINCT_JOBS = 3
# This many more if some of those jobs have no retry left: bad jobs one after another are a weaker sign than
# jobs that fail at the same time.
EXTRA_IF_EXHAUSTED = 2
# Of many requests, some fail in a row by chance: at least one job for this many slots in use must fail.
SLOTS_PER_FAILING_JOB = 4
# After this many failures after another job's success, a job no longer counts as a sign of an outage. A
# dependency may fail again right after it recovered; a bad job must not cause outages for ever.
MAX_FAILURES_DESPITE_SUCCESSES = 3
# Of failing jobs; far more than fail at once, at little cost.
REMEMBERED_JOBS = 1000
# Others succeed if the last success is at most this old.
RECENT_SUCCESS_S = 60.0
# An outage is a relapse if it began shortly after the last one ended, before this many requests succeeded.
RELAPSE_S = 5.0
SUCCESSES_TO_RECOVER = 3

_NEVER = float("-inf")
_WATCHED = (Dependency.MODEL, Dependency.S3, Dependency.RESULT_STORE)


class Diagnosis(Enum):
    """What a request's result says about its dependency."""

    OUTAGE = auto()
    """The dependency is down."""
    CLEARED = auto()
    """The dependency works: a failure is the job's own."""
    PENDING = auto()
    """Not known yet: the results of other requests will show it."""


@dataclass(frozen=True, slots=True)
class Success:
    """A request that began at `started` showed that the dependency works."""

    started: float


RequestResult: TypeAlias = Success | TransientError | DependencyDownError


@dataclass(frozen=True, slots=True)
class Outage:
    """An outage: its start, its reason, and whether it began shortly after the last one ended."""

    since: float
    reason: str
    is_relapse: bool = False


@dataclass(slots=True)
class _JobRecord:
    """The failures of one job with one dependency.

    Attributes:
        last_failed_at: the time of the last failure.
        failures_despite_successes: failures after another job's success.
        refused_at: the time of the first refusal.
    """

    last_failed_at: float
    failures_despite_successes: int = 0
    refused_at: float | None = None


@dataclass(slots=True)
class _CountedAttempts:
    """The attempts of one job that were counted while the diagnosis was pending."""

    count: int = 0
    last_failed_at: float = _NEVER


@dataclass(slots=True)
class _State:
    """What is known about one dependency.

    Attributes:
        outage: the current outage.
        succeeded_at: the time of the last success.
        last_success_started_at: the start of the latest successful request.
        recovered_at, successes: the end of the last outage, and the successes since.
        failing: the distinct jobs that failed in a row, without a success in between.
        exhausted: those of them that have no retry left.
        records: each job's failures, the latest last.
        counted: attempts that are restored if the failures turn out to be an outage.
    """

    outage: Outage | None = None
    succeeded_at: float = _NEVER
    last_success_started_at: float = _NEVER
    recovered_at: float = _NEVER
    successes: int = 0
    failing: set[str] = field(default_factory=set)
    exhausted: set[str] = field(default_factory=set)
    records: OrderedDict[str, _JobRecord] = field(default_factory=OrderedDict)
    counted: OrderedDict[str, _CountedAttempts] = field(default_factory=OrderedDict)


class OutageDetector:
    """Diagnose each request's result from all results so far.

    The first row that applies decides; tests/unit/test_outage_detector.py tests each of them.

    | result | condition | diagnosis |
    |---|---|---|
    | success | begun before the outage | outage |
    | success | otherwise | cleared; ends the outage |
    | any failure | an outage lasts | outage |
    | any failure | a duplicate of another job's failure | pending |
    | 403 | a request begun after this job's first refusal succeeded, and no other job fails | cleared |
    | transient error | more than 3 failures after another job's success | cleared |
    | unavailable | the same, and the last such success is after the job's last failure | cleared |
    | transient error | 3 distinct jobs failed in a row (see below) | outage |
    | transient error | otherwise | pending |
    | unavailable | may be isolated (see below) | pending |
    | unavailable | otherwise | outage |

    In a row: without a success in between. With more than 12 slots in use, one job for each 4 of them must
    fail; if some of the failing jobs have no retry left, two more. May be isolated: may concern one bucket or
    model; a success within 60 s; first failure of this job; fewer than 3 jobs failing.

    An outage restores the attempts that were counted for it while the diagnosis was pending, unless a request
    begun after them succeeded.

    Args:
        slots_in_use: returns how many jobs hold a slot.

    Attributes:
        changed: set when an outage begins or ends.
    """

    def __init__(self, slots_in_use: Callable[[], int] = lambda: 0) -> None:
        self._slots_in_use = slots_in_use
        self._states = {name: _State() for name in _WATCHED}
        # Attempts not to count, by job.
        self._restored: OrderedDict[str, int] = OrderedDict()
        self.changed = asyncio.Event()
        for dependency in self._states:
            metrics.DEPENDENCY_UP.labels(dependency.label).set(1)

    @property
    def outages(self) -> dict[Dependency, Outage]:
        """Return the current outages."""
        return {name: state.outage for name, state in self._states.items() if state.outage}

    def observe(self, dependency: Dependency, job: str, result: RequestResult, now: float) -> Diagnosis:
        """Record the result of a job's request, and return the diagnosis: see the table above."""
        state = self._states[dependency]
        if isinstance(result, Success):
            return self._succeeded(dependency, result.started, now)
        if result.is_duplicate:
            return Diagnosis.OUTAGE if state.outage else Diagnosis.PENDING
        if isinstance(result, TransientError) and result.refused and _is_refused_alone(state, job, now):
            return Diagnosis.CLEARED
        others_succeeded = _record_failure(state, job, now)
        if state.outage:
            return Diagnosis.OUTAGE
        is_bad_job = state.records[job].failures_despite_successes > MAX_FAILURES_DESPITE_SUCCESSES
        if isinstance(result, TransientError):
            return Diagnosis.CLEARED if is_bad_job else self._transient(dependency, job, result, now)
        if is_bad_job and others_succeeded:
            return Diagnosis.CLEARED
        return self._unavailable(dependency, job, result, now)

    def diagnosis(self, dependency: Dependency, failed_at: float) -> Diagnosis:
        """Return what is known by now about a failure at `failed_at`."""
        state = self._states[dependency]
        if state.outage:
            return Diagnosis.OUTAGE
        return Diagnosis.CLEARED if state.last_success_started_at >= failed_at else Diagnosis.PENDING

    def count_attempt(self, dependency: Dependency, job: str, failed_at: float) -> None:
        """Record that an attempt is counted while the diagnosis is pending; an outage restores it."""
        counted = self._states[dependency].counted.setdefault(job, _CountedAttempts())
        counted.count += 1
        counted.last_failed_at = failed_at
        _forget_oldest(self._states[dependency].counted)

    def end_job(self, dependency: Dependency, job: str) -> None:
        """Record that a job has no retry left after its failure, without an outage."""
        state = self._states[dependency]
        if job in state.failing:
            state.failing.remove(job)
            state.exhausted.add(job)

    def take_restored_attempts(self, job: str) -> int:
        """Return how many of a job's counted attempts an outage caused, and forget them."""
        return self._restored.pop(job, 0)

    def _succeeded(self, dependency: Dependency, started: float, now: float) -> Diagnosis:
        state = self._states[dependency]
        if state.outage and started < state.outage.since:
            return Diagnosis.OUTAGE
        state.failing.clear()
        state.exhausted.clear()
        state.succeeded_at = now
        state.last_success_started_at = max(state.last_success_started_at, started)
        for job in [job for job, counted in state.counted.items() if counted.last_failed_at <= started]:
            del state.counted[job]
        state.successes += 1
        if state.outage:
            state.outage, state.recovered_at, state.successes = None, now, 1
            self._update_gauge(dependency)
        return Diagnosis.CLEARED

    def _transient(self, dependency: Dependency, job: str, error: TransientError, now: float) -> Diagnosis:
        state = self._states[dependency]
        state.failing.add(job)
        if not self._enough_jobs_failed(state):
            return Diagnosis.PENDING
        count = len(state.failing | state.exhausted)
        cause = f"{error.reason}, {error.log_message}"
        return self._begin_outage(dependency, f"{count} different jobs in a row failed: {cause}", now)

    def _unavailable(
        self, dependency: Dependency, job: str, error: DependencyDownError, now: float
    ) -> Diagnosis:
        state = self._states[dependency]
        may_be_isolated = job not in state.failing and now - state.succeeded_at < RECENT_SUCCESS_S
        state.failing.add(job)
        if error.may_be_partial and may_be_isolated and not self._enough_jobs_failed(state):
            return Diagnosis.PENDING
        return self._begin_outage(dependency, error.message, now)

    def _enough_jobs_failed(self, state: _State) -> bool:
        """Return whether enough distinct jobs have failed in a row."""
        enough = max(DISTINCT_JOBS, self._slots_in_use() // SLOTS_PER_FAILING_JOB)
        with_exhausted = len(state.failing | state.exhausted)
        return len(state.failing) >= enough or with_exhausted >= enough + EXTRA_IF_EXHAUSTED

    def _begin_outage(self, dependency: Dependency, reason: str, now: float) -> Diagnosis:
        state = self._states[dependency]
        is_relapse = now - state.recovered_at < RELAPSE_S and state.successes < SUCCESSES_TO_RECOVER
        state.outage = Outage(now, reason, is_relapse)
        for job, counted in state.counted.items():
            self._restored[job] = self._restored.get(job, 0) + counted.count
        state.counted.clear()
        _forget_oldest(self._restored)
        self._update_gauge(dependency)
        return Diagnosis.OUTAGE

    def _update_gauge(self, dependency: Dependency) -> None:
        is_up = dependency.label not in {down.label for down in self.outages}
        metrics.DEPENDENCY_UP.labels(dependency.label).set(is_up)
        self.changed.set()


def _is_refused_alone(state: _State, job: str, now: float) -> bool:
    """Record a 403; return whether the API denies only this job. Never for the first one, nor in an outage.

    Until the retry, the results of other jobs show whether they are denied too.
    """
    record = _record_of(state, job, now)
    if record.refused_at is None:
        record.refused_at = now
    return not state.outage and state.last_success_started_at > record.refused_at and state.failing <= {job}


def _record_failure(state: _State, job: str, now: float) -> bool:
    """Record a failure; return whether others have succeeded since this job's last one."""
    record = _record_of(state, job, now)
    others_succeeded = state.succeeded_at > record.last_failed_at
    record.failures_despite_successes += others_succeeded
    record.last_failed_at = now
    return others_succeeded


def _record_of(state: _State, job: str, now: float) -> _JobRecord:
    record = state.records.setdefault(job, _JobRecord(last_failed_at=now))
    state.records.move_to_end(job)
    _forget_oldest(state.records)
    return record


def _forget_oldest(remembered: OrderedDict[str, Any]) -> None:
    while len(remembered) > REMEMBERED_JOBS:
        remembered.popitem(last=False)
