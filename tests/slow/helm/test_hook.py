"""The hook that declares the queues runs before the release and uses none of its objects."""

import pytest

from tests.slow.helm.rendering import (
    CHART,
    Object,
    Rendered,
    ci_values,
    decoded,
    error_of,
    helm,
    minimal,
    objects_in,
    render,
)
from worker.cli.exit_codes import EXIT_CONFIG

HOOK = "helm.sh/hook"
# The default of `--timeout`.
HELM_TIMEOUT_S = 300
EVENTS = "pre-install,pre-upgrade"


def _hooks(rendered: Rendered) -> list[Object]:
    """Return the hooks that run before the release."""
    return [it for it in rendered.objects if it["metadata"].get("annotations", {}).get(HOOK) == EVENTS]


def _pod(rendered: Rendered) -> Object:
    pod: Object = rendered.one("Job")["spec"]["template"]["spec"]
    return pod


def _container(rendered: Rendered) -> Object:
    (container,) = _pod(rendered)["containers"]
    found: Object = container
    return found


def _weight(found: Object) -> int:
    return int(found["metadata"]["annotations"]["helm.sh/hook-weight"])


@pytest.mark.parametrize("name", ["minimal", "keda", "full", "airgapped"])
def test_the_job_uses_only_hooks_that_run_before_it(name: str) -> None:
    rendered = render(ci_values(name))
    hooks = _hooks(rendered)
    job = rendered.one("Job")
    before = [found for found in hooks if found is not job and found["kind"] != "Job"]
    assert all(_weight(found) < _weight(job) for found in before)
    of_hooks = {found["metadata"]["name"] for found in hooks}
    of_release = {found["metadata"]["name"] for found in rendered.objects if found not in hooks}
    assert of_hooks.isdisjoint(of_release)
    needed = _needed(_pod(rendered))
    assert needed.isdisjoint(of_release)
    assert needed & of_hooks == {found["metadata"]["name"] for found in before} & needed


def _needed(pod: Object) -> set[str]:
    """Return the names of the objects that a pod refers to."""
    (container,) = pod["containers"]
    assert "envFrom" not in container
    secrets = {
        entry["valueFrom"]["secretKeyRef"]["name"] for entry in container["env"] if "valueFrom" in entry
    }
    volumes = {volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    return secrets | volumes | {pod["serviceAccountName"]}


@pytest.mark.parametrize("name", ["minimal", "full"])
def test_hooks_are_not_part_of_the_release(name: str) -> None:
    with helm.Config(namespace="vision") as config:
        release = config.install(str(CHART), "demo", ci_values(name), dry_run="client")
    manifest = list(objects_in(release["manifest"]))
    rendered = render(ci_values(name))
    hooks = _hooks(rendered)
    assert _names(manifest) == _names(
        [it for it in rendered.objects if it not in hooks and it["kind"] != "Pod"]
    )
    assert release["notes"].strip() == rendered.notes.strip()


def _names(objects: list[Object]) -> list[tuple[str, str]]:
    return sorted((found["kind"], found["metadata"]["name"]) for found in objects)


def test_hooks_are_deleted_after_success_and_before_the_next_run() -> None:
    for found in _hooks(render(ci_values("full"))):
        policy = found["metadata"]["annotations"]["helm.sh/hook-delete-policy"]
        assert policy == "before-hook-creation,hook-succeeded"


def test_the_hook_runs_topology_apply() -> None:
    rendered = render(ci_values("full"))
    container = _container(rendered)
    assert container["args"][:2] == ["topology", "apply"]
    assert "command" not in container
    assert container["image"] == rendered.container["image"]


def test_an_invalid_setting_fails_the_job_immediately_and_an_outage_is_retried() -> None:
    spec = render(minimal()).one("Job")["spec"]
    assert spec["podFailurePolicy"]["rules"][0] == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "topology", "operator": "In", "values": [EXIT_CONFIG]},
    }
    assert spec["template"]["spec"]["containers"][0]["name"] == "topology"
    # Required by a pod failure policy.
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_all_attempts_fit_into_the_deadline_and_the_deadline_into_helm_s_timeout() -> None:
    """Otherwise the reported error would be a timeout instead of the cause."""
    spec = render(minimal()).one("Job")["spec"]
    attempts = spec["backoffLimit"] + 1
    *_, timeout = spec["template"]["spec"]["containers"][0]["args"]
    timeout_s = float(timeout.removeprefix("--timeout="))
    # Kubernetes waits 10 seconds after the first failure, and twice as long after each further.
    pauses_s = sum(10 * 2**n for n in range(attempts - 1))
    assert attempts * timeout_s + pauses_s < spec["activeDeadlineSeconds"] < HELM_TIMEOUT_S


def test_the_hook_can_have_its_own_broker_user() -> None:
    rendered = render(ci_values("full"))
    operator = decoded(rendered.one("Secret", "questions-topology"))
    assert operator == {"VQA_RABBITMQ_URL": "amqps://operator:operator-password@rabbitmq.example/vision"}
    assert "operator-password" not in "".join(rendered.secrets.values())


def test_the_hook_uses_the_workers_broker_user_by_default() -> None:
    rendered = render(minimal())
    secret = decoded(rendered.one("Secret", "demo-vqa-worker-topology"))
    assert secret["VQA_RABBITMQ_URL"] == rendered.secrets["VQA_RABBITMQ_URL"]


@pytest.mark.parametrize(
    ("hook", "secrets", "used"),
    [
        ({"existingSecret": "operator"}, {"existingSecret": "worker"}, "operator"),
        ({}, {"existingSecret": "worker"}, "worker"),
        (
            {"rabbitmqUrl": "amqp://operator@rabbitmq/"},
            {"existingSecret": "worker"},
            "demo-vqa-worker-topology",
        ),
    ],
)
def test_the_url_can_come_from_an_existing_secret(
    hook: dict[str, str], secrets: dict[str, str], used: str
) -> None:
    nothing = {"rabbitmqUrl": "", "modelApiKey": ""}
    rendered = render(minimal({"topology": {"hook": hook}, "secrets": {**nothing, **secrets}}))
    (url, *_) = _container(rendered)["env"]
    assert url == {
        "name": "VQA_RABBITMQ_URL",
        "valueFrom": {"secretKeyRef": {"name": used, "key": "VQA_RABBITMQ_URL"}},
    }
    assert (used == "demo-vqa-worker-topology") == bool(rendered.all("Secret"))


def test_the_hook_uses_the_workers_certificates() -> None:
    rendered = render(ci_values("full"))
    environment = {entry["name"]: entry.get("value") for entry in _container(rendered)["env"]}
    for name in ("VQA_RABBITMQ_CA_FILE", "VQA_RABBITMQ_CERT_FILE", "VQA_RABBITMQ_KEY_FILE"):
        assert environment[name] == rendered.settings[name]
    mounts = {mount["mountPath"] for mount in _container(rendered)["volumeMounts"]}
    assert "/etc/vqa-worker/rabbitmq-tls" in mounts


def test_the_network_policy_allows_dns_and_the_broker() -> None:
    rendered = render(ci_values("full"))
    spec = rendered.one("NetworkPolicy", "questions-topology")["spec"]
    labels = rendered.one("Job")["spec"]["template"]["metadata"]["labels"]
    assert spec["podSelector"]["matchLabels"].items() <= labels.items()
    assert [port["port"] for rule in spec["egress"] for port in rule["ports"]] == [53, 53, 5671]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in spec


def test_a_disabled_hook_renders_nothing() -> None:
    rendered = render(minimal({"topology": {"hook": {"enabled": False}}}))
    assert _hooks(rendered) == []
    assert rendered.all("Job") == []


def test_a_hook_without_a_broker_url_is_rejected() -> None:
    environment = [{"name": "VQA_RABBITMQ_URL", "value": "amqp://rabbitmq/"}]
    error = error_of(minimal({"secrets": {"rabbitmqUrl": ""}, "extraEnv": environment}))
    assert "topology.hook has no RabbitMQ URL" in error
