"""Declare a metric once, for both the Prometheus client library and `docs/metrics.md`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

Kind: TypeAlias = Literal["counter", "gauge", "histogram", "info"]


@dataclass(frozen=True, slots=True)
class Label:
    """A label and a description of its closed set of values."""

    name: str
    values: str


@dataclass(frozen=True, slots=True)
class Declaration:
    """A metric: its name in queries (including `_total` and `_info`), unit and meaning.

    `buckets` are the upper bounds of a histogram, without infinity.
    """

    name: str
    kind: Kind
    meaning: str
    labels: tuple[Label, ...]
    unit: str
    buckets: tuple[float, ...] = ()


class Instruments:
    """Create metrics in a registry and record their declarations."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.declared: dict[str, Declaration] = {}

    def counter(self, name: str, unit: str, meaning: str, *labels: Label) -> Counter:
        """Create a counter; its name ends in `_total`."""
        self._declare(Declaration(name, "counter", meaning, labels, unit))
        return Counter(name.removesuffix("_total"), meaning, _names(labels), registry=self._registry)

    def gauge(self, name: str, unit: str, meaning: str, *labels: Label) -> Gauge:
        """Create a gauge."""
        self._declare(Declaration(name, "gauge", meaning, labels, unit))
        return Gauge(name, meaning, _names(labels), registry=self._registry)

    def histogram(
        self, name: str, unit: str, meaning: str, *labels: Label, buckets: Sequence[float]
    ) -> Histogram:
        """Create a histogram."""
        self._declare(Declaration(name, "histogram", meaning, labels, unit, tuple(buckets)))
        return Histogram(name, meaning, _names(labels), buckets=buckets, registry=self._registry)

    def info(self, name: str, meaning: str, content: dict[str, str], *labels: Label) -> Info:
        """Create an info metric: facts in labels, value 1; its name ends in `_info`."""
        self._declare(Declaration(name, "info", meaning, labels, ""))
        info = Info(name.removesuffix("_info"), meaning, registry=self._registry)
        info.info(content)
        return info

    def _declare(self, declaration: Declaration) -> None:
        self.declared[declaration.name] = declaration


def _names(labels: Sequence[Label]) -> list[str]:
    return [label.name for label in labels]
