"""What goes wrong, and when: a pure function of the seed."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

# Before the first fault everything has to work, and between two faults of the same part it may.
CALM_S: Final = 3.0
REST_S: Final = 2.0

Value = float | int | str | None


@dataclass(frozen=True)
class Kind:
    """A kind of fault: the part that it hits, for how many seconds, and what it can be like.

    `who`: it can hit a single worker's network (`one`), everybody's (`all`), or either.
    """

    part: str
    lasts_s: tuple[float, float]
    values: tuple[Value, ...] = (None,)
    who: str = "all"


KINDS: Final = {
    "worker killed": Kind("worker", (0.2, 3), who="one"),
    "worker asked to stop": Kind("worker", (0, 1), who="one"),
    "worker frozen": Kind("worker", (1, 9), who="one"),
    "broker killed": Kind("broker", (0.5, 5)),
    "broker restarted": Kind("broker", (0, 1)),
    "broker connections reset": Kind("broker", (0, 0), who="either"),
    "broker silent": Kind("broker", (11, 15), ("and comes back", "and is interrupted"), who="either"),
    "broker slow": Kind("broker", (3, 8), (0.05, 0.2, 0.5), who="either"),
    "broker out of memory": Kind("broker", (3, 6)),
    "broker refuses results": Kind("broker", (3, 6)),
    "S3 stopped": Kind("s3", (0.5, 3)),
    "S3 unreachable": Kind("s3", (2, 6), who="either"),
    "S3 cuts off": Kind("s3", (4, 8), (2_000, 20_000, 200_000), who="either"),
    "S3 slow": Kind("s3", (3, 8), (0.1, 0.5), who="either"),
    "S3 silent": Kind("s3", (3, 8), who="either"),
    "model fails": Kind("model", (3, 8), (500, 502, 503)),
    "model refuses everybody": Kind("model", (3, 8), (401, 402, 403, 404)),
    "model hangs": Kind("model", (7, 10)),
    "model resets": Kind("model", (3, 6)),
    "model malformed": Kind("model", (2, 5), ("not_json", "no_choices_key", "cut_json", "truncated")),
    "model takes few calls": Kind("model", (4, 10), (1, 2, 4)),
    "model asks to wait": Kind("model", (2, 5), (1, 2)),
    "model slow": Kind("model", (3, 8), (1.0, 3.0)),
    "model restarted": Kind("model", (0.5, 3)),
    "model connections reset": Kind("model", (0, 0), who="either"),
    "model unreachable": Kind("model", (2, 6), who="either"),
    "model silent": Kind("model", (7, 10), who="either"),
}
# What a single worker that is never killed has to live with for half an hour without growing.
MILD: Final = (
    "broker connections reset",
    "broker slow",
    "broker refuses results",
    "S3 unreachable",
    "S3 cuts off",
    "S3 slow",
    "model fails",
    "model refuses everybody",
    "model hangs",
    "model resets",
    "model malformed",
    "model takes few calls",
    "model asks to wait",
    "model slow",
    "model connections reset",
    "model unreachable",
)


@dataclass(frozen=True)
class Fault:
    """One fault of the plan.

    Attributes:
        at_s: seconds from the beginning.
        lasts_s: for how long; what takes its own time to come back, as a broker, takes that on top.
        who: the number of the worker that meets it; None for all.
        value: which status, how many seconds late, and so on; see `faults`.
    """

    at_s: float
    lasts_s: float
    kind: str
    who: int | None = None
    value: Value = None

    @property
    def part(self) -> str:
        """What it hits: nothing is hit by two faults at once."""
        part = KINDS[self.kind].part
        return f"{part} {self.who}" if part == "worker" else part

    def __str__(self) -> str:
        who = "" if self.who is None else f", worker {self.who}"
        value = "" if self.value is None else f", {self.value}"
        return f"{self.at_s:6.1f} s  {self.kind}{value}{who}, for {self.lasts_s:.1f} s"


def schedule(
    seed: int, seconds: float, workers: int, every_s: float, kinds: Sequence[str] = tuple(KINDS)
) -> list[Fault]:
    """The faults of a run, in order, one every `every_s` seconds on average; all end within `seconds`."""
    rng = random.Random(f"faults {seed}")  # noqa: S311 - repeatable on purpose
    faults, at_s, free_at = [], CALM_S, dict[str, float]()
    for kind in _bags(rng, kinds):
        fault = _draw(rng, kind, at_s, workers)
        begins = max(at_s, free_at.get(fault.part, 0.0))
        if begins + fault.lasts_s > seconds:
            break
        faults.append(Fault(round(begins, 1), fault.lasts_s, kind, fault.who, fault.value))
        free_at[fault.part] = begins + fault.lasts_s + REST_S
        at_s += rng.uniform(0.3, 1.7) * every_s
    return sorted(faults, key=lambda fault: fault.at_s)


def _bags(rng: random.Random, kinds: Sequence[str]) -> Iterator[str]:
    """Kinds without end: each comes once before any comes again."""
    while True:
        yield from rng.sample(kinds, len(kinds))


def _draw(rng: random.Random, name: str, at_s: float, workers: int) -> Fault:
    kind = KINDS[name]
    only_one = kind.who == "one" or (kind.who == "either" and rng.random() < 0.5)
    who = rng.randrange(workers) if only_one else None
    return Fault(at_s, round(rng.uniform(*kind.lasts_s), 1), name, who, rng.choice(kind.values))
