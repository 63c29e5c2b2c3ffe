"""Parse PromQL expressions."""

import re

import promql_parser

_GRAFANA = re.compile(r"\$__(rate_interval|interval|range)\b")
# Metrics of Prometheus itself.
BUILT_IN = frozenset({"up", "ALERTS"})


def names_in(expr: str) -> set[str]:
    """Return the names of all metrics in an expression, which may contain Grafana's durations.

    Raises:
        ValueError: The expression is not PromQL, or a selector has no metric name.
    """
    return {str(selector.name) for selector in _selectors(expr)}


def labels_in(expr: str) -> dict[str, set[str]]:
    """Return the labels of an expression's selectors, by metric."""
    found: dict[str, set[str]] = {}
    for selector in _selectors(expr):
        labels = {matcher.name for matcher in selector.matchers.matchers}
        found.setdefault(str(selector.name), set()).update(labels)
    return found


def family_of(name: str) -> str:
    """Return the name of the metric family, without a histogram's suffix."""
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
