"""The decisions of the control loop, compared with the documentation and the source of KEDA and the HPA."""

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.scaling.autoscaler import Autoscaler, Hpa, Keda, recommendation
from tests.scaling.scaled_object import ScalerConfig

CHART: dict[str, Any] = {
    "scaleUp": {
        "stabilizationWindowSeconds": 0,
        "policies": [
            {"type": "Percent", "value": 100, "periodSeconds": 15},
            {"type": "Pods", "value": 4, "periodSeconds": 15},
        ],
    },
    "scaleDown": {
        "stabilizationWindowSeconds": 120,
        "policies": [
            {"type": "Percent", "value": 50, "periodSeconds": 60},
            {"type": "Pods", "value": 1, "periodSeconds": 60},
        ],
    },
}
AT_ONCE: dict[str, Any] = {
    "scaleUp": {"policies": [{"type": "Percent", "value": 10_000, "periodSeconds": 15}]},
    "scaleDown": {"stabilizationWindowSeconds": 0},
}


def manifest(behavior: dict[str, Any] | None = None, /, *, value: str = "4", **spec: Any) -> dict[str, Any]:
    """Return a ScaledObject; `activation` and `trigger` change its trigger."""
    metadata = {
        "host": "http://rabbitmq:15672/",
        "protocol": "http",
        "mode": "QueueLength",
        "queueName": "vqa.jobs",
        "value": value,
        "activationValue": spec.pop("activation", "0"),
    }
    trigger = {"type": "rabbitmq", "metadata": metadata, **spec.pop("trigger", {})}
    advanced = {"horizontalPodAutoscalerConfig": {"behavior": behavior}} if behavior else {}
    default = {"scaleTargetRef": {"name": "worker"}, "maxReplicaCount": 100, "advanced": advanced}
    return {"spec": {**default, "triggers": [trigger], **spec}}


def config(behavior: dict[str, Any] | None = None, /, **spec: Any) -> ScalerConfig:
    return ScalerConfig.of(manifest(behavior, **spec))


def keda(**spec: Any) -> Keda:
    return Keda(config(**spec))


def hpa(behavior: dict[str, Any] = AT_ONCE, /, **spec: Any) -> Hpa:
    return Hpa(config(behavior, **spec))


def replicas_after(it: Hpa, replicas: int, messages: Mapping[float, int]) -> list[int]:
    """Return the replicas after each sync."""
    after = []
    for now, count in messages.items():
        replicas = it.decide(now, count, replicas)
        after.append(replicas)
    return after


@pytest.mark.parametrize(
    ("spec", "messages", "desired"),
    [
        ({}, 0, 0),
        ({}, 1, 1),
        ({}, 1000, 1),
        ({"activation": "5"}, 5, 0),
        ({"activation": "5"}, 6, 1),
        ({"minReplicaCount": 3}, 1, 3),
    ],
)
def test_keda_scales_from_zero_to_the_minimum_above_the_activation_value(
    spec: dict[str, Any], messages: int, desired: int
) -> None:
    assert keda(**spec).decide(0, messages, 0) == desired


def test_keda_does_not_change_an_active_deployment() -> None:
    it = keda()
    assert [it.decide(now, 1, replicas) for now, replicas in enumerate([1, 7, 100])] == [1, 7, 100]


def test_keda_does_not_scale_to_zero_with_a_minimum() -> None:
    it = keda(minReplicaCount=3, cooldownPeriod=10)
    assert it.decide(0, 1, 5) == 5
    assert it.decide(1000, 0, 5) == 5
    assert it.decide(1000, 0, 0) == 3


def test_keda_scales_to_zero_after_the_cooldown() -> None:
    it = keda(cooldownPeriod=300)
    it.decide(0, 1, 0)
    it.decide(60, 1, 1)
    assert it.decide(61, 0, 1) == 1
    assert it.decide(360, 0, 1) == 1
    assert it.decide(361, 0, 1) == 0


def test_a_message_restarts_the_cooldown() -> None:
    it = keda(cooldownPeriod=300)
    it.decide(0, 1, 1)
    it.decide(299, 1, 1)
    assert it.decide(500, 0, 1) == 1
    assert it.decide(600, 0, 1) == 0


def test_keda_scales_to_zero_from_any_number_of_replicas() -> None:
    it = keda(cooldownPeriod=10)
    it.decide(0, 1, 8)
    assert it.decide(11, 0, 8) == 0


def test_there_is_no_cooldown_without_an_active_trigger_before() -> None:
    assert keda().decide(0, 0, 2) == 0


def test_messages_up_to_the_activation_value_do_not_restart_the_cooldown() -> None:
    it = keda(activation="5", cooldownPeriod=10)
    it.decide(0, 6, 0)
    assert it.decide(11, 5, 2) == 0


@pytest.mark.parametrize(
    ("messages", "replicas", "desired"),
    [
        (0, 1, 0),
        (1, 1, 1),
        (4, 1, 1),
        (5, 1, 2),
        (400, 1, 100),
        # Within the tolerance of 10 %.
        (36, 10, 10),
        (44, 10, 10),
        (35, 10, 9),
        (45, 10, 12),
        # Rounded up.
        (9, 5, 3),
        (8, 5, 2),
    ],
)
def test_one_pod_per_value_messages_with_a_tolerance(messages: int, replicas: int, desired: int) -> None:
    assert recommendation(messages, 4, replicas) == desired


@given(st.integers(1, 1000))
def test_busy_pods_are_not_scaled_down(replicas: int) -> None:
    # Unacknowledged messages are counted, and `value` is the concurrency.
    assert recommendation(64 * replicas, 64, replicas) == replicas


@pytest.mark.parametrize(
    ("it", "messages", "replicas", "desired"),
    [
        pytest.param(hpa(), 1000, 0, 0, id="not from zero"),
        pytest.param(hpa(maxReplicaCount=8), 1000, 1, 8, id="at most the maximum"),
        pytest.param(hpa(), 0, 5, 1, id="at least one"),
        pytest.param(hpa(minReplicaCount=3), 0, 5, 3, id="at least the minimum"),
        pytest.param(hpa(CHART, maxReplicaCount=8), 0, 20, 8, id="from above the maximum immediately"),
        pytest.param(hpa(CHART, minReplicaCount=3), 0, 1, 3, id="from below the minimum immediately"),
    ],
)
def test_the_bounds_of_the_hpa(it: Hpa, messages: int, replicas: int, desired: int) -> None:
    assert it.decide(0, messages, replicas) == desired


def test_the_hpa_scales_up_by_the_faster_policy() -> None:
    # Plus four, then doubled.
    up = replicas_after(hpa(CHART), 1, dict.fromkeys((0, 15, 30, 45, 60), 1000))
    assert up == [5, 10, 20, 40, 80]


def test_the_policies_limit_the_change_within_a_period() -> None:
    up = replicas_after(hpa(CHART), 1, dict.fromkeys((0, 5, 10, 15, 20), 1000))
    assert up == [5, 5, 5, 10, 10]


@pytest.mark.parametrize(("select", "up", "down"), [("Max", 20, 50), ("Min", 14, 99), ("Disabled", 10, 100)])
def test_select_policy_chooses_a_policy(select: str, up: int, down: int) -> None:
    behavior = {
        "scaleUp": {**CHART["scaleUp"], "selectPolicy": select},
        "scaleDown": {**CHART["scaleDown"], "selectPolicy": select, "stabilizationWindowSeconds": 0},
    }
    assert hpa(behavior).decide(0, 1000, 10) == up
    assert hpa(behavior).decide(0, 0, 100) == down


def test_percentages_are_rounded_up_for_scale_up_and_truncated_for_scale_down() -> None:
    policy = {"policies": [{"type": "Percent", "value": 10, "periodSeconds": 60}]}
    slow = {"scaleUp": policy, "scaleDown": {**policy, "stabilizationWindowSeconds": 0}}
    assert hpa(slow).decide(0, 1000, 1) == 2
    assert hpa(slow).decide(0, 0, 15) == 13


def test_a_dip_shorter_than_the_window_stops_no_pod() -> None:
    assert replicas_after(hpa(CHART), 10, {0: 40, 60: 0, 119: 0, 120: 40, 239: 0}) == [10] * 5


def test_after_the_window_the_hpa_halves_the_replicas_each_minute() -> None:
    down = replicas_after(hpa(CHART), 16, {now: 0 if now else 64 for now in range(0, 391, 15)})
    assert down == [16] * 8 + [8] * 4 + [4] * 4 + [2] * 4 + [1] * 7


def test_the_hpa_scales_down_to_the_highest_recommendation_in_the_window() -> None:
    assert replicas_after(hpa(CHART), 10, {0: 40, 15: 32, 30: 0, 121: 0, 136: 0}) == [10, 10, 10, 8, 5]


def test_the_hpa_scales_up_to_the_lowest_recommendation_in_the_window() -> None:
    patient = {"scaleUp": {**AT_ONCE["scaleUp"], "stabilizationWindowSeconds": 30}}
    assert replicas_after(hpa(patient), 1, {0: 4, 15: 40, 29: 40, 31: 40, 46: 40}) == [1, 1, 1, 10, 10]


def test_replicas_added_in_the_period_can_be_removed_as_well() -> None:
    # `periodStartReplicas` counts changes in both directions: of ten replicas a minute ago five may stop.
    behavior = {**AT_ONCE, "scaleDown": {**CHART["scaleDown"], "stabilizationWindowSeconds": 0}}
    assert replicas_after(hpa(behavior), 10, {0: 40, 30: 80, 45: 0}) == [10, 20, 5]


def test_the_kubernetes_defaults_apply() -> None:
    it = Hpa(config())
    assert replicas_after(it, 1, {0: 1000, 15: 1000, 30: 0, 314: 0, 316: 0}) == [5, 10, 10, 10, 1]


@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=60),
    st.integers(1, 40),
)
def test_the_hpa_never_exceeds_its_policies(messages: list[int], maximum: int) -> None:
    it = hpa(CHART, maxReplicaCount=maximum)
    found = [1, *replicas_after(it, 1, {15.0 * turn: count for turn, count in enumerate(messages)})]
    for turn, (before, after) in enumerate(itertools.pairwise(found)):
        assert 1 <= after <= maximum
        assert after <= max(2 * before, before + 4)
        if after < before:
            # At most twice as many at the syncs of the last minute.
            lately = found[max(0, turn - 3) : turn + 1]
            assert after >= min(max(1, max(lately) // 2), max(1, max(lately) - 1))
            # No recommendation in the window was higher.
            desired = [recommendation(messages[it], 4, found[it]) for it in range(max(0, turn - 7), turn + 1)]
            assert after >= min(max(desired), before)


def test_keda_and_the_hpa_have_separate_intervals() -> None:
    it = Autoscaler(config(CHART, pollingInterval=40))
    assert it.next_at == 0
    assert it.decide(0, 0, 0) == 0
    assert it.next_at == 15
    # A sync of the HPA does not scale from zero.
    assert it.decide(15, 100, 0) == 0
    assert it.decide(30, 100, 0) == 0
    assert it.next_at == 40
    assert it.decide(40, 100, 0) == 1
    assert it.next_at == 45
    assert it.decide(44, 100, 1) == 1
    assert it.decide(45, 100, 1) == 5


def test_a_missed_tick_is_skipped() -> None:
    it = Autoscaler(config(CHART, pollingInterval=15))
    it.decide(0, 100, 0)
    it.decide(50, 100, 1)
    assert it.next_at == 60


def test_keda_s_first_pod_does_not_count_for_the_hpa_s_policies() -> None:
    it = Autoscaler(config(CHART, pollingInterval=15))
    assert it.decide(0, 100, 0) == 5


def test_from_zero_to_the_maximum_and_back() -> None:
    it = Autoscaler(config(CHART, pollingInterval=15, cooldownPeriod=300, maxReplicaCount=6))
    replicas, after = 0, {}
    for now in range(0, 901, 15):
        messages = 100 if 60 <= now < 180 else 0
        replicas = after[now] = it.decide(now, messages, replicas)
    assert [now for now in after if after[now] != after.get(now - 15, 0)] == [60, 75, 285, 345, 480]
    assert [after[now] for now in (45, 60, 75, 270, 285, 345, 465, 480)] == [0, 5, 6, 6, 3, 1, 1, 0]


def test_the_configuration_is_read_from_the_manifest() -> None:
    found = config(
        CHART, value="64", pollingInterval=10, cooldownPeriod=60, minReplicaCount=2, activation="3"
    )
    assert (found.host, found.vhost, found.queue) == ("http://rabbitmq:15672/", "/", "vqa.jobs")
    assert (found.value, found.activation) == (64, 3)
    assert (found.minimum, found.maximum) == (2, 100)
    assert (found.polling_s, found.cooldown_s, found.sync_s) == (10, 60, 15)
    assert [it.value for it in found.up.policies] == [100, 4]
    assert found.down.stabilization_window_seconds == 120


def test_the_defaults_of_keda_apply() -> None:
    found = ScalerConfig.of({"spec": {k: v for k, v in manifest()["spec"].items() if k != "maxReplicaCount"}})
    assert (found.polling_s, found.cooldown_s, found.minimum, found.maximum) == (30, 300, 0, 100)


def test_all_durations_can_be_divided() -> None:
    fast = config(CHART, pollingInterval=30, cooldownPeriod=300).sped_up(60)
    assert (fast.polling_s, fast.cooldown_s, fast.sync_s) == (0.5, 5, 0.25)
    assert [it.period_seconds for it in fast.up.policies] == [0.25, 0.25]
    assert [it.period_seconds for it in fast.down.policies] == [1, 1]
    assert (fast.up.stabilization_window_seconds, fast.down.stabilization_window_seconds) == (0, 2)
    assert (fast.value, fast.maximum) == (4, 100)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=80), st.sampled_from([1, 8, 64]))
def test_with_scaled_time_the_decisions_are_the_same(messages: list[int], factor: int) -> None:
    def replicas(found: ScalerConfig, turn_s: float) -> list[int]:
        it, count, after = Autoscaler(found), 0, []
        for turn, waiting in enumerate(messages):
            count = it.decide(turn * turn_s, waiting, count)
            after.append(count)
        return after

    default = config(CHART, pollingInterval=15)
    assert replicas(default, 15) == replicas(default.sped_up(factor), 15 / factor)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"idleReplicaCount": 0}, "idleReplicaCount"),
        ({"value": 4}, "value"),
        ({"trigger": {"useCachedMetrics": True}}, "useCachedMetrics"),
        ({"trigger": {"metricType": "Value"}}, "metricType"),
        ({"trigger": {"type": "kafka"}}, "type"),
        ({"advanced": {"scalingModifiers": {"formula": "jobs"}}}, "scalingModifiers"),
    ],
)
def test_unsupported_fields_are_rejected(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        config(**spec)


@pytest.mark.parametrize(
    "metadata", [{"protocol": "amqp"}, {"mode": "MessageRate"}, {"excludeUnacknowledged": "true"}]
)
def test_unsupported_metadata_is_rejected(metadata: dict[str, str]) -> None:
    found = manifest()
    found["spec"]["triggers"][0]["metadata"] |= metadata
    with pytest.raises(ValidationError, match=next(iter(metadata))):
        ScalerConfig.of(found)
