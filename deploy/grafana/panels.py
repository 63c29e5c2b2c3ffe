"""What the dashboard shows, row by row; `build.py` makes Grafana's JSON of it.

In the queries `@here` stands for the workers that the variables at the top of the dashboard choose, `@model`
for them and the models chosen, and `@broker(NAME, SELECTOR)` for a metric of the broker by either name.
"""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from worker.errors import NEUTRAL_FAILURES, SERVICE_FAILURES

Kind: TypeAlias = Literal["lines", "stack", "bars", "number", "states"]
Unit: TypeAlias = Literal["s", "short", "percentunit", "currencyUSD", "Bps", "bytes", "cps", "reqps", "none"]


@dataclass(frozen=True)
class Query:
    """PromQL, and what its series are called; `{{label}}` stands for a label's value."""

    expr: str
    legend: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture.

    Attributes:
        about: for whoever asks what it means: a sentence or two.
        width: of the 24 that are a whole row.
        least, most: the ends of the scale; it goes lower than `least` if the values do.
        good, bad: for numbers and ratios, from where on it is green and red.
        since: shows this time, such as the day so far, whatever the dashboard shows.
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
    # Those that succeeded have no error: the question mark lets them in.
    counted = f'sum(increase({_JOBS}, error=~"({_BAD})?"}}[{window}]))'
    return f"{good} / {counted}"


def _rate(series: str, *by: str) -> str:
    """How much a counter grows in a second, by some labels."""
    grouped = f" by ({', '.join(by)})" if by else ""
    return f"sum{grouped} (rate({series}[$__rate_interval]))"


def _quantile(quantile: float, histogram: str, *by: str, window: str = "$__rate_interval") -> str:
    """A quantile of a histogram given with its selector, such as `name{label="value"}`."""
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
            about="Good ÷ (good + bad) in the time shown. Bad is what the service is to blame for: attempts"
            " used up, deadlines missed. What no service could answer does not count: see docs/metrics.md.",
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
            about="Jobs that came to an end in the time shown, well or not.",
            unit="short",
            queries=(Query(f"sum(increase({_JOBS}}}[$__range]))", ""),),
            kind="number",
            width=4,
            decimals=0,
        ),
        Panel(
            title="Time per job, p95",
            about="From a job's delivery to its ack: 95 of 100 successful jobs took no longer.",
            unit="s",
            queries=(Query(_quantile(0.95, _DURATION, window="$__range"), ""),),
            kind="number",
            width=4,
        ),
        Panel(
            title="Time in the queue, p95",
            about="From a message's timestamp to its delivery. Publishers have to set the timestamp.",
            unit="s",
            queries=(Query(_quantile(0.95, _QUEUE_TIME, window="$__range"), ""),),
            kind="number",
            width=4,
            good=0,
            bad=300,
        ),
        Panel(
            title="Cost today",
            about="US dollars since midnight, whatever time the dashboard shows.",
            unit="currencyUSD",
            queries=(Query("sum(increase(vqa_cost_usd_total{@model}[$__range]))", ""),),
            kind="number",
            width=4,
            since="now/d",
        ),
        Panel(
            title="Alerts",
            about="Alerts of deploy/prometheus/vqa-worker.rules.yaml that fire now; docs/runbook.md helps.",
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
            about="The same over time. The objective is 99 %.",
            unit="percentunit",
            queries=(Query(_success_ratio("$__rate_interval"), "good ÷ (good + bad)"),),
            least=0.9,
            most=1,
            good=_OBJECTIVE,
            bad=0.95,
        ),
        Panel(
            title="Time per job",
            about="From the delivery of a job to its ack, successful jobs.",
            unit="s",
            queries=_quantiles(_DURATION),
        ),
        Panel(
            title="Time in the queue",
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
            about="What waits in the queue, what the workers have, what waits for its retry, and what"
            " somebody must look at.",
            unit="short",
            queries=(
                Query('@broker(messages_ready, queue="$queue")', "waiting"),
                Query('@broker(messages_unacked, queue="$queue")', "with workers"),
                Query(r'sum(@broker(messages, queue=~"$queue\\.retry\\..+"))', "waiting for a retry"),
                Query('@broker(messages, queue="$queue.dead")', "dead letters"),
            ),
        ),
        Panel(
            title="Consumers and workers",
            about="A worker that takes jobs is a consumer, or a few after its limit has moved. One that is"
            " paused, starts or drains is none.",
            unit="short",
            queries=(
                Query('@broker(consumers, queue="$queue")', "consumers"),
                Query("count(vqa_build_info{@here})", "workers"),
            ),
        ),
        Panel(
            title="Oldest wait",
            about="How long the oldest job had waited among those delivered lately. Falls to 0 in a minute or"
            " two when nothing is delivered.",
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
            about="Failures are told apart by whose they are: the service's use up the error budget.",
            unit="cps",
            queries=(
                Query(_rate(f'{_JOBS}, status="succeeded"}}'), "succeeded"),
                Query(_rate(f'{_JOBS}, error=~"{_BAD}"}}'), "failed, the service's"),
                Query(
                    _rate(f'{_JOBS}, status="failed", error!~"{_BAD}|{_NOTHING}"}}'),
                    "failed, the job's own",
                ),
                Query(_rate(f'{_JOBS}, error=~"{_NOTHING}"}}'), "cancelled"),
            ),
            kind="stack",
        ),
        Panel(
            title="Failed jobs by error",
            about="The codes are those of a result's `error.code`.",
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
            about="`unknown` are those that could not be read, or named a model that is not allowed.",
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
            title="Where a job's time goes",
            about="Mean seconds per job: waiting for a slot, fetching images, the API, publishing.",
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
            about="95 of 100 times a stage took no longer.",
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
            about="Bytes of images handed to the API. With VQA_IMAGE_DELIVERY=link none come through here.",
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
            about="Tokens as the API counts them, images included.",
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
            about="US dollars an hour at the present rate: the provider's own figure, else from VQA_PRICES.",
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
            about="Needs VQA_TENANT_FROM and VQA_TENANTS; all that are not listed are `other`.",
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
            title="Cost in the time shown",
            about="US dollars.",
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
            about="All that was spent in the time shown, divided by the jobs that succeeded.",
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
            title="Tokens per call, p95",
            about="95 of 100 calls had no more; what goes in (with the images) and what comes out.",
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
            title="Calls by answer",
            about="HTTP status, or what came in its place.",
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
            title="Time per call",
            about="Successful calls, from the first byte sent to the whole answer.",
            unit="s",
            queries=_quantiles(_CALL),
        ),
        Panel(
            title="Refused for their rate (429)",
            about="Share of all calls. The limit follows it; over a fifth for long means too many workers.",
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
            about="How many jobs may call at once (429 lowers it, answers raise it), how many do, and how"
            " many are here in all. All workers together.",
            unit="short",
            queries=(
                Query("sum(vqa_concurrency_limit{@here})", "limit"),
                Query("sum(vqa_concurrency_in_use{@here})", "in use"),
                Query("sum(vqa_jobs_in_flight{@here})", "in flight"),
            ),
        ),
        Panel(
            title="Up or paused",
            about="Paused if any worker is: it takes no jobs until the dependency answers again.",
            unit="none",
            queries=(Query("min by (dependency) (vqa_dependency_up{@here})", "{{dependency}}"),),
            kind="states",
        ),
        Panel(
            title="Calls that may have been paid in vain",
            about="Timed out or cut off: whether the provider bills them, nobody here knows.",
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
            about="Attempts that failed and wait at the broker for the next.",
            unit="cps",
            queries=(Query(_rate("vqa_retries_total{@here}", "reason") + " > 0", "{{reason}}"),),
            kind="stack",
        ),
        Panel(
            title="Dead letters by reason",
            about="Messages that a person must look at: `vqa-worker dlq list`.",
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
            title="Given back, and the result store",
            about="Jobs put back uncounted (a pause, a drain, no slot), and what the result store did"
            " (VQA_RESULT_STORE).",
            unit="cps",
            queries=(
                Query(_rate("vqa_jobs_requeued_total{@here}"), "given back"),
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
            about="Cores in use, by worker. One is all that a worker can use, nearly.",
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
            about="How late the loop is. Over some tenths of a second something blocks it, or the CPU limit"
            " throttles it.",
            unit="s",
            queries=(
                Query(_quantile(0.99, "vqa_event_loop_lag_seconds{@here}", "instance"), "{{instance}}"),
            ),
            width=6,
        ),
        Panel(
            title="Open files and tasks",
            about="Both go back to where they were when the work is done; what only climbs is a leak.",
            unit="short",
            queries=(
                Query(f"process_open_fds{{@here}} {_OF_WORKERS}", "{{instance}} files"),
                Query("python_asyncio_tasks{@here}", "{{instance}} tasks"),
            ),
            width=6,
        ),
        Panel(
            title="Up for",
            about="Seconds since the worker that started last did so.",
            unit="s",
            queries=(Query(f"min(time() - (process_start_time_seconds{{@here}} {_OF_WORKERS}))", ""),),
            kind="number",
            width=6,
        ),
        Panel(
            title="Versions",
            about="How many workers run which version.",
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
