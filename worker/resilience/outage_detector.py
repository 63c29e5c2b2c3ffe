"""Detect outages: distinguish a failing dependency from a failing job. Pure; times are passed in."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, TypeAlias

from worker.errors import Dependency, DependencyDownError, TransientError
from worker.observability import metrics

# This many distinct failing jobs in a row are an outage. With fewer, two bad jobs would look like one; with
# more, many calls would fail in a real one.
DISTINCT_JOBS = 3
# This many more if some of those jobs have already ended: bad jobs one after another are a weaker sign than
# jobs that fail at the same time.
EXTRA_IF_ENDED = 2
# With many calls in flight, some fail in a row by chance: at least one job for this many calls must fail.
CALLS_PER_FAILING_JOB = 4
# How many times a job may fail although others succeeded since its last failure, before it no longer counts
# as a sign of an outage. A dependency may fail again right after it recovered; a bad job must not cause
# outages for ever.
MAX_REPEATS = 3
# Of failing jobs; far more than fail at once, at little cost.
REMEMBERED_JOBS = 1000
# Others succeed if the last success is at most this old.
RECENT_SUCCESS_S = 60.0
# An outage is a relapse if it begins so soon after the last one, and before so many calls succeeded.
RELAPSE_S = 5.0
SUCCESSES_TO_RECOVER = 3

_NEVER = float("-inf")
_WATCHED = (Dependency.MODEL, Dependency.S3, Dependency.RESULT_STORE)


class Diagnosis(Enum):
    """What a call's result says about its dependency."""

    OUTAGE = auto()
    """The dependency is down."""
    CLEARED = auto()
    """The dependency works: a failure is the job's own."""
    PENDING = auto()
    """Not known yet: the results of other calls will show it."""


@dataclass(frozen=True, slots=True)
class Success:
    """A call that began at `started` showed that the dependency works."""

    started: float


CallResult: TypeAlias = Success | TransientError | DependencyDownError


@dataclass(frozen=True, slots=True)
class Outage:
    """An outage: its start, its reason, and whether the dependency had hardly recovered from the last one."""

    since: float
    reason: str
    is_relapse: bool = False


@dataclass(slots=True)
class _JobRecord:
    """The failures of one job with one dependency.

    Attributes:
        last_failed_at: the time of the last failure.
        repeats: failures although other jobs had succeeded since the failure before.
        forbidden_at: the time of the first 403.
    """

    last_failed_at: float
    repeats: int = 0
    forbidden_at: float | None = None


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
        good_call_began: the start of the latest successful call.
        recovered_at, successes: the end of the last outage, and the successes since.
        failing: the distinct jobs that failed in a row, without a success in between.
        ended: those of them that have ended.
        records: each job's failures, the latest last.
        counted: attempts that are restored if the failures turn out to be an outage.
    """

    outage: Outage | None = None
    succeeded_at: float = _NEVER
    good_call_began: float = _NEVER
    recovered_at: float = _NEVER
    successes: int = 0
    failing: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    records: OrderedDict[str, _JobRecord] = field(default_factory=OrderedDict)
    counted: OrderedDict[str, _CountedAttempts] = field(default_factory=OrderedDict)


class OutageDetector:
    """Diagnose each call's result from all results so far.

    The first row that applies decides; tests/unit/test_outage_detector.py tests each of them.

    | result | condition | diagnosis |
    |---|---|---|
    | success | begun before the outage | outage: it shows nothing |
    | success | otherwise | cleared; ends the outage |
    | any failure | an outage lasts | outage |
    | any failure | a duplicate of another job's failure | pending |
    | 403 | a call begun after this job's first 403 succeeded, and no other job fails | cleared |
    | any failure | the job failed more than 3 times after others had succeeded | cleared |
    | transient error | 3 distinct jobs failed in a row (see below) | outage |
    | transient error | otherwise | pending |
    | unavailable | perhaps one bucket or model, others succeed, the job's first, too few jobs | pending |
    | unavailable | otherwise | outage |

    In a row: without a success in between. With more than 12 calls in flight, one job for each 4 of them must
    fail; if some of the failing jobs have already ended, two more. Others succeed if one did within 60 s.

    An outage restores the attempts that were counted for it while the diagnosis was pending, unless a call
    begun after them succeeded.

    Args:
        calls_in_flight: returns how many calls run.

    Attributes:
        changed: set when an outage begins or ends.
    """

    def __init__(self, calls_in_flight: Callable[[], int] = lambda: 0) -> None:
        self._calls_in_flight = calls_in_flight
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

    def observe(self, dependency: Dependency, job: str, result: CallResult, now: float) -> Diagnosis:
        """Record the result of a call for a job, and return the diagnosis: see the table above."""
        state = self._states[dependency]
        if isinstance(result, Success):
            return self._succeeded(dependency, result.started, now)
        if result.is_duplicate:
            return Diagnosis.OUTAGE if state.outage else Diagnosis.PENDING
        if isinstance(result, TransientError) and result.forbidden and _is_forbidden_alone(state, job, now):
            return Diagnosis.CLEARED
        is_repeat = _record_failure(state, job, now)
        if state.outage:
            return Diagnosis.OUTAGE
        repeats = state.records[job].repeats
        if isinstance(result, TransientError):
            return (
                Diagnosis.CLEARED if repeats > MAX_REPEATS else self._transient(dependency, job, result, now)
            )
        if is_repeat and repeats > MAX_REPEATS:
            return Diagnosis.CLEARED
        return self._unavailable(dependency, job, result, now)

    def diagnosis(self, dependency: Dependency, failed_at: float) -> Diagnosis:
        """Return what is known by now about a failure at `failed_at`."""
        state = self._states[dependency]
        if state.outage:
            return Diagnosis.OUTAGE
        return Diagnosis.CLEARED if state.good_call_began >= failed_at else Diagnosis.PENDING

    def count_attempt(self, dependency: Dependency, job: str, failed_at: float) -> None:
        """Record that an attempt is counted while the diagnosis is pending; an outage restores it."""
        counted = self._states[dependency].counted.setdefault(job, _CountedAttempts())
        counted.count += 1
        counted.last_failed_at = failed_at
        _forget_oldest(self._states[dependency].counted)

    def end_job(self, dependency: Dependency, job: str) -> None:
        """Record that a job ended by its failure, without an outage."""
        state = self._states[dependency]
        if job in state.failing:
            state.failing.remove(job)
            state.ended.add(job)

    def take_restored_attempts(self, job: str) -> int:
        """Return how many of a job's counted attempts an outage caused, and forget them."""
        return self._restored.pop(job, 0)

    def _succeeded(self, dependency: Dependency, started: float, now: float) -> Diagnosis:
        state = self._states[dependency]
        if state.outage and started < state.outage.since:
            return Diagnosis.OUTAGE
        state.failing.clear()
        state.ended.clear()
        state.succeeded_at = now
        state.good_call_began = max(state.good_call_began, started)
        for job in [job for job, counted in state.counted.items() if counted.last_failed_at <= started]:
            del state.counted[job]
        state.successes += 1
        if state.outage:
            state.outage, state.recovered_at, state.successes = None, now, 1
            self._publish(dependency)
        return Diagnosis.CLEARED

    def _transient(self, dependency: Dependency, job: str, error: TransientError, now: float) -> Diagnosis:
        state = self._states[dependency]
        state.failing.add(job)
        if not self._are_enough(state):
            return Diagnosis.PENDING
        count = len(state.failing | state.ended)
        return self._begin_outage(dependency, f"{count} different jobs in a row failed: {error.reason}", now)

    def _unavailable(
        self, dependency: Dependency, job: str, error: DependencyDownError, now: float
    ) -> Diagnosis:
        state = self._states[dependency]
        is_first = job not in state.failing and now - state.succeeded_at < RECENT_SUCCESS_S
        state.failing.add(job)
        if error.may_be_partial and is_first and not self._are_enough(state):
            return Diagnosis.PENDING
        return self._begin_outage(dependency, error.message, now)

    def _are_enough(self, state: _State) -> bool:
        """Return whether enough distinct jobs have failed in a row."""
        enough = max(DISTINCT_JOBS, self._calls_in_flight() // CALLS_PER_FAILING_JOB)
        with_ended = len(state.failing | state.ended)
        return len(state.failing) >= enough or with_ended >= enough + EXTRA_IF_ENDED

    def _begin_outage(self, dependency: Dependency, reason: str, now: float) -> Diagnosis:
        state = self._states[dependency]
        is_relapse = now - state.recovered_at < RELAPSE_S and state.successes < SUCCESSES_TO_RECOVER
        state.outage = Outage(now, reason, is_relapse)
        for job, counted in state.counted.items():
            self._restored[job] = self._restored.get(job, 0) + counted.count
        state.counted.clear()
        _forget_oldest(self._restored)
        self._publish(dependency)
        return Diagnosis.OUTAGE

    def _publish(self, dependency: Dependency) -> None:
        is_up = dependency.label not in {down.label for down in self.outages}
        metrics.DEPENDENCY_UP.labels(dependency.label).set(is_up)
        self.changed.set()


def _is_forbidden_alone(state: _State, job: str, now: float) -> bool:
    """Record a 403; return whether the API refuses this job only. Never for the first one, nor in an outage.

    Until the retry, the results of other jobs show whether they are refused too.
    """
    record = _record_of(state, job, now)
    if record.forbidden_at is None:
        record.forbidden_at = now
    return not state.outage and state.good_call_began > record.forbidden_at and state.failing <= {job}


def _record_failure(state: _State, job: str, now: float) -> bool:
    """Record a failure; return whether others have succeeded since this job's last one."""
    record = _record_of(state, job, now)
    is_repeat = state.succeeded_at > record.last_failed_at
    record.repeats += is_repeat
    record.last_failed_at = now
    return is_repeat


def _record_of(state: _State, job: str, now: float) -> _JobRecord:
    record = state.records.setdefault(job, _JobRecord(last_failed_at=now))
    state.records.move_to_end(job)
    _forget_oldest(state.records)
    return record


def _forget_oldest(remembered: OrderedDict[str, Any]) -> None:
    while len(remembered) > REMEMBERED_JOBS:
        remembered.popitem(last=False)
