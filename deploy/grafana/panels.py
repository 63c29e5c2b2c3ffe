"""The dashboard's rows and panels; `build.py` converts them to Grafana's JSON.

In queries, `@here` is replaced with the selector of the selected workers, `@model` with that of the selected
workers and models, and `@broker(NAME, SELECTOR)` with a RabbitMQ metric under either of its names.
"""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from worker.errors import NEUTRAL_FAILURES, SERVICE_FAILURES

Kind: TypeAlias = Literal["lines", "stack", "bars", "number", "states"]
Unit: TypeAlias = Literal["s", "short", "percentunit", "currencyUSD", "Bps", "bytes", "cps", "reqps", "none"]


@dataclass(frozen=True)
class Query:
    """A PromQL query and the legend of its series; `{{label}}` is replaced with the label's value."""

    expr: str
    legend: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel.

    Attributes:
        about: the panel's description.
        width: of the 24 grid columns of a row.
        least, most: ends of the scale; values below `least` extend it.
        good, bad: thresholds for green and red.
        since: overrides the dashboard's time range, for example with the current day.
    """

    title: str
    about: str
    unit: Unit
    queries: tuple[Query, ...]
    kind: Kind = "lines"
    width: int = 8
    decimals: int | None = None
    least: float = 0
    most: float | None = None
    good: float | None = None
    bad: float | None = None
    since: str | None = None


@dataclass(frozen=True)
class Row:
    """Panels side by side under a title."""

    title: str
    panels: tuple[Panel, ...]


_BAD: Final = "|".join(sorted(SERVICE_FAILURES))
_NOTHING: Final = "|".join(sorted(NEUTRAL_FAILURES))

_JOBS: Final = "vqa_jobs_total{@model"
_OBJECTIVE: Final = 0.99


def _success_ratio(window: str) -> str:
    good = f'sum(increase({_JOBS}, status="succeeded"}}[{window}]))'
    # Succeeded jobs have an empty error, which the question mark matches.
    counted = f'sum(increase({_JOBS}, error=~"({_BAD})?"}}[{window}]))'
    return f"{good} / {counted}"


def _rate(series: str, *by: str) -> str:
    """Return the per-second rate of a counter, grouped by labels."""
    grouped = f" by ({', '.join(by)})" if by else ""
    return f"sum{grouped} (rate({series}[$__rate_interval]))"


def _quantile(quantile: float, histogram: str, *by: str, window: str = "$__rate_interval") -> str:
    """Return a quantile of a histogram with a selector, such as `name{label="value"}`."""
    name, brace, selector = histogram.partition("{")
    labels = ", ".join(("le", *by))
    return (
        f"histogram_quantile({quantile}, sum by ({labels}) (rate({name}_bucket{brace}{selector}[{window}])))"
    )


def _quantiles(histogram: str) -> tuple[Query, ...]:
    return tuple(Query(_quantile(it, histogram), f"p{it * 100:.0f}") for it in (0.5, 0.95, 0.99))


_DURATION: Final = 'vqa_job_duration_seconds{@model, status="succeeded"}'
_QUEUE_TIME: Final = "vqa_job_queue_seconds{@here}"
_CALL: Final = (
    'gen_ai_client_operation_duration_seconds{@here, gen_ai_request_model=~"$model", error_type=""}'
)
_OF_WORKERS: Final = "and on (job, instance) vqa_build_info{@here}"

SERVICE: Final = Row(
    "Service level",
    (
        Panel(
            title="Success ratio",
            about="Good ÷ (good + bad) in the selected range. Bad: attempts used up, deadlines missed. Client"
            " errors are excluded: see docs/metrics.md.",
            unit="percentunit",
            queries=(Query(_success_ratio("$__range"), ""),),
            kind="number",
            width=4,
            decimals=2,
            good=_OBJECTIVE,
            bad=0.95,
        ),
        Panel(
            title="Jobs",
            about="Completed jobs in the selected range, succeeded or failed.",
            unit="short",
            queries=(Query(f"sum(increase({_JOBS}}}[$__range]))", ""),),
            kind="number",
            width=4,
            decimals=0,
        ),
        Panel(
            title="Job duration, p95",
            about="From a job's delivery to its ack; succeeded jobs.",
            unit="s",
            queries=(Query(_quantile(0.95, _DURATION, window="$__range"), ""),),
            kind="number",
            width=4,
        ),
        Panel(
            title="Queue wait, p95",
            about="From a message's timestamp to its delivery. Only messages with a timestamp.",
            unit="s",
            queries=(Query(_quantile(0.95, _QUEUE_TIME, window="$__range"), ""),),
            kind="number",
            width=4,
            good=0,
            bad=300,
        ),
        Panel(
            title="Cost today",
            about="USD since midnight, regardless of the selected range.",
            unit="currencyUSD",
            queries=(Query("sum(increase(vqa_cost_usd_total{@model}[$__range]))", ""),),
            kind="number",
            width=4,
            since="now/d",
        ),
        Panel(
            title="Alerts",
            about="Firing alerts of deploy/prometheus/vqa-worker.rules.yaml; see docs/runbook.md.",
            unit="short",
            queries=(
                Query(
                    'count(ALERTS{alertname=~"VqaWorker.+", alertstate="firing", namespace=~"$namespace"})'
                    " or vector(0)",
                    "",
                ),
            ),
            kind="number",
            width=4,
            decimals=0,
            good=0,
            bad=1,
        ),
        Panel(
            title="Success ratio",
            about="Success ratio over time. The objective is 99 %.",
            unit="percentunit",
            queries=(Query(_success_ratio("$__rate_interval"), "good ÷ (good + bad)"),),
            least=0.9,
            most=1,
            good=_OBJECTIVE,
            bad=0.95,
        ),
        Panel(
            title="Job duration",
            about="From a job's delivery to its ack; succeeded jobs.",
            unit="s",
            queries=_quantiles(_DURATION),
        ),
        Panel(
            title="Queue wait",
            about="From a message's timestamp to its delivery.",
            unit="s",
            queries=_quantiles(_QUEUE_TIME),
        ),
    ),
)

QUEUE: Final = Row(
    "Queue",
    (
        Panel(
            title="Messages",
            about="Messages in the jobs queue, in flight, in the retry queues, and in the dead-letter queue.",
            unit="short",
            queries=(
                Query('@broker(messages_ready, queue="$queue")', "ready"),
                Query('@broker(messages_unacked, queue="$queue")', "unacknowledged"),
                Query(r'sum(@broker(messages, queue=~"$queue\\.retry\\..+"))', "in retry"),
                Query('@broker(messages, queue="$queue.dead")', "dead letters"),
            ),
        ),
        Panel(
            title="Consumers and workers",
            about="A consuming worker has one consumer, or a few after its prefetch has changed. A paused,"
            " starting or draining worker has none.",
            unit="short",
            queries=(
                Query('@broker(consumers, queue="$queue")', "consumers"),
                Query("count(vqa_build_info{@here})", "workers"),
            ),
        ),
        Panel(
            title="Oldest queued job",
            about="Longest queue wait of the recently delivered jobs. Falls to 0 within two minutes when"
            " nothing is delivered.",
            unit="s",
            queries=(Query("max(vqa_job_queue_wait_max_seconds{@here})", "oldest"),),
        ),
    ),
)

JOBS: Final = Row(
    "Jobs",
    (
        Panel(
            title="Jobs by outcome",
            about="Service errors use up the error budget; client errors do not.",
            unit="cps",
            queries=(
                Query(_rate(f'{_JOBS}, status="succeeded"}}'), "succeeded"),
                Query(_rate(f'{_JOBS}, error=~"{_BAD}"}}'), "failed, service error"),
                Query(
                    _rate(f'{_JOBS}, status="failed", error!~"{_BAD}|{_NOTHING}"}}'),
                    "failed, client error",
                ),
                Query(_rate(f'{_JOBS}, error=~"{_NOTHING}"}}'), "cancelled"),
            ),
            kind="stack",
        ),
        Panel(
            title="Failed jobs by error",
            about="By the result's `error.code`.",
            unit="cps",
            queries=(
                Query(
                    _rate('vqa_jobs_total{@here, status="failed"}', "error") + " > 0",
                    "{{error}}",
                ),
            ),
            kind="stack",
        ),
        Panel(
            title="Jobs by model",
            about="`unknown`: jobs that are not readable, or with a model that is not allowed.",
            unit="cps",
            queries=(Query(_rate("vqa_jobs_total{@here}", "model"), "{{model}}"),),
            kind="stack",
        ),
    ),
)

STAGES: Final = Row(
    "Stages",
    (
        Panel(
            title="Time by stage",
            about="Mean seconds per job: waiting for a slot, fetching images, model request, publishing.",
            unit="s",
            queries=(
                Query(
                    _rate("vqa_stage_duration_seconds_sum{@model}", "stage")
                    + " / on () group_left () "
                    + _rate("vqa_job_duration_seconds_count{@model}"),
                    "{{stage}}",
                ),
            ),
            kind="stack",
        ),
        Panel(
            title="Stages, p95",
            about="95th percentile of each stage's duration.",
            unit="s",
            queries=(
                Query(
                    _quantile(0.95, "vqa_stage_duration_seconds{@model}", "stage"),
                    "{{stage}}",
                ),
            ),
        ),
        Panel(
            title="Images",
            about="Image bytes sent to the model API. 0 with VQA_IMAGE_DELIVERY=link.",
            unit="Bps",
            queries=(Query(_rate("vqa_image_bytes_total{@here}", "delivery"), "{{delivery}}"),),
        ),
    ),
)

COST: Final = Row(
    "Tokens and cost",
    (
        Panel(
            title="Tokens",
            about="Tokens reported by the model API, including image tokens.",
            unit="cps",
            queries=(
                Query(
                    _rate("vqa_tokens_total{@model}", "model", "type"),
                    "{{model}} {{type}}",
                ),
            ),
            kind="stack",
        ),
        Panel(
            title="Cost per hour, by model",
            about="USD per hour at the current rate, from the provider, else computed from VQA_PRICES.",
            unit="currencyUSD",
            queries=(
                Query(
                    _rate("vqa_cost_usd_total{@model}", "model") + " * 3600",
                    "{{model}}",
                ),
            ),
            kind="stack",
        ),
        Panel(
            title="Cost per hour, by tenant",
            about="Requires VQA_TENANT_FROM and VQA_TENANTS; tenants that are not listed are `other`.",
            unit="currencyUSD",
            queries=(
                Query(
                    _rate("vqa_tenant_cost_usd_total{@model}", "tenant") + " * 3600",
                    "{{tenant}}",
                ),
            ),
            kind="stack",
        ),
        Panel(
            title="Cost in selected range",
            about="USD by model.",
            unit="currencyUSD",
            queries=(
                Query(
                    "sum by (model) (increase(vqa_cost_usd_total{@model}[$__range]))",
                    "{{model}}",
                ),
            ),
            kind="number",
        ),
        Panel(
            title="Cost per job",
            about="Cost in the selected range divided by the number of succeeded jobs.",
            unit="currencyUSD",
            queries=(
                Query(
                    "sum(increase(vqa_cost_usd_total{@model}[$__range]))"
                    f' / sum(increase({_JOBS}, status="succeeded"}}[$__range]))',
                    "",
                ),
            ),
            kind="number",
            decimals=6,
        ),
        Panel(
            title="Tokens per model request, p95",
            about="Input tokens (including images) and output tokens.",
            unit="short",
            queries=(
                Query(
                    _quantile(
                        0.95,
                        'gen_ai_client_token_usage{@here, gen_ai_request_model=~"$model"}',
                        "gen_ai_token_type",
                    ),
                    "{{gen_ai_token_type}}",
                ),
            ),
        ),
    ),
)

PROVIDER: Final = Row(
    "Provider",
    (
        Panel(
            title="Model requests by status code",
            about="HTTP status code, or the kind of failure.",
            unit="reqps",
            queries=(
                Query(
                    _rate("vqa_model_requests_total{@model}", "code"),
                    "{{code}}",
                ),
            ),
            kind="stack",
        ),
        Panel(
            title="Model request latency",
            about="Successful requests, from the first byte sent to the complete response.",
            unit="s",
            queries=_quantiles(_CALL),
        ),
        Panel(
            title="Rate-limited requests (429)",
            about="Ratio of all model requests. Persistently above 20 %: too many workers for the quota.",
            unit="percentunit",
            queries=(
                Query(
                    _rate('vqa_model_requests_total{@model, code="429"}')
                    + " / "
                    + _rate("vqa_model_requests_total{@model}"),
                    "429",
                ),
            ),
            most=1,
            good=0,
            bad=0.2,
        ),
        Panel(
            title="Concurrency",
            about="Concurrency limit (lowered by 429, raised by successes), slots in use, and jobs in flight,"
            " of all workers.",
            unit="short",
            queries=(
                Query("sum(vqa_concurrency_limit{@here})", "limit"),
                Query("sum(vqa_concurrency_in_use{@here})", "in use"),
                Query("sum(vqa_jobs_in_flight{@here})", "in flight"),
            ),
        ),
        Panel(
            title="Dependency status",
            about="Paused if any worker is paused: it consumes no jobs until the dependency recovers.",
            unit="none",
            queries=(Query("min by (dependency) (vqa_dependency_up{@here})", "{{dependency}}"),),
            kind="states",
        ),
        Panel(
            title="Requests with unknown outcome",
            about="Timeouts, connection losses and cancellations: the provider may have billed them.",
            unit="cps",
            queries=(
                Query(
                    _rate("vqa_ambiguous_calls_total{@model}", "model"),
                    "{{model}}",
                ),
            ),
        ),
    ),
)

RETRIES: Final = Row(
    "Retries and dead letters",
    (
        Panel(
            title="Retries by reason",
            about="Failed attempts whose jobs wait in a retry queue.",
            unit="cps",
            queries=(Query(_rate("vqa_retries_total{@here}", "reason") + " > 0", "{{reason}}"),),
            kind="stack",
        ),
        Panel(
            title="Dead letters by reason",
            about="Messages moved to the dead-letter queue: `vqa-worker dlq list`.",
            unit="short",
            queries=(
                Query(
                    "sum by (reason) (increase(vqa_dead_letters_total{@here}[$__rate_interval]))",
                    "{{reason}}",
                ),
            ),
            kind="bars",
        ),
        Panel(
            title="Requeued jobs; result store",
            about="Jobs requeued without counting an attempt (pause, shutdown, no slot), and operations of"
            " the result store (VQA_RESULT_STORE).",
            unit="cps",
            queries=(
                Query(_rate("vqa_jobs_requeued_total{@here}"), "requeued"),
                Query(
                    _rate("vqa_result_store_operations_total{@here}", "result"),
                    "store: {{result}}",
                ),
            ),
        ),
    ),
)

PROCESS: Final = Row(
    "Process",
    (
        Panel(
            title="CPU",
            about="Cores in use, by worker. A worker uses little more than one.",
            unit="short",
            queries=(
                Query(
                    f"rate(process_cpu_seconds_total{{@here}}[$__rate_interval]) {_OF_WORKERS}",
                    "{{instance}}",
                ),
            ),
            width=6,
        ),
        Panel(
            title="Memory",
            about="Resident memory, by worker.",
            unit="bytes",
            queries=(Query(f"process_resident_memory_bytes{{@here}} {_OF_WORKERS}", "{{instance}}"),),
            width=6,
        ),
        Panel(
            title="Event loop lag, p99",
            about="Above a few tenths of a second: something blocks the loop, or the CPU limit throttles it.",
            unit="s",
            queries=(
                Query(_quantile(0.99, "vqa_event_loop_lag_seconds{@here}", "instance"), "{{instance}}"),
            ),
            width=6,
        ),
        Panel(
            title="Open files and tasks",
            about="Both return to their idle level after work; a steady increase is a leak.",
            unit="short",
            queries=(
                Query(f"process_open_fds{{@here}} {_OF_WORKERS}", "{{instance}} files"),
                Query("python_asyncio_tasks{@here}", "{{instance}} tasks"),
            ),
            width=6,
        ),
        Panel(
            title="Uptime",
            about="Seconds since the most recent start of a worker.",
            unit="s",
            queries=(Query(f"min(time() - (process_start_time_seconds{{@here}} {_OF_WORKERS}))", ""),),
            kind="number",
            width=6,
        ),
        Panel(
            title="Versions",
            about="Number of workers by version.",
            unit="short",
            queries=(
                Query(
                    "count by (version, python) (vqa_build_info{@here})", "{{version}} (Python {{python}})"
                ),
            ),
            kind="number",
            width=18,
        ),
    ),
)

ROWS: Final = (SERVICE, QUEUE, JOBS, STAGES, COST, PROVIDER, RETRIES, PROCESS)
