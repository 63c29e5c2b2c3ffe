"""Draw the charts of `docs/performance.md`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from tests.bench.contenders import WORKER
from tests.bench.results import Results

_COLOURS: Final = {
    WORKER: "#0b6e4f",
    "aio-pika": "#d1792b",
    "FastStream": "#4a6fa5",
    "Celery prefork 2": "#a23b72",
    "Celery threads": "#8d8741",
}
_PERCENTILES: Final = {"p50": ":", "p95": "--", "p99": "-"}
_LABELLED_PEER: Final = "aio-pika"
_INTEGERS_FROM: Final = 20
_STYLE: Final = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    # Text as text, and reproducible ids.
    "svg.fonttype": "none",
    "svg.hashsalt": "vqa-worker",
}


def draw(results: Results, folder: Path) -> list[str]:
    """Draw the charts of the measured scenarios; return the file names."""
    drawings = {"cpu": _cpu, "memory": _memory, "latency": _latency}
    measured = [name for name in drawings if results.cases(name)]
    return [save(folder, name, (8, 4.2), partial(drawings[name], results=results)) for name in measured]


def save(folder: Path, name: str, size: tuple[float, float], drawing: Callable[[Figure], None]) -> str:
    """Write a chart as SVG; return the file name."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        drawing(figure)
        figure.savefig(folder / f"{name}.svg", facecolor="white", metadata={"Date": None})
    return f"{name}.svg"


def _cpu(figure: Figure, results: Results) -> None:
    """Draw one panel for each image size: on a common axis the bars of 100 KB would be invisible."""
    cases = results.cases("cpu")
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        for place, who in enumerate(results.contenders("cpu")):
            spread = results.spread("cpu", who, case, "cpu_ms")
            if spread is not None:
                around = [[spread.median - spread.low], [spread.high - spread.median]]
                axes.bar(
                    place, spread.median, color=_COLOURS.get(who), label=who, yerr=around, ecolor="#444444"
                )
                _label(axes, place, spread.high, spread.median)
        axes.set_title(case, fontsize=10)
        axes.set_xticks([])
        axes.margins(y=0.1)
    panels[0].set_ylabel("CPU ms per job")
    figure.suptitle("CPU per job by size of the image: less is better")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)


def _memory(figure: Figure, results: Results) -> None:
    axes = figure.subplots()
    for who in results.contenders("memory"):
        points = []
        for case in results.cases("memory"):
            in_flight, _, size = case.partition(" × ")
            spread = results.spread("memory", who, case, "peak_mb")
            if size == "10 MB" and spread is not None:
                points.append((int(in_flight), spread.median))
                if who in (WORKER, _LABELLED_PEER):
                    _label(axes, int(in_flight), spread.median, spread.median)
        if points:
            axes.plot(*zip(*points, strict=True), color=_COLOURS.get(who), marker="o", label=who)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.1)
    axes.set_xlabel("jobs in flight, a image of 10 MB each")
    axes.set_ylabel("peak MB")
    figure.suptitle("Peak memory while the model thinks: less is better")
    figure.legend(loc="outside lower center", ncols=5)


def _latency(figure: Figure, results: Results) -> None:
    axes = figure.subplots()
    for who in results.contenders("latency"):
        cases = [it for it in results.cases("latency") if results.spread("latency", who, it, "p50")]
        if len(cases) > 1:
            _curves(axes, results, who, sorted(cases, key=lambda it: int(it.rstrip("%"))))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("load, % of the most that the contender managed")
    axes.set_ylabel("ms added to the API's time (logarithmic)")
    figure.suptitle("Time added, by load: less is better")
    figure.legend(loc="outside lower center", ncols=2)


def _curves(axes: Axes, results: Results, who: str, cases: list[str]) -> None:
    loads = [int(it.rstrip("%")) for it in cases]
    for percentile, style in _PERCENTILES.items():
        spreads = [results.spread("latency", who, it, percentile) for it in cases]
        values = [it.median for it in spreads if it is not None]
        label = f"{who}, {percentile}"
        axes.plot(loads, values, style, color=_COLOURS.get(who), marker="o", markersize=4, label=label)


def _label(axes: Axes, x: float, y: float, value: float) -> None:
    """Write a value above its marker."""
    shown = f"{value:,.0f}" if value >= _INTEGERS_FROM else f"{value:.1f}"
    axes.annotate(shown, (x, y), (0, 4), textcoords="offset points", ha="center", fontsize=8)
