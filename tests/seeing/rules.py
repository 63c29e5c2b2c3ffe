"""The file of rules, and what it says."""

from typing import Any, Final

import yaml

from tests.running import ROOT
from tests.seeing.prometheus import RULES

TESTS: Final = ROOT / "deploy" / "prometheus" / "tests" / "alerts.yaml"


def all_rules() -> list[dict[str, Any]]:
    """Every rule of every group."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    """Those that alert."""
    return [rule for rule in all_rules() if "alert" in rule]


def records() -> list[str]:
    """The names that the others record."""
    return [rule["record"] for rule in all_rules() if "record" in rule]
