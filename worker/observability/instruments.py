"""What a metric is: declared once, made into the library's object and a line of `docs/metrics.md` alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

Kind: TypeAlias = Literal["counter", "gauge", "histogram", "info"]


@dataclass(frozen=True, slots=True)
class Label:
    """A label and, in words, the closed set of its values."""

    name: str
    values: str


@dataclass(frozen=True, slots=True)
class Declaration:
    """A metric as a query names it (`_total` and `_info` included), its unit and what it means.

    `buckets` are the upper bounds of a histogram's, without the infinite one.
    """

    name: str
    kind: Kind
    meaning: str
    labels: tuple[Label, ...]
    unit: str
    buckets: tuple[float, ...] = ()


class Instruments:
    """Makes metrics in a registry of the library's, and keeps what was declared of them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.declared: dict[str, Declaration] = {}

    def counter(self, name: str, unit: str, meaning: str, *labels: Label) -> Counter:
        """A number that only grows; its name ends in `_total`."""
        self._declare(Declaration(name, "counter", meaning, labels, unit))
        return Counter(name.removesuffix("_total"), meaning, _names(labels), registry=self._registry)

    def gauge(self, name: str, unit: str, meaning: str, *labels: Label) -> Gauge:
        """A number that comes and goes."""
        self._declare(Declaration(name, "gauge", meaning, labels, unit))
        return Gauge(name, meaning, _names(labels), registry=self._registry)

    def histogram(
        self, name: str, unit: str, meaning: str, *labels: Label, buckets: Sequence[float]
    ) -> Histogram:
        """How values are spread over buckets."""
        self._declare(Declaration(name, "histogram", meaning, labels, unit, tuple(buckets)))
        return Histogram(name, meaning, _names(labels), buckets=buckets, registry=self._registry)

    def info(self, name: str, meaning: str, content: dict[str, str], *labels: Label) -> Info:
        """Facts that stand in labels; the value is always 1, and the name ends in `_info`."""
        self._declare(Declaration(name, "info", meaning, labels, ""))
        info = Info(name.removesuffix("_info"), meaning, registry=self._registry)
        info.info(content)
        return info

    def _declare(self, declaration: Declaration) -> None:
        self.declared[declaration.name] = declaration


def _names(labels: Sequence[Label]) -> list[str]:
    return [label.name for label in labels]
