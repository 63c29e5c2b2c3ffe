"""Whether a dependency is down, or only a job is in trouble with it.

A dependency that cannot be reached or refuses everybody is down at once. One that fails in other ways is
down when several different jobs in a row met failures and none a success. A single job that fails
again and again is that job's own trouble. What the first jobs met is not known at that time: they wait a
moment for a verdict, and attempts that were counted in vain are handed back when it comes later.
Times are seconds of a monotonic clock, passed in.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from worker.errors import Dependency
from worker.observability import metrics

# Fewer would take two bad jobs for an outage, more would make many calls in vain in a real one.
DISTINCT_JOBS = 3
# So many more if some of them have already come to their end by it.
MORE_IN_TURN = 2
# Of many calls at once some fail one after the other by chance, or since a batch was bad: then it takes one
# in so many of those that run.
CROWD = 4
# How long a job that failed waits for what others meet. It waits for its retry anyway.
VERDICT_S = 2.0
# And where nobody else calls at that moment: others may just be about to, if jobs came together.
ALONE_S = 0.25
# How often a job may fail though others have succeeded since it last did, and still be taken for a sign of
# an outage: a provider may fall over again as soon as it is up. Beyond that the job is the trouble, or a
# batch of bad ones would stop the worker again and again.
FAIR_CHANCES = 3
# How many failing jobs are remembered: far more than fail at once, at little cost.
REMEMBERED_JOBS = 1000
# How old a success may be to say that others succeed.
RECENT_S = 60.0

# What falls over again within so many seconds, and before so many calls went well, was not really up.
RELAPSE_S = 5.0
FIRST_SUCCESSES = 3

_NEVER = float("-inf")
_WATCHED = (Dependency.MODEL, Dependency.S3, Dependency.RESULT_STORE)


class Verdict(Enum):
    """Whose trouble a failure was."""

    DOWN = auto()
    """The dependency's: it is down."""
    OWN = auto()
    """The job's own: others have succeeded since."""
    OPEN = auto()
    """Nobody can tell yet."""


@dataclass(frozen=True, slots=True)
class Outage:
    """Since when (a monotonic clock's seconds) and why a dependency is down; if it was hardly up before."""

    since: float
    reason: str
    is_relapse: bool = False


@dataclass(slots=True)
class _Met:
    """What a job has met: when it failed last, how often again after others succeeded, and its first 403."""

    last: float
    again: int = 0
    forbidden_at: float | None = None


@dataclass(slots=True)
class _Counted:
    """How many of a job's attempts were counted since a success, and when the last of them failed."""

    attempts: int = 0
    failed_at: float = _NEVER


@dataclass(slots=True)
class _State:
    """What is known of one dependency.

    Attributes:
        began_well: when the youngest of the calls that went well began.
        up_at, successes: when the last outage ended, and how many calls have gone well since.
        failing: the different jobs that failed in a row, with no success in between.
        ended: those of them that have come to their end by that.
        met: what each job met here, the one that failed last at the end.
        counted: attempts that may turn out to have been an outage's: no call begun since has succeeded.
        suspects: who waits for a verdict, and since when.
    """

    outage: Outage | None = None
    succeeded_at: float = _NEVER
    began_well: float = _NEVER
    up_at: float = _NEVER
    successes: int = 0
    failing: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    met: OrderedDict[str, _Met] = field(default_factory=OrderedDict)
    counted: OrderedDict[str, _Counted] = field(default_factory=OrderedDict)
    suspects: dict[asyncio.Future[Verdict], float] = field(default_factory=dict)


class Health:
    """What the jobs' outcomes say about the dependencies."""

    def __init__(self) -> None:
        self._states = {name: _State() for name in _WATCHED}
        # Attempts to hand back, by job.
        self._restored_attempts: OrderedDict[str, int] = OrderedDict()
        self._gives_verdicts = True
        self.changed = asyncio.Event()
        for dependency in self._states:
            metrics.DEPENDENCY_UP.labels(dependency.label).set(1)

    @property
    def outages(self) -> dict[Dependency, Outage]:
        """The dependencies that are down, and why."""
        return {name: state.outage for name, state in self._states.items() if state.outage}

    def succeeded(self, dependency: Dependency, started: float, now: float) -> None:
        """A call begun at `started` went well; one begun before the outage proves nothing."""
        state = self._states[dependency]
        if state.outage and started < state.outage.since:
            return
        state.failing.clear()
        state.ended.clear()
        state.succeeded_at = now
        state.began_well = max(state.began_well, started)
        _acquit(state, started)
        state.successes += 1
        if state.outage:
            state.outage, state.up_at, state.successes = None, now, 1
            self._publish(dependency)

    def failed(
        self, dependency: Dependency, job: str, reason: str, now: float, *, others: int = 0
    ) -> Verdict:
        """A call failed in a way that may be the job's, while `others` calls ran."""
        state = self._states[dependency]
        _meet(state, job, now)
        if state.outage:
            return Verdict.DOWN
        if state.met[job].again > FAIR_CHANCES:
            return Verdict.OWN
        state.failing.add(job)
        if not _is_enough(state, others):
            return Verdict.OPEN
        count = len(state.failing | state.ended)
        self.down(dependency, f"{count} different jobs in a row failed: {reason}", now)
        return Verdict.DOWN

    def refused_everybody(
        self,
        dependency: Dependency,
        job: str,
        reason: str,
        now: float,
        *,
        others: int = 0,
        may_be_partial: bool = False,
    ) -> Verdict:
        """A call failed as anybody's would, or with `may_be_partial` as that of many would.

        It is the job's own trouble if time and again others have succeeded since this very job met the same
        (a bucket that only looks like an outage, say): it must not stop the others for ever. What may concern
        one bucket or one model only stops nobody if others were served just before, until it is met by
        several jobs in a row, or by the same twice; until then the verdict is open.
        """
        state = self._states[dependency]
        fails_again = _meet(state, job, now)
        if state.outage:
            return Verdict.DOWN
        if fails_again and state.met[job].again > FAIR_CHANCES:
            return Verdict.OWN
        is_new = job not in state.failing and now - state.succeeded_at < RECENT_S
        state.failing.add(job)
        if may_be_partial and is_new and not _is_enough(state, others):
            return Verdict.OPEN
        self.down(dependency, reason, now)
        return Verdict.DOWN

    def down(self, dependency: Dependency, reason: str, now: float) -> None:
        """The dependency is out of reach or refuses everybody; what was counted for it is handed back."""
        state = self._states[dependency]
        if state.outage:
            return
        is_relapse = now - state.up_at < RELAPSE_S and state.successes < FIRST_SUCCESSES
        state.outage = Outage(now, reason, is_relapse)
        _tell(state, Verdict.DOWN)
        for job, counted in state.counted.items():
            self._restored_attempts[job] = self._restored_attempts.get(job, 0) + counted.attempts
        state.counted.clear()
        _forget_the_oldest(self._restored_attempts)
        self._publish(dependency)

    async def verdict(self, dependency: Dependency, failed_at: float, patience_s: float) -> Verdict:
        """Wait for what calls begun after a failure say about it: at most `patience_s`, then it is open."""
        state = self._states[dependency]
        if state.outage:
            return Verdict.DOWN
        if patience_s <= 0 or not self._gives_verdicts:
            return Verdict.OPEN
        verdict: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        state.suspects[verdict] = failed_at
        try:
            async with asyncio.timeout(patience_s):
                return await verdict
        except TimeoutError:
            return Verdict.OPEN
        finally:
            del state.suspects[verdict]

    def has_suspects(self, dependency: Dependency) -> bool:
        """Whether jobs wait for a verdict: what fails together is tried again together."""
        return bool(self._states[dependency].suspects)

    def end_verdicts(self) -> None:
        """The worker stops: nobody waits for a verdict any more."""
        self._gives_verdicts = False
        for state in self._states.values():
            _tell(state, Verdict.OPEN)

    def counted(self, dependency: Dependency, job: str, failed_at: float) -> None:
        """An attempt is counted although the verdict is open; `down` hands it back if it was in vain."""
        state = self._states[dependency]
        counted = state.counted.setdefault(job, _Counted())
        counted.attempts += 1
        counted.failed_at = failed_at
        _forget_the_oldest(state.counted)

    def ended(self, dependency: Dependency, job: str) -> None:
        """A job that failed has come to its end by that, with no outage in sight."""
        state = self._states[dependency]
        if job in state.failing:
            state.failing.remove(job)
            state.ended.add(job)

    def take_restored_attempts(self, job: str) -> int:
        """How many of the attempts that were counted for a job are not to count; told once."""
        return self._restored_attempts.pop(job, 0)

    def is_forbidden_alone(self, dependency: Dependency, job: str, now: float) -> bool:
        """A job met a 403; returns whether it is forbidden for this job only.

        So it is if a call begun since its first 403 has gone well, and no other job is failing. Never for the
        first one, nor in an outage: the others get the time of a retry to show whether they fail as well.
        """
        state = self._states[dependency]
        met = _remembered(state, job, now)
        if met.forbidden_at is None:
            met.forbidden_at = now
        return not state.outage and state.began_well > met.forbidden_at and state.failing <= {job}

    def _publish(self, dependency: Dependency) -> None:
        is_up = dependency.label not in {down.label for down in self.outages}
        metrics.DEPENDENCY_UP.labels(dependency.label).set(is_up)
        self.changed.set()


def _meet(state: _State, job: str, now: float) -> bool:
    """Remember a failure; returns whether others have succeeded since this very job failed before."""
    met = _remembered(state, job, now)
    fails_again = state.succeeded_at > met.last
    met.again += fails_again
    met.last = now
    return fails_again


def _remembered(state: _State, job: str, now: float) -> _Met:
    """What this job has met; it is the last to be forgotten."""
    met = state.met.setdefault(job, _Met(last=now))
    state.met.move_to_end(job)
    _forget_the_oldest(state.met)
    return met


def _is_enough(state: _State, others: int) -> bool:
    """Whether so many different jobs have failed in a row, while `others` calls run, that it is an outage.

    If some of them are no more it takes a few more: bad jobs that come one after the other are less of a sign
    than jobs that fail at the same time, and yet an outage in a quiet hour must not pass for them for ever.
    """
    enough = max(DISTINCT_JOBS, others // CROWD)
    return len(state.failing) >= enough or len(state.failing | state.ended) >= enough + MORE_IN_TURN


def _tell(state: _State, verdict: Verdict, *, failed_by: float = float("inf")) -> None:
    for suspect, failed_at in state.suspects.items():
        if failed_at <= failed_by and not suspect.done():
            suspect.set_result(verdict)


def _acquit(state: _State, started: float) -> None:
    """A call begun at `started` went well: what failed before that was no outage that lasts."""
    _tell(state, Verdict.OWN, failed_by=started)
    for job in [job for job, counted in state.counted.items() if counted.failed_at <= started]:
        del state.counted[job]


def _forget_the_oldest(remembered: OrderedDict[str, Any]) -> None:
    while len(remembered) > REMEMBERED_JOBS:
        remembered.popitem(last=False)
