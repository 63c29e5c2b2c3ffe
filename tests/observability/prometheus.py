"""Run a Prometheus server of one of two releases and query it."""

import json
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from deploy.local.ports import PortBlock
from deploy.local.processes import SupervisedProcess
from deploy.local.service import Service, http_ok
from tests import debian
from tests.running import ROOT

RULES: Final = ROOT / "deploy" / "prometheus" / "vqa-worker.rules.yaml"
SCRAPE_S: Final = 1
# Debian's next release, with Prometheus 3.
SUITE: Final = "forky"


@dataclass(frozen=True)
class Release:
    """The programs of a release of Prometheus."""

    prometheus: Path
    promtool: Path


def installed() -> Release:
    """Return this machine's release (2.42 on Debian 12), installed if missing, or skip the test."""
    programs = ("prometheus", "promtool")
    debian.install(dict.fromkeys(programs, "prometheus"))
    return Release(*(Path(shutil.which(name) or name) for name in programs))


def release_3() -> Release:
    """Return Prometheus 3, unpacked next to this machine's release, or skip the test."""
    folder = debian.unpacked(SUITE, "prometheus", "promtool") / "usr" / "bin"
    return Release(folder / "prometheus", folder / "promtool")


RELEASES: Final[Mapping[str, Callable[[], Release]]] = {"installed": installed, "3": release_3}


@dataclass(frozen=True)
class Series:
    """A time series: its labels, and its points as (Unix time, value)."""

    labels: Mapping[str, str]
    points: Sequence[tuple[float, float]]


class Prometheus(Service):
    """A Prometheus server with its own data."""

    ready_timeout_seconds = 60.0
    advice = "Is it installed?"

    def __init__(self, program: Path, folder: Path, port: int) -> None:
        server = SupervisedProcess(
            "Prometheus",
            _command(program, folder, port),
            environment={"PATH": "/usr/bin:/bin"},
            folder=folder,
        )
        super().__init__([server])
        self._root = f"http://127.0.0.1:{port}"

    def is_ready(self) -> bool:
        """Return whether it answers queries."""
        return http_ok(f"{self._root}/-/ready")

    @classmethod
    @contextmanager
    def scraping(
        cls, release: Release, jobs: Sequence[Mapping[str, Any]], *, rules: str | None = None
    ) -> Iterator["Prometheus"]:
        """Run a server in this context.

        Args:
            release: Its programs.
            jobs: The `scrape_configs`.
            rules: The content of the rule file.
        """
        with ExitStack() as resources:
            folder = Path(tempfile.mkdtemp(prefix="vqa-prometheus-"))
            resources.callback(shutil.rmtree, folder, ignore_errors=True)
            ports = PortBlock()
            resources.callback(ports.close)
            _configure(folder, jobs, rules)
            server = cls(release.prometheus, folder, ports.take())
            resources.callback(server.close)
            server.start()
            yield server

    def query(self, expr: str) -> list[Series]:
        """Return the result of an instant query."""
        found = self._get("query", query=expr)
        if found["resultType"] == "scalar":
            return [Series({}, [_point(found["result"])])]
        return [Series(it["metric"], [_point(it["value"])]) for it in found["result"]]

    def query_range(self, expr: str, begin: float, end: float, step_s: float = 1.0) -> list[Series]:
        """Return the result of a range query."""
        found = self._get("query_range", query=expr, start=begin, end=end, step=step_s)
        return [Series(it["metric"], [*map(_point, it["values"])]) for it in found["result"]]

    def values_of(self, label: str, selector: str) -> list[str]:
        """Return the values of a label in the selected series."""
        return list(self._get(f"label/{label}/values", **{"match[]": selector}))

    def rules(self) -> list[dict[str, Any]]:
        """Return all rules with their state."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def _get(self, path: str, **parameters: Any) -> Any:
        url = f"{self._root}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:  # noqa: S310 - on this machine
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise ValueError(f"{parameters}: {error.read().decode()}") from None


def _point(pair: Sequence[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])


def _configure(folder: Path, jobs: Sequence[Mapping[str, Any]], rules: str | None) -> None:
    configuration: dict[str, Any] = {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
        "scrape_configs": [dict(job) for job in jobs],
    }
    if rules is not None:
        (folder / "rules.yaml").write_text(rules)
        configuration["rule_files"] = ["rules.yaml"]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))


def _command(program: Path, folder: Path, port: int) -> list[str]:
    return [
        str(program),
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
