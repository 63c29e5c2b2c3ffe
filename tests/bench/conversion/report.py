"""Render the measurements as tables and as `docs/images.md`."""

from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Final

from tests.bench.contenders import WORKER
from tests.bench.conversion.sources import RECIPES
from tests.bench.results import Results, Spread
from tests.bench.tables import number, table
from worker.model.image_tokens import image_tokens
from worker.settings import Settings

# Who or what is measured.
PLAIN: Final = "plain Pillow"
SCAN, BASE64 = "scan", "base64"
ALL_LIBRARIES: Final = "all libraries"
IDLE: Final = "without jobs"
EDGES: Final = (2048, 1568, 1024, 768)
MODELS: Final = {"Qwen2.5-VL": "Qwen/Qwen2.5-VL-7B-Instruct", "gpt-4o": "gpt-4o"}

# Sources in the table of the largest pictures.
_EXAMPLES: Final = {
    "JPEG on its side, 50 MP": "JPEG, BMP, PNG",
    "HEIC, 12 MP": "HEIC, AVIF",
    "JPEG 2000, 8 MP": "JPEG 2000",
    "GIF, a photo, 2 MP": "GIF",
    "TIFF (LZW), A4 at 300 dpi, colour": "TIFF",
}

_PAGE: Final = Path(__file__).parents[1] / "images_page.md"
_NONE: Final = "–"
_MAX_OTHERS: Final = 0.05
# Defaults of the Helm chart: settings.imageProcesses and settings.imageDecodeBytes.
_CHART_PROCESSES: Final = 2
_SMALL_DECODE_BYTES: Final = 256 * 1024 * 1024


def tables(results: Results) -> str:
    """Return all tables, for the terminal."""
    parts = [_machine(results)]
    parts += [f"## {title}\n\n{text}" for title, text in _sections(results)]
    return "\n\n".join(parts) + "\n"


def page(results: Results) -> str:
    """Return the documentation page."""
    sections = dict(_sections(results))
    base_mb, idle_mb = _base_mb(results), _median(results, "mix", IDLE, "", "idle_mb")
    buffer_mb = _default("image_buffer_bytes") / 1e6
    text = Template(_PAGE.read_text()).substitute(
        machine=_machine(results),
        rounds=1 + max(it.round for it in results.measurements if it.scenario == "conversion"),
        conversions=sections["Conversions"],
        largest=sections["Largest pictures"],
        scans=sections["Images that are sent unchanged"],
        throughput=sections["Throughput and event loop lag"],
        processes=sections["Memory of a process"],
        edges=sections["Tokens"],
        took=results.about["took"],
        photo_sizes=", ".join(
            f"{name.removeprefix('size of ')} {size} MB"
            for name, size in results.about.items()
            if name.startswith("size of ")
        ),
        idle=f"{idle_mb:.0f}",
        buffer=f"{buffer_mb:.0f}",
        base=f"{base_mb:.0f}",
        processes_in_chart=_CHART_PROCESSES,
        sum=f"{idle_mb + buffer_mb + _default('image_decode_bytes') / 1e6 + _CHART_PROCESSES * base_mb:.0f}",
        decode=f"{_default('image_decode_bytes') / 1e6:.0f}",
        others=_others(results),
        lag=_lag_sentence(results),
    )
    return text.rstrip() + "\n"


def edge_case(name: str, edge: int | None) -> str:
    """Return the name of a measurement of a picture, scaled to an edge."""
    return f"{name}, {edge or _NONE}"


def _machine(results: Results) -> str:
    about = results.about
    return (
        f"Machine: {about['machine']}; load average before the run: {about['load before']}.\n"
        f"Software: {about['software']} ({about['decoders']})."
    )


def _sections(results: Results) -> Iterable[tuple[str, str]]:
    yield "Conversions", _conversions(results)
    yield "Largest pictures", _largest(results)
    yield "Images that are sent unchanged", _scans(results)
    if results.cases("mix"):
        yield "Throughput and event loop lag", _throughput(results)
    yield "Memory of a process", _processes(results)
    yield "Tokens", _edges(results)


def _conversions(results: Results) -> str:
    rows = []
    for case in results.cases("conversion"):
        row = [case, number(_median(results, "conversion", WORKER, case, "source_kb") / 1000)]
        for figure in ("cpu_s", "time_s", "peak_mb"):
            row.append(_shown(results.spread("conversion", WORKER, case, figure)))
            row.append(_shown(results.ratio("conversion", case, figure, WORKER, PLAIN)))
        row.append(number(_median(results, "conversion", WORKER, case, "reserved_mb")))
        row += [
            number(_median(results, "conversion", who, case, "sent_kb") / 1000) for who in (WORKER, PLAIN)
        ]
        rows.append(row)
    header = [
        "source",
        "MB",
        "CPU, s",
        "times plain",
        "time, s",
        "times plain",
        "peak, MB",
        "times plain",
        "reserved, MB",
        "result, MB",
        "plain, MB",
    ]
    return table(header, rows)


def _largest(results: Results) -> str:
    """Return the table of what the memory for decoding is enough for, without a budget of pixels."""
    budgets = (_default("image_decode_bytes"), float(_SMALL_DECODE_BYTES))
    rows = []
    for recipe in RECIPES:
        if recipe.name not in _EXAMPLES or recipe.name not in results.cases("conversion"):
            continue
        reserved, source = (
            _median(results, "conversion", WORKER, recipe.name, figure) * scale / recipe.pixels
            for figure, scale in (("reserved_mb", 1e6), ("source_kb", 1e3))
        )
        largest = [f"{budget / reserved / 1e6:.0f}" for budget in budgets]
        rows.append([_EXAMPLES[recipe.name], f"{reserved - source:.0f}", *largest])
    header = ["source", "bytes per pixel", *(f"megapixels with {it / 1024**2:.0f} MiB" for it in budgets)]
    return table(header, rows)


def _scans(results: Results) -> str:
    rows = []
    for case in results.cases("scan"):
        scan, base64 = (results.spread("scan", who, case, "cpu_us") for who in (SCAN, BASE64))
        ratio = results.ratio("scan", case, "cpu_us", SCAN, BASE64)
        rows.append([case, _shown(scan), _shown(base64), _shown(ratio)])
    return table(["image", "scan, µs", "base64, µs", "scan / base64"], rows)


def _throughput(results: Results) -> str:
    rows = []
    for who in results.contenders("mix"):
        figures = ("jobs_per_s", "worker_ms", "children_ms", "worker_mb", "children_mb")
        row = [who, *(_shown(results.spread("mix", who, "", it)) for it in figures)]
        rows.append(row)
    header = [
        "",
        "jobs/s",
        "worker, CPU ms per job",
        "processes, CPU ms per job",
        "worker, peak MB",
        "processes, peak MB",
    ]
    work = table(header, [row for row in rows if row[1] != _NONE])
    lags = []
    for who in results.contenders("mix"):
        row = [who]
        row += [
            _shown(results.spread("mix", who, "", it)) for it in ("lag_p50_ms", "lag_p99_ms", "lag_max_ms")
        ]
        over, timers, others = (
            results.spread("mix", who, "", it) for it in ("over_50_ms", "slow_timers", "others")
        )
        row += [
            _NONE if over is None else f"{over.high:.2%}",
            _NONE if timers is None else f"{timers.high:.0f}",
            _NONE if others is None else f"{others.high:.0%}",
        ]
        lags.append(row)
    lag = table(
        ["", "p50, ms", "p99, ms", "maximum, ms", "over 50 ms", "slow timers", "other programs"], lags
    )
    return f"{work}\n\n{lag}"


def _lag_sentence(results: Results) -> str:
    """Compare the lag with conversions to that without, both measured in the same run."""
    converting = [it for it in results.contenders("mix") if it.startswith("phone photos")]
    worst = max(_median(results, "mix", it, "", "lag_p99_ms") for it in converting)
    highest = max(
        spread.high
        for it in converting
        if (spread := results.spread("mix", it, "", "lag_max_ms")) is not None
    )
    return (
        f"While photos are converted, 99 of 100 polls are answered within {number(worst)} ms; the longest of"
        f" all rounds took {number(highest)} ms."
    )


def _others(results: Results) -> str:
    parts = [
        part
        for it in results.measurements
        for figure in ("others", "others_working")
        if (part := it.figures.get(figure)) is not None
    ]
    disturbed = sum(it > _MAX_OTHERS for it in parts)
    if not disturbed:
        return ""
    return (
        f"During {disturbed} of {len(parts)} measurements of throughput and lag, other programs used more"
        f" than {_MAX_OTHERS:.0%} of the CPUs.\n"
    )


def _processes(results: Results) -> str:
    rows = [
        [case, *(_shown(results.spread("process", WORKER, case, it)) for it in ("start_mb", "idle_mb"))]
        for case in results.cases("process")
    ]
    return table(["libraries for", "at the start, MB", "after a picture, MB"], rows)


def _base_mb(results: Results) -> float:
    return max(_median(results, "process", WORKER, case, "start_mb") for case in results.cases("process"))


def _edges(results: Results) -> str:
    rows: list[list[str]] = []
    without: dict[str, list[float]] = {}
    for case in results.cases("edge"):
        name, _, edge = case.rpartition(", ")
        width, height, kb, cpu = (
            _median(results, "edge", WORKER, case, it) for it in ("width", "height", "kb", "cpu_s")
        )
        tokens = [image_tokens(model, round(width), round(height)) or 0 for model in MODELS.values()]
        first = without.setdefault(name, [kb, *tokens])
        is_unchanged = [kb, *tokens] == first
        sent = [
            f"{now:,.0f}" + ("" if now == was else f" ({now / was:.0%})")
            for now, was in zip((kb, *tokens), first, strict=True)
        ]
        size = f"{width:.0f} × {height:.0f}"
        rows.append([name, edge, size, *sent, "unchanged" if is_unchanged else number(cpu)])
    names = [f"tokens, {it}" for it in MODELS]
    return table(["picture", "edge", "sent, pixels", "sent, KB", *names, "CPU, s"], rows)


def _default(name: str) -> float:
    return float(Settings.model_fields[name].default)


def _median(results: Results, scenario: str, who: str, case: str, figure: str) -> float:
    spread = results.spread(scenario, who, case, figure)
    assert spread is not None, (scenario, who, case, figure)
    return spread.median


def _shown(value: Spread | None) -> str:
    if value is None:
        return _NONE
    if number(value.low) == number(value.high):
        return number(value.median)
    return f"{number(value.median)} ({number(value.low)}–{number(value.high)})"
