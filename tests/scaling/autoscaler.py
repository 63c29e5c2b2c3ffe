"""The scaling decisions of KEDA and the HPA as pure functions of time.

Reimplemented from the source code of KEDA 2 (`scale_scaledobjects.go`, `rabbitmq_scaler.go`)
and Kubernetes (`horizontal.go`, `replica_calculator.go`); each rule names
its function. KEDA scales between zero and one; the HPA that it creates scales between one and the maximum,
and reads the current queue depth from KEDA's metrics server at each sync.
"""

import math
from typing import Final

from tests.scaling.scaled_object import Policy, Rules, ScalerConfig

# --horizontal-pod-autoscaler-tolerance of kube-controller-manager.
TOLERANCE: Final = 0.1
_FOREVER: Final = float("-inf")


class Keda:
    """Scale from and to zero: KEDA's `RequestScale`."""

    def __init__(self, scaler: ScalerConfig) -> None:
        self._scaler = scaler
        self._last_active = _FOREVER

    def decide(self, now: float, messages: int, replicas: int) -> int:
        """Return the desired replicas at a poll."""
        if messages > self._scaler.activation:
            # `scaleFromZeroOrIdle`; an active trigger also sets `LastActiveTime`.
            self._last_active = now
            return replicas or max(1, self._scaler.minimum)
        if self._scaler.minimum:
            return max(replicas, self._scaler.minimum)
        # `scaleToZeroOrIdle`: from any number of replicas.
        is_cool = self._last_active + self._scaler.cooldown_s < now
        return 0 if is_cool else replicas


class Hpa:
    """Scale between one and the maximum: the HPA controller's `reconcileAutoscaler`."""

    def __init__(self, scaler: ScalerConfig) -> None:
        self._scaler = scaler
        # `getHPAMinReplicas` of KEDA: never below one.
        self._minimum = max(1, scaler.minimum)
        # Past recommendations and changes of the replicas (negative: down), with their times.
        self._recommended: list[tuple[float, int]] = []
        self._changed: list[tuple[float, int]] = []

    def decide(self, now: float, messages: int, replicas: int) -> int:
        """Return the desired replicas at a sync."""
        if not self._recommended:
            # `recordInitialRecommendation`
            self._recommended.append((now, replicas))
        if replicas == 0:
            # "scaling is disabled since the replica count of the target is zero"
            return 0
        if not self._minimum <= replicas <= self._scaler.maximum:
            desired = min(max(replicas, self._minimum), self._scaler.maximum)
        else:
            raw = recommendation(messages, self._scaler.value, replicas)
            desired = self._limited(now, replicas, self._stabilized(now, replicas, raw))
        if desired != replicas:
            self._changed.append((now, desired - replicas))
        return desired

    def _stabilized(self, now: float, replicas: int, raw: int) -> int:
        """`stabilizeRecommendationWithBehaviors`: apply the stabilization windows."""
        up_since = now - self._scaler.up.stabilization_window_seconds
        down_since = now - self._scaler.down.stabilization_window_seconds
        lowest = min([raw, *(it for at, it in self._recommended if at > up_since)])
        highest = max([raw, *(it for at, it in self._recommended if at > down_since)])
        oldest = min(up_since, down_since)
        self._recommended = [it for it in self._recommended if it[0] > oldest] + [(now, raw)]
        return min(max(replicas, lowest), highest)

    def _limited(self, now: float, replicas: int, desired: int) -> int:
        """`convertDesiredReplicasWithBehaviorRate`: apply the policies, the minimum and the maximum."""
        if desired > replicas:
            limit = max(replicas, self._limit(now, replicas, self._scaler.up, 1))
            return min(desired, limit, self._scaler.maximum)
        if desired < replicas:
            limit = min(replicas, self._limit(now, replicas, self._scaler.down, -1))
            return max(desired, limit, self._minimum)
        return desired

    def _limit(self, now: float, replicas: int, rules: Rules, sign: int) -> int:
        """`calculateScaleUpLimitWithScalingRules`, `calculateScaleDownLimitWithBehaviors`."""
        if rules.select_policy == "Disabled":
            return replicas
        limits = [
            _policy_limit(policy, replicas - self._changed_since(now - policy.period_seconds), sign)
            for policy in rules.policies
        ]
        select = max if (rules.select_policy == "Max") == (sign > 0) else min
        return select(limits)

    def _changed_since(self, since: float) -> int:
        """`getReplicasChangePerPeriod`: changes by the HPA in both directions, without those by KEDA."""
        return sum(change for at, change in self._changed if at > since)


def recommendation(messages: int, value: float, replicas: int) -> int:
    """`GetExternalPerPodMetricReplicas`: one pod per `value` messages, with a tolerance."""
    ratio = messages / (value * replicas)
    return replicas if 1 - TOLERANCE <= ratio <= 1 + TOLERANCE else math.ceil(messages / value)


def _policy_limit(policy: Policy, at_start: int, sign: int) -> int:
    """Return the replicas that a policy allows, from their number at the start of its period."""
    if policy.type == "Pods":
        return at_start + sign * policy.value
    # Scaling up rounds up; scaling down truncates, as Go's int32() does.
    reach = at_start * (1 + sign * policy.value / 100)
    return math.ceil(reach) if sign > 0 else int(reach)


class Autoscaler:
    """KEDA and the HPA, each with its own interval."""

    def __init__(self, scaler: ScalerConfig, now: float = 0.0) -> None:
        self._keda, self._hpa = Keda(scaler), Hpa(scaler)
        # `startScaleLoop` polls immediately, then at each polling interval.
        self._polling = Ticker(scaler.polling_s, now)
        self._syncing = Ticker(scaler.sync_s, now)

    @property
    def next_at(self) -> float:
        """The time of the next decision."""
        return min(self._polling.next_at, self._syncing.next_at)

    def decide(self, now: float, messages: int, replicas: int) -> int:
        """Return the desired replicas; unchanged if no decision is due."""
        if self._polling.is_due(now):
            replicas = self._keda.decide(now, messages, replicas)
        if self._syncing.is_due(now):
            replicas = self._hpa.decide(now, messages, replicas)
        return replicas


class Ticker:
    """A fixed interval; missed ticks are skipped."""

    def __init__(self, every_s: float, now: float) -> None:
        self._every_s = every_s
        self.next_at = now

    def is_due(self, now: float) -> bool:
        """Return whether a tick is due, once per tick."""
        if now < self.next_at:
            return False
        self.next_at += self._every_s * (1 + (now - self.next_at) // self._every_s)
        return True
