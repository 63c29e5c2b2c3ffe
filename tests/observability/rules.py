"""Read the rule file."""

from typing import Any, Final

import yaml

from tests.observability.prometheus import RULES
from tests.running import ROOT

TESTS: Final = ROOT / "deploy" / "prometheus" / "tests" / "alerts.yaml"


def all_rules() -> list[dict[str, Any]]:
    """Return the rules of all groups."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    """Return the alerting rules."""
    return [rule for rule in all_rules() if "alert" in rule]


def records() -> list[str]:
    """Return the names of the recording rules."""
    return [rule["record"] for rule in all_rules() if "record" in rule]
