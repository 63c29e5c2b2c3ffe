"""Each answer of a model API alone, among good jobs, and to a whole queue: who fails, who waits, who pauses.

The rows are all answers of test_classification.py. Each is sent over HTTP once, to get the worker's error;
answers with the same consequences then share the runs of a worker, which are in virtual time.
"""

import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final, get_args

import pytest
import structlog

from tests.unit.model_queue import MAX_ATTEMPTS, Scene
from tests.unit.test_classification import BLAME, GENERIC, MODEL, NOT_THE_JOBS, RECORDED, error, found
from tests.unit.test_model_client import Api, a_body, a_model, response
from worker.errors import (
    MALFORMED_RESPONSE,
    Dependency,
    DependencyDownError,
    JobError,
    RateLimitedError,
    TransientError,
)
from worker.model.client import Model
from worker.providers import Category, load_profile, provider_names
from worker.resilience.failure_outcomes import MAX_MALFORMED
from worker.resilience.outage_detector import FREE_PROBES

GOOD: Final = [f"good-{n}" for n in range(100)]
BAD: Final = [f"bad-{n}" for n in range(20)]
SUCCEEDED, REJECTED, EXHAUSTED = "succeeded", "model_rejected", "attempts_exhausted"
OTHER: Final = "vision-2"
LONG_S: Final = 10.0


@dataclass(frozen=True)
class Row:
    """An answer, and whose fault it is."""

    status: int
    body: Any
    category: Category
    provider: str = "generic"
    number: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.number}-{self.provider}-{self.status}-{self.category}"


HALF: Final = {"choices": [{"message": {"content": "half"}, "finish_reason": "error"}]}
USAGE: Final = {"prompt_tokens": 3, "completion_tokens": 4}
# Answers with status 200 that are billed and cannot be used.
MALFORMED: Final[list[Any]] = [
    b"<p>no JSON",
    b"",
    {"choices": []},
    HALF,
    {**HALF, "usage": USAGE},
    {**HALF, "usage": USAGE, "error": {"code": 429, "message": "Rate limit reached"}},
    {**HALF, "usage": USAGE, "error": {"code": 402, "message": "Insufficient credits"}},
    b'data: {"choices": [{"delta": {"content": "ha"}}]}\n\n',
]


def _rows() -> list[Row]:
    rows = [
        *(Row(200, body, Category.TRANSIENT) for body in MALFORMED),
        *(Row(row["status"], row["body"], Category(row["category"]), row["provider"]) for row in RECORDED),
        *(Row(status, body, category) for status, body, category in GENERIC),
        *(Row(status, error(message), category) for status, message, category in NOT_THE_JOBS),
        *(Row(status, body, found(status, body).category) for status, body, _ in BLAME),
    ]
    return [Row(it.status, it.body, it.category, it.provider, n) for n, it in enumerate(rows)]


ROWS: Final = _rows()
EACH = pytest.mark.parametrize("row", ROWS, ids=str)


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """Log nothing: there are hundreds of runs."""
    with structlog.testing.capture_logs():
        yield


@pytest.fixture(scope="module")
async def api() -> AsyncIterator[Api]:
    async with Api.serving() as api:
        yield api


@pytest.fixture(scope="module")
async def models(api: Api) -> AsyncIterator[dict[str, Model]]:
    """A client for each provider."""
    async with AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(a_model(api.url, profile=load_profile(name)))
            for name in provider_names()
        }


Failing = JobError | TransientError | RateLimitedError | DependencyDownError
Ask = Callable[[Row], Awaitable[Failing]]


@pytest.fixture(scope="module")
async def ask(api: Api, models: dict[str, Model]) -> Ask:
    """Return the worker's error for an answer."""
    errors: dict[int, Failing] = {}

    async def asked(row: Row) -> Failing:
        if row.number not in errors:
            raw = row.body if isinstance(row.body, bytes | str) else json.dumps(row.body)
            api.says = response(row.status, raw.encode() if isinstance(raw, str) else raw)
            with pytest.raises(get_args(Failing)) as caught:
                await models[row.provider].complete(MODEL, a_body({}), time_left_s=60.0)
            errors[row.number] = caught.value
        return errors[row.number]

    return asked


def consequences(failure: Failing) -> Hashable:
    """Return all of an error that decides, without its words; of a time to wait, only whether it is long."""
    deciding = {k: v for k, v in vars(failure).items() if k not in ("message", "log_message", "cause")}
    if isinstance(failure, RateLimitedError) and failure.retry_after_s is not None:
        deciding["retry_after_s"] = failure.retry_after_s > LONG_S
    return type(failure), tuple(sorted(deciding.items()))


def is_the_jobs(failure: Failing) -> bool:
    """Return whether an answer is known to be the job's own."""
    return isinstance(failure, JobError) or (isinstance(failure, TransientError) and failure.is_duplicate)


def most_attempts(failure: Failing) -> int:
    is_malformed = isinstance(failure, TransientError) and failure.reason == MALFORMED_RESPONSE
    return MAX_MALFORMED if is_malformed else MAX_ATTEMPTS


def is_overload(failure: Failing) -> bool:
    return isinstance(failure, RateLimitedError) and failure.is_overloaded


@dataclass
class Facts:
    """What became of the jobs of a run, at its end and after the API was repaired.

    Attributes:
        ended: how the bad jobs ended before; `attempts`: their attempts; `repaired`: how all ended.
        calls: of the bad jobs, before.
        good: how the first good jobs ended; `good_after`: of `most_good`, after the repair.
        attempts_after: the attempts of the jobs that succeeded after the repair.
    """

    ended: Counter[str] = field(default_factory=Counter)
    attempts: set[int] = field(default_factory=set)
    calls: int = 0
    in_a_row: int = 0
    pauses: int = 0
    is_paused: bool = False
    paused_models: set[str] = field(default_factory=set)
    good: Counter[str] = field(default_factory=Counter)
    good_after: Counter[str] = field(default_factory=Counter)
    most_good: int = 0
    repaired: Counter[str] = field(default_factory=Counter)
    attempts_after: set[int] = field(default_factory=set)


async def _facts(scene: Scene, bad: Sequence[str], good: Sequence[str]) -> Facts:
    """Return the facts so far, then repair the API and return those too."""
    before = [id_ for id_ in bad if id_ in scene.ended]
    facts = Facts(
        ended=scene.codes(bad),
        attempts={scene.attempts(id_) for id_ in before},
        calls=sum(scene.api.calls[id_] for id_ in bad),
        in_a_row=scene.in_a_row,
        pauses=scene.pauses,
        is_paused=scene.is_paused,
        paused_models={*scene.detector.paused_models},
        good=scene.codes(good),
    )
    scene.api.is_bad = lambda _, __: False
    # An API may want to be asked again after an hour.
    await scene.run(3700, until=bad)
    facts.repaired = scene.codes(bad)
    facts.attempts_after = {scene.attempts(id_) for id_ in bad if id_ in scene.ended and id_ not in before}
    return facts


def _is_bad(id_: str, _: str) -> bool:
    return id_.startswith("bad")


async def _alone(failure: Failing) -> Facts:
    async with Scene(failure, _is_bad, MODEL).running() as scene:
        scene.put(BAD[:1])
        await scene.run(60, until=BAD[:1])
        return await _facts(scene, BAD[:1], [])


async def _among(failure: Failing) -> Facts:
    """Put a bad job among 100 good ones; more of these keep coming, as many as the worker can do."""
    async with Scene(failure, _is_bad, MODEL).running() as scene:
        good = [*GOOD]
        scene.put([*GOOD[:10], *BAD[:1], *GOOD[10:]])
        # The pauses between the attempts are random.
        for n in range(300 if is_overload(failure) else 40):
            if scene.ended.keys() >= {*BAD[:1], *GOOD}:
                break
            await scene.run(1)
            good += [f"more-{n}-{m}" for m in range(8)]
            scene.put(good[-8:])
        facts = await _facts(scene, BAD[:1], GOOD)
        await scene.run(120, until=good)
        facts.good_after = scene.codes(good)
        facts.most_good = len(good)
        return facts


async def _whole(failure: Failing, *, worked_before: bool) -> Facts:
    async with Scene(failure, _is_bad, MODEL).running() as scene:
        if worked_before:
            scene.put(GOOD[:10])
            await scene.run(10, until=GOOD[:10])
        scene.put(BAD)
        await scene.run(120, until=BAD)
        return await _facts(scene, BAD, [])


async def _of_one_model(failure: Failing) -> Facts:
    """Refuse all jobs of one model, among jobs of another."""
    async with Scene(failure, lambda _, model: model == MODEL, MODEL, OTHER).running() as scene:
        scene.put(GOOD[:50], OTHER)
        scene.put(BAD, MODEL)
        scene.put(GOOD[50:], OTHER)
        await scene.run(60)
        return await _facts(scene, BAD, GOOD)


RUNS: Final[dict[str, Callable[[Failing], Awaitable[Facts]]]] = {
    "alone": _alone,
    "among 100 good": _among,
    "whole queue": lambda failure: _whole(failure, worked_before=False),
    "whole queue, later": lambda failure: _whole(failure, worked_before=True),
    "one model": _of_one_model,
}
_known: Final[dict[tuple[str, Hashable], Facts]] = {}


async def run(kind: str, failure: Failing) -> Facts:
    """Return the facts of a run; answers with the same consequences share one."""
    key = kind, consequences(failure)
    if key not in _known:
        _known[key] = await RUNS[kind](failure)
    return _known[key]


@EACH
async def test_a_single_job_ends_or_waits(row: Row, ask: Ask) -> None:
    failure = await ask(row)
    facts = await run("alone", failure)
    match row.category:
        case Category.CONFIGURATION | Category.MODEL | Category.CAPACITY:
            assert not facts.ended
            assert facts.is_paused is (row.category is not Category.CAPACITY or is_overload(failure))
            assert (facts.repaired, facts.attempts_after) == ({SUCCEEDED: 1}, {1})
            assert facts.calls < 20
        case Category.JOB:
            assert (facts.ended, facts.calls, facts.pauses) == ({REJECTED: 1}, 1, 0)
        case Category.UNKNOWN if row.status in (400, 413, 422):
            assert (facts.ended, facts.calls, facts.pauses) == ({REJECTED: 1}, 1, 0)
        case Category.UNKNOWN | Category.MODEL_JOB | Category.TRANSIENT:
            assert (facts.ended, facts.calls, facts.pauses) == ({EXHAUSTED: 1}, most_attempts(failure), 0)


@EACH
async def test_among_100_good_jobs_only_the_bad_one_ends_or_waits(row: Row, ask: Ask) -> None:
    failure = await ask(row)
    facts = await run("among 100 good", failure)
    assert facts.good_after == {SUCCEEDED: facts.most_good}
    # All jobs of the account wait as long as the API says.
    if not (isinstance(failure, RateLimitedError) and (failure.retry_after_s or 0) > LONG_S):
        assert facts.good == {SUCCEEDED: len(GOOD)}
    # A refusal of one job never pauses the others.
    assert (facts.pauses, facts.is_paused, facts.in_a_row <= 1) == (0, False, True)
    match row.category:
        case Category.CAPACITY if is_overload(failure):
            # More than 20 times, while others succeed.
            assert (facts.ended, facts.attempts) == ({EXHAUSTED: 1}, {MAX_ATTEMPTS})
            assert facts.calls > 20 * MAX_ATTEMPTS
        case Category.CAPACITY:
            assert not facts.ended
            assert (facts.repaired, facts.attempts_after) == ({SUCCEEDED: 1}, {1})
        case Category.JOB | Category.UNKNOWN | Category.MODEL_JOB:
            assert facts.ended == {REJECTED: 1}
            assert facts.calls <= 2
        case Category.CONFIGURATION | Category.MODEL | Category.TRANSIENT:
            assert (facts.ended, facts.attempts) == ({EXHAUSTED: 1}, {most_attempts(failure)})


@EACH
async def test_a_whole_queue_fails_only_for_what_is_known_to_be_the_jobs_own(row: Row, ask: Ask) -> None:
    failure = await ask(row)
    for kind in ("whole queue", "whole queue, later"):
        check_whole_queue(row, failure, await run(kind, failure))


def check_whole_queue(row: Row, failure: Failing, facts: Facts) -> None:
    if is_the_jobs(failure):
        expected = REJECTED if isinstance(failure, JobError) else EXHAUSTED
        assert (facts.ended, facts.pauses) == ({expected: len(BAD)}, 0)
        return
    assert facts.in_a_row <= 3
    # No dead letter: an outage or a wrong setting uses no attempt.
    assert facts.ended in ({}, {REJECTED: 3})
    assert facts.repaired[SUCCEEDED] == len(BAD) - facts.ended.total()
    assert facts.attempts_after == {1}
    assert facts.pauses == (row.category is not Category.CAPACITY or is_overload(failure))
    # Each job once, and single probes at growing intervals.
    assert facts.calls < 2 * len(BAD)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.category in (Category.MODEL, Category.MODEL_JOB)], ids=str
)
async def test_what_concerns_one_model_pauses_only_its_jobs(row: Row, ask: Ask) -> None:
    facts = await run("one model", await ask(row))
    assert facts.good == {SUCCEEDED: len(GOOD)}
    assert not facts.ended
    assert (facts.pauses, facts.paused_models) == (0, {MODEL})
    assert (facts.repaired, facts.attempts_after) == ({SUCCEEDED: len(BAD)}, {1})


@pytest.mark.parametrize("reason", ["timeout", "connection_error"])
async def test_a_request_without_an_answer_concerns_its_job_unless_several_fail_in_a_row(reason: str) -> None:
    failure = TransientError(Dependency.MODEL, reason, "no answer")
    for kind, good in (("alone", {}), ("among 100 good", {SUCCEEDED: len(GOOD)})):
        facts = await run(kind, failure)
        assert (facts.ended, facts.attempts, facts.pauses) == ({EXHAUSTED: 1}, {MAX_ATTEMPTS}, 0)
        assert facts.good == good
    facts = await run("whole queue", failure)
    assert (facts.ended, facts.pauses, facts.attempts_after) == ({}, 1, {1})


async def test_an_api_that_cannot_be_reached_pauses_the_worker_at_once_and_uses_no_attempt() -> None:
    failure = DependencyDownError(Dependency.MODEL, "unreachable")
    for kind in ("alone", "whole queue", "whole queue, later"):
        facts = await run(kind, failure)
        assert (facts.ended, facts.pauses, facts.attempts_after) == ({}, 1, {1})


LONG_OUTAGE_S: Final = 2400


@pytest.mark.parametrize("is_billed", [True, False])
async def test_half_answers_of_a_long_outage_are_bought_a_few_times_for_each_job(
    api: Api, models: dict[str, Model], *, is_billed: bool
) -> None:
    """As with 500, which a job may cause, its attempts count after some probes."""
    api.says = response(200, {**HALF, "usage": USAGE if is_billed else None})
    with pytest.raises(TransientError) as caught:
        await models["generic"].complete(MODEL, a_body({}), time_left_s=60.0)
    async with Scene(caught.value, _is_bad, MODEL).running() as scene:
        scene.put(BAD[:6])
        await scene.run(LONG_OUTAGE_S, until=BAD[:6])
        assert scene.codes(BAD) == {EXHAUSTED: 6}
        assert max(scene.api.calls.values()) <= FREE_PROBES + MAX_MALFORMED + (not is_billed)
        # Not one after another: each probe is followed by a longer wait.
        assert scene.clock.monotonic() > 300


async def test_a_long_outage_with_another_status_ends_no_job() -> None:
    async with Scene(TransientError(Dependency.MODEL, "http_5xx", "x"), _is_bad, MODEL).running() as scene:
        scene.put(BAD[:6])
        await scene.run(LONG_OUTAGE_S, until=BAD[:6])
        assert not scene.ended


def test_the_rows_have_every_category() -> None:
    assert {row.category for row in ROWS} == {*Category}
