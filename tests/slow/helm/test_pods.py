"""The pods: security, probes, resources, scheduling and termination."""

import json
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.running import ROOT
from tests.slow.helm.rendering import CI_FILES, Object, ci_values, error_of, minimal, render
from worker.app.runner import HOLD_TIMEOUT_S, REQUEUE_TIMEOUT_S
from worker.observability.tracing.otlp import FLUSH_S
from worker.settings import Settings

NAMES = [path.name.removesuffix("-values.yaml") for path in CI_FILES]
MIB = 1024 * 1024
CONVERTERS = 2
MEMORY_UNITS = {"Mi": MIB, "Gi": 1024 * MIB}


def _no(*keys: str) -> Callable[[Object, Object], bool]:
    return lambda pod, container: not any(key in place for key in keys for place in (pod, container))


def _security(container: Object) -> Object:
    context: Object = container["securityContext"]
    return context


VOLUMES_ALLOWED = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
}

# The controls of the Pod Security Standard "restricted", which includes "baseline", as listed on
# kubernetes.io, and further ones of this chart. Each checks a pod's spec and its container.
RESTRICTED: dict[str, Callable[[Object, Object], bool]] = {
    "no host namespaces": _no("hostNetwork", "hostPID", "hostIPC"),
    "no privileged container": lambda _, container: "privileged" not in _security(container),
    "all capabilities dropped": lambda _, container: (
        _security(container)["capabilities"] == {"drop": ["ALL"]}
    ),
    "only allowed volume types": lambda pod, _: (
        {key for volume in pod["volumes"] for key in volume} - {"name"} <= VOLUMES_ALLOWED | {"secret"}
    ),
    "no host ports": lambda _, container: all("hostPort" not in port for port in container.get("ports", [])),
    "no AppArmor profile": lambda pod, container: (
        "appArmorProfile" not in {**pod["securityContext"], **_security(container)}
    ),
    "no SELinux options": lambda pod, container: (
        "seLinuxOptions" not in {**pod["securityContext"], **_security(container)}
    ),
    "default /proc": lambda _, container: "procMount" not in _security(container),
    "no sysctls": lambda pod, _: "sysctls" not in pod["securityContext"],
    "no privilege escalation": lambda _, container: _security(container)["allowPrivilegeEscalation"] is False,
    "not root": lambda pod, container: (
        pod["securityContext"]["runAsNonRoot"] is True and "runAsNonRoot" not in _security(container)
    ),
    "a numeric user other than root": lambda pod, container: (
        pod["securityContext"]["runAsUser"] == 10001 and "runAsUser" not in _security(container)
    ),
    "seccomp": lambda pod, container: (
        pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        and "seccompProfile" not in _security(container)
    ),
    # Not in the standard.
    "a group other than root": lambda pod, _: pod["securityContext"]["runAsGroup"] == 10001,
    "a read-only root file system": lambda _, container: (
        _security(container)["readOnlyRootFilesystem"] is True
    ),
    "a volume for temporary files": lambda pod, container: (
        {"name": "tmp", "mountPath": "/tmp"}  # noqa: S108 - in the pod
        in container["volumeMounts"]
        and any(volume["name"] == "tmp" and "emptyDir" in volume for volume in pod["volumes"])
    ),
    "no service account token": lambda pod, _: pod["automountServiceAccountToken"] is False,
    "no variables for Services": lambda pod, _: pod["enableServiceLinks"] is False,
}


def _pods(name: str) -> Iterator[Object]:
    for found in render(ci_values(name)).objects:
        if found["kind"] in {"Deployment", "Job"}:
            yield found["spec"]["template"]["spec"]


@pytest.mark.parametrize("control", RESTRICTED)
@pytest.mark.parametrize("name", NAMES)
def test_pods_are_restricted(name: str, control: str) -> None:
    for pod in _pods(name):
        assert pod.get("initContainers") is None
        (container,) = pod["containers"]
        assert RESTRICTED[control](pod, container)


def test_no_service_account_mounts_a_token() -> None:
    accounts = render(ci_values("full")).all("ServiceAccount")
    assert [account["metadata"]["name"] for account in accounts] == ["questions-worker", "questions-topology"]
    assert [account["automountServiceAccountToken"] for account in accounts] == [False, False]


def test_the_annotations_for_a_role_apply_to_the_workers_and_not_to_the_hook() -> None:
    rendered = render(ci_values("full"))
    role = {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/vision"}
    assert rendered.one("ServiceAccount", "questions-worker")["metadata"]["annotations"] == role
    assert role.keys().isdisjoint(
        rendered.one("ServiceAccount", "questions-topology")["metadata"]["annotations"]
    )
    assert rendered.pod["spec"]["serviceAccountName"] == "questions-worker"


def test_an_existing_service_account_is_used_by_workers_and_hook() -> None:
    rendered = render(minimal({"serviceAccount": {"create": False, "name": "own"}}))
    assert rendered.all("ServiceAccount") == []
    job = rendered.one("Job")["spec"]["template"]
    assert [pod["spec"]["serviceAccountName"] for pod in (rendered.pod, job)] == ["own", "own"]


@pytest.mark.parametrize("grace_s", [150, 121, 500, 130.5])
def test_the_termination_grace_period_covers_the_worker_s_shutdown(grace_s: float) -> None:
    rendered = render(minimal({"settings": {"shutdownGrace": grace_s}}))
    assert float(rendered.settings["VQA_SHUTDOWN_GRACE"]) == grace_s
    left = rendered.pod["spec"]["terminationGracePeriodSeconds"] - grace_s
    takes = REQUEUE_TIMEOUT_S + HOLD_TIMEOUT_S + FLUSH_S
    assert takes < left < takes + 10


@pytest.mark.parametrize("grace_s", [120, 100])
def test_a_grace_shorter_than_the_model_timeout_is_rejected(grace_s: float) -> None:
    error = error_of(minimal({"settings": {"shutdownGrace": grace_s}}))
    assert f"settings.shutdownGrace ({grace_s} s) must be more than settings.modelTimeout (120 s)" in error


def test_the_probes_use_the_health_endpoints_on_the_configured_port() -> None:
    rendered = render(ci_values("full"))
    container = rendered.container
    probes = {name: probe["httpGet"] for name, probe in container.items() if name.endswith("Probe")}
    assert probes == {
        "startupProbe": {"path": "/livez", "port": "http"},
        "livenessProbe": {"path": "/livez", "port": "http"},
        "readinessProbe": {"path": "/readyz", "port": "http"},
    }
    assert container["ports"] == [{"name": "http", "containerPort": int(rendered.settings["VQA_HTTP_PORT"])}]
    assert container["livenessProbe"]["failureThreshold"] == 2


def _bytes(quantity: str) -> float:
    return float(quantity[:-2]) * MEMORY_UNITS[quantity[-2:]]


def _measured(scenario: str, case: str, figure: str) -> float:
    measurements = json.loads((ROOT / "docs/performance/figures.json").read_text())["measurements"]
    figures: list[float] = [
        it["figures"][figure]
        for it in measurements
        if (it["contender"], it["scenario"], it["case"]) == ("vqa-worker", scenario, case)
    ]
    return statistics.median(figures)


def _default(setting: str) -> int:
    value: int = Settings.model_fields[setting].default
    return value


def test_the_memory_limit_is_the_measured_sum() -> None:
    """The sum of docs/performance.md for a pod, with images in S3 and the default settings."""
    needed = (
        _measured("start", "start", "idle_mb") * 1e6
        + _default("image_buffer_bytes")
        + 3 * _default("max_job_bytes")
        + 40 * MIB
    )
    resources = render(minimal()).container["resources"]
    assert needed <= _bytes(resources["requests"]["memory"]) <= 1.2 * needed
    # Images are converted in bursts, in processes that end when they are idle.
    needed += _default("image_decode_bytes") + CONVERTERS * 64e6
    assert needed <= _bytes(resources["limits"]["memory"]) <= 1.2 * needed


def test_the_cpu_is_enough_for_all_jobs_in_flight() -> None:
    resources = render(minimal()).container["resources"]
    jobs_per_s = _default("max_concurrency") / 5
    cores = jobs_per_s * _measured("cpu", "1 MB", "cpu_ms") / 1000
    assert cores <= float(resources["requests"]["cpu"].removesuffix("m")) / 1000 <= 4 * cores
    # A limit would throttle.
    assert "cpu" not in resources["limits"]


def _checksums(changes: dict[str, Any]) -> tuple[str, str]:
    annotations = render(minimal(changes)).pod["metadata"]["annotations"]
    return annotations["checksum/settings"], annotations["checksum/secrets"]


def test_changed_settings_or_secrets_restart_the_pods() -> None:
    settings, secrets = _checksums({})
    assert _checksums({}) == (settings, secrets)
    changed = _checksums({"settings": {"maxAttempts": 3}})
    assert changed[0] != settings
    assert changed[1] == secrets
    changed = _checksums({"secrets": {"modelApiKey": "another"}})
    assert changed[0] == settings
    assert changed[1] != secrets


def test_changes_outside_the_worker_do_not_restart_the_pods() -> None:
    before = render(minimal()).pod
    changes = {
        "autoscaling": {"value": 3},
        "podMonitor": {"enabled": True},
        "networkPolicy": {"enabled": True},
    }
    assert render(minimal(changes)).pod == before


def test_selectors_use_stable_labels_that_the_hook_s_pods_do_not_have() -> None:
    rendered = render(ci_values("full"))
    selector = {
        "app.kubernetes.io/name": "vision",
        "app.kubernetes.io/instance": "demo",
        "app.kubernetes.io/component": "worker",
    }
    spec = rendered.one("Deployment")["spec"]
    assert spec["selector"]["matchLabels"] == selector
    assert selector.items() <= rendered.pod["metadata"]["labels"].items()
    hooks = rendered.one("Job")["spec"]["template"]["metadata"]["labels"]
    assert not selector.items() <= hooks.items()
    selectors = [
        rendered.one("PodDisruptionBudget")["spec"]["selector"],
        rendered.one("PodMonitor")["spec"]["selector"],
        *(constraint["labelSelector"] for constraint in rendered.pod["spec"]["topologySpreadConstraints"]),
    ]
    assert selectors == [{"matchLabels": selector}] * 3


@pytest.mark.parametrize("name", ["airgapped", "full", "hpa", "keda", "minimal"])
def test_the_pod_of_helm_test_has_what_a_worker_has(name: str) -> None:
    rendered = render(ci_values(name))
    pod, worker = rendered.one("Pod"), rendered.pod
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,), (of_worker,) = pod["spec"]["containers"], worker["spec"]["containers"]
    of_workers_only = {"name", "args", "ports", "startupProbe", "livenessProbe", "readinessProbe"}
    assert {key: it for key, it in of_worker.items() if key not in of_workers_only} == {
        key: it for key, it in container.items() if key not in of_workers_only
    }
    assert container["args"] == ["check"]
    of_workers_only = {"containers", "affinity", "terminationGracePeriodSeconds", "topologySpreadConstraints"}
    assert {key: it for key, it in worker["spec"].items() if key not in of_workers_only} == {
        key: it for key, it in pod["spec"].items() if key not in {"containers", "restartPolicy"}
    }


def test_the_pod_of_helm_test_has_the_workers_network_policy_and_is_no_worker() -> None:
    rendered = render(ci_values("full"))
    policy = rendered.one("NetworkPolicy", "questions")["spec"]["podSelector"]
    (components,) = policy["matchExpressions"]
    labels = rendered.one("Pod")["metadata"]["labels"]
    assert policy["matchLabels"].items() <= labels.items()
    assert (components["key"], components["operator"]) == ("app.kubernetes.io/component", "In")
    of_both = {labels[components["key"]], rendered.pod["metadata"]["labels"][components["key"]]}
    assert set(components["values"]) == of_both
    selector = rendered.one("Deployment")["spec"]["selector"]["matchLabels"]
    assert not selector.items() <= labels.items()


def test_added_labels_do_not_override_the_chart_s_labels() -> None:
    ours = {"app.kubernetes.io/component": "mine", "app.kubernetes.io/name": "mine"}
    labels = render(minimal({"podLabels": ours, "commonLabels": ours})).pod["metadata"]["labels"]
    assert labels["app.kubernetes.io/component"] == "worker"
    assert labels["app.kubernetes.io/name"] == "vqa-worker"


def test_pods_are_spread_over_zones_and_nodes() -> None:
    constraints = render(minimal()).pod["spec"]["topologySpreadConstraints"]
    assert [(it["topologyKey"], it["whenUnsatisfiable"], it["matchLabelKeys"]) for it in constraints] == [
        ("topology.kubernetes.io/zone", "ScheduleAnyway", ["pod-template-hash"]),
        ("kubernetes.io/hostname", "ScheduleAnyway", ["pod-template-hash"]),
    ]
    without = render(minimal({"topologySpread": {"enabled": False}}))
    assert "topologySpreadConstraints" not in without.pod["spec"]


def test_a_node_drain_evicts_one_pod_at_a_time() -> None:
    spec = render(minimal()).one("PodDisruptionBudget")["spec"]
    assert spec["maxUnavailable"] == 1
    # A pod without a broker is not ready and must not block a drain.
    assert spec["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    spec = render(ci_values("full")).one("PodDisruptionBudget")["spec"]
    assert spec["minAvailable"] == "50%"
    assert "maxUnavailable" not in spec
    assert render(minimal({"podDisruptionBudget": {"enabled": False}})).all("PodDisruptionBudget") == []


def test_a_rollout_starts_new_pods_before_it_stops_old_ones() -> None:
    strategy = render(minimal()).one("Deployment")["spec"]["strategy"]
    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    recreated = render(minimal({"strategy": {"type": "Recreate"}})).one("Deployment")["spec"]["strategy"]
    assert recreated == {"type": "Recreate"}


def test_a_digest_takes_precedence_over_a_tag() -> None:
    digest = f"sha256:{'0123456789abcdef' * 4}"
    image = {"repository": "registry.example/vqa-worker", "tag": "1.2.3", "digest": digest}
    assert render(minimal({"image": image})).container["image"] == f"registry.example/vqa-worker@{digest}"


def test_user_port_and_entrypoint_match_the_image() -> None:
    image = (ROOT / "Dockerfile").read_text()
    rendered = render(minimal())
    pod = rendered.pod["spec"]["securityContext"]
    assert f"USER {pod['runAsUser']}:{pod['runAsGroup']}\n" in image
    assert f"EXPOSE {rendered.container['ports'][0]['containerPort']}\n" in image
    # The containers set `args` only.
    assert 'ENTRYPOINT ["vqa-worker"]\n' in image


def test_scheduling_and_extra_values_are_passed_to_the_pods() -> None:
    values = ci_values("full")
    rendered = render(values)
    for pod in (rendered.pod, rendered.one("Job")["spec"]["template"]):
        assert pod["spec"]["nodeSelector"] == values["nodeSelector"]
        assert pod["spec"]["tolerations"] == values["tolerations"]
        assert pod["spec"]["priorityClassName"] == "batch"
        assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    assert rendered.pod["spec"]["affinity"] == values["affinity"]
    assert rendered.pod["metadata"]["annotations"].items() >= values["podAnnotations"].items()
    assert values["extraVolumes"][0] in rendered.pod["spec"]["volumes"]
    assert values["extraVolumeMounts"][0] in rendered.container["volumeMounts"]
    assert values["extraEnvFrom"][0] == rendered.container["envFrom"][-1]
    assert values["extraEnv"][0] == rendered.container["env"][-1]


def test_the_grace_period_is_rounded_up_to_seconds() -> None:
    grace = render(minimal({"settings": {"shutdownGrace": 130.5}})).pod["spec"][
        "terminationGracePeriodSeconds"
    ]
    assert grace == math.ceil(130.5) + 25


def test_user_and_group_can_be_left_to_the_cluster() -> None:
    """OpenShift assigns the ids."""
    left_out = {"runAsUser": None, "runAsGroup": None, "fsGroup": None}
    rendered = render(minimal({"podSecurityContext": left_out}))
    for pod in (rendered.pod, rendered.one("Job")["spec"]["template"]):
        assert pod["spec"]["securityContext"] == {
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
