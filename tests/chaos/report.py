"""What a run came to, for a person: figures in tables, and what was wrong in so many words."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tests.chaos.scene import Life
from tests.chaos.verdict import Records, Verdict, calls_by_job, is_paid

_SHOWN = 20
_STORE = "vqa_result_store_operations_total"
_STORE_EVENTS = {
    "reused": "that were taken from the store",
    "stored_by_another": "that another worker had stored meanwhile (the race)",
    "store_failed": "that could not be stored",
}


def table(heading: str, rows: Iterable[tuple[str, object]]) -> str:
    """Names and figures below each other."""
    lines = [f"  {name:<58}{value!s:>10}" for name, value in rows]
    return "\n".join([heading, *(lines or ["  none"])])


def tables(records: Records, verdict: Verdict, noticed: Mapping[str, int]) -> str:
    """All of it."""
    faults = Counter(it.fault.kind for it in records.happened)
    parts = [
        table("Faults injected", sorted(faults.items())),
        table("What the workers noticed", noticed.items()),
        table("Jobs, by kind", sorted(Counter(asked.kind for asked in records.asked).items())),
        table("Results", _results(records).most_common()),
        table("Figures", _figures(records, verdict)),
        table("Paid for again, because", verdict.paid_again.most_common()),
        *_warnings(verdict),
    ]
    return "\n\n".join(parts)


def noticed(logs: Mapping[str, Sequence[Mapping[str, object]]], lives: Sequence[Life]) -> dict[str, int]:
    """How often the workers logged what the faults must have made them log."""
    paused = Counter(line["dependency"] for line in logs["consumption_paused"])
    broken = sum(line["reason"] == "connection_error" for line in logs["job_retried"])
    return {
        "workers killed": sum(life.code == -9 for life in lives),
        "workers that stopped when they were asked to": sum(life.ending == "asked to stop" for life in lives),
        "connections to the broker made": len(logs["rabbitmq_connected"]),
        "connections to the broker lost": len(logs["rabbitmq_connection_lost"]),
        "publishes that failed and were repeated": len(logs["publish_failed"]),
        "pauses for the model": paused["model"],
        "pauses for S3": paused["s3"],
        "times they resumed": len(logs["consumption_resumed"]),
        "retries": len(logs["job_retried"]),
        "retries after a connection was interrupted": broken,
    }


def _results(records: Records) -> Counter[str]:
    bodies = (got.json() for got in records.results)
    return Counter((body["error"] or {}).get("code", body["status"]) for body in bodies)


def _figures(records: Records, verdict: Verdict) -> list[tuple[str, object]]:
    jobs = len(records.asked)
    paid = sum(map(is_paid, records.calls))
    ambiguous = sum(life.total("vqa_ambiguous_calls_total") for life in records.lives)
    calls = len(records.calls)
    stored = [
        (f"answers {what}", round(sum(life.total(_STORE, result=result) for life in records.lives)))
        for result, what in _STORE_EVENTS.items()
        if records.with_store
    ]
    return [
        ("jobs", jobs),
        ("submissions", sum(len(asked.sent_at) for asked in records.asked)),
        ("submissions sent again, as their confirm did not come", sum(it.doubtful for it in records.asked)),
        ("faults injected", len(records.happened)),
        ("lost", len(verdict.lost)),
        ("wrong", len(verdict.wrong)),
        ("paid for again for no reason", len(verdict.plain)),
        ("paid for again with a reason, see below", verdict.paid_again.total() - len(verdict.plain)),
        ("ambiguous calls, as the workers counted them (1)", round(ambiguous)),
        ("duplicate results", len(verdict.duplicate_results)),
        ("dead letters", len(records.dead_letters)),
        ("calls", calls),
        ("calls that were answered", paid),
        ("calls that got no answer", sum(call.status is None for call in records.calls)),
        ("calls refused by a limit (429)", sum(call.status == 429 for call in records.calls)),
        ("calls per job that was called for", f"{calls / max(1, len(calls_by_job(records.calls))):.2f}"),
        ("workers started", len(records.lives)),
        ("workers that died by themselves", len(verdict.died)),
        *stored,
    ]


def _warnings(verdict: Verdict) -> list[str]:
    named = {
        "LOST": verdict.lost,
        "WRONG": verdict.wrong,
        "PAID FOR AGAIN FOR NO REASON": verdict.plain,
        "DIED": verdict.died,
        "Duplicate results (allowed: delivery is at least once)": verdict.duplicate_results,
    }
    return [_complaint(heading, lines) for heading, lines in named.items() if lines]


def _complaint(heading: str, lines: Sequence[str]) -> str:
    more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join([f"{heading}:", *(f"  {line}" for line in lines[:_SHOWN]), *more])


FOOTNOTE = (
    "(1) Scraped once a second and before each end; what a killed worker counted after that died with it. "
    "Calls that a killed\n    worker had made are in no counter."
)
