"""What the records of a run say: pure, so that it can be shown to find what it is there to find."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from deploy.local.model_simulator.calls import Call
from tests.chaos.backend import Got, by_job
from tests.chaos.faults import Happened
from tests.chaos.jobs import Asked, job_of
from tests.chaos.scene import MODEL_TIMEOUT_S, WORKER_HEADER, Life

# How late what follows from a fault can show: a result that is read late, a connection found dead late.
SLACK_S: Final = 2.0
LATE_S: Final = 30.0
UNDELIVERABLE: Final = "vqa-undeliverable-to"

# Why a job was paid for again. The first three cannot be helped; what has no such reason is a bug.
CUT_OFF: Final = "the answer before was interrupted or timed out on its way"
DIED: Final = "the worker that had the answer was killed or cut off"
ELSEWHERE: Final = "its connection was lost, and another worker got the job meanwhile"
NO_STORE: Final = "the store was unreachable"
SUBMITTED: Final = "it was submitted again"
PLAIN: Final = "for no reason"

# Those that can take an answer away that the model has given. (What hangs is not answered, hence not paid.)
_BREAKS_CALLS: Final = frozenset(
    {"model restarted", "model connections reset", "model unreachable", "model silent"}
)


@dataclass(frozen=True)
class Records:
    """All that is known of a run when it is over."""

    asked: Sequence[Asked]
    results: Sequence[Got]
    dead_letters: Sequence[Got]
    calls: Sequence[Call]
    happened: Sequence[Happened]
    lives: Sequence[Life]
    private_queue: str
    with_store: bool
    began: float = 0.0
    """The beginning of the run, from which the times in complaints count."""

    def story_of(self, job_id: str) -> str:
        """When a job was sent, called for and answered, in seconds from the beginning."""
        events = [(at, "sent") for asked in self.asked if asked.id == job_id for at in asked.sent_at]
        events += [
            (call.started, f"call by {call.headers.get(WORKER_HEADER)}: {call.status}")
            for call in calls_by_job(self.calls).get(job_id, [])
        ]
        events += [(got.at, "result") for named, got in by_job(list(self.results)) if named == job_id]
        return "; ".join(f"{at - self.began:.1f} {what}" for at, what in sorted(events))


@dataclass
class Verdict:
    """What there was to find."""

    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    paid_again: Counter[str] = field(default_factory=Counter)
    """How often a job was paid for again, by the reason."""
    plain: list[str] = field(default_factory=list)
    duplicate_results: list[str] = field(default_factory=list)
    died: list[str] = field(default_factory=list)
    """Workers that ended by themselves, or not as they should."""

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.wrong or self.plain or self.died)


def judge(records: Records) -> Verdict:
    """Hold every job's results and calls against what they must be."""
    verdict = Verdict()
    _judge_results(records, verdict)
    _judge_dead_letters(records, verdict)
    _judge_payments(records, verdict)
    expected = {"killed": -9, "asked to stop": 0}
    for life in records.lives:
        if life.code != expected.get(life.ending or ""):
            verdict.died.append(f"worker {life.name}, {life.ending}, ended with {life.code}")
    return verdict


def is_paid(call: Call) -> bool:
    """Whether the simulator gave a full answer, whoever got it."""
    return call.status == 200 and call.played in (None, "answer") and call.ended is not None


def calls_by_job(calls: Iterable[Call]) -> dict[str, list[Call]]:
    """The calls for each job, in the order in which they began."""
    found = defaultdict(list)
    for call in sorted(calls, key=lambda call: call.started):
        if (job_id := job_of(call.question)) is not None:
            found[job_id].append(call)
    return found


def _judge_results(records: Records, verdict: Verdict) -> None:
    results = defaultdict(list)
    for job_id, got in by_job(list(records.results)):
        results[job_id].append(got)
    for asked in records.asked:
        found = results.pop(asked.id, [])
        missing = len(asked.sent_at) - len(found)
        if missing > 0:
            story = records.story_of(asked.id)
            verdict.lost.append(f"{asked.id} ({asked.kind}): {missing} of {len(asked.sent_at)}: {story}")
        more = len(found) - len(asked.sent_at) - asked.doubtful
        if more > 0:
            story = records.story_of(asked.id)
            verdict.duplicate_results.append(f"{asked.id} ({asked.kind}): {more} more: {story}")
        verdict.wrong += [f"{asked.id} ({asked.kind}): {it}" for it in _faults_of(asked, found, records)]
    verdict.wrong += [f"a result that nobody asked for: {job_id}" for job_id in results]


def _faults_of(asked: Asked, found: Iterable[Got], records: Records) -> list[str]:
    faults = []
    for got in found:
        faults.append(asked.fault_of(got.json()))
        if got.correlation_id != f"for {asked.id}":
            faults.append(f"the correlation id {got.correlation_id}")
        if (got.queue == records.private_queue) != (asked.reply_to == records.private_queue):
            is_marked = got.headers.get(UNDELIVERABLE) == asked.reply_to and asked.elsewhere
            faults.append(None if is_marked else f"a result in {got.queue}")
    return [fault for fault in faults if fault]


def _judge_dead_letters(records: Records, verdict: Verdict) -> None:
    """None is missing, and none is there that should not be; one may be there twice, as a result may."""
    bodies = Counter(got.body for got in records.dead_letters)
    expected = {asked.body: asked for asked in records.asked if asked.dies}
    for body, asked in expected.items():
        if not bodies[body]:
            verdict.lost.append(f"{asked.id} ({asked.kind}): the dead letter")
    stray = [body for body in bodies if body not in expected]
    verdict.wrong += [f"a dead letter: {body[:100]!r}" for body in stray]


def _judge_payments(records: Records, verdict: Verdict) -> None:
    asked_by_id = {asked.id: asked for asked in records.asked}
    seen_at = _first_seen(records.results)
    for job_id, calls in calls_by_job(records.calls).items():
        asked, paid = asked_by_id.get(job_id), [call for call in calls if is_paid(call)]
        if asked is None:
            verdict.wrong.append(f"a call for a job that nobody asked: {job_id}")
            continue
        reasons = _reasons(asked, paid, seen_at.get(job_id, float("inf")), records)
        verdict.paid_again.update(reasons)
        if PLAIN in reasons:
            verdict.plain.append(f"{job_id} ({asked.kind}): {records.story_of(job_id)}")


def _reasons(asked: Asked, paid: Sequence[Call], first_result: float, records: Records) -> list[str]:
    """Why a job was paid for again, each time. Without a store each submission may be paid for, once."""
    messages = 1 if records.with_store else max(1, len(asked.sent_at) + asked.doubtful)
    reasons = [SUBMITTED] * (min(messages, len(paid)) - 1)
    # Which of the messages a call is for cannot be seen: it is for one of those whose last call ended badly.
    last = list(paid[:messages])
    for again in paid[messages:]:
        found = [(_reason(before, again, first_result, records), before) for before in last]
        reason, before = next((it for it in found if it[0] is not PLAIN), found[0])
        last.remove(before)
        last.append(again)
        reasons.append(reason)
    return reasons


def _first_seen(results: Iterable[Got]) -> Mapping[str | None, float]:
    first: dict[str | None, float] = {}
    for job_id, got in by_job(list(results)):
        first.setdefault(job_id, got.at)
    return first


def _reason(before: Call, again: Call, first_result: float, records: Records) -> str:
    """Why a job was paid for again after `before` had been answered."""
    caller = before.headers.get(WORKER_HEADER)
    number = int((caller or "-1").split(".")[0])
    ended = before.ended or before.started
    if _was_cut_off(before, ended, number, records):
        return CUT_OFF
    # With a store the answer is safe as soon as it has been written there.
    safe_at = ended if records.with_store else min(again.started, first_result)
    if _died(caller, before.started, safe_at + SLACK_S, records.lives):
        return DIED
    if records.with_store:
        hit = _hit(records, ("s3",), number, ended - SLACK_S, again.started)
        return NO_STORE if hit else PLAIN
    # Also if it was the same worker in the end: the other one can have given the job back meanwhile.
    has_others = len({life.name.split(".")[0] for life in records.lives}) > 1
    parts = ("broker", f"worker {number}")
    lost = _hit(records, parts, number, before.started - LATE_S, again.started + SLACK_S)
    return ELSEWHERE if has_others and lost else PLAIN


def _was_cut_off(call: Call, ended: float, number: int, records: Records) -> bool:
    if call.disconnected or ended - call.started > MODEL_TIMEOUT_S - SLACK_S:
        return True
    for it in records.happened:
        meets = it.fault.who in (None, number)
        breaks = it.fault.kind in _BREAKS_CALLS and meets
        freezes = it.fault.kind == "worker frozen" and it.fault.who == number
        if (breaks or freezes) and it.began <= ended + SLACK_S and it.ended >= call.started - SLACK_S:
            return True
    return False


def _died(name: str | None, since: float, until: float, lives: Iterable[Life]) -> bool:
    """Whether this worker ended in the time given, other than with everything done."""
    return any(
        life.name == name
        and life.ended is not None
        and since <= life.ended <= until
        and (life.ending == "killed" or life.was_cut_off)
        for life in lives
    )


def _hit(records: Records, parts: Iterable[str], number: int, since: float, until: float) -> bool:
    """Whether something happened to one of these parts, for this worker, in the time given."""
    return any(
        it.fault.part in parts and it.fault.who in (None, number) and it.began <= until and it.ended >= since
        for it in records.happened
    )
