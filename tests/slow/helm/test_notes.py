"""The notes after an install: number of replicas, warnings, next steps."""

from typing import Any

import pytest

from tests.slow.helm.rendering import ci_values, keda, minimal, render


def test_the_notes_list_the_next_steps() -> None:
    notes = render(minimal()).notes
    assert "consumes jobs from the queue vqa.jobs" in notes
    assert "kubectl -n vision rollout status deployment/demo-vqa-worker" in notes
    assert '"images": ["s3://photos/image.jpg"]' in notes
    assert "install KEDA, set autoscaling.mode to keda" in notes


def test_the_notes_show_the_range_of_replicas_and_the_scaledobject() -> None:
    notes = render(keda()).notes
    assert "0 to 3, one for every 64 messages" in notes
    assert "kubectl -n vision get scaledobject demo-vqa-worker" in notes
    assert "WARNING" not in notes


def test_with_scale_to_zero_the_notes_do_not_wait_for_a_rollout() -> None:
    assert "rollout status" not in render(keda()).notes
    assert "rollout status" in render(keda({"autoscaling": {"minReplicas": 1}})).notes


@pytest.mark.parametrize("mode", ["keda", "hpa"])
def test_the_notes_warn_of_more_replicas_than_the_provider_allows(mode: str) -> None:
    notes = render(keda({"autoscaling": {"mode": mode, "maxReplicas": 10}})).notes
    warning = " ".join(notes.split("WARNING:", 1)[1].split())
    assert warning.startswith(
        "autoscaling.maxReplicas is 10, but the provider allows 200 concurrent requests"
        " (provider.maxConcurrentRequests) and a pod sends up to 64 (settings.maxConcurrency):"
        " more than 3 pods would only cause 429"
    )
    assert "to 3, one for every" in notes


def test_the_notes_warn_if_one_pod_exceeds_the_limit() -> None:
    notes = render(keda({"provider": {"maxConcurrentRequests": 50}})).notes
    assert "WARNING: one pod sends up to 64 concurrent requests" in notes
    assert "more than the 50 that the provider" in notes


def test_the_notes_warn_of_too_many_fixed_replicas() -> None:
    assert "WARNING" not in render(minimal({"replicas": 3})).notes
    notes = render(minimal({"replicas": 4})).notes
    assert "WARNING: together they send up to 256 concurrent requests, and the provider allows 200" in notes
    unlimited = {"replicas": 400, "provider": {"maxConcurrentRequests": None}}
    assert "WARNING" not in render(minimal(unlimited)).notes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "The hook has declared the queues."),
        (
            {"topology": {"hook": {"enabled": False}}},
            "WARNING: the workers declare the queues, but no worker starts",
        ),
        (
            {"topology": {"hook": {"enabled": False}}, "settings": {"declareTopology": False}},
            "The queues are not declared",
        ),
    ],
)
def test_the_notes_show_what_declares_the_queues(changes: dict[str, Any], expected: str) -> None:
    assert expected in render(keda(changes)).notes


def test_a_running_worker_declares_its_queues_without_a_warning() -> None:
    notes = render(keda({"topology": {"hook": {"enabled": False}}, "autoscaling": {"minReplicas": 1}})).notes
    assert "declare" not in notes
    assert "WARNING" not in notes


def test_the_notes_point_out_secrets_in_values() -> None:
    assert "secrets.existingSecret for a Secret" in render(minimal()).notes
    assert "secrets.existingSecret" not in render(ci_values("hpa")).notes


def test_the_notes_explain_how_to_enable_monitoring() -> None:
    assert "set podMonitor.enabled" in render(minimal()).notes
    notes = render(minimal({"podMonitor": {"enabled": True}})).notes
    assert "For alerts, set prometheusRule.enabled. For the dashboard, set dashboard.enabled." in notes
