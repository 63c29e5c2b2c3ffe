"""Whether a dependency is down, or only a job is in trouble with it.

A dependency that cannot be reached or refuses everybody is down at once. One that fails in other ways is
down when several different jobs in a row met failures and none a success. A single job that fails
again and again is that job's own trouble. Times are seconds of a monotonic clock, passed in.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from worker import metrics
from worker.errors import Dependency

# Fewer would take a handful of bad jobs for an outage, more would burn attempts in a real one.
DISTINCT_JOBS = 5
# How many failing jobs' first failures are remembered: far more than fail at once, at little cost.
REMEMBERED_JOBS = 1000
# How old a success may be to say that others succeed.
RECENT_S = 60.0


@dataclass(frozen=True, slots=True)
class Outage:
    """Since when (a monotonic clock's seconds) and why a dependency is down."""

    since: float
    reason: str


class Health:
    """What the jobs' outcomes say about the dependencies."""

    def __init__(self) -> None:
        self._failing: dict[Dependency, set[str]] = {Dependency.MODEL: set(), Dependency.S3: set()}
        self._first_failed: OrderedDict[tuple[Dependency, str], float] = OrderedDict()
        self._succeeded_at: dict[Dependency, float] = {}
        self._outages: dict[Dependency, Outage] = {}
        self.changed = asyncio.Event()
        for dependency in self._failing:
            metrics.DEPENDENCY_UP.labels(dependency).set(1)

    @property
    def outages(self) -> dict[Dependency, Outage]:
        """The dependencies that are down, and why."""
        return dict(self._outages)

    def succeeded(self, dependency: Dependency, started: float, now: float) -> None:
        """A call begun at `started` went well; one begun before the outage proves nothing."""
        outage = self._outages.get(dependency)
        if outage and started < outage.since:
            return
        self._failing[dependency].clear()
        self._succeeded_at[dependency] = now
        if outage:
            del self._outages[dependency]
            self._publish(dependency, up=True)

    def failed(self, dependency: Dependency, job: str, reason: str, now: float) -> bool:
        """A call failed in a way that may be the job's; returns whether the dependency is down."""
        self._failing[dependency].add(job)
        self._first_failed.setdefault((dependency, job), now)
        self._forget_the_oldest()
        if len(self._failing[dependency]) >= DISTINCT_JOBS:
            self.down(dependency, f"{DISTINCT_JOBS} different jobs in a row failed: {reason}", now)
        return dependency in self._outages

    def refused_everybody(self, dependency: Dependency, job: str, reason: str, now: float) -> bool:
        """A call failed as anybody's would; returns whether the dependency is down.

        It is not if others have succeeded since this very job met the same: then the job is in trouble of
        its own after all (a bucket that only looks like an outage, say), and must not stop the others again.
        """
        failed_at = self._first_failed.get((dependency, job), float("inf"))
        is_its_own = dependency not in self._outages and self._last_success(dependency) > failed_at
        self._first_failed[dependency, job] = now
        self._forget_the_oldest()
        if not is_its_own:
            self.down(dependency, reason, now)
        return not is_its_own

    def down(self, dependency: Dependency, reason: str, now: float) -> None:
        """The dependency is out of reach or refuses everybody."""
        if dependency not in self._outages:
            self._outages[dependency] = Outage(now, reason)
            self._publish(dependency, up=False)

    def succeeds_for_others(self, dependency: Dependency, job: str) -> bool:
        """Whether calls went well since shortly before this job first failed, and no other job is failing.

        False for a first failure: the others get the time of a retry to show whether they fail as well.
        """
        failed_at = self._first_failed.get((dependency, job), float("inf"))
        return self._last_success(dependency) > failed_at - RECENT_S and self._failing[dependency] <= {job}

    def _last_success(self, dependency: Dependency) -> float:
        return self._succeeded_at.get(dependency, float("-inf"))

    def _forget_the_oldest(self) -> None:
        if len(self._first_failed) > REMEMBERED_JOBS:
            self._first_failed.popitem(last=False)

    def _publish(self, dependency: Dependency, *, up: bool) -> None:
        metrics.DEPENDENCY_UP.labels(dependency).set(up)
        self.changed.set()
