"""Render the findings as tables and as `docs/scaling.md`."""

from pathlib import Path
from statistics import median
from string import Template
from typing import Final

from tests.bench.contenders import ROOT, WORKER
from tests.bench.results import Results
from tests.bench.tables import number, table
from tests.scaling import study
from tests.scaling.findings import Findings
from tests.scaling.record import Summary, difference
from tests.scaling.release import Release
from tests.scaling.scaled_object import Rules
from tests.slow.helm.rendering import keda, render

_PAGE: Final = Path(__file__).with_name("page.md")
_PERFORMANCE: Final = ROOT / "docs" / "performance" / "figures.json"

# A job in the table of bottlenecks; the prices are the example of VQA_PRICES.
IMAGE_MB: Final = 1.0
TOKENS: Final = (1600, 200)
USD_PER_MILLION: Final = (0.35, 0.40)
# Amazon S3, per partitioned prefix ("Best practices design patterns: optimizing S3 performance").
S3_GETS_PER_S: Final = 5500


def tables(findings: Findings) -> str:
    """Return a summary for the terminal."""
    parts = (_run(findings), _costs(findings), _sizes(findings), _limits(findings))
    return "\n\n".join(parts) + "\n"


def page(findings: Findings) -> str:
    """Return the documentation page."""
    run, costs = findings.run, findings.costs
    scaler = Release.default(pods=1).scaler
    text = Template(_PAGE.read_text()).substitute(
        machine=findings.about["machine"],
        software=findings.about["software"],
        factor=f"{run.factor:g}",
        pods=run.pods,
        concurrency=run.concurrency,
        call_s=f"{run.call_s:g}",
        cluster_call_s=f"{run.call_s * run.factor:g}",
        jobs=f"{run.real.summary.jobs:,}",
        calls=f"{run.calls:,}",
        interrupted=len(run.interrupted),
        open_calls=sum(run.interrupted),
        start_low=number(min(run.start_s)),
        start_high=number(max(run.start_s)),
        drain=f"{run.real.summary.drain_s / run.real.summary.ideal_drain_s:.2f}",
        difference=f"{_difference(findings):.0%}",
        run=_run(findings),
        polling=f"{scaler.polling_s:g}",
        cooldown=f"{scaler.cooldown_s:g}",
        window=f"{scaler.down.stabilization_window_seconds:g}",
        value=f"{scaler.value:g}",
        up=_policies(scaler.up),
        down=_policies(scaler.down),
        provider=study.PROVIDER,
        provider_pods=study.PROVIDER // int(scaler.value),
        call_simulated=f"{study.CALL_S:g}",
        start_simulated=f"{study.START_S:g}",
        limits=_limits(findings),
        tokens=f"{TOKENS[0]:,} and {TOKENS[1]}",
        prices=f"{USD_PER_MILLION[0]} and {USD_PER_MILLION[1]}",
        job_usd=f"{_job_usd():.5f}".rstrip("0"),
        broker_ms=number(costs.broker_cpu_ms),
        broker_per_core=f"{round(1000 / costs.broker_cpu_ms, -2):,.0f}",
        broker_pod_kb=f"{costs.broker_pod_kb:.0f}",
        connections=f"{costs.connections:g}",
        measured_jobs=f"{costs.jobs:,}",
        image_kb=f"{costs.image_bytes / 1000:.0f}",
        costs=_costs(findings),
        worker_ms=number(_worker_ms()),
        s3_gets=f"{S3_GETS_PER_S:,}",
        sizes=_sizes(findings),
        over_limit=_over_limit(findings),
        peak=_variants(findings, "peak"),
        waves=_variants(findings, "waves"),
    )
    return text.rstrip() + "\n"


def _run(findings: Findings) -> str:
    real, simulated = findings.run.real.summary, findings.run.simulated.summary
    rows = [
        _pair("maximum pods", real.max_replicas, simulated.max_replicas),
        _pair("pods started, including restarts", real.starts, simulated.starts),
        _pair("largest backlog", real.max_backlog, simulated.max_backlog),
        _pair("first job to first ready pod, s", real.first_pod_s, simulated.first_pod_s),
        _pair("last job to last answer, s", real.drain_s, simulated.drain_s),
        _pair("the same, ideal, s", real.ideal_drain_s, simulated.ideal_drain_s),
        _pair("last answer to last pod stopped, s", real.scale_down_s, simulated.scale_down_s),
        _pair("pod-seconds", real.pod_s, simulated.pod_s),
        ["idle", f"{real.idle:.0%}", f"{simulated.idle:.0%}"],
    ]
    return table(["", "real", "simulated"], rows)


def _costs(findings: Findings) -> str:
    it = findings.costs
    rows = [
        ["job: CPU of the worker, ms", number(it.worker_cpu_ms)],
        ["job: CPU of RabbitMQ, ms", number(it.broker_cpu_ms)],
        ["job: CPU of the S3 server, ms", number(it.s3_cpu_ms)],
        ["pod: start, s (median)", number(median(findings.run.start_s))],
        ["pod: peak resident memory, MB", number(it.worker_mb)],
        ["pod: connections to RabbitMQ", f"{it.connections:g}"],
        ["pod: memory of RabbitMQ for them, KB", number(it.broker_pod_kb)],
    ]
    return table(["", "measured"], rows)


def _difference(findings: Findings) -> float:
    run = findings.run
    return difference(run.real.samples, run.simulated.samples, lambda it: it.replicas)


def _sizes(findings: Findings) -> str:
    rows = []
    for pods, recording in findings.sizes.items():
        it = recording.summary
        rows.append(
            [
                f"{pods:,}",
                f"{study.capacity_per_s(pods, _concurrency()):,.0f}",
                f"{it.jobs:,}",
                f"{it.max_backlog:,}",
                f"{it.all_ready_s:.0f}",
                f"{it.drain_s:.0f} ({it.drain_s / it.ideal_drain_s:.2f} × ideal)",
                f"{it.wait_s:.0f}",
                f"{it.pod_s / 3600:,.1f}",
                f"{it.idle:.0%}",
            ]
        )
    header = [
        "pods", "capacity, jobs/s", "jobs", "largest backlog", "all pods ready after, s",
        "drained after the last job in, s", "mean wait, s", "pod-hours", "idle",
    ]  # fmt: skip
    return table(header, rows)


def _limits(findings: Findings) -> str:
    columns = [_limits_of(pods, findings) for pods in study.SIZES]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return table(["", *(f"{pods:,} pods" for pods in study.SIZES)], rows)


def _limits_of(pods: int, findings: Findings) -> dict[str, str]:
    costs, calls = findings.costs, pods * _concurrency()
    per_s = study.capacity_per_s(pods, _concurrency())
    return {
        "concurrent model requests": f"{calls:,}",
        f"times the limit of {study.PROVIDER}": f"{calls / study.PROVIDER:,.1f}",
        "jobs per second": f"{per_s:,.0f}",
        "workers: total cores": _scaled(per_s * _worker_ms() / 1000),
        "workers: memory requested, GB": _scaled(pods * _pod_gb()),
        "RabbitMQ: cores for the jobs": _scaled(per_s * costs.broker_cpu_ms / 1000),
        "RabbitMQ: connections": f"{pods * costs.connections:,.0f}",
        "RabbitMQ: memory for them, MB": _scaled(pods * costs.broker_pod_kb / 1000),
        "S3: GETs per second": f"{per_s:,.0f}",
        "S3: share of one prefix": f"{per_s / S3_GETS_PER_S:.0%}",
        "network: images in, MB/s": f"{per_s * IMAGE_MB:,.0f}",
        "network: base64 out to the model API, MB/s": f"{per_s * IMAGE_MB * 4 / 3:,.0f}",
        "model cost, USD per hour": f"{per_s * 3600 * _job_usd():,.0f}",
    }


def _over_limit(findings: Findings) -> str:
    rows = [
        [
            str(pods),
            f"{pods * _concurrency():,}",
            f"{it.rate_limited:,}",
            f"{it.drain_s:.0f}",
            f"{it.wait_s:.0f}",
            f"{it.pod_s:,.0f}",
            f"{it.idle:.0%}",
        ]
        for pods, it in findings.over_limit.items()
    ]
    header = [
        "maximum pods",
        "concurrent requests",
        "429s",
        "drained in, s",
        "mean wait, s",
        "pod-seconds",
        "idle",
    ]
    return table(header, rows)


def _variants(findings: Findings, load: str) -> str:
    rows = [_variant(it.name, it.summary) for it in findings.variants if it.load == load]
    header = ["", "largest backlog", "mean wait, s", "pods started", "pod-seconds", "idle"]
    return table(header, rows)


def _variant(name: str, it: Summary) -> list[str]:
    figures = [
        f"{it.max_backlog:,}",
        number(it.wait_s),
        str(it.starts),
        f"{it.pod_s:,.0f}",
        f"{it.idle:.0%}",
    ]
    return [name, *figures]


def _policies(rules: Rules) -> str:
    units = {"Pods": "", "Percent": " %"}
    found = [f"{it.value}{units[it.type]} in {it.period_seconds:g} s" for it in rules.policies]
    return " or ".join(found)


def _pair(name: str, real: float, simulated: float) -> list[str]:
    return [name, *(f"{it:,}" if isinstance(it, int) else number(it) for it in (real, simulated))]


def _scaled(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else number(value)


def _concurrency() -> int:
    return Release.default(pods=1).concurrency


def _worker_ms() -> float:
    """Return the CPU time of the worker for a job with an image of 1 MB, from docs/performance.md."""
    spread = Results.load(_PERFORMANCE).spread("cpu", WORKER, "1 MB", "cpu_ms")
    assert spread is not None
    return spread.median


def _pod_gb() -> float:
    """Return the memory request of the chart, in GB."""
    mebibytes = render(keda()).container["resources"]["requests"]["memory"].removesuffix("Mi")
    return int(mebibytes) * 2**20 / 1e9


def _job_usd() -> float:
    return sum(count * price for count, price in zip(TOKENS, USD_PER_MILLION, strict=True)) / 1e6
