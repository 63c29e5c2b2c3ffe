"""Print a run's results: tables of figures and a list of errors."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tests.chaos.environment import WorkerProcess
from tests.chaos.evaluation import Evaluation, Records, calls_by_job, is_billed

_MAX_LINES = 20
_STORE = "vqa_result_store_operations_total"
_STORE_EVENTS = {
    "reused": "reused from the store",
    "stored_by_another": "stored by another worker in the meantime (race)",
    "store_failed": "not stored because of an error",
}


def table(heading: str, rows: Iterable[tuple[str, object]]) -> str:
    """Format names and figures, one per line."""
    lines = [f"  {name:<58}{value!s:>10}" for name, value in rows]
    return "\n".join([heading, *(lines or ["  none"])])


def tables(records: Records, evaluation: Evaluation, noticed: Mapping[str, int]) -> str:
    """Format the whole report."""
    faults = Counter(it.fault.kind for it in records.injected)
    parts = [
        table("Faults injected", sorted(faults.items())),
        table("Logged by the workers", noticed.items()),
        table("Jobs, by kind", sorted(Counter(job.kind for job in records.jobs).items())),
        table("Results", _results(records).most_common()),
        table("Figures", _figures(records, evaluation)),
        table("Billed again, by reason", evaluation.billed_again.most_common()),
        *_warnings(evaluation),
    ]
    return "\n\n".join(parts)


def noticed(
    logs: Mapping[str, Sequence[Mapping[str, object]]], processes: Sequence[WorkerProcess]
) -> dict[str, int]:
    """Count the workers' exits and log events that the faults cause."""
    paused = Counter(line["dependency"] for line in logs["consumption_paused"])
    broken = sum(line["reason"] == "connection_error" for line in logs["job_retried"])
    return {
        "workers killed": sum(process.code == -9 for process in processes),
        "workers stopped by SIGTERM": sum(process.ending == "SIGTERM" for process in processes),
        "broker connections opened": len(logs["rabbitmq_connected"]),
        "broker connections lost": len(logs["rabbitmq_connection_lost"]),
        "publishes repeated after an error": len(logs["publish_failed"]),
        "pauses for the model": paused["model"],
        "pauses for S3": paused["s3"],
        "resumed": len(logs["consumption_resumed"]),
        "retries": len(logs["job_retried"]),
        "retries after a connection error": broken,
    }


def _results(records: Records) -> Counter[str]:
    bodies = (got.json() for got in records.results)
    return Counter((body["error"] or {}).get("code", body["status"]) for body in bodies)


def _figures(records: Records, evaluation: Evaluation) -> list[tuple[str, object]]:
    jobs = len(records.jobs)
    billed = sum(map(is_billed, records.calls))
    ambiguous = sum(process.total("vqa_ambiguous_calls_total") for process in records.processes)
    calls = len(records.calls)
    stored = [
        (f"answers {what}", round(sum(process.total(_STORE, result=result) for process in records.processes)))
        for result, what in _STORE_EVENTS.items()
        if records.with_store
    ]
    return [
        ("jobs", jobs),
        ("submissions", sum(len(job.sent_at) for job in records.jobs)),
        ("submissions repeated after a lost confirm", sum(it.unconfirmed for it in records.jobs)),
        ("faults injected", len(records.injected)),
        ("lost", len(evaluation.lost)),
        ("wrong", len(evaluation.wrong)),
        ("billed again without a reason", len(evaluation.unexplained)),
        (
            "billed again with a reason, see below",
            evaluation.billed_again.total() - len(evaluation.unexplained),
        ),
        ("ambiguous calls counted by the workers (1)", round(ambiguous)),
        ("duplicate results", len(evaluation.duplicate_results)),
        ("dead letters", len(records.dead_letters)),
        ("calls", calls),
        ("calls answered", billed),
        ("calls not answered", sum(call.status is None for call in records.calls)),
        ("calls rejected with 429", sum(call.status == 429 for call in records.calls)),
        ("calls per job with a call", f"{calls / max(1, len(calls_by_job(records.calls))):.2f}"),
        ("workers started", len(records.processes)),
        ("workers crashed", len(evaluation.crashed)),
        *stored,
    ]


def _warnings(evaluation: Evaluation) -> list[str]:
    named = {
        "LOST": evaluation.lost,
        "WRONG": evaluation.wrong,
        "BILLED AGAIN WITHOUT A REASON": evaluation.unexplained,
        "CRASHED": evaluation.crashed,
        "Duplicate results (allowed: delivery is at least once)": evaluation.duplicate_results,
    }
    return [_section(heading, lines) for heading, lines in named.items() if lines]


def _section(heading: str, lines: Sequence[str]) -> str:
    more = [f"  and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else []
    return "\n".join([f"{heading}:", *(f"  {line}" for line in lines[:_MAX_LINES]), *more])


FOOTNOTE = "(1) Scraped once a second and before each exit; a killed worker's later counts are lost."
