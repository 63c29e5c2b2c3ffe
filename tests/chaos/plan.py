"""Plan faults and their times: a pure function of the seed."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

# Seconds without faults: at the start, and between two faults of the same part.
WARM_UP_S: Final = 3.0
PAUSE_S: Final = 2.0

Value = float | int | str | None


@dataclass(frozen=True)
class Kind:
    """A kind of fault: the affected part, the range of durations in seconds, and possible values.

    `who`: affects a single worker (`one`), all workers (`all`), or either.
    """

    part: str
    lasts_s: tuple[float, float]
    values: tuple[Value, ...] = (None,)
    who: str = "all"


KINDS: Final = {
    "worker killed": Kind("worker", (0.2, 3), who="one"),
    "worker terminated": Kind("worker", (0, 1), who="one"),
    "worker frozen": Kind("worker", (1, 9), who="one"),
    "broker killed": Kind("broker", (0.5, 5)),
    "broker restarted": Kind("broker", (0, 1)),
    "broker connections reset": Kind("broker", (0, 0), who="either"),
    "broker silent": Kind("broker", (11, 15), ("then resumes", "then resets"), who="either"),
    "broker slow": Kind("broker", (3, 8), (0.05, 0.2, 0.5), who="either"),
    "broker out of memory": Kind("broker", (3, 6)),
    "broker refuses results": Kind("broker", (3, 6)),
    "S3 stopped": Kind("s3", (0.5, 3)),
    "S3 unreachable": Kind("s3", (2, 6), who="either"),
    "S3 truncates responses": Kind("s3", (4, 8), (2_000, 20_000, 200_000), who="either"),
    "S3 slow": Kind("s3", (3, 8), (0.1, 0.5), who="either"),
    "S3 silent": Kind("s3", (3, 8), who="either"),
    "S3 throttles": Kind("s3", (3, 8), ("400 Throttling", "429 SlowDown", "503 SlowDown"), who="either"),
    "S3 refuses all requests": Kind(
        "s3", (3, 8), ("403 InvalidAccessKeyId", "403 NeverHeardOf", "400 ExpiredToken"), who="either"
    ),
    "S3 behind a proxy's page": Kind("s3", (3, 8), ("301", "403", "502"), who="either"),
    "model fails": Kind("model", (3, 8), (500, 502, 503)),
    "model rejects all requests": Kind("model", (3, 8), (401, 402, 403, 404, 405, 418)),
    "model hangs": Kind("model", (7, 10)),
    "model resets connections": Kind("model", (3, 6)),
    "model malformed": Kind("model", (2, 5), ("not_json", "no_choices_key", "cut_json", "truncated")),
    "model interrupts answers": Kind("model", (2, 5)),
    "model wraps answers": Kind("model", (4, 10), ("bom", "comments", "stream", "object")),
    # Not 413: it is the job's own error.
    "model answers early": Kind("model", (2, 5), (401, 429)),
    "model's quota used up": Kind("model", (2, 5)),
    "model limits concurrency": Kind("model", (4, 10), (1, 2, 4)),
    "model overloaded": Kind("model", (4, 10), (1, 2, 4)),
    "model sends Retry-After": Kind("model", (2, 5), (1, 2)),
    "model slow": Kind("model", (3, 8), (1.0, 3.0)),
    "model restarted": Kind("model", (0.5, 3)),
    "model connections reset": Kind("model", (0, 0), who="either"),
    "model unreachable": Kind("model", (2, 6), who="either"),
    "model silent": Kind("model", (7, 10), who="either"),
}
# Faults of the soak test, during which memory must not grow.
MILD: Final = (
    "broker connections reset",
    "broker slow",
    "broker refuses results",
    "S3 unreachable",
    "S3 truncates responses",
    "S3 slow",
    "S3 throttles",
    "S3 refuses all requests",
    "S3 behind a proxy's page",
    "model fails",
    "model rejects all requests",
    "model hangs",
    "model resets connections",
    "model malformed",
    "model interrupts answers",
    "model wraps answers",
    "model answers early",
    "model's quota used up",
    "model limits concurrency",
    "model overloaded",
    "model sends Retry-After",
    "model slow",
    "model connections reset",
    "model unreachable",
)


@dataclass(frozen=True)
class Fault:
    """One fault of the plan.

    Attributes:
        at_s: seconds from the start.
        lasts_s: duration in seconds, without the time a service takes to restart.
        who: the number of the affected worker; None for all.
        value: the HTTP status, the delay in seconds, and so on; see `faults`.
    """

    at_s: float
    lasts_s: float
    kind: str
    who: int | None = None
    value: Value = None

    @property
    def part(self) -> str:
        """The affected part; a part has at most one fault at a time."""
        part = KINDS[self.kind].part
        return f"{part} {self.who}" if part == "worker" else part

    def __str__(self) -> str:
        who = "" if self.who is None else f", worker {self.who}"
        value = "" if self.value is None else f", {self.value}"
        return f"{self.at_s:6.1f} s  {self.kind}{value}{who}, for {self.lasts_s:.1f} s"


def schedule(
    seed: int, seconds: float, workers: int, every_s: float, kinds: Sequence[str] = tuple(KINDS)
) -> list[Fault]:
    """Return the faults of a run in order, one every `every_s` seconds on average, all within `seconds`."""
    rng = random.Random(f"faults {seed}")  # noqa: S311 - repeatable on purpose
    faults, at_s, free_at = [], WARM_UP_S, dict[str, float]()
    for kind in _shuffled(rng, kinds):
        fault = _draw(rng, kind, at_s, workers)
        begins = max(at_s, free_at.get(fault.part, 0.0))
        if begins + fault.lasts_s > seconds:
            break
        faults.append(Fault(round(begins, 1), fault.lasts_s, kind, fault.who, fault.value))
        free_at[fault.part] = begins + fault.lasts_s + PAUSE_S
        at_s += rng.uniform(0.3, 1.7) * every_s
    return sorted(faults, key=lambda fault: fault.at_s)


def _shuffled(rng: random.Random, kinds: Sequence[str]) -> Iterator[str]:
    """Yield kinds endlessly, in shuffled rounds with each kind once."""
    while True:
        yield from rng.sample(kinds, len(kinds))


def _draw(rng: random.Random, name: str, at_s: float, workers: int) -> Fault:
    kind = KINDS[name]
    only_one = kind.who == "one" or (kind.who == "either" and rng.random() < 0.5)
    who = rng.randrange(workers) if only_one else None
    return Fault(at_s, round(rng.uniform(*kind.lasts_s), 1), name, who, rng.choice(kind.values))
