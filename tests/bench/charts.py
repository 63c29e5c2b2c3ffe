"""The pictures of `docs/performance.md`."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from tests.bench.contenders import WORKER
from tests.bench.figures import Notebook

_COLOURS: Final = {
    WORKER: "#0b6e4f",
    "aio-pika": "#d1792b",
    "FastStream": "#4a6fa5",
    "Celery prefork 2": "#a23b72",
    "Celery threads": "#8d8741",
}
_PERCENTILES: Final = {"p50": ":", "p95": "--", "p99": "-"}
_SHOWN_PEER: Final = "aio-pika"
_WHOLE_FROM: Final = 20
LOOK: Final = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    # Text stays text, and the same figures give the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "vqa-worker",
}
Drawing = Callable[[Figure, Notebook], None]


def draw(notebook: Notebook, folder: Path, suffix: str = "svg") -> list[str]:
    """Draw what was measured; return the names of the files."""
    drawings: dict[str, Drawing] = {"cpu": _cpu, "memory": _memory, "latency": _latency}
    drawn = []
    with mpl.rc_context(LOOK):
        for name, drawing in drawings.items():
            if not notebook.cases(name):
                continue
            figure = Figure(figsize=(8, 4.2), layout="constrained")
            drawing(figure, notebook)
            file = f"{name}.{suffix}"
            metadata = {"Date": None} if suffix == "svg" else None
            figure.savefig(folder / file, dpi=110, facecolor="white", metadata=metadata)
            drawn.append(file)
    return drawn


def _cpu(figure: Figure, notebook: Notebook) -> None:
    """Bars from zero, a panel of its own for each size: next to 10 MB, those of 100 KB would not be seen."""
    cases = notebook.cases("cpu")
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        for place, who in enumerate(notebook.contenders("cpu")):
            spread = notebook.spread("cpu", who, case, "cpu_ms")
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
    figure.suptitle("CPU per job by size of the picture: less is better")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)


def _memory(figure: Figure, notebook: Notebook) -> None:
    axes = figure.subplots()
    for who in notebook.contenders("memory"):
        points = []
        for case in notebook.cases("memory"):
            in_flight, _, size = case.partition(" × ")
            spread = notebook.spread("memory", who, case, "peak_mb")
            if size == "10 MB" and spread is not None:
                points.append((int(in_flight), spread.median))
                if who in (WORKER, _SHOWN_PEER):
                    _label(axes, int(in_flight), spread.median, spread.median)
        if points:
            axes.plot(*zip(*points, strict=True), color=_COLOURS.get(who), marker="o", label=who)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.1)
    axes.set_xlabel("jobs in flight, a picture of 10 MB each")
    axes.set_ylabel("peak MB")
    figure.suptitle("Peak memory while the model thinks: less is better")
    figure.legend(loc="outside lower center", ncols=5)


def _latency(figure: Figure, notebook: Notebook) -> None:
    axes = figure.subplots()
    for who in notebook.contenders("latency"):
        cases = [it for it in notebook.cases("latency") if notebook.spread("latency", who, it, "p50")]
        if len(cases) > 1:
            _curves(axes, notebook, who, sorted(cases, key=lambda it: int(it.rstrip("%"))))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("load, % of the most that the contender managed")
    axes.set_ylabel("ms added to the API's time (logarithmic)")
    figure.suptitle("Time added, by load: less is better")
    figure.legend(loc="outside lower center", ncols=2)


def _curves(axes: Axes, notebook: Notebook, who: str, cases: list[str]) -> None:
    loads = [int(it.rstrip("%")) for it in cases]
    for percentile, style in _PERCENTILES.items():
        spreads = [notebook.spread("latency", who, it, percentile) for it in cases]
        values = [it.median for it in spreads if it is not None]
        label = f"{who}, {percentile}"
        axes.plot(loads, values, style, color=_COLOURS.get(who), marker="o", markersize=4, label=label)


def _label(axes: Axes, x: float, y: float, value: float) -> None:
    """Write a value over its mark."""
    shown = f"{value:,.0f}" if value >= _WHOLE_FROM else f"{value:.1f}"
    axes.annotate(shown, (x, y), (0, 4), textcoords="offset points", ha="center", fontsize=8)
