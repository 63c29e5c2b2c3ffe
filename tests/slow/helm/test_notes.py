"""What Helm says after an install: how many pods there will be, what is amiss, what to do next."""

from typing import Any

import pytest

from tests.slow.helm.rendering import ci_values, keda, minimal, render


def test_they_say_what_to_do_next() -> None:
    notes = render(minimal()).notes
    assert "takes its jobs from the queue vqa.jobs" in notes
    assert "kubectl -n vision rollout status deployment/demo-vqa-worker" in notes
    assert '"images": ["s3://photos/picture.jpg"]' in notes
    assert "install KEDA, set autoscaling.mode to keda" in notes


def test_they_show_the_range_of_pods_and_where_keda_tells_its_state() -> None:
    notes = render(keda()).notes
    assert "0 to 3, one for every 64 messages" in notes
    assert "kubectl -n vision get scaledobject demo-vqa-worker" in notes
    assert "WARNING" not in notes


def test_they_do_not_send_anybody_to_wait_for_pods_that_do_not_come() -> None:
    assert "rollout status" not in render(keda()).notes
    assert "rollout status" in render(keda({"autoscaling": {"minReplicas": 1}})).notes


@pytest.mark.parametrize("mode", ["keda", "hpa"])
def test_they_say_so_when_more_pods_are_asked_for_than_the_api_has_requests_for(mode: str) -> None:
    notes = render(keda({"autoscaling": {"mode": mode, "maxReplicas": 10}})).notes
    warning = " ".join(notes.split("WARNING:", 1)[1].split())
    assert warning.startswith(
        "autoscaling.maxReplicas is 10, but the API takes 200 requests at once"
        " (provider.maxConcurrentRequests) and a pod makes up to 64 (settings.maxConcurrency):"
        " more than 3 would only earn"
    )
    assert "to 3, one for every" in notes


def test_they_say_so_when_one_pod_alone_is_too_much() -> None:
    notes = render(keda({"provider": {"maxConcurrentRequests": 50}})).notes
    assert "WARNING: one pod makes up to 64 requests at once" in notes
    assert "more than the 50 that the API takes" in notes


def test_they_say_so_when_fixed_pods_are_too_many() -> None:
    assert "WARNING" not in render(minimal({"replicas": 3})).notes
    notes = render(minimal({"replicas": 4})).notes
    assert "WARNING: these make up to 256 requests at once, and the API takes 200" in notes
    unlimited = {"replicas": 400, "provider": {"maxConcurrentRequests": None}}
    assert "WARNING" not in render(minimal(unlimited)).notes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "The queues are there: the hook has declared them."),
        (
            {"topology": {"hook": {"enabled": False}}},
            "WARNING: the workers declare the queues, and no worker starts",
        ),
        (
            {"topology": {"hook": {"enabled": False}}, "settings": {"declareTopology": False}},
            "Nobody declares the queues",
        ),
    ],
)
def test_they_say_who_declares_the_queues(changes: dict[str, Any], said: str) -> None:
    assert said in render(keda(changes)).notes


def test_a_worker_that_runs_may_declare_its_queues_without_ado() -> None:
    notes = render(keda({"topology": {"hook": {"enabled": False}}, "autoscaling": {"minReplicas": 1}})).notes
    assert "declare" not in notes
    assert "WARNING" not in notes


def test_they_point_at_secrets_that_stand_in_values() -> None:
    assert "secrets.existingSecret names one" in render(minimal()).notes
    assert "secrets.existingSecret" not in render(ci_values("hpa")).notes


def test_they_say_how_the_rest_of_monitoring_is_switched_on() -> None:
    assert "by podMonitor.enabled" in render(minimal()).notes
    notes = render(minimal({"podMonitor": {"enabled": True}})).notes
    assert "Alerts: prometheusRule.enabled. The dashboard: dashboard.enabled." in notes
