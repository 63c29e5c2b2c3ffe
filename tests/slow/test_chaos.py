"""A short chaos test: one fault of each important kind, at random times from a fixed seed.

`make chaos` runs longer, with every kind of fault.
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
from tests.chaos import evaluation, faults, plan
from tests.chaos.backend import ReceivedMessage
from tests.chaos.environment import WORKER_HEADER, WorkerProcess
from tests.chaos.evaluation import Records, evaluate
from tests.chaos.faults import InjectedFault
from tests.chaos.jobs import KINDS, ExpectedJob, JobInputs, Jobs, Stored
from tests.chaos.plan import Fault
from tests.chaos.run import Options, run
from tests.chaos.soak import Sample, SoakResult
from tests.running import Worker
from worker.observability import metrics

IMPORTANT = (
    "worker killed",
    "broker connections reset",
    "broker killed",
    "model fails",
    "S3 truncates responses",
    "model limits concurrency",
)
SHORT = Options(seed=2712, seconds=24, workers=2, rate=12, every_s=3.0, faults=IMPORTANT, with_store=True)
# Ten attempts take longer than this run.
SHORT_KINDS = tuple(kind for kind in KINDS if kind != "always HTTP 500")


@pytest.mark.timeout(240)
async def test_faults_cause_no_lost_wrong_or_twice_billed_jobs(own_stack: Stack, tmp_path: Path) -> None:
    own_stack.model.reset()
    reported: list[str] = []
    try:
        ended = await run(own_stack, tmp_path, replace(SHORT, kinds=SHORT_KINDS), reported.append)
    finally:
        own_stack.model.reset()
    found, noticed = ended.evaluation, ended.noticed

    assert found.passed, f"{ended}\n{reported}"
    assert len(ended.records.jobs) > 0.9 * SHORT.seconds * SHORT.rate
    # All faults were injected and noticed.
    assert {it.fault.kind for it in ended.records.injected} == set(IMPORTANT)
    assert noticed["workers killed"] == 1
    # Three started workers, and two reconnects.
    assert noticed["broker connections opened"] >= 3 + 2
    assert noticed["broker connections lost"] >= 2
    assert noticed["pauses for the model"] >= 1
    assert noticed["resumed"] >= 1
    # Of these faults only truncated S3 responses cause them.
    assert noticed["pauses for S3"] + noticed["retries after a connection error"] >= 1
    assert any(call.status == 429 for call in ended.records.calls)


def test_a_plan_depends_on_the_seed_only_and_has_every_kind_of_fault() -> None:
    long = Options(seed=1, seconds=600)
    assert long.plan() == long.plan() != replace(long, seed=2).plan()
    assert {fault.kind for fault in long.plan()} == set(plan.KINDS) == set(faults.INJECTED)
    assert all(fault.at_s + fault.lasts_s <= 600 for fault in long.plan())
    assert {fault.kind for fault in SHORT.plan()} == set(IMPORTANT)


def test_a_part_has_at_most_one_fault_at_a_time() -> None:
    by_part: dict[str, float] = {}
    for fault in Options(seed=random.randrange(1000), seconds=600, every_s=1.0).plan():  # noqa: S311
        assert fault.at_s >= by_part.get(fault.part, 0.0), fault
        by_part[fault.part] = fault.at_s + fault.lasts_s


def test_the_jobs_are_the_same_for_the_same_seed() -> None:
    picture = Stored("s3://bucket/key", b"")
    inputs = JobInputs([picture] * 3, [picture], "bucket", "queue")

    def bodies(seed: int) -> list[str]:
        jobs = zip(range(50), Jobs(seed, inputs, ("one image in S3", "the long form")), strict=False)
        return [job.body.decode() for _, job in jobs]

    assert bodies(1) == bodies(1) != bodies(2)


# Tests of the evaluation, on records with one deviation each.

JOB = ExpectedJob("1" * 16, "a job", b"{}", frozenset({"succeeded"}), ("a" * 12,), sent_at=[0.0])


def result(answer: str = f"[simulated model] (sha256 {'a' * 12})", **changes: Any) -> ReceivedMessage:
    body: dict[str, Any] = {
        "id": JOB.id,
        "status": "succeeded",
        "answer": answer,
        "error": None,
        "metadata": {},
    }
    got = ReceivedMessage("results", "m1", b"", {}, f"for {JOB.id}", at=2.0)
    changed = {
        name: changes.pop(name) for name in list(changes) if name in ReceivedMessage.__dataclass_fields__
    }
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


def process(name: str, *, ended: float, ending: Any = "SIGTERM", code: int = 0) -> WorkerProcess:
    return WorkerProcess(name, Worker({}, Path()), started=0.0, ended=ended, ending=ending, code=code)


GOOD_RUN = Records(
    jobs=[JOB],
    results=[result()],
    dead_letters=[],
    calls=[call(1.0)],
    injected=[],
    processes=[process("0.0", ended=99.0)],
    private_queue="private",
    with_store=False,
)


def hit(kind: str, started: float, ended: float, who: int | None = None) -> InjectedFault:
    return InjectedFault(Fault(0.0, ended - started, kind, who), started, ended)


def test_a_good_run_passes() -> None:
    found = evaluate(GOOD_RUN)
    assert found.passed
    assert not found.billed_again
    assert not found.duplicate_results


def test_lost_jobs_are_found() -> None:
    assert len(evaluate(replace(GOOD_RUN, results=[])).lost) == 1
    twice = replace(JOB, sent_at=[0.0, 1.0])
    assert len(evaluate(replace(GOOD_RUN, jobs=[twice])).lost) == 1
    dead_lettered = replace(JOB, is_dead_lettered=True)
    assert len(evaluate(replace(GOOD_RUN, jobs=[dead_lettered])).lost) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(result(f"[simulated model] (sha256 {'b' * 12})"), id="another image"),
        pytest.param(result("Nonsense"), id="not the model's answer"),
        pytest.param(result(status="failed", error={"code": "model_rejected", "message": ""}), id="failed"),
        pytest.param(
            result(status="failed", error={"code": "attempts_exhausted", "message": ""}), id="exhausted"
        ),
        pytest.param(result(metadata={"n": 1}), id="another job's metadata"),
        pytest.param(result(correlation_id="another's"), id="another's correlation id"),
        pytest.param(result(queue="private"), id="another's queue"),
    ],
)
def test_wrong_results_are_found(wrong: ReceivedMessage) -> None:
    assert evaluate(replace(GOOD_RUN, results=[wrong])).wrong


def test_results_calls_and_dead_letters_of_unknown_jobs_are_found() -> None:
    assert evaluate(replace(GOOD_RUN, results=[result(), result(id="?")])).wrong
    assert evaluate(replace(GOOD_RUN, dead_letters=[result()])).wrong
    assert evaluate(replace(GOOD_RUN, jobs=[], results=[])).wrong


def test_duplicate_results_are_allowed_and_counted() -> None:
    found = evaluate(replace(GOOD_RUN, results=[result(), result()]))
    assert found.passed
    assert len(found.duplicate_results) == 1
    unconfirmed = replace(GOOD_RUN, jobs=[replace(JOB, unconfirmed=1)], results=[result(), result()])
    assert not evaluate(unconfirmed).duplicate_results


TWICE = replace(
    GOOD_RUN, calls=[call(1.0), call(6.0, "1.0")], processes=[*GOOD_RUN.processes, process("1.0", ended=99.0)]
)
KILLED = [process("0.0", ended=1.2, ending="killed", code=-9), process("1.0", ended=99.0)]


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        pytest.param(TWICE, evaluation.UNEXPLAINED, id="no fault"),
        pytest.param(
            replace(TWICE, calls=[call(1.0), call(6.0)]), evaluation.UNEXPLAINED, id="the same worker"
        ),
        pytest.param(
            replace(TWICE, injected=[hit("model connections reset", 1.4, 1.4)]),
            evaluation.INTERRUPTED,
            id="the answer was interrupted",
        ),
        pytest.param(
            replace(TWICE, injected=[hit("model connections reset", 1.4, 1.4, who=1)]),
            evaluation.UNEXPLAINED,
            id="another worker's answer was interrupted",
        ),
        pytest.param(replace(TWICE, processes=KILLED), evaluation.WORKER_STOPPED, id="its worker was killed"),
        pytest.param(
            replace(TWICE, injected=[hit("broker killed", 1.2, 5.0)]),
            evaluation.REDELIVERED,
            id="redelivered",
        ),
        pytest.param(
            replace(TWICE, injected=[hit("broker killed", 1.2, 5.0)], with_store=True),
            evaluation.UNEXPLAINED,
            id="redelivered, with a store",
        ),
        pytest.param(
            replace(TWICE, processes=[replace(KILLED[0], ended=5.0), KILLED[1]], with_store=True),
            evaluation.UNEXPLAINED,
            id="killed when its answer was stored",
        ),
        pytest.param(
            replace(TWICE, injected=[hit("S3 unreachable", 1.2, 5.0)], with_store=True),
            evaluation.STORE_UNREACHABLE,
            id="no store",
        ),
        pytest.param(
            replace(TWICE, jobs=[replace(JOB, sent_at=[0.0, 5.0])], results=[result(), result()]),
            evaluation.SUBMITTED_AGAIN,
            id="submitted twice",
        ),
    ],
)
def test_the_reason_why_a_job_was_billed_twice(records: Records, reason: str) -> None:
    found = evaluate(records)
    assert found.billed_again == Counter({reason: 1})
    assert found.passed == (reason != evaluation.UNEXPLAINED)


def test_each_submission_may_be_billed_again_after_its_worker_was_killed() -> None:
    calls = [call(1.0), call(1.1), call(6.0, "1.0"), call(6.1, "1.0")]
    asked = [replace(JOB, sent_at=[0.0, 0.5])]
    records = replace(TWICE, jobs=asked, calls=calls, results=[result()], processes=KILLED)
    assert evaluate(records).billed_again == Counter(
        {evaluation.SUBMITTED_AGAIN: 1, evaluation.WORKER_STOPPED: 2}
    )
    once_more = replace(records, calls=[*calls, call(9.0, "1.0")])
    assert evaluate(once_more).billed_again[evaluation.UNEXPLAINED] == 1


def test_failed_calls_are_not_billed() -> None:
    assert not evaluate(replace(GOOD_RUN, calls=[call(0.5, status=500), call(1.0)])).billed_again


def test_workers_that_exit_without_a_signal_or_with_another_code_are_found() -> None:
    for ending, code in (("none", 0), ("SIGTERM", 1), ("killed", 0)):
        assert evaluate(
            replace(GOOD_RUN, processes=[process("0.0", ended=99.0, ending=ending, code=code)])
        ).crashed


async def test_asyncio_tasks_are_exposed_only_from_the_event_loop() -> None:
    shown = re.search(r"^python_asyncio_tasks (.*)$", metrics.exposition()[0].decode(), re.MULTILINE)
    assert shown is not None
    assert float(shown[1]) == len(asyncio.all_tasks())
    from_thread, _ = await asyncio.to_thread(metrics.exposition)
    assert b"python_asyncio_tasks" not in from_thread


def test_the_soak_test_finds_growth() -> None:
    idle = Sample(0, memory_mb=90, files=20, tasks=10)
    flat = [Sample(at, memory_mb=100 + at % 3, files=40, tasks=30) for at in range(50)]
    assert SoakResult(idle, flat, idle, jobs=27_000).faults() == []
    growing = [replace(it, memory_mb=100 + it.at) for it in flat]
    assert len(SoakResult(idle, growing, idle, jobs=1000).faults()) == 1
    late = [replace(it, memory_mb=100 + max(0, it.at - 30) / 2) for it in flat]
    assert len(SoakResult(idle, late, idle, jobs=27_000).faults()) == 1
    assert len(SoakResult(idle, flat, replace(idle, files=30, tasks=11), jobs=1000).faults()) == 2
