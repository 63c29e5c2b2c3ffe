"""The fault suite in short: one fault of each important kind, at random times from a fixed seed.

`make chaos` is the same for minutes, with every kind of fault.
"""

import asyncio
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy.local.model_simulator.calls import Call
from deploy.local.stack import Stack
from tests.chaos import faults, plan, verdict
from tests.chaos.backend import Got
from tests.chaos.faults import Happened
from tests.chaos.jobs import MAKERS, Asked, Jobs, Places, Stored
from tests.chaos.plan import Fault
from tests.chaos.run import Options, run
from tests.chaos.scene import WORKER_HEADER, Life
from tests.chaos.soak import Sample, Soaked
from tests.chaos.verdict import Records, judge
from tests.running import Worker
from worker.observability import metrics

IMPORTANT = (
    "worker killed",
    "broker connections reset",
    "broker killed",
    "model fails",
    "S3 cuts off",
    "model takes few calls",
)
SHORT = Options(seed=2712, seconds=24, workers=2, rate=12, every_s=3.0, faults=IMPORTANT, with_store=True)
# A job that the faults would have to leave in peace for ten attempts takes longer than there is time for.
SHORT_KINDS = tuple(kind for kind in MAKERS if kind != "poisonous")


@pytest.mark.timeout(240)
async def test_under_faults_of_each_kind_nothing_is_lost_or_wrong_or_paid_twice(
    own_stack: Stack, tmp_path: Path
) -> None:
    own_stack.model.reset()
    reported: list[str] = []
    try:
        ended = await run(own_stack, tmp_path, replace(SHORT, kinds=SHORT_KINDS), reported.append)
    finally:
        own_stack.model.reset()
    found, noticed = ended.verdict, ended.noticed

    assert found.is_good, f"{ended}\n{reported}"
    assert len(ended.records.asked) > 0.9 * SHORT.seconds * SHORT.rate
    # And all of it did happen.
    assert {it.fault.kind for it in ended.records.happened} == set(IMPORTANT)
    assert noticed["workers killed"] == 1
    # Two workers at the start, the killed one's successor, and each after the reset and the broker's end.
    assert noticed["connections to the broker made"] >= 3 + 2
    assert noticed["connections to the broker lost"] >= 2
    assert noticed["pauses for the model"] >= 1
    assert noticed["times they resumed"] >= 1
    # Of these faults only S3's breaks connections off in the middle of an answer.
    assert noticed["pauses for S3"] + noticed["retries after a connection was interrupted"] >= 1
    assert any(call.status == 429 for call in ended.records.calls)


def test_a_plan_is_the_same_for_the_same_seed_and_has_every_kind_of_fault() -> None:
    long = Options(seed=1, seconds=600)
    assert long.plan() == long.plan() != replace(long, seed=2).plan()
    assert {fault.kind for fault in long.plan()} == set(plan.KINDS) == set(faults.INJECTED)
    assert all(fault.at_s + fault.lasts_s <= 600 for fault in long.plan())
    assert {fault.kind for fault in SHORT.plan()} == set(IMPORTANT)


def test_no_part_is_hit_by_two_faults_at_once() -> None:
    by_part: dict[str, float] = {}
    for fault in Options(seed=random.randrange(1000), seconds=600, every_s=1.0).plan():  # noqa: S311
        assert fault.at_s >= by_part.get(fault.part, 0.0), fault
        by_part[fault.part] = fault.at_s + fault.lasts_s


def test_the_jobs_are_the_same_for_the_same_seed() -> None:
    picture = Stored("s3://bucket/key", b"")
    places = Places([picture] * 3, [picture], "bucket", "queue")

    def bodies(seed: int) -> list[str]:
        jobs = zip(range(50), Jobs(seed, places, ("one image in S3", "the long form")), strict=False)
        return [job.body.decode() for _, job in jobs]

    assert bodies(1) == bodies(1) != bodies(2)


# The verdict itself: made-up records, each with one thing in them.

JOB = Asked("1" * 16, "a job", b"{}", frozenset({"succeeded"}), ("a" * 12,), sent_at=[0.0])


def result(answer: str = f"[simulated model] (sha256 {'a' * 12})", **changes: Any) -> Got:
    body: dict[str, Any] = {
        "id": JOB.id,
        "status": "succeeded",
        "answer": answer,
        "error": None,
        "metadata": {},
    }
    got = Got("results", "m1", b"", {}, f"for {JOB.id}", at=2.0)
    changed = {name: changes.pop(name) for name in list(changes) if name in Got.__dataclass_fields__}
    return replace(got, body=json.dumps({**body, **changes}).encode(), **changed)


def call(started: float, worker: str = "0.0", status: int = 200) -> Call:
    return Call(
        number=1,
        started=started,
        ended=started + 0.5,
        status=status,
        question=f"#{JOB.id}# What is it?",
        headers={WORKER_HEADER: worker},
    )


def life(name: str, *, ended: float, ending: Any = "asked to stop", code: int = 0) -> Life:
    return Life(name, Worker({}, Path()), began=0.0, ended=ended, ending=ending, code=code)


CALM = Records(
    asked=[JOB],
    results=[result()],
    dead_letters=[],
    calls=[call(1.0)],
    happened=[],
    lives=[life("0.0", ended=99.0)],
    private_queue="private",
    with_store=False,
)


def hit(kind: str, began: float, ended: float, who: int | None = None) -> Happened:
    return Happened(Fault(0.0, ended - began, kind, who), began, ended)


def test_the_verdict_on_a_run_in_which_all_went_well() -> None:
    found = judge(CALM)
    assert found.is_good
    assert not found.paid_again
    assert not found.duplicate_results


def test_the_verdict_finds_what_is_lost() -> None:
    assert len(judge(replace(CALM, results=[])).lost) == 1
    twice = replace(JOB, sent_at=[0.0, 1.0])
    assert len(judge(replace(CALM, asked=[twice])).lost) == 1
    dying = replace(JOB, dies=True)
    assert len(judge(replace(CALM, asked=[dying])).lost) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(result(f"[simulated model] (sha256 {'b' * 12})"), id="another image"),
        pytest.param(result("Nonsense"), id="no answer of the model's"),
        pytest.param(result(status="failed", error={"code": "model_rejected", "message": ""}), id="failed"),
        pytest.param(
            result(status="failed", error={"code": "attempts_exhausted", "message": ""}), id="exhausted"
        ),
        pytest.param(result(metadata={"n": 1}), id="another job's metadata"),
        pytest.param(result(correlation_id="another's"), id="another's correlation id"),
        pytest.param(result(queue="private"), id="another's queue"),
    ],
)
def test_the_verdict_finds_what_is_wrong(wrong: Got) -> None:
    assert judge(replace(CALM, results=[wrong])).wrong


def test_the_verdict_finds_results_calls_and_dead_letters_that_nobody_asked_for() -> None:
    assert judge(replace(CALM, results=[result(), result(id="?")])).wrong
    assert judge(replace(CALM, dead_letters=[result()])).wrong
    assert judge(replace(CALM, asked=[], results=[])).wrong


def test_the_verdict_counts_second_results() -> None:
    found = judge(replace(CALM, results=[result(), result()]))
    assert found.is_good
    assert len(found.duplicate_results) == 1
    doubtful = replace(CALM, asked=[replace(JOB, doubtful=1)], results=[result(), result()])
    assert not judge(doubtful).duplicate_results


TWICE = replace(CALM, calls=[call(1.0), call(6.0, "1.0")], lives=[*CALM.lives, life("1.0", ended=99.0)])
KILLED = [life("0.0", ended=1.2, ending="killed", code=-9), life("1.0", ended=99.0)]


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        pytest.param(TWICE, verdict.PLAIN, id="nothing happened"),
        pytest.param(replace(TWICE, calls=[call(1.0), call(6.0)]), verdict.PLAIN, id="the same worker"),
        pytest.param(
            replace(TWICE, happened=[hit("model connections reset", 1.4, 1.4)]),
            verdict.CUT_OFF,
            id="the answer was interrupted",
        ),
        pytest.param(
            replace(TWICE, happened=[hit("model connections reset", 1.4, 1.4, who=1)]),
            verdict.PLAIN,
            id="another worker's answer was interrupted",
        ),
        pytest.param(replace(TWICE, lives=KILLED), verdict.DIED, id="its worker was killed"),
        pytest.param(
            replace(TWICE, happened=[hit("broker killed", 1.2, 5.0)]), verdict.ELSEWHERE, id="redelivered"
        ),
        pytest.param(
            replace(TWICE, happened=[hit("broker killed", 1.2, 5.0)], with_store=True),
            verdict.PLAIN,
            id="redelivered, with a store",
        ),
        pytest.param(
            replace(TWICE, lives=[replace(KILLED[0], ended=5.0), KILLED[1]], with_store=True),
            verdict.PLAIN,
            id="killed when its answer was stored",
        ),
        pytest.param(
            replace(TWICE, happened=[hit("S3 unreachable", 1.2, 5.0)], with_store=True),
            verdict.NO_STORE,
            id="no store",
        ),
        pytest.param(
            replace(TWICE, asked=[replace(JOB, sent_at=[0.0, 5.0])], results=[result(), result()]),
            verdict.SUBMITTED,
            id="submitted twice",
        ),
    ],
)
def test_the_verdict_tells_why_a_job_was_paid_for_twice(records: Records, reason: str) -> None:
    found = judge(records)
    assert found.paid_again == Counter({reason: 1})
    assert found.is_good == (reason != verdict.PLAIN)


def test_each_submission_may_be_paid_for_again_when_the_worker_dies_with_all_of_them() -> None:
    calls = [call(1.0), call(1.1), call(6.0, "1.0"), call(6.1, "1.0")]
    asked = [replace(JOB, sent_at=[0.0, 0.5])]
    records = replace(TWICE, asked=asked, calls=calls, results=[result()], lives=KILLED)
    assert judge(records).paid_again == Counter({verdict.SUBMITTED: 1, verdict.DIED: 2})
    once_more = replace(records, calls=[*calls, call(9.0, "1.0")])
    assert judge(once_more).paid_again[verdict.PLAIN] == 1


def test_calls_that_failed_were_not_paid_for() -> None:
    assert not judge(replace(CALM, calls=[call(0.5, status=500), call(1.0)])).paid_again


def test_the_verdict_finds_workers_that_end_by_themselves_or_not_as_they_should() -> None:
    for ending, code in (("by itself", 0), ("asked to stop", 1), ("killed", 0)):
        assert judge(replace(CALM, lives=[life("0.0", ended=99.0, ending=ending, code=code)])).died


async def test_the_tasks_of_the_event_loop_are_counted_where_there_is_one() -> None:
    shown = re.search(r"^python_asyncio_tasks (.*)$", metrics.exposition()[0].decode(), re.MULTILINE)
    assert shown is not None
    assert float(shown[1]) == len(asyncio.all_tasks())
    elsewhere, _ = await asyncio.to_thread(metrics.exposition)
    assert b"python_asyncio_tasks" not in elsewhere


def test_the_soak_finds_what_grows() -> None:
    idle = Sample(0, memory_mb=90, files=20, tasks=10)
    flat = [Sample(at, memory_mb=100 + at % 3, files=40, tasks=30) for at in range(50)]
    assert Soaked(idle, flat, idle, jobs=27_000).faults() == []
    growing = [replace(it, memory_mb=100 + it.at) for it in flat]
    assert len(Soaked(idle, growing, idle, jobs=1000).faults()) == 1
    late = [replace(it, memory_mb=100 + max(0, it.at - 30) / 2) for it in flat]
    assert len(Soaked(idle, late, idle, jobs=27_000).faults()) == 1
    assert len(Soaked(idle, flat, replace(idle, files=30, tasks=11), jobs=1000).faults()) == 2
