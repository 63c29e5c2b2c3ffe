"""Which metrics a PromQL expression asks for, by a real parser."""

import re

import promql_parser

_GRAFANA = re.compile(r"\$__(rate_interval|interval|range)\b")
# What Prometheus itself makes.
BUILT_IN = frozenset({"up", "ALERTS"})


def names_in(expr: str) -> set[str]:
    """The names of all metrics in an expression; Grafana's durations may stand in it.

    Raises:
        ValueError: it is not PromQL, or it asks for metrics without naming them.
    """
    return {str(selector.name) for selector in _selectors(expr)}


def labels_in(expr: str) -> dict[str, set[str]]:
    """By metric, the labels that an expression selects by."""
    found: dict[str, set[str]] = {}
    for selector in _selectors(expr):
        labels = {matcher.name for matcher in selector.matchers.matchers}
        found.setdefault(str(selector.name), set()).update(labels)
    return found


def family_of(name: str) -> str:
    """The name as metrics are declared: a histogram's series have endings of their own."""
    return re.sub(r"_(bucket|sum|count)$", "", name)


def _selectors(expr: str) -> list[promql_parser.VectorSelector]:
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)
        elif isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(_GRAFANA.sub("5m", expr)), visit)
    if any(selector.name is None for selector in found):
        raise ValueError(f"a selector without a name: {expr}")
    return found
