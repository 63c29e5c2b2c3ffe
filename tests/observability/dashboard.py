"""Read the dashboard's JSON: panels, queries and variables."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tests.running import ROOT

FILE: Final = ROOT / "deploy" / "grafana" / "vqa-worker.json"


@dataclass(frozen=True)
class Target:
    """A query of a panel."""

    panel: Mapping[str, Any]
    expr: str
    legend: str
    is_instant: bool

    @property
    def title(self) -> str:
        return f"{self.panel['title']} ({self.panel['id']}): {self.expr}"


def load() -> dict[str, Any]:
    """Return the dashboard."""
    dashboard: dict[str, Any] = json.loads(FILE.read_text())
    return dashboard


def panels(dashboard: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return all panels except rows."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def targets(dashboard: Mapping[str, Any]) -> Iterator[Target]:
    """Yield the queries of all panels."""
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield Target(panel, target["expr"], target["legendFormat"], target["instant"])


def variables(dashboard: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the variables by name."""
    return {variable["name"]: variable for variable in dashboard["templating"]["list"]}


def with_values(expr: str, values: Mapping[str, str]) -> str:
    """Replace variables by their values, as Grafana does.

    Raises:
        KeyError: A variable is unknown.
    """
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: values[found[1] or found[2]], expr)


def named(legend: str, labels: Mapping[str, str]) -> str:
    """Return the name of a series by the legend format."""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: labels.get(found[1], ""), legend)
