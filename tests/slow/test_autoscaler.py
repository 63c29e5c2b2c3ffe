"""The control loop's decisions, against what KEDA and the HPA are documented and written to do."""

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.scaling.autoscaler import Autoscaler, Hpa, Keda, recommendation
from tests.scaling.scaled_object import Numbers

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
    """A ScaledObject; `activation` is its trigger's."""
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
    usual = {"scaleTargetRef": {"name": "worker"}, "maxReplicaCount": 100, "advanced": advanced}
    return {"spec": {**usual, "triggers": [trigger], **spec}}


def numbers(behavior: dict[str, Any] | None = None, /, **spec: Any) -> Numbers:
    return Numbers.of(manifest(behavior, **spec))


def keda(**spec: Any) -> Keda:
    return Keda(numbers(**spec))


def hpa(behavior: dict[str, Any] = AT_ONCE, /, **spec: Any) -> Hpa:
    return Hpa(numbers(behavior, **spec))


def course(it: Hpa, replicas: int, messages: Mapping[float, int]) -> list[int]:
    """The replicas after each turn, from so many on."""
    after = []
    for now, count in messages.items():
        replicas = it.decide(now, count, replicas)
        after.append(replicas)
    return after


def test_the_first_message_starts_the_first_pod() -> None:
    assert keda().decide(0, 0, 0) == 0
    assert keda().decide(0, 1, 0) == 1
    assert keda().decide(0, 1000, 0) == 1


def test_the_first_pod_takes_more_messages_than_the_activation_value() -> None:
    assert keda(activation="5").decide(0, 5, 0) == 0
    assert keda(activation="5").decide(0, 6, 0) == 1


def test_while_there_are_messages_keda_leaves_the_number_to_the_hpa() -> None:
    it = keda()
    assert [it.decide(now, 1, replicas) for now, replicas in enumerate([1, 7, 100])] == [1, 7, 100]


def test_keda_goes_from_none_to_the_fewest() -> None:
    assert keda(minReplicaCount=3).decide(0, 1, 0) == 3


def test_keda_never_goes_to_none_with_a_minimum() -> None:
    it = keda(minReplicaCount=3, cooldownPeriod=10)
    assert it.decide(0, 1, 5) == 5
    assert it.decide(1000, 0, 5) == 5
    assert it.decide(1000, 0, 0) == 3


def test_keda_goes_to_none_when_the_cooldown_has_passed_since_a_look_last_found_a_message() -> None:
    it = keda(cooldownPeriod=300)
    it.decide(0, 1, 0)
    it.decide(60, 1, 1)
    assert it.decide(61, 0, 1) == 1
    assert it.decide(360, 0, 1) == 1
    assert it.decide(361, 0, 1) == 0


def test_a_message_within_the_cooldown_begins_it_anew() -> None:
    it = keda(cooldownPeriod=300)
    it.decide(0, 1, 1)
    it.decide(299, 1, 1)
    assert it.decide(500, 0, 1) == 1
    assert it.decide(600, 0, 1) == 0


def test_keda_goes_to_none_from_however_many_there_are() -> None:
    it = keda(cooldownPeriod=10)
    it.decide(0, 1, 8)
    assert it.decide(11, 0, 8) == 0


def test_what_never_was_active_has_no_cooldown() -> None:
    assert keda().decide(0, 0, 2) == 0


def test_messages_up_to_the_activation_value_do_not_keep_pods() -> None:
    it = keda(activation="5", cooldownPeriod=10)
    it.decide(0, 6, 0)
    assert it.decide(11, 5, 2) == 0


@pytest.mark.parametrize(
    ("messages", "replicas", "wanted"),
    [
        (0, 1, 0),
        (1, 1, 1),
        (4, 1, 1),
        (5, 1, 2),
        (400, 1, 100),
        # Ten pods for 36 to 44: within a tenth of what they are for.
        (36, 10, 10),
        (44, 10, 10),
        (35, 10, 9),
        (45, 10, 12),
        # The last message is rounded up.
        (9, 5, 3),
        (8, 5, 2),
    ],
)
def test_a_pod_for_each_value_messages_unless_there_are_about_so_many(
    messages: int, replicas: int, wanted: int
) -> None:
    assert recommendation(messages, 4, replicas) == wanted


@given(st.integers(1, 1000))
def test_busy_pods_hold_themselves_up(replicas: int) -> None:
    # With `value` as the concurrency: what they work on is counted.
    assert recommendation(64 * replicas, 64, replicas) == replicas


def test_the_hpa_leaves_none_at_none() -> None:
    assert hpa().decide(0, 1000, 0) == 0


def test_the_hpa_stays_between_one_and_the_most() -> None:
    assert hpa(maxReplicaCount=8).decide(0, 1000, 1) == 8
    assert hpa().decide(0, 0, 5) == 1
    assert hpa(minReplicaCount=3).decide(0, 0, 5) == 3


def test_the_hpa_brings_back_at_once_what_is_out_of_bounds() -> None:
    assert hpa(CHART, maxReplicaCount=8).decide(0, 0, 20) == 8
    assert hpa(CHART, minReplicaCount=3).decide(0, 0, 1) == 3


def test_the_hpa_goes_up_by_the_faster_of_the_policies() -> None:
    # Four more, then twice as many.
    up = course(hpa(CHART), 1, dict.fromkeys((0, 15, 30, 45, 60), 1000))
    assert up == [5, 10, 20, 40, 80]


def test_within_one_period_no_more_is_added_than_the_policies_allow() -> None:
    up = course(hpa(CHART), 1, dict.fromkeys((0, 5, 10, 15, 20), 1000))
    assert up == [5, 5, 5, 10, 10]


@pytest.mark.parametrize(("select", "up", "down"), [("Max", 20, 50), ("Min", 14, 99), ("Disabled", 10, 100)])
def test_of_several_policies_one_is_selected(select: str, up: int, down: int) -> None:
    behavior = {
        "scaleUp": {**CHART["scaleUp"], "selectPolicy": select},
        "scaleDown": {**CHART["scaleDown"], "selectPolicy": select, "stabilizationWindowSeconds": 0},
    }
    assert hpa(behavior).decide(0, 1000, 10) == up
    assert hpa(behavior).decide(0, 0, 100) == down


def test_percentages_are_rounded_up_on_the_way_up_and_cut_off_on_the_way_down() -> None:
    policy = {"policies": [{"type": "Percent", "value": 10, "periodSeconds": 60}]}
    slow = {"scaleUp": policy, "scaleDown": {**policy, "stabilizationWindowSeconds": 0}}
    assert hpa(slow).decide(0, 1000, 1) == 2
    assert hpa(slow).decide(0, 0, 15) == 13


def test_a_dip_that_is_shorter_than_the_window_costs_no_pod() -> None:
    assert course(hpa(CHART), 10, {0: 40, 60: 0, 119: 0, 120: 40, 239: 0}) == [10] * 5


def test_after_the_window_the_hpa_halves_them_each_minute() -> None:
    down = course(hpa(CHART), 16, {now: 0 if now else 64 for now in range(0, 391, 15)})
    assert down == [16] * 8 + [8] * 4 + [4] * 4 + [2] * 4 + [1] * 7


def test_the_hpa_goes_down_to_the_highest_that_was_wanted_in_the_window() -> None:
    assert course(hpa(CHART), 10, {0: 40, 15: 32, 30: 0, 121: 0, 136: 0}) == [10, 10, 10, 8, 5]


def test_a_window_for_the_way_up_waits_for_the_lowest_that_was_wanted() -> None:
    patient = {"scaleUp": {**AT_ONCE["scaleUp"], "stabilizationWindowSeconds": 30}}
    assert course(hpa(patient), 1, {0: 4, 15: 40, 29: 40, 31: 40, 46: 40}) == [1, 1, 1, 10, 10]


def test_what_was_added_lately_may_be_taken_away_with_the_period_s_share() -> None:
    # `periodStartReplicas` counts ups and downs: ten were there a minute ago, so that five may go.
    behavior = {**AT_ONCE, "scaleDown": {**CHART["scaleDown"], "stabilizationWindowSeconds": 0}}
    assert course(hpa(behavior), 10, {0: 40, 30: 80, 45: 0}) == [10, 20, 5]


def test_where_nothing_is_said_kubernetes_defaults_hold() -> None:
    it = Hpa(numbers())
    assert course(it, 1, {0: 1000, 15: 1000, 30: 0, 314: 0, 316: 0}) == [5, 10, 10, 10, 1]


@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=60),
    st.integers(1, 40),
)
def test_the_hpa_never_goes_faster_than_it_may(messages: list[int], maximum: int) -> None:
    it = hpa(CHART, maxReplicaCount=maximum)
    found = [1, *course(it, 1, {15.0 * turn: count for turn, count in enumerate(messages)})]
    for turn, (before, after) in enumerate(itertools.pairwise(found)):
        assert 1 <= after <= maximum
        assert after <= max(2 * before, before + 4)
        if after < before:
            # At the turns of the last minute there were at most twice as many.
            lately = found[max(0, turn - 3) : turn + 1]
            assert after >= min(max(1, max(lately) // 2), max(1, max(lately) - 1))
            # Of those that were called for within the window none was higher.
            wanted = [recommendation(messages[it], 4, found[it]) for it in range(max(0, turn - 7), turn + 1)]
            assert after >= min(max(wanted), before)


def test_keda_and_the_hpa_have_their_own_times() -> None:
    it = Autoscaler(numbers(CHART, pollingInterval=40))
    assert it.next_at == 0
    assert it.decide(0, 0, 0) == 0
    assert it.next_at == 15
    # The HPA's turn: it starts no first pod.
    assert it.decide(15, 100, 0) == 0
    assert it.decide(30, 100, 0) == 0
    assert it.next_at == 40
    assert it.decide(40, 100, 0) == 1
    assert it.next_at == 45
    assert it.decide(44, 100, 1) == 1
    assert it.decide(45, 100, 1) == 5


def test_a_turn_that_was_missed_is_not_made_up_for() -> None:
    it = Autoscaler(numbers(CHART, pollingInterval=15))
    it.decide(0, 100, 0)
    it.decide(50, 100, 1)
    assert it.next_at == 60


def test_keda_s_first_pod_takes_nothing_from_what_the_hpa_may_add() -> None:
    it = Autoscaler(numbers(CHART, pollingInterval=15))
    assert it.decide(0, 100, 0) == 5


def test_from_none_to_the_most_and_back() -> None:
    it = Autoscaler(numbers(CHART, pollingInterval=15, cooldownPeriod=300, maxReplicaCount=6))
    replicas, after = 0, {}
    for now in range(0, 901, 15):
        messages = 100 if 60 <= now < 180 else 0
        replicas = after[now] = it.decide(now, messages, replicas)
    assert [now for now in after if after[now] != after.get(now - 15, 0)] == [60, 75, 285, 345, 480]
    assert [after[now] for now in (45, 60, 75, 270, 285, 345, 465, 480)] == [0, 5, 6, 6, 3, 1, 1, 0]


def test_the_numbers_are_those_of_the_manifest() -> None:
    found = numbers(
        CHART, value="64", pollingInterval=10, cooldownPeriod=60, minReplicaCount=2, activation="3"
    )
    assert (found.host, found.vhost, found.queue) == ("http://rabbitmq:15672/", "/", "vqa.jobs")
    assert (found.value, found.activation) == (64, 3)
    assert (found.minimum, found.maximum) == (2, 100)
    assert (found.polling_s, found.cooldown_s, found.sync_s) == (10, 60, 15)
    assert [it.value for it in found.up.policies] == [100, 4]
    assert found.down.stabilization_window_seconds == 120


def test_what_is_not_said_is_what_keda_takes() -> None:
    found = Numbers.of({"spec": {k: v for k, v in manifest()["spec"].items() if k != "maxReplicaCount"}})
    assert (found.polling_s, found.cooldown_s, found.minimum, found.maximum) == (30, 300, 0, 100)


def test_all_seconds_can_be_divided() -> None:
    fast = numbers(CHART, pollingInterval=30, cooldownPeriod=300).faster(60)
    assert (fast.polling_s, fast.cooldown_s, fast.sync_s) == (0.5, 5, 0.25)
    assert [it.period_seconds for it in fast.up.policies] == [0.25, 0.25]
    assert [it.period_seconds for it in fast.down.policies] == [1, 1]
    assert (fast.up.stabilization_window_seconds, fast.down.stabilization_window_seconds) == (0, 2)
    assert (fast.value, fast.maximum) == (4, 100)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=80), st.sampled_from([1, 8, 64]))
def test_in_a_faster_world_the_same_happens_sooner(messages: list[int], factor: int) -> None:
    def replicas(found: Numbers, turn_s: float) -> list[int]:
        it, count, after = Autoscaler(found), 0, []
        for turn, waiting in enumerate(messages):
            count = it.decide(turn * turn_s, waiting, count)
            after.append(count)
        return after

    usual = numbers(CHART, pollingInterval=15)
    assert replicas(usual, 15) == replicas(usual.faster(factor), 15 / factor)


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
def test_what_the_loop_does_not_know_is_refused(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        numbers(**spec)


@pytest.mark.parametrize(
    "metadata", [{"protocol": "amqp"}, {"mode": "MessageRate"}, {"excludeUnacknowledged": "true"}]
)
def test_another_way_of_counting_is_refused(metadata: dict[str, str]) -> None:
    found = manifest()
    found["spec"]["triggers"][0]["metadata"] |= metadata
    with pytest.raises(ValidationError, match=next(iter(metadata))):
        Numbers.of(found)
