"""Grafana's JSON, made of what `panels.py` describes."""

import itertools
import json
import re
import string
from collections.abc import Iterator, Sequence
from typing import Any, Final, assert_never

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    BigValueJustifyMode,
    BigValueTextMode,
    GraphDrawStyle,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import Dashboard as Model
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    FieldColorModeId,
    GridPos,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
    VariableHide,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

from deploy.grafana.panels import ROWS, Panel, Query

UID: Final = "vqa-worker"
HERE: Final = 'namespace=~"$namespace", instance=~"$instance"'
MODEL: Final = f'{HERE}, model=~"$model"'
NUMBER_HEIGHT, HEIGHT = 4, 8
_RED, _AMBER, _GREEN = "red", "orange", "green"
_SOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")
_BROKER: Final = re.compile(r"@broker\((\w+), (\w+=~?\"[^\"]*\")\)")
# A queue by its own name: not those that are named after it.
_NO_QUEUE_OF_JOBS: Final = r"/^(?!amq\.)(?!.*\.(?:retry\.\d+s|dead)$).*$/"

_WIDTH: Final = 24

_Visual = timeseries.Panel | stat.Panel | statetimeline.Panel


def dashboard_json() -> str:
    """The file's text."""
    return json.dumps(build(), cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def build() -> Model:
    """The dashboard as Grafana's own types have it."""
    board = (
        dashboard.Dashboard("vqa-worker")
        .uid(UID)
        .description("Made by `make docs` from deploy/grafana/panels.py.")
        .tags(["vqa-worker"])
        .editable()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-3h", "now")
        .timezone("browser")
        .refresh("30s")
        .annotation(
            dashboard.AnnotationQuery()
            .name("Alerts")
            .datasource(_SOURCE)
            .enable(enable=True)
            .icon_color(_RED)
            .expr('ALERTS{alertname=~"VqaWorker.+", alertstate="firing", namespace=~"$namespace"}')
        )
    )
    for variable in _variables():
        board.with_variable(variable)
    ids, y = itertools.count(1), 0
    for row in ROWS:
        board.with_row(dashboard.Row(row.title).id(next(ids)).grid_pos(GridPos(h=1, w=_WIDTH, x=0, y=y)))
        y += 1
        for line in _lines(row.panels):
            height = NUMBER_HEIGHT if all(panel.kind == "number" for panel in line) else HEIGHT
            for place, panel in enumerate(line):
                x = sum(other.width for other in line[:place])
                at = GridPos(h=height, w=panel.width, x=x, y=y)
                board.with_panel(_visual(panel).id(next(ids)).grid_pos(at))
            y += height
    return board.build()


def expand(expr: str) -> str:
    """A query without the abbreviations of `panels.py`."""
    both = r"max by (vhost, queue) (rabbitmq_detailed_queue_\1{\2} or rabbitmq_queue_\1{\2})"
    return _BROKER.sub(both, expr).replace("@model", MODEL).replace("@here", HERE)


def _variables() -> Iterator[Any]:
    yield dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    yield _choice("namespace", "label_values(vqa_build_info, namespace)")
    yield _choice("instance", 'label_values(vqa_build_info{namespace=~"$namespace"}, instance)')
    yield _choice("model", f"label_values(vqa_jobs_total{{{HERE}}}, model)")
    queues = 'label_values({__name__=~"rabbitmq_(detailed_)?queue_consumers"}, queue)'
    yield _query("queue", queues).regex(_NO_QUEUE_OF_JOBS).current(_option("vqa.jobs"))


def _choice(name: str, query: str) -> dashboard.QueryVariable:
    """Several, or all: also where nothing has such a label, as there are no namespaces outside Kubernetes."""
    every = _option("All", "$__all")
    return _query(name, query).multi(multi=True).include_all(include_all=True).all_value(".*").current(every)


def _query(name: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .hide(VariableHide.DONT_HIDE)
        .datasource(_SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
    )


def _option(text: str, value: str | None = None) -> VariableOption:
    return VariableOption(selected=True, text=text, value=value or text)


def _lines(panels: Sequence[Panel]) -> Iterator[list[Panel]]:
    """The panels of a row, as many next to each other as there is room for."""
    line: list[Panel] = []
    for panel in panels:
        if sum(other.width for other in line) + panel.width > _WIDTH:
            yield line
            line = []
        line.append(panel)
    yield line


def _visual(panel: Panel) -> _Visual:
    match panel.kind:
        case "number":
            visual: _Visual = _number(panel)
        case "states":
            visual = _states()
        case "lines" | "stack" | "bars":
            visual = _graph(panel)
        case _:
            assert_never(panel.kind)
    visual.title(panel.title).description(panel.about).datasource(_SOURCE).unit(panel.unit)
    for query, ref_id in zip(panel.queries, string.ascii_uppercase, strict=False):
        visual.with_target(_target(query, ref_id, is_instant=panel.kind == "number"))
    if panel.decimals is not None:
        visual.decimals(panel.decimals)
    if panel.most is not None:
        visual.max(panel.most)
    if panel.since is not None:
        visual.time_from(panel.since)
    return visual


def _target(query: Query, ref_id: str, *, is_instant: bool) -> prometheus.Dataquery:
    target = prometheus.Dataquery().datasource(_SOURCE).ref_id(ref_id).expr(expand(query.expr))
    target.legend_format(query.legend or "__auto")
    return target.instant() if is_instant else target.range()


def _number(panel: Panel) -> stat.Panel:
    visual = (
        stat.Panel()
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .graph_mode(BigValueGraphMode.NONE)
        .color_mode(BigValueColorMode.VALUE)
        .justify_mode(BigValueJustifyMode.AUTO)
        .text_mode(BigValueTextMode.VALUE_AND_NAME if panel.queries[0].legend else BigValueTextMode.VALUE)
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
    )
    return visual.thresholds(_thresholds(panel))


def _thresholds(panel: Panel) -> dashboard.ThresholdsConfig:
    """Green from `good` on and red from `bad` on, whichever way that is, and amber in between."""
    good, bad = panel.good, panel.bad
    steps = [Threshold(value=None, color=_GREEN)]
    if good is not None and bad is not None and good < bad:
        steps = [Threshold(value=None, color=_GREEN), Threshold(value=bad, color=_RED)]
    elif good is not None and bad is not None:
        amber = Threshold(value=bad, color=_AMBER)
        steps = [Threshold(value=None, color=_RED), amber, Threshold(value=good, color=_GREEN)]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def _states() -> statetimeline.Panel:
    states = {
        "1": ValueMappingResult(text="up", color=_GREEN),
        "0": ValueMappingResult(text="paused", color=_RED),
    }
    return (
        statetimeline.Panel()
        .mappings([ValueMap(options=states)])
        .show_value(VisibilityMode.NEVER)
        .merge_values(merge_values=True)
        .row_height(0.8)
        .fill_opacity(80)
        .legend(_legend())
    )


def _graph(panel: Panel) -> timeseries.Panel:
    is_filled = panel.kind != "lines"
    visual = (
        timeseries.Panel()
        .axis_soft_min(panel.least)
        .draw_style(GraphDrawStyle.BARS if panel.kind == "bars" else GraphDrawStyle.LINE)
        .line_width(1)
        .fill_opacity(50 if is_filled else 5)
        .show_points(VisibilityMode.NEVER)
        .stacking(common.StackingConfig().mode(StackingMode.NORMAL if is_filled else StackingMode.NONE))
        .legend(_legend())
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    )
    if panel.good is not None:
        style = common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED)
        visual.thresholds(_thresholds(panel)).thresholds_style(style)
    return visual


def _legend() -> common.VizLegendOptions:
    legend = common.VizLegendOptions().show_legend(show_legend=True)
    return legend.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).calcs([])
