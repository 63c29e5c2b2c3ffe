"""The metrics of a new worker after jobs with every outcome."""

import asyncio
import platform
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.model_simulator.behavior import Answer, Error, Hang, Malformed, Outcome, Reset
from deploy.local.stack import Stack
from tests.conftest import BUCKET, PutImage, picture
from tests.running import Client, Reply, Worker, until
from worker import __version__
from worker.settings.model import JOB_TIMEOUT_CEILING_S

LINK = "https://images.example.com/a-name-for-nobody.png?sig=a-signature-for-nobody"
SECRETS = ("a-question-for-nobody", "a-name-for-nobody", "a-signature-for-nobody", "a-note-for-nobody")
MAX_CONCURRENCY = 16

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Reported:
    """The metrics of a worker after its jobs, and the jobs' results."""

    exposition: str
    log: str
    before: Mapping[str, Mapping[Labels, float]]
    after: Mapping[str, Mapping[Labels, float]]
    results: Mapping[str, dict[str, Any]]
    models: tuple[str, ...]
    images: tuple[bytes, ...]
    api_key: str

    def values(self, name: str) -> dict[tuple[str, ...], float]:
        """Return the samples of a metric by label values, in alphabetical order of the labels."""
        return {
            tuple(value for _, value in sorted(labels)): value for labels, value in self.after[name].items()
        }

    def counted(self, name: str) -> dict[tuple[str, ...], float]:
        """Return the samples of a counter without those that are 0."""
        return {labels: value for labels, value in self.values(name).items() if value}

    def sum_of(self, field: str, names: Iterable[str]) -> float:
        """Return the sum of a field of the results' usage."""
        return sum(self.results[name]["usage"][field] or 0 for name in names)


ANSWERED = ("two images", "after a 500", "after a reset", "after a malformed response", "after a 429")


@pytest.fixture(scope="module")
async def reported(stack: Stack, put_image: PutImage, tmp_path_factory: pytest.TempPathFactory) -> Reported:
    images = picture(), picture("JPEG", (100, 100))
    async with (
        Worker.running(
            stack,
            tmp_path_factory.mktemp("metrics"),
            VQA_MAX_ATTEMPTS="2",
            VQA_MODEL_TIMEOUT="3",
            VQA_MAX_CONCURRENCY=str(MAX_CONCURRENCY),
            VQA_LOG_LEVEL="debug",
        ) as worker,
        Client.of(stack, worker) as client,
    ):
        before = _samples(worker.get("/metrics")[1])
        jobs: dict[str, dict[str, Any]] = {
            "two images": {"images": [put_image(images[0]), put_image(images[1])]},
            "other model": {"model": stack.model.models[1]},
            "unknown model": {"model": 'evil"} 1\nvqa_jobs_total{x="'},
            "missing image": {"images": [f"s3://{BUCKET}/a-name-for-nobody"]},
            "rejected": {},
            "empty": {},
            "exhausted": {},
            "after a 500": {},
            "after a reset": {},
            "after a malformed response": {},
            "after a 429": {},
        }
        outcomes: dict[str, Outcome] = {
            "other model": Answer(usage="no_cost"),
            "rejected": Error(status=422, message="a-note-for-nobody"),
            "empty": Answer(text="", reasoning_content="a-note-for-nobody"),
            "exhausted": Hang(),
            "after a 500": Error(status=500, message="a-note-for-nobody"),
            "after a reset": Reset(),
            "after a malformed response": Malformed(how="not_json"),
            "after a 429": Error(status=429, headers={"Retry-After": "0.1"}),
        }
        results = [_result_of(client, stack, name, job, outcomes.get(name)) for name, job in jobs.items()]
        # Concurrent failures could be an outage, and jobs that wait after a 429 could start: each of
        # these jobs runs alone.
        at_once = len(jobs) - sum(name.startswith("after") for name in jobs)
        replies = await asyncio.gather(*results[:at_once])
        replies += [await result for result in results[at_once:]]
        await client.publish(b"a-note-for-nobody", message_id="unreadable", timestamp=int(time.time()))
        await client.result("unreadable")
        await until(lambda: worker.metric("vqa_jobs_total") == len(jobs) + 1, "all jobs are counted")
        exposition = worker.get("/metrics")[1]
        return Reported(
            exposition=exposition,
            log=worker.output(),
            before=before,
            after=_samples(exposition),
            results={name: reply.body for name, reply in zip(jobs, replies, strict=True)},
            models=stack.model.models,
            images=images,
            api_key=stack.model.api_key,
        )


async def _result_of(
    client: Client, stack: Stack, name: str, job: dict[str, Any], outcome: Outcome | None
) -> Reply:
    """Return the result of a job with this outcome at its first call, or in its last attempt."""
    job_id = uuid.uuid4().hex
    question = f"a-question-for-nobody {job_id}"
    if outcome is not None:
        stack.model.play(outcome, marker=question)
    fields = {"id": job_id, "question": question, "images": [LINK], "metadata": {"x": "a-note-for-nobody"}}
    attempts: dict[str, Any] = {"vqa-attempts": 1} if name == "exhausted" else {}
    # Two messages have a timestamp: this one and the invalid one.
    timed = {"timestamp": int(time.time())} if name == "two images" else {}
    await client.publish({**fields, **job}, headers=attempts, **timed)
    return await client.result(job_id)


def _samples(exposition: str) -> dict[str, dict[Labels, float]]:
    """Return the name, labels and value of every sample."""
    samples: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return samples


def test_the_jobs_have_the_expected_outcomes(reported: Reported) -> None:
    codes = {name: body["error"] and body["error"]["code"] for name, body in reported.results.items()}
    assert codes == {
        **dict.fromkeys((*ANSWERED, "other model")),
        "unknown model": "invalid_job",
        "missing image": "image_not_found",
        "rejected": "model_rejected",
        "empty": "empty_answer",
        "exhausted": "attempts_exhausted",
    }


def test_jobs_are_counted_by_status_error_and_model(reported: Reported) -> None:
    first, second = reported.models
    assert reported.counted("vqa_jobs_total") == {
        # error, model, status
        ("", first, "succeeded"): 5,
        ("", second, "succeeded"): 1,
        ("invalid_job", "unknown", "failed"): 2,
        ("image_not_found", first, "failed"): 1,
        ("model_rejected", first, "failed"): 1,
        ("empty_answer", first, "failed"): 1,
        ("attempts_exhausted", first, "failed"): 1,
    }


def test_retries_and_dead_letters_are_counted_by_reason(reported: Reported) -> None:
    assert reported.counted("vqa_retries_total") == {
        ("http_500",): 1,
        ("connection_error",): 1,
        ("malformed_response",): 1,
    }
    assert reported.counted("vqa_dead_letters_total") == {("attempts_exhausted",): 1, ("invalid_job",): 1}


def test_durations_are_observed_once_per_job(reported: Reported) -> None:
    first, second = reported.models
    assert reported.values("vqa_job_duration_seconds_count") == {
        # model, status
        (first, "succeeded"): 5,
        (second, "succeeded"): 1,
        (first, "failed"): 4,
        ("unknown", "failed"): 2,
    }
    assert reported.values("vqa_job_duration_seconds_sum")[(first, "failed")] >= 3
    assert reported.values("vqa_job_queue_seconds_count") == {(): 2}
    assert 0 <= reported.values("vqa_job_queue_seconds_sum")[()] < 120


def test_stages_are_observed_each_time_a_job_enters_them(reported: Reported) -> None:
    first, second = reported.models
    # Ten jobs, three of them twice (retries), and one that started again after a 429.
    assert reported.values("vqa_stage_duration_seconds_count") == {
        # model, stage
        (first, "wait"): 13,
        (second, "wait"): 1,
        (first, "fetch"): 13,
        (second, "fetch"): 1,
        (first, "model"): 12,
        (second, "model"): 1,
        (first, "publish"): 12,
        (second, "publish"): 1,
        ("unknown", "publish"): 2,
    }


def test_tokens_and_costs_match_the_results(reported: Reported) -> None:
    first, second = reported.models
    paid = (*ANSWERED, "empty")
    assert reported.values("vqa_tokens_total") == {
        (first, "prompt"): reported.sum_of("prompt_tokens", paid),
        (first, "completion"): reported.sum_of("completion_tokens", paid),
        (second, "prompt"): reported.sum_of("prompt_tokens", ["other model"]),
        (second, "completion"): reported.sum_of("completion_tokens", ["other model"]),
    }
    assert reported.sum_of("cost_usd", paid) > 0
    assert reported.values("vqa_cost_usd_total") == {
        (first,): pytest.approx(reported.sum_of("cost_usd", paid)),
        (second,): 0,
    }


CALLS = {"200": 6, "422": 1, "429": 1, "500": 1, "timeout": 1, "connection": 1, "malformed": 1}


def test_model_requests_are_counted_by_outcome(reported: Reported) -> None:
    first, second = reported.models
    assert reported.counted("vqa_model_requests_total") == {
        **{(code, first): count for code, count in CALLS.items()},
        ("200", second): 1,
    }
    # The timeout, the reset and the malformed response.
    assert reported.counted("vqa_ambiguous_calls_total") == {(first,): 3}


def test_model_requests_have_the_names_and_labels_of_opentelemetry(reported: Reported) -> None:
    first, second = reported.models
    duration = reported.after["gen_ai_client_operation_duration_seconds_count"]
    assert duration == {
        **{_call(first, error_type="" if code == "200" else code): count for code, count in CALLS.items()},
        _call(second, error_type=""): 1,
    }
    assert reported.after["gen_ai_client_token_usage_count"] == {
        _call(model, gen_ai_token_type=kind): count
        for model, count in ((first, 6), (second, 1))
        for kind in ("input", "output")
    }
    assert reported.after["gen_ai_client_token_usage_sum"] == {
        _call(model, gen_ai_token_type=theirs): reported.values("vqa_tokens_total")[model, ours]
        for model in (first, second)
        for ours, theirs in (("prompt", "input"), ("completion", "output"))
    }


def _call(model: str, **labels: str) -> Labels:
    common = {
        "gen_ai_operation_name": "chat",
        "gen_ai_provider_name": "127.0.0.1",
        "gen_ai_request_model": model,
    }
    return frozenset({**common, **labels}.items())


def test_opentelemetry_s_metrics_have_its_recommended_buckets(reported: Reported) -> None:
    assert _buckets(reported, "gen_ai_client_token_usage") == [*(4.0**n for n in range(14)), float("inf")]
    recommended = [0.01 * 2**n for n in range(14)]
    assert _buckets(reported, "gen_ai_client_operation_duration_seconds")[:14] == pytest.approx(recommended)


def test_the_buckets_of_job_durations_cover_the_longest_job(reported: Reported) -> None:
    for name in (
        "vqa_job_duration_seconds",
        "vqa_stage_duration_seconds",
        "gen_ai_client_operation_duration_seconds",
    ):
        assert _buckets(reported, name)[-2] >= JOB_TIMEOUT_CEILING_S


def _buckets(reported: Reported, name: str) -> list[float]:
    limits = {float(dict(labels)["le"]) for labels in reported.after[f"{name}_bucket"]}
    return sorted(limits)


def test_only_loaded_bytes_are_counted(reported: Reported) -> None:
    assert reported.values("vqa_image_bytes_total") == {("inline",): sum(map(len, reported.images))}


def test_gauges_show_current_values(reported: Reported) -> None:
    assert reported.before["vqa_concurrency_limit"] == {frozenset(): MAX_CONCURRENCY}
    # A 429 lowered the limit, which may have recovered since.
    assert 1 <= reported.values("vqa_concurrency_limit")[()] <= MAX_CONCURRENCY
    assert reported.values("vqa_jobs_in_flight") == reported.values("vqa_concurrency_in_use") == {(): 0}
    assert reported.before["vqa_job_queue_wait_max_seconds"] == {frozenset(): 0}
    assert 0 < reported.values("vqa_job_queue_wait_max_seconds")[()] < 120
    for samples in (reported.before, reported.after):
        assert samples["vqa_dependency_up"] == {
            frozenset({("dependency", dependency)}): 1 for dependency in ("model", "s3", "rabbitmq")
        }


def test_build_info_is_exposed(reported: Reported) -> None:
    assert reported.values("vqa_build_info") == {(platform.python_version(), __version__): 1}


def test_the_counters_of_a_new_worker_are_0(reported: Reported) -> None:
    counts = {
        name: samples
        for name, samples in reported.before.items()
        if name.startswith(("vqa_", "gen_ai_")) and name.endswith(("_total", "_count", "_sum"))
    }
    assert sum(value for samples in counts.values() for value in samples.values()) == 0


def test_series_used_in_alerts_exist_from_the_start(reported: Reported) -> None:
    """`increase` does not see the first count of a new series."""
    for name in (
        "vqa_jobs_total",
        "vqa_retries_total",
        "vqa_dead_letters_total",
        "vqa_cost_usd_total",
        "vqa_tokens_total",
        "vqa_ambiguous_calls_total",
    ):
        assert reported.before[name].keys() == reported.after[name].keys(), name


def test_without_a_tenant_field_no_metric_has_a_tenant_label(reported: Reported) -> None:
    assert [name for name in reported.after if name.startswith("vqa_tenant_")] == []


def test_there_are_no_created_series(reported: Reported) -> None:
    assert [name for name in reported.after if name.endswith("_created")] == []


def test_prometheus_can_parse_the_exposition(reported: Reported) -> None:
    for family in text_string_to_metric_families(reported.exposition):
        assert family.documentation, family.name
        assert family.type in ("counter", "gauge", "histogram"), family.name


def test_neither_metrics_nor_logs_contain_questions_or_secrets(reported: Reported, stack: Stack) -> None:
    """The level is debug, at which libraries log requests."""
    assert "botocore" in reported.log
    for text in (reported.exposition, reported.log):
        for secret in (*SECRETS, reported.api_key, stack.s3.secret_key, "evil", "data:image", "[simulated"):
            assert secret not in text
