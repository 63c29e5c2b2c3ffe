"""The measurements of a run, and their medians, spreads and ratios."""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Measurement:
    """The figures of one measurement."""

    scenario: str
    contender: str
    case: str
    round: int
    figures: dict[str, float]


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of repeated figures."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Self:
        """Return the spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Results:
    """All measurements of a run, with remarks on omitted cases and disturbances."""

    log: Callable[[str], None] = print
    measurements: list[Measurement] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)
    """The machine and the software of the run."""

    def add(self, scenario: str, contender: str, case: str, number: int, figures: dict[str, float]) -> None:
        """Add and log a measurement."""
        self.measurements.append(Measurement(scenario, contender, case, number, figures))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.log(f"{scenario:8} {contender:17} {case:16} round {number + 1}  {shown}")

    def remark(self, text: str) -> None:
        """Add and log a remark."""
        self.remarks.append(text)
        self.log(text)

    def contenders(self, scenario: str) -> list[str]:
        """Return the measured contenders, in order of first measurement."""
        return list(dict.fromkeys(it.contender for it in self.measurements if it.scenario == scenario))

    def cases(self, scenario: str) -> list[str]:
        """Return the measured cases, in order of first measurement."""
        return list(dict.fromkeys(it.case for it in self.measurements if it.scenario == scenario))

    def spread(self, scenario: str, contender: str, case: str, figure: str) -> Spread | None:
        """Return the spread of a figure over the rounds; None if it was not measured."""
        values = list(self._by_round(scenario, contender, case, figure).values())
        return Spread.of(values) if values else None

    def ratio(self, scenario: str, case: str, figure: str, of: str, to: str) -> Spread | None:
        """Return the spread over the rounds of the ratio of two contenders' figures."""
        above, below = (self._by_round(scenario, it, case, figure) for it in (of, to))
        ratios = [above[number] / below[number] for number in above if below.get(number)]
        return Spread.of(ratios) if ratios else None

    def _by_round(self, scenario: str, contender: str, case: str, figure: str) -> dict[int, float]:
        return {
            it.round: it.figures[figure]
            for it in self.measurements
            if (it.scenario, it.contender, it.case) == (scenario, contender, case) and figure in it.figures
        }

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        content = {
            "about": self.about,
            "remarks": self.remarks,
            "measurements": [asdict(it) for it in self.measurements],
        }
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        content = json.loads(path.read_text())
        measurements = [Measurement(**it) for it in content["measurements"]]
        return cls(measurements=measurements, remarks=content["remarks"], about=content["about"])
