"""Detect outages: distinguish a failing dependency from a failing job. No I/O; times are passed in."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, TypeAlias

from worker.errors import (
    REASONS_OF_BAD_JOBS,
    Dependency,
    DependencyDownError,
    RateLimitedError,
    TransientError,
)
from worker.observability import metrics

# This many distinct failing jobs in a row are an outage. Fewer would report an outage for two bad jobs; with
# more, many requests would fail in an outage.
DISTINCT_JOBS = 3
# So many jobs in a row may end with a failure that is not known to be their own. One more job that fails is
# an outage: a wrong setting or a failing dependency must not fail the whole queue.
MAX_FAILED_IN_A_ROW = 3
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
# An API that says that it is overloaded is down if nothing succeeds for so long.
OVERLOAD_S = 5.0
# A job that gets this answer so often, although others succeed, is the likely cause: its attempt counts.
MAX_OVERLOADS_DESPITE_SUCCESSES = 20
# So many probes of a job may be answered 500, or with a malformed answer, in one outage. After them the job
# itself is the likely cause and its attempts count: it must not be probed, or its answers bought, for ever.
FREE_PROBES = 3
# A paused model is tried with one job at growing intervals.
FIRST_MODEL_PROBE_S = 1.0
MAX_MODEL_PROBE_S = 30.0

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
    """A request that began at `started` showed that the dependency works; `model`: the one that answered."""

    started: float
    model: str = ""


RequestResult: TypeAlias = Success | TransientError | DependencyDownError | RateLimitedError


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
        overloaded_at, overloads: when the API last said that it is overloaded, and how often although others
            had succeeded since the time before.
        outage_since, probes: the last outage in which a probe of it failed as a bad job does, and how often.
    """

    last_failed_at: float
    failures_despite_successes: int = 0
    refused_at: float | None = None
    overloaded_at: float = _NEVER
    overloads: int = 0
    outage_since: float = _NEVER
    probes: int = 0


@dataclass(slots=True)
class _CountedAttempts:
    """The attempts of one job that were counted while the diagnosis was pending."""

    count: int = 0
    last_failed_at: float = _NEVER


@dataclass(slots=True)
class _State:
    """What is known about one dependency, or about one of several models.

    Attributes:
        outage: the current outage.
        succeeded_at: the time of the last success.
        last_success_started_at: the start of the latest successful request.
        recovered_at, successes: the end of the last outage, and the successes since.
        failing: the distinct jobs that failed in a row, without a success in between.
        exhausted: those of them that have no retry left.
        records: each job's failures, the latest last.
        counted: attempts that are restored if the failures turn out to be an outage.
        rejected: the distinct jobs that were rejected in a row with an answer that may concern all jobs.
        overloaded_since: the first answer that the API is overloaded, since the last success.
        probe_at, probe_interval_s: when a paused model is tried next, and how long after the last time.
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
    rejected: set[str] = field(default_factory=set)
    overloaded_since: float | None = None
    probe_at: float = _NEVER
    probe_interval_s: float = FIRST_MODEL_PROBE_S


class OutageDetector:
    """Diagnose each request's result from all results so far.

    The first row that applies decides; tests/unit/test_outage_detector.py tests each of them.

    | result | condition | diagnosis |
    |---|---|---|
    | success | begun before the outage | outage |
    | success | otherwise | cleared; ends the outage |
    | 500, malformed answer | an outage lasts, and 3 probes of this job in it failed so | cleared |
    | any failure | an outage lasts | outage |
    | any failure | a duplicate of another job's failure | pending |
    | overloaded | 21 times for this job, each time after another success; not of a service tier | cleared |
    | overloaded | nothing succeeded for 5 s, and no request begun before is running | outage |
    | overloaded | otherwise | pending |
    | rejection | 3 distinct jobs in a row at most | cleared |
    | rejection | otherwise | outage |
    | refusal | a request begun after this job's first refusal succeeded, and no other job fails | cleared |
    | transient error | more than 3 failures after another job's success | cleared |
    | unavailable | the same, and may concern one job, or another success since the last failure | cleared |
    | transient error | 3 distinct jobs failed in a row (see below) | outage |
    | transient error | otherwise | pending |
    | unavailable | may be isolated (see below) | pending |
    | unavailable | otherwise | outage |

    Rejection: a 400, 413 or 422 that no rule knows. Refusal: a 403, or any other answer that no rule knows. A
    failure that concerns one of several models is diagnosed among the results of this model, and its outage
    pauses this model only.

    In a row: without a success in between. With more than 12 slots in use, one job for each 4 of them must
    fail; or a fourth job if some of them have ended. May be isolated: may concern one job; a success within
    60 s; first failure of this job; fewer than 3 jobs failing.

    An outage restores the attempts that were counted for it while the diagnosis was pending, unless a request
    begun after them succeeded.

    Args:
        slots_in_use: returns how many jobs hold a slot.
        oldest_request: returns when the oldest running request began; infinity without one.
        has_several_models: whether jobs may use more than one model.

    Attributes:
        changed: set when an outage begins or ends.
    """

    def __init__(
        self,
        slots_in_use: Callable[[], int] = lambda: 0,
        oldest_request: Callable[[], float] = lambda: float("inf"),
        *,
        has_several_models: bool = False,
    ) -> None:
        self._slots_in_use = slots_in_use
        self._oldest_request = oldest_request
        self._has_several_models = has_several_models
        self._states = {name: _State() for name in _WATCHED}
        # Of models that failed on their own.
        self._models: dict[str, _State] = {}
        # Attempts not to count, by job.
        self._restored: OrderedDict[str, int] = OrderedDict()
        self.changed = asyncio.Event()
        for dependency in self._states:
            metrics.DEPENDENCY_UP.labels(dependency.label).set(1)

    @property
    def outages(self) -> dict[Dependency, Outage]:
        """Return the current outages."""
        return {name: state.outage for name, state in self._states.items() if state.outage}

    @property
    def paused_models(self) -> Mapping[str, Outage]:
        """Return the outages of single models, while others are available."""
        return {name: state.outage for name, state in self._models.items() if state.outage}

    def one_model(self, model: str) -> str:
        """Return the model if a failure concerns only it; empty if it is the only one, which all jobs use."""
        return model if self._has_several_models else ""

    def may_request(self, model: str, now: float) -> bool:
        """Return whether a job may use a model: it is not paused, or this job is its next probe."""
        state = self._models.get(model)
        if state is None or state.outage is None:
            return True
        if now < state.probe_at:
            return False
        state.probe_interval_s = min(2 * state.probe_interval_s, MAX_MODEL_PROBE_S)
        state.probe_at = now + state.probe_interval_s
        return True

    def next_probe_s(self, model: str, now: float) -> float:
        """Return the seconds until the next probe of a paused model."""
        return max(0.0, self._state(Dependency.MODEL, model).probe_at - now)

    def observe(self, dependency: Dependency, job: str, result: RequestResult, now: float) -> Diagnosis:
        """Record the result of a job's request, and return the diagnosis: see the table above."""
        if isinstance(result, Success):
            return self._succeeded(dependency, result, now)
        if isinstance(result, RateLimitedError):
            return self._overloaded(dependency, job, result, now)
        state = self._state(dependency, result.model)
        if result.is_duplicate:
            return Diagnosis.OUTAGE if state.outage else Diagnosis.PENDING
        if isinstance(result, TransientError) and result.refused:
            if result.is_likely_the_jobs and not state.outage:
                return self._rejected(state, job, result, now)
            if _is_refused_alone(state, job, now):
                return Diagnosis.CLEARED
        return self._failed(state, job, result, now)

    def diagnosis(self, dependency: Dependency, failed_at: float, model: str = "") -> Diagnosis:
        """Return what is known by now about a failure at `failed_at`."""
        state = self._state(dependency, model)
        if state.outage:
            return Diagnosis.OUTAGE
        return Diagnosis.CLEARED if state.last_success_started_at >= failed_at else Diagnosis.PENDING

    def count_attempt(self, dependency: Dependency, job: str, failed_at: float, model: str = "") -> None:
        """Record that an attempt is counted while the diagnosis is pending; an outage restores it."""
        state = self._state(dependency, model)
        counted = state.counted.setdefault(job, _CountedAttempts())
        counted.count += 1
        counted.last_failed_at = failed_at
        _forget_oldest(state.counted)

    def end_job(self, dependency: Dependency, job: str, model: str = "") -> None:
        """Record that a job has no retry left after its failure, without an outage."""
        state = self._state(dependency, model)
        if job in state.failing:
            state.failing.remove(job)
            state.exhausted.add(job)

    def take_restored_attempts(self, job: str) -> int:
        """Return how many of a job's counted attempts an outage caused, and forget them."""
        return self._restored.pop(job, 0)

    def _state(self, dependency: Dependency, model: str) -> _State:
        one = self.one_model(model)
        return self._models.setdefault(one, _State()) if one else self._states[dependency]

    def _succeeded(self, dependency: Dependency, success: Success, now: float) -> Diagnosis:
        if self.one_model(success.model):
            self._record_success(self._state(dependency, success.model), success.started, now)
        return self._record_success(self._states[dependency], success.started, now)

    def _record_success(self, state: _State, started: float, now: float) -> Diagnosis:
        if state.outage and started < state.outage.since:
            return Diagnosis.OUTAGE
        state.failing.clear()
        state.exhausted.clear()
        state.rejected.clear()
        state.overloaded_since = None
        state.succeeded_at = now
        state.last_success_started_at = max(state.last_success_started_at, started)
        for job in [job for job, counted in state.counted.items() if counted.last_failed_at <= started]:
            del state.counted[job]
        state.successes += 1
        if state.outage:
            state.outage, state.recovered_at, state.successes = None, now, 1
            self._outages_changed()
        return Diagnosis.CLEARED

    def _overloaded(self, dependency: Dependency, job: str, error: RateLimitedError, now: float) -> Diagnosis:
        state = self._states[dependency]
        if state.outage:
            return Diagnosis.OUTAGE
        record = _record_of(state, job, now)
        # That requests succeed in the default tier does not show that another tier has capacity.
        record.overloads += state.succeeded_at > record.overloaded_at and not error.concerns_tier
        record.overloaded_at = now
        if record.overloads > MAX_OVERLOADS_DESPITE_SUCCESSES:
            record.overloads = 0
            return Diagnosis.CLEARED
        if state.overloaded_since is None:
            state.overloaded_since = now
        if now - state.overloaded_since < OVERLOAD_S or self._oldest_request() < state.overloaded_since:
            return Diagnosis.PENDING
        return self._begin_outage(state, f"nothing succeeded for {OVERLOAD_S:g} s: {error.message}", now)

    def _failed(
        self, state: _State, job: str, result: TransientError | DependencyDownError, now: float
    ) -> Diagnosis:
        others_succeeded = _record_failure(state, job, now)
        if state.outage:
            return _diagnose_probe(state.records[job], state.outage, result)
        is_bad_job = state.records[job].failures_despite_successes > MAX_FAILURES_DESPITE_SUCCESSES
        if isinstance(result, TransientError):
            return Diagnosis.CLEARED if is_bad_job else self._transient(state, job, result, now)
        if is_bad_job and (others_succeeded or result.may_be_the_jobs):
            return Diagnosis.CLEARED
        return self._unavailable(state, job, result, now)

    def _rejected(self, state: _State, job: str, error: TransientError, now: float) -> Diagnosis:
        state.rejected.add(job)
        if len(state.rejected) <= MAX_FAILED_IN_A_ROW:
            return Diagnosis.CLEARED
        count = len(state.rejected)
        return self._begin_outage(state, f"{count} different jobs in a row were rejected: {error.cause}", now)

    def _transient(self, state: _State, job: str, error: TransientError, now: float) -> Diagnosis:
        state.failing.add(job)
        if not self._enough_jobs_failed(state):
            return Diagnosis.PENDING
        count = len(state.failing | state.exhausted)
        cause = f"{error.reason}, {error.cause}"
        return self._begin_outage(state, f"{count} different jobs in a row failed: {cause}", now)

    def _unavailable(self, state: _State, job: str, error: DependencyDownError, now: float) -> Diagnosis:
        may_be_isolated = job not in state.failing and now - state.succeeded_at < RECENT_SUCCESS_S
        state.failing.add(job)
        if error.may_be_the_jobs and may_be_isolated and not self._enough_jobs_failed(state):
            return Diagnosis.PENDING
        return self._begin_outage(state, error.message, now)

    def _enough_jobs_failed(self, state: _State) -> bool:
        """Return whether enough distinct jobs have failed in a row."""
        enough = max(DISTINCT_JOBS, self._slots_in_use() // SLOTS_PER_FAILING_JOB)
        has_ended = bool(state.exhausted) and len(state.failing | state.exhausted) > MAX_FAILED_IN_A_ROW
        return len(state.failing) >= enough or has_ended

    def _begin_outage(self, state: _State, reason: str, now: float) -> Diagnosis:
        is_relapse = now - state.recovered_at < RELAPSE_S and state.successes < SUCCESSES_TO_RECOVER
        state.outage = Outage(now, reason, is_relapse)
        if not is_relapse:
            state.probe_interval_s = FIRST_MODEL_PROBE_S
        state.probe_at = now + state.probe_interval_s
        for job, counted in state.counted.items():
            self._restored[job] = self._restored.get(job, 0) + counted.count
        state.counted.clear()
        _forget_oldest(self._restored)
        self._outages_changed()
        return Diagnosis.OUTAGE

    def _outages_changed(self) -> None:
        down = {dependency.label for dependency in self.outages}
        for dependency in self._states:
            metrics.DEPENDENCY_UP.labels(dependency.label).set(dependency.label not in down)
        self.changed.set()


def _diagnose_probe(record: _JobRecord, outage: Outage, result: RequestResult) -> Diagnosis:
    """Diagnose a failure during an outage: a job whose probes all fail so may be the cause."""
    if not isinstance(result, TransientError) or result.reason not in REASONS_OF_BAD_JOBS:
        return Diagnosis.OUTAGE
    if record.outage_since != outage.since:
        record.outage_since, record.probes = outage.since, 0
    record.probes += 1
    return Diagnosis.CLEARED if record.probes > FREE_PROBES else Diagnosis.OUTAGE


def _is_refused_alone(state: _State, job: str, now: float) -> bool:
    """Record a refusal; return whether the API refuses only this job. Never at first, nor in an outage.

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
