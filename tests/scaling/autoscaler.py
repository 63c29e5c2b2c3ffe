"""How many pods there shall be, as KEDA and the HPA decide it; pure, with the clock passed in.

After the sources of KEDA 2 (`pkg/scaling/executor/scale_scaledobjects.go`, `pkg/scalers/rabbitmq_scaler.go`)
and Kubernetes (`pkg/controller/podautoscaler/horizontal.go`, `replica_calculator.go`), whose functions are
named next to each rule. KEDA decides between none and some. Between one and the most it leaves everything to
the HPA that it makes, which asks KEDA's metrics server at each of its own turns for the queue as it is then.
"""

import math
from typing import Final

from tests.scaling.scaled_object import Numbers, Policy, Rules

# --horizontal-pod-autoscaler-tolerance of kube-controller-manager.
TOLERANCE: Final = 0.1
_FOREVER: Final = float("-inf")


class Keda:
    """From none to some and back to none: KEDA's `RequestScale`."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers
        self._last_active = _FOREVER

    def decide(self, now: float, messages: int, replicas: int) -> int:
        """How many replicas there shall be, at one look at the queue."""
        if messages > self._numbers.activation:
            # `scaleFromZeroOrIdle`, and `LastActiveTime` at each look that finds the trigger active.
            self._last_active = now
            return replicas or max(1, self._numbers.minimum)
        if self._numbers.minimum:
            return max(replicas, self._numbers.minimum)
        # `scaleToZeroOrIdle`: from however many there are, if they were not needed for so long.
        is_cool = self._last_active + self._numbers.cooldown_s < now
        return 0 if is_cool else replicas


class Hpa:
    """From one to the most: the HPA controller's `reconcileAutoscaler`."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers
        # `getHPAMinReplicas` of KEDA: never below one.
        self._minimum = max(1, numbers.minimum)
        # With their times: what was recommended, and by how much the number was changed (down: negative).
        self._recommended: list[tuple[float, int]] = []
        self._changed: list[tuple[float, int]] = []

    def decide(self, now: float, messages: int, replicas: int) -> int:
        """How many replicas there shall be, at one turn."""
        if not self._recommended:
            # `recordInitialRecommendation`
            self._recommended.append((now, replicas))
        if replicas == 0:
            # "scaling is disabled since the replica count of the target is zero"
            return 0
        if not self._minimum <= replicas <= self._numbers.maximum:
            wanted = min(max(replicas, self._minimum), self._numbers.maximum)
        else:
            raw = recommendation(messages, self._numbers.value, replicas)
            wanted = self._limited(now, replicas, self._stabilized(now, replicas, raw))
        if wanted != replicas:
            self._changed.append((now, wanted - replicas))
        return wanted

    def _stabilized(self, now: float, replicas: int, raw: int) -> int:
        """`stabilizeRecommendationWithBehaviors`: between what the windows for going up and down allow."""
        up_since = now - self._numbers.up.stabilization_window_seconds
        down_since = now - self._numbers.down.stabilization_window_seconds
        lowest = min([raw, *(it for at, it in self._recommended if at > up_since)])
        highest = max([raw, *(it for at, it in self._recommended if at > down_since)])
        oldest = min(up_since, down_since)
        self._recommended = [it for it in self._recommended if it[0] > oldest] + [(now, raw)]
        return min(max(replicas, lowest), highest)

    def _limited(self, now: float, replicas: int, wanted: int) -> int:
        """`convertDesiredReplicasWithBehaviorRate`: as fast as the policies allow, as far as the bounds."""
        if wanted > replicas:
            limit = max(replicas, self._limit(now, replicas, self._numbers.up, 1))
            return min(wanted, limit, self._numbers.maximum)
        if wanted < replicas:
            limit = min(replicas, self._limit(now, replicas, self._numbers.down, -1))
            return max(wanted, limit, self._minimum)
        return wanted

    def _limit(self, now: float, replicas: int, rules: Rules, sign: int) -> int:
        """`calculateScaleUpLimitWithScalingRules`, `calculateScaleDownLimitWithBehaviors`."""
        if rules.select_policy == "Disabled":
            return replicas
        limits = [
            _reach(policy, replicas - self._changed_since(now - policy.period_seconds), sign)
            for policy in rules.policies
        ]
        farthest = max if (rules.select_policy == "Max") == (sign > 0) else min
        return farthest(limits)

    def _changed_since(self, since: float) -> int:
        """`getReplicasChangePerPeriod`, ups and downs together; KEDA's own steps are not among them."""
        return sum(change for at, change in self._changed if at > since)


def recommendation(messages: int, value: float, replicas: int) -> int:
    """`GetExternalPerPodMetricReplicas`: a pod for each `value` messages, unless there are about so many."""
    ratio = messages / (value * replicas)
    return replicas if 1 - TOLERANCE <= ratio <= 1 + TOLERANCE else math.ceil(messages / value)


def _reach(policy: Policy, at_start: int, sign: int) -> int:
    """How far a policy lets the number go from what it was when its period began."""
    if policy.type == "Pods":
        return at_start + sign * policy.value
    # Upwards it is rounded up, so that there is a change; downwards cut off, as by Go's int32().
    reach = at_start * (1 + sign * policy.value / 100)
    return math.ceil(reach) if sign > 0 else int(reach)


class Autoscaler:
    """Both of them, each at its own times."""

    def __init__(self, numbers: Numbers, now: float = 0.0) -> None:
        self._keda, self._hpa = Keda(numbers), Hpa(numbers)
        # `startScaleLoop` looks at once, then at each polling interval.
        self._polling = Clock(numbers.polling_s, now)
        self._syncing = Clock(numbers.sync_s, now)

    @property
    def next_at(self) -> float:
        """When there is something to decide again."""
        return min(self._polling.next_at, self._syncing.next_at)

    def decide(self, now: float, messages: int, replicas: int) -> int:
        """How many replicas there shall be; as many as there are if it is nobody's turn."""
        if self._polling.strikes(now):
            replicas = self._keda.decide(now, messages, replicas)
        if self._syncing.strikes(now):
            replicas = self._hpa.decide(now, messages, replicas)
        return replicas


class Clock:
    """Strikes at equal distances; what it missed it does not make up for."""

    def __init__(self, every_s: float, now: float) -> None:
        self._every_s = every_s
        self.next_at = now

    def strikes(self, now: float) -> bool:
        """Whether it is time, for the first time."""
        if now < self.next_at:
            return False
        self.next_at += self._every_s * (1 + (now - self.next_at) // self._every_s)
        return True
