"""Evaluate the records of a run: lost, wrong and duplicate results, unexplained billing."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from deploy.local.model_simulator.calls import Call
from tests.chaos.backend import ReceivedMessage, by_job
from tests.chaos.environment import MODEL_TIMEOUT_S, WORKER_HEADER, WorkerProcess
from tests.chaos.faults import InjectedFault
from tests.chaos.jobs import ExpectedJob, job_of

# Seconds by which the effect of a fault can follow it: a late result, a late missed heartbeat.
SLACK_S: Final = 2.0
LATE_S: Final = 30.0
UNDELIVERABLE: Final = "vqa-undeliverable-to"

# Reasons why a job was billed again. `UNEXPLAINED` is a bug of the worker.
INTERRUPTED: Final = "the previous response was interrupted or timed out"
WORKER_STOPPED: Final = "the worker that had the response was killed or exceeded its grace period"
REDELIVERED: Final = "the worker's connection was lost and the job redelivered"
STORE_UNREACHABLE: Final = "the result store was unreachable"
SUBMITTED_AGAIN: Final = "the job was submitted again"
UNEXPLAINED: Final = "no reason found"

# Faults that can interrupt a response. (A call that hangs has no response and is not billed.)
_BREAKS_CALLS: Final = frozenset(
    {"model restarted", "model connections reset", "model unreachable", "model silent"}
)


@dataclass(frozen=True)
class Records:
    """The records of a finished run."""

    jobs: Sequence[ExpectedJob]
    results: Sequence[ReceivedMessage]
    dead_letters: Sequence[ReceivedMessage]
    calls: Sequence[Call]
    injected: Sequence[InjectedFault]
    processes: Sequence[WorkerProcess]
    private_queue: str
    with_store: bool
    started: float = 0.0
    """The start of the run, the zero of the times in messages."""

    def history_of(self, job_id: str) -> str:
        """Return the times of a job's submissions, calls and results, in seconds from the start."""
        events = [(at, "sent") for job in self.jobs if job.id == job_id for at in job.sent_at]
        events += [
            (call.started, f"call by {call.headers.get(WORKER_HEADER)}: {call.status}")
            for call in calls_by_job(self.calls).get(job_id, [])
        ]
        events += [(got.at, "result") for named, got in by_job(list(self.results)) if named == job_id]
        return "; ".join(f"{at - self.started:.1f} {what}" for at, what in sorted(events))


@dataclass
class Evaluation:
    """The errors found in a run."""

    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    billed_again: Counter[str] = field(default_factory=Counter)
    """The number of calls billed again, by reason."""
    unexplained: list[str] = field(default_factory=list)
    duplicate_results: list[str] = field(default_factory=list)
    crashed: list[str] = field(default_factory=list)
    """Workers that exited without a signal, or with an unexpected exit code."""

    @property
    def passed(self) -> bool:
        return not (self.lost or self.wrong or self.unexplained or self.crashed)


def evaluate(records: Records) -> Evaluation:
    """Compare every job's results and calls with the expected ones."""
    evaluation = Evaluation()
    _check_results(records, evaluation)
    _check_dead_letters(records, evaluation)
    _check_billing(records, evaluation)
    expected = {"killed": -9, "SIGTERM": 0}
    for process in records.processes:
        if process.code != expected.get(process.ending or ""):
            evaluation.crashed.append(f"worker {process.name}, {process.ending}, exited with {process.code}")
    return evaluation


def is_billed(call: Call) -> bool:
    """Return whether the simulator sent a complete response."""
    return call.status == 200 and call.played in (None, "answer") and call.ended is not None


def calls_by_job(calls: Iterable[Call]) -> dict[str, list[Call]]:
    """Return the calls by job id, in order of their start."""
    found = defaultdict(list)
    for call in sorted(calls, key=lambda call: call.started):
        if (job_id := job_of(call.question)) is not None:
            found[job_id].append(call)
    return found


def _check_results(records: Records, evaluation: Evaluation) -> None:
    results = defaultdict(list)
    for job_id, got in by_job(list(records.results)):
        results[job_id].append(got)
    for job in records.jobs:
        found = results.pop(job.id, [])
        missing = len(job.sent_at) - len(found)
        if missing > 0:
            history = records.history_of(job.id)
            evaluation.lost.append(f"{job.id} ({job.kind}): {missing} of {len(job.sent_at)}: {history}")
        more = len(found) - len(job.sent_at) - job.unconfirmed
        if more > 0:
            history = records.history_of(job.id)
            evaluation.duplicate_results.append(f"{job.id} ({job.kind}): {more} more: {history}")
        evaluation.wrong += [f"{job.id} ({job.kind}): {it}" for it in _mismatches(job, found, records)]
    evaluation.wrong += [f"a result for an unknown job: {job_id}" for job_id in results]


def _mismatches(job: ExpectedJob, found: Iterable[ReceivedMessage], records: Records) -> list[str]:
    faults = []
    for got in found:
        faults.append(job.mismatch(got.json()))
        if got.correlation_id != f"for {job.id}":
            faults.append(f"the correlation id {got.correlation_id}")
        if (got.queue == records.private_queue) != (job.reply_to == records.private_queue):
            is_marked = got.headers.get(UNDELIVERABLE) == job.reply_to and job.may_be_undeliverable
            faults.append(None if is_marked else f"a result in {got.queue}")
    return [fault for fault in faults if fault]


def _check_dead_letters(records: Records, evaluation: Evaluation) -> None:
    """Find missing and unexpected dead letters; duplicates are allowed."""
    bodies = Counter(got.body for got in records.dead_letters)
    expected = {job.body: job for job in records.jobs if job.is_dead_lettered}
    for body, job in expected.items():
        if not bodies[body]:
            evaluation.lost.append(f"{job.id} ({job.kind}): the dead letter")
    evaluation.wrong += [f"an unexpected dead letter: {it[:100]!r}" for it in bodies if it not in expected]


def _check_billing(records: Records, evaluation: Evaluation) -> None:
    jobs_by_id = {job.id: job for job in records.jobs}
    result_times = _first_result_times(records.results)
    for job_id, calls in calls_by_job(records.calls).items():
        job, billed = jobs_by_id.get(job_id), [call for call in calls if is_billed(call)]
        if job is None:
            evaluation.wrong.append(f"a call for an unknown job: {job_id}")
            continue
        reasons = _reasons(job, billed, result_times.get(job_id, float("inf")), records)
        evaluation.billed_again.update(reasons)
        if UNEXPLAINED in reasons:
            evaluation.unexplained.append(f"{job_id} ({job.kind}): {records.history_of(job_id)}")


def _reasons(job: ExpectedJob, billed: Sequence[Call], first_result: float, records: Records) -> list[str]:
    """Return a reason for each repeated billing. Without a store each submission may be billed once."""
    messages = 1 if records.with_store else max(1, len(job.sent_at) + job.unconfirmed)
    reasons = [SUBMITTED_AGAIN] * (min(messages, len(billed)) - 1)
    # A call does not show which submission it is for: assume one whose last call has a reason to be repeated.
    last = list(billed[:messages])
    for again in billed[messages:]:
        found = [(_reason(before, again, first_result, records), before) for before in last]
        reason, before = next((it for it in found if it[0] is not UNEXPLAINED), found[0])
        last.remove(before)
        last.append(again)
        reasons.append(reason)
    return reasons


def _first_result_times(results: Iterable[ReceivedMessage]) -> Mapping[str | None, float]:
    first: dict[str | None, float] = {}
    for job_id, got in by_job(list(results)):
        first.setdefault(job_id, got.at)
    return first


def _reason(before: Call, again: Call, first_result: float, records: Records) -> str:
    """Return why a job was billed again after the response to `before`."""
    caller = before.headers.get(WORKER_HEADER)
    number = int((caller or "-1").split(".")[0])
    ended = before.ended or before.started
    if _was_interrupted(before, ended, number, records):
        return INTERRUPTED
    # With a store the response is safe once it is stored.
    safe_at = ended if records.with_store else min(again.started, first_result)
    if _was_stopped(caller, before.started, safe_at + SLACK_S, records.processes):
        return WORKER_STOPPED
    if records.with_store:
        hit = _was_hit(records, ("s3",), number, ended - SLACK_S, again.started)
        return STORE_UNREACHABLE if hit else UNEXPLAINED
    # The same worker can get the job again after another one requeued it.
    has_others = len({process.name.split(".")[0] for process in records.processes}) > 1
    parts = ("broker", f"worker {number}")
    lost = _was_hit(records, parts, number, before.started - LATE_S, again.started + SLACK_S)
    return REDELIVERED if has_others and lost else UNEXPLAINED


def _was_interrupted(call: Call, ended: float, number: int, records: Records) -> bool:
    if call.disconnected or ended - call.started > MODEL_TIMEOUT_S - SLACK_S:
        return True
    for it in records.injected:
        meets = it.fault.who in (None, number)
        breaks = it.fault.kind in _BREAKS_CALLS and meets
        freezes = it.fault.kind == "worker frozen" and it.fault.who == number
        if (breaks or freezes) and it.started <= ended + SLACK_S and it.ended >= call.started - SLACK_S:
            return True
    return False


def _was_stopped(name: str | None, since: float, until: float, processes: Iterable[WorkerProcess]) -> bool:
    """Return whether this worker exited in this interval with unfinished jobs."""
    return any(
        process.name == name
        and process.ended is not None
        and since <= process.ended <= until
        and (process.ending == "killed" or process.exceeded_grace_period)
        for process in processes
    )


def _was_hit(records: Records, parts: Iterable[str], number: int, since: float, until: float) -> bool:
    """Return whether a fault affected one of these parts for this worker in this interval."""
    return any(
        it.fault.part in parts
        and it.fault.who in (None, number)
        and it.started <= until
        and it.ended >= since
        for it in records.injected
    )
