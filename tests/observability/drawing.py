"""Draw the dashboard's panels from query results, without Grafana."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

_COLUMNS: Final = 24
_INCH: Final = 0.72, 0.3  # of a column and of a row of the grid
_HEAD_IN: Final = 1.15
_STYLE: Final = {
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9a9fa8",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "xtick.color": "#60656f",
    "ytick.color": "#60656f",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "vqa-worker",
}
_COLOURS: Final = (
    *("#56A64B", "#3274D9", "#F2A20C", "#E02F44", "#8F3BB8"),
    *("#37A2A8", "#B877D9", "#A0522D", "#7C8798", "#C0CA33"),
)
_FAILURE: Final = "#E02F44"
_NAMED_COLOURS: Final = {
    "succeeded": "#56A64B",
    "failed, service error": _FAILURE,
    "failed, client error": "#F2A20C",
    "cancelled": "#7C8798",
    "200": "#56A64B",
    "429": "#F2A20C",
}
_LONG_NAME: Final = 22
_THOUSAND: Final = 1000
_MINUTES_FROM_S: Final = 100
_STATES: Final = {1.0: "#56A64B", 0.0: _FAILURE}
_SHADES: Final = {"green": "#3d8b37", "orange": "#d17f00", "red": "#c4162a"}


@dataclass(frozen=True)
class Line:
    """A series to draw: its name, and pairs of seconds since the start and value."""

    name: str
    points: Sequence[tuple[float, float]]


def draw(
    dashboard: Mapping[str, Any], found: Mapping[int, Sequence[Line]], file: Path, title: Sequence[str]
) -> None:
    """Draw all panels at their grid positions; `found` has the series by panel id, `title` is the heading."""
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    size = _COLUMNS * _INCH[0], rows * _INCH[1] + _HEAD_IN
    # All range queries have the same steps; a missing value is a gap.
    ranges = [line for lines in found.values() for line in lines if len(line.points) > 1]
    times = sorted({second for line in ranges for second, _ in line.points})
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size)
        figure.text(0.012, 1 - 0.3 / size[1], title[0], fontsize=14, weight="bold")
        for nth, text in enumerate(title[1:]):
            figure.text(0.012, 1 - (0.55 + 0.2 * nth) / size[1], text, fontsize=9.5, color="#60656f")
        for panel in dashboard["panels"]:
            _panel(figure, size, panel, found.get(panel["id"], ()), times)
        metadata = {"Date": None} if file.suffix == ".svg" else None
        figure.savefig(file, dpi=80, facecolor="white", metadata=metadata)


def _panel(
    figure: Figure,
    size: tuple[float, float],
    panel: Mapping[str, Any],
    lines: Sequence[Line],
    times: Sequence[float],
) -> None:
    at = panel["gridPos"]
    left, top = at["x"] * _INCH[0], size[1] - _HEAD_IN - at["y"] * _INCH[1]
    width, height = at["w"] * _INCH[0], at["h"] * _INCH[1]
    if panel["type"] == "row":
        figure.text(
            0.012, (top - 0.22) / size[1], panel["title"], fontsize=11, weight="bold", color="#1f60c4"
        )
        return
    figure.text((left + 0.2) / size[0], (top - 0.2) / size[1], panel["title"], fontsize=9, weight="bold")
    if panel["type"] == "stat":
        middle = (left + width / 2) / size[0], (top - height / 2 - 0.08) / size[1]
        _numbers(figure, middle, panel, lines)
        return
    legend_in = 0.2 * math.ceil(len(lines) / _columns(lines))
    box = left + 0.65, top - height + 0.32 + legend_in, width - 0.85, height - 0.62 - legend_in
    axes = figure.add_axes((box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]))
    if panel["type"] == "state-timeline":
        _states(axes, lines)
    else:
        _curves(axes, panel, lines, times)
    axes.tick_params(length=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:.0f} s"))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.margins(x=0)


def _curves(axes: Axes, panel: Mapping[str, Any], lines: Sequence[Line], times: Sequence[float]) -> None:
    custom = panel["fieldConfig"]["defaults"]["custom"]
    colours = [_NAMED_COLOURS.get(it.name, _COLOURS[n % len(_COLOURS)]) for n, it in enumerate(lines)]
    names = [line.name for line in lines]
    if custom["stacking"]["mode"] == "normal":
        heights = [[dict(line.points).get(second, 0.0) for second in times] for line in lines]
        axes.stackplot(times, heights, labels=names, colors=colours, alpha=0.65, linewidth=0)
    else:
        for line, colour in zip(lines, colours, strict=True):
            values = [dict(line.points).get(second, math.nan) for second in times]
            axes.plot(times, values, color=colour, label=line.name, linewidth=1.2)
    most = panel["fieldConfig"]["defaults"].get("max")
    least = min([custom["axisSoftMin"], *(value for line in lines for _, value in line.points)])
    axes.margins(y=0.1)
    axes.set_ylim(least, most and most * 1.003)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    unit = panel["fieldConfig"]["defaults"]["unit"]
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formatted(value, unit)))
    for step in panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", ()):
        if custom.get("thresholdsStyle", {}).get("mode") == "dashed" and step["value"] is not None:
            axes.axhline(step["value"], color=_SHADES[step["color"]], linestyle="--", linewidth=0.8)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.09),
        ncols=_columns(lines),
        fontsize=7.5,
        handlelength=1,
        borderpad=0,
    )


def _columns(lines: Sequence[Line]) -> int:
    """Return the number of columns of the legend."""
    return 2 if max(len(line.name) for line in lines) > _LONG_NAME else 3


def _states(axes: Axes, lines: Sequence[Line]) -> None:
    for place, line in enumerate(lines):
        for (second, value), (until, _) in zip(line.points, line.points[1:], strict=False):
            axes.broken_barh([(second, until - second)], (place - 0.35, 0.7), color=_STATES[value])
    axes.set_yticks(range(len(lines)), [line.name for line in lines])
    axes.grid(visible=False)


def _numbers(
    figure: Figure, middle: tuple[float, float], panel: Mapping[str, Any], lines: Sequence[Line]
) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    for nth, line in enumerate(lines):
        value = line.points[-1][1]
        steps = defaults["thresholds"]["steps"]
        colour = [step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1]
        y = middle[1] + ((len(lines) - 1) / 2 - nth) * 0.016
        text = formatted(value, defaults["unit"], defaults.get("decimals"))
        named = f"{line.name}  {text}" if line.name else text
        large = 13 if line.name else 20
        figure.text(
            middle[0],
            y,
            named,
            fontsize=large,
            color=_SHADES[colour],
            ha="center",
            va="center",
            weight="bold",
        )


def formatted(value: float, unit: str, decimals: int | None = None) -> str:
    """Format a value similar to Grafana."""
    if math.isnan(value):
        return "no data"
    match unit:
        case "s":
            return _seconds(value)
        case "percentunit":
            return f"{_plain(value * 100, decimals)} %"
        case "currencyUSD":
            return f"${_plain(value, decimals)}"
        case "bytes" | "Bps":
            return _bytes(value) + ("/s" if unit == "Bps" else "")
        case "cps" | "reqps":
            return f"{_plain(value)} /s"
    return _plain(value, decimals)


def _plain(value: float, decimals: int | None = None) -> str:
    if decimals is None:
        return f"{value:,.0f}" if abs(value) >= _THOUSAND else f"{value:.3g}"
    return f"{value:,.{decimals}f}"


def _seconds(value: float) -> str:
    if value == 0:
        return "0 s"
    if value < 1:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g} s" if value < _MINUTES_FROM_S else f"{value / 60:.3g} min"


def _bytes(value: float) -> str:
    for name in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {name}"
        value /= 1024
    return f"{value:.3g} GiB"
