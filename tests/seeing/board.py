"""The dashboard's file as Grafana would read it: its panels, and what they ask Prometheus."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tests.running import ROOT

FILE: Final = ROOT / "deploy" / "grafana" / "vqa-worker.json"


@dataclass(frozen=True)
class Target:
    """One query of a panel, as it stands in the file."""

    panel: Mapping[str, Any]
    expr: str
    legend: str
    is_instant: bool

    @property
    def title(self) -> str:
        return f"{self.panel['title']} ({self.panel['id']}): {self.expr}"


def load() -> dict[str, Any]:
    """The file."""
    board: dict[str, Any] = json.loads(FILE.read_text())
    return board


def panels(board: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All panels that are not rows."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def targets(board: Mapping[str, Any]) -> Iterator[Target]:
    """All queries of all panels."""
    for panel in panels(board):
        for target in panel["targets"]:
            yield Target(panel, target["expr"], target["legendFormat"], target["instant"])


def variables(board: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The variables, by name."""
    return {variable["name"]: variable for variable in board["templating"]["list"]}


def with_values(expr: str, values: Mapping[str, str]) -> str:
    """What Grafana sends: each variable, its own included, in place of its name.

    Raises:
        KeyError: a variable that nobody knows.
    """
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: values[found[1] or found[2]], expr)


def named(legend: str, labels: Mapping[str, str]) -> str:
    """A series' name, as its legend says."""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: labels.get(found[1], ""), legend)
