"""The notebook that scenarios write into, and what is made of its figures: medians, spreads, ratios."""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Measurement:
    """What one measurement gave."""

    scenario: str
    contender: str
    case: str
    round: int
    figures: dict[str, float]


@dataclass(frozen=True)
class Spread:
    """The middle, the lowest and the highest of repeated figures."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Self:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Notebook:
    """All measurements of a run, and remarks on what was left out or is out of the ordinary."""

    tell: Callable[[str], None] = print
    measurements: list[Measurement] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)
    """What the run was made on and with."""

    def add(self, scenario: str, contender: str, case: str, number: int, figures: dict[str, float]) -> None:
        """Write down a measurement, and tell it at once."""
        self.measurements.append(Measurement(scenario, contender, case, number, figures))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.tell(f"{scenario:8} {contender:17} {case:16} round {number + 1}  {shown}")

    def remark(self, text: str) -> None:
        """Write down a remark."""
        self.remarks.append(text)
        self.tell(text)

    def contenders(self, scenario: str) -> list[str]:
        """Who was measured, in the order of the first time."""
        return list(dict.fromkeys(it.contender for it in self.measurements if it.scenario == scenario))

    def cases(self, scenario: str) -> list[str]:
        """What was measured, in the order of the first time."""
        return list(dict.fromkeys(it.case for it in self.measurements if it.scenario == scenario))

    def spread(self, scenario: str, contender: str, case: str, figure: str) -> Spread | None:
        """A figure over the rounds; None if it was not measured."""
        values = list(self._by_round(scenario, contender, case, figure).values())
        return Spread.of(values) if values else None

    def ratio(self, scenario: str, case: str, figure: str, of: str, to: str) -> Spread | None:
        """How many times another's one contender's figure is: within each round, then over the rounds."""
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
        """Keep everything as JSON."""
        content = {
            "about": self.about,
            "remarks": self.remarks,
            "measurements": [asdict(it) for it in self.measurements],
        }
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """What `save` kept."""
        content = json.loads(path.read_text())
        measurements = [Measurement(**it) for it in content["measurements"]]
        return cls(measurements=measurements, remarks=content["remarks"], about=content["about"])
