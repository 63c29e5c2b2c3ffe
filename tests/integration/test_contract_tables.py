"""The tables of the contract match the code and a running worker."""

import base64
import json
import re
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from prometheus_client import Counter, Gauge, Histogram, Info
from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel

from deploy.local.stack import Stack
from tests.running import ROOT, Worker
from vqa_worker.messages.decoding import InvalidJobError, decode
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.job import RESERVED_PARAMS, Job
from vqa_worker.messages.result import JobFailure, Result, Timings, Usage
from worker.observability import metrics
from worker.rabbitmq.topology import QueueSpec, Topology

CONTRACT = ROOT.parent / "shared" / "contract.md"
pytestmark = pytest.mark.skipif(not CONTRACT.exists(), reason="the contract is not next to this copy")

# The contract also lists planned features: everything implemented must be in it, but not the reverse.

# Later additions, which the contract allows: codes and metrics that readers may not know.
ADDED_CODES = {ErrorCode.CANCELLED, ErrorCode.RESULT_TOO_LARGE}
ADDED_METRICS: dict[str, tuple[str, set[str]]] = {
    "vqa_result_store_operations_total": ("counter", {"result"}),
    "vqa_jobs_requeued_total": ("counter", set()),
    "vqa_redelivered_jobs_total": ("counter", {"result"}),
    "vqa_concurrency_in_use": ("gauge", set()),
    "vqa_event_loop_lag_seconds": ("histogram", set()),
    "vqa_job_queue_wait_max_seconds": ("gauge", set()),
    "vqa_tenant_jobs_total": ("counter", {"tenant", "status"}),
    "vqa_tenant_tokens_total": ("counter", {"tenant", "model", "type"}),
    "vqa_tenant_cost_usd_total": ("counter", {"tenant", "model"}),
}

KINDS = {Counter: "counter", Gauge: "gauge", Histogram: "histogram", Info: "info"}
GEN_AI_LABELS = {
    "gen_ai_client_token_usage": {
        "gen_ai_operation_name",
        "gen_ai_provider_name",
        "gen_ai_request_model",
        "gen_ai_token_type",
    },
    "gen_ai_client_operation_duration_seconds": {
        "gen_ai_operation_name",
        "gen_ai_provider_name",
        "gen_ai_request_model",
        "error_type",
    },
}


def table(heading: str) -> list[list[str]]:
    """Return the rows of the first table under a heading, each a list of its cells."""
    section = re.split(r"^#+ ", CONTRACT.read_text(), flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(heading)]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def quoted(text: str) -> list[str]:
    """Return the texts between backticks."""
    return re.findall(r"`([^`]+)`", text)


def test_the_fields_of_a_job() -> None:
    named = [name for first, *_ in table("Job") for name in quoted(first)]
    assert set(Job.model_fields) <= set(named)


def test_params_that_are_passed_on_and_rejected_params() -> None:
    (row,) = [row for row in table("Job") if row[0] == "`params`"]
    passed_on, kept_back = (quoted(part) for part in row[2].split(" except "))
    taken = decode(_job_with(dict.fromkeys(passed_on, 1)), None, 10_000)
    assert taken.params == dict.fromkeys(passed_on, 1)
    assert sorted(kept_back) == sorted(RESERVED_PARAMS)
    for name in kept_back:
        with pytest.raises(InvalidJobError, match=name):
            decode(_job_with({name: 1}), None, 10_000)


def _job_with(params: dict[str, int]) -> bytes:
    return json.dumps({"id": "1", "question": "?", "images": ["x"], "params": params}).encode()


def test_the_fields_of_a_result() -> None:
    (text,) = re.findall(r"```json\n(.*?)```", CONTRACT.read_text(), re.DOTALL)
    example = json.loads(text)
    assert "`usage` gains `cached_tokens`, `reasoning_tokens`" in CONTRACT.read_text()
    example["usage"] |= {"cached_tokens": 0, "reasoning_tokens": 0}
    for name, model in (("usage", Usage), ("timings", Timings)):
        example[name] = _built(example[name], model)
    example = _built(example, Result)
    assert json.loads(Result.model_validate(example).to_body()) == example


def _built(example: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Return the example without announced fields; it has all others, in the same order."""
    built = {name: value for name, value in example.items() if name in model.model_fields}
    assert list(built) == list(model.model_fields)
    return built


def test_the_fields_of_an_error() -> None:
    (example,) = re.findall(r'`(\{"code": .*?\})`', CONTRACT.read_text(), re.DOTALL)
    assert list(json.loads(example.replace("\n", " "))) == list(JobFailure.model_fields)


def test_the_error_codes() -> None:
    named = [name for first, *_ in table("Error codes") for name in quoted(first)]
    assert set(ErrorCode) - ADDED_CODES <= set(named)


def _rows_of_queues() -> dict[str, dict[str, Any]]:
    """Yield each queue of the table and its arguments; `<n>` in the retry queue's name is 30."""
    queues = {}
    for names, arguments in table("Queues"):
        pairs = (item.replace("<n>", "30").split(": ", 1) for item in quoted(arguments))
        values = {name: _value(text) for name, text in pairs}
        for name in quoted(names):
            queues[name.replace("<n>", "30")] = {"x-queue-type": "quorum", **values}
    return queues


def _value(text: str) -> str | int:
    text = text.strip('"')
    return int(text) if text.isdecimal() else text


def _specified(queues: list[QueueSpec]) -> dict[str, dict[str, Any]]:
    return {queue.name: dict(queue.arguments) for queue in queues}


def test_the_queues_and_their_arguments() -> None:
    topology = Topology(
        jobs="vqa.jobs",
        results="vqa.results",
        dead_letters="vqa.jobs.dead",
        retry_delays_s=[30],
        reply_exchange="",
        jobs_exchange="",
        declare=True,
    )
    assert _specified(topology.queues()) == _rows_of_queues()


def test_the_queues_on_the_broker(stack: Stack, worker: Worker) -> None:
    expected = {
        name.replace("vqa.jobs", worker.jobs_queue, 1)
        .replace("vqa.results", worker.results_queue, 1)
        .replace("retry.30s", "retry.1s"): _renamed(arguments, worker)
        for name, arguments in _rows_of_queues().items()
    }
    prefix = worker.jobs_queue.removesuffix(".jobs")
    queues = [queue for queue in _management(stack, "/api/queues/%2F") if queue["name"].startswith(prefix)]

    assert {queue["name"]: queue["arguments"] for queue in queues} == expected
    assert all(queue["durable"] for queue in queues)
    assert not any(queue["auto_delete"] or queue["exclusive"] for queue in queues)


def _renamed(arguments: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Return the arguments for the worker's own names and a delay of one second."""
    renamed = {
        name: value.replace("vqa.jobs", worker.jobs_queue) if isinstance(value, str) else value
        for name, value in arguments.items()
    }
    return {**renamed, "x-message-ttl": 1000} if "x-message-ttl" in renamed else renamed


def _management(stack: Stack, path: str) -> Any:
    url = urlsplit(stack.rabbitmq.url)
    credentials = base64.b64encode(f"{unquote(url.username or '')}:{unquote(url.password or '')}".encode())
    request = urllib.request.Request(  # noqa: S310 - the local broker
        f"{stack.rabbitmq.management_url}{path}", headers={"Authorization": f"Basic {credentials.decode()}"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310 - see above
        return json.load(response)


def _declared_metrics() -> Iterator[tuple[str, str, MetricWrapperBase]]:
    """Yield the worker's metrics: exposed name, type, and the metric itself."""
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            kind = KINDS[type(metric)]
            suffix = {"counter": "_total", "info": "_info"}.get(kind, "")
            (family,) = metric.describe()
            yield f"{family.name}{suffix}", kind, metric


def _metrics_of_the_table() -> dict[str, tuple[str, set[str]]]:
    """Yield each metric of the table, its type and its labels."""
    found = {}
    for names, kind, about in table("Metrics"):
        for name in quoted(names):
            # A label's values are in brackets.
            labels = set(quoted(re.sub(r"\([^)]*\)", "", about))) | GEN_AI_LABELS.get(name, set())
            # An info metric's labels are its content.
            found[name] = (kind, set() if kind == "info" else labels)
    return found


def test_the_metrics_with_their_types_and_labels() -> None:
    expected = {**_metrics_of_the_table(), **ADDED_METRICS}
    # The library has no public API for label names.
    declared = {
        name: (kind, set(metric._labelnames))  # noqa: SLF001
        for name, kind, metric in _declared_metrics()
    }
    assert declared == {name: expected.get(name) for name in declared}


def test_the_metrics_that_a_worker_exposes(worker: Worker) -> None:
    shown = dict(re.findall(r"^# TYPE ((?:vqa|gen_ai)_\w+) (\w+)$", worker.get("/metrics")[1], re.MULTILINE))
    metrics = {**_metrics_of_the_table(), **ADDED_METRICS}
    expected = {name: kind.replace("info", "gauge") for name, (kind, _) in metrics.items()}
    assert shown == {name: expected.get(name) for name in shown}
    assert shown.keys() == {name for name, *_ in _declared_metrics()}


def test_the_content_of_the_build_info(worker: Worker) -> None:
    (row,) = [row for row in table("Metrics") if row[0] == "`vqa_build_info`"]
    labels = re.search(r"^vqa_build_info\{(.*)\} 1\.0$", worker.get("/metrics")[1], re.MULTILINE)
    assert labels is not None
    assert sorted(re.findall(r"(\w+)=", labels[1])) == sorted(quoted(row[2]))


def test_the_values_of_labels_that_the_table_lists(worker: Worker) -> None:
    """Check the values of `stage` (wait, fetch, …) that the shared worker has exposed so far."""
    exposition = worker.get("/metrics")[1]
    for names, _, about in table("Metrics"):
        for label, listed in re.findall(r"`(\w+)` \(([^)]*)\)", about):
            allowed = set(re.findall(r"\w+", listed))
            for name in quoted(names):
                shown = set(
                    re.findall(rf'^{name}(?:_count)?{{[^}}]*\b{label}="(\w*)"', exposition, re.MULTILINE)
                )
                if label == "error":
                    allowed = {*ErrorCode, ""}
                if label == "code":
                    shown = {value for value in shown if not value.isdecimal()}
                assert shown <= allowed, (name, label)
