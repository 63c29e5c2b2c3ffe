"""The pictures of `docs/scaling.md`."""

from functools import partial
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from tests.bench.charts import save
from tests.scaling.findings import Findings, Run
from tests.scaling.record import rates

_JOBS: Final = "#4a6fa5"
_SHOWN: Final = "#d1792b"
_PODS: Final = "#0b6e4f"
_LIGHT: Final = "#b9d8cc"
_OTHER: Final = "#a23b72"
_GREY: Final = "#777777"
# Jobs a second are counted over so many seconds.
_OVER_S: Final = 3.0


def draw(findings: Findings, folder: Path) -> list[str]:
    """Draw all charts; return the file names."""
    return [
        save(folder, "run", (8, 7.6), partial(_draw_run, findings=findings)),
        save(folder, "sizes", (8, 5.2), partial(_draw_sizes, findings=findings)),
    ]


def _draw_run(figure: Figure, findings: Findings) -> None:
    run = findings.run
    samples = run.real.samples
    jobs, pods, speed = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 3))
    times = [it.at for it in samples]
    jobs.fill_between(times, [it.backlog for it in samples], color=_JOBS, alpha=0.25, linewidth=0)
    jobs.plot(times, [it.backlog for it in samples], color=_JOBS, label="jobs without an answer")
    jobs.step(
        times, [it.messages for it in samples], color=_SHOWN, where="post", label="as the broker tells KEDA"
    )
    jobs.set_ylabel("jobs")
    _draw_pods(pods, run)
    came = rates(samples, lambda it: it.published, _OVER_S)
    answered = rates(samples, lambda it: it.answered, _OVER_S)
    most = [it.ready * run.concurrency / run.call_s for it in samples]
    speed.fill_between(
        times, most, step="post", color=_LIGHT, linewidth=0, label="what the ready pods manage"
    )
    speed.plot(times, came, color=_GREY, linestyle="--", label="came")
    speed.plot(times, answered, color=_JOBS, label="answered")
    speed.set_ylabel("jobs a second")
    speed.set_xlabel(f"seconds of the run, in which time passes {run.factor:g} times as fast as in a cluster")
    for axes in (jobs, pods, speed):
        axes.set_xlim(0, times[-1])
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left", fontsize=9, ncols=2)
    minutes = jobs.secondary_xaxis(
        "top", functions=(lambda it: it * run.factor / 60, lambda it: it * 60 / run.factor)
    )
    minutes.set_xlabel("minutes of a cluster")
    figure.suptitle(f"Two tides: from no pod to {run.pods} and back to none")


def _draw_pods(axes: Axes, run: Run) -> None:
    samples = run.real.samples
    times = [it.at for it in samples]
    ready = [it.ready for it in samples]
    ending = [it.ready + it.ending for it in samples]
    foretold = run.simulated.samples
    axes.fill_between(times, ready, step="post", color=_LIGHT, linewidth=0, label="ready")
    axes.fill_between(
        times,
        ready,
        ending,
        step="post",
        color=_OTHER,
        alpha=0.7,
        linewidth=0,
        label="ending their last calls",
    )
    axes.step(times, [it.replicas for it in samples], color=_PODS, where="post", label="wanted")
    axes.step(
        [it.at for it in foretold],
        [it.replicas for it in foretold],
        color="black",
        linestyle=":",
        where="post",
        label="wanted, in the simulation",
    )
    axes.set_ylabel("pods")
    axes.set_yticks(range(0, run.pods + 1, max(1, run.pods // 4)))
    # Room for the legend.
    axes.set_ylim(top=1.45 * run.pods)


def _draw_sizes(figure: Figure, findings: Findings) -> None:
    grid = figure.subplots(2, len(findings.sizes), sharex=True, sharey=False)
    longest = max(course.samples[-1].at for course in findings.sizes.values()) / 60
    for column, (pods, course) in enumerate(findings.sizes.items()):
        samples = course.samples
        minutes = [it.at / 60 for it in samples]
        jobs, count = grid[0][column], grid[1][column]
        jobs.fill_between(minutes, [it.backlog for it in samples], color=_JOBS, alpha=0.25, linewidth=0)
        jobs.plot(minutes, [it.backlog for it in samples], color=_JOBS)
        jobs.set_title(f"{pods:,} pods", fontsize=10)
        count.fill_between(
            minutes, [it.ready for it in samples], step="post", color=_LIGHT, linewidth=0, label="ready"
        )
        count.step(minutes, [it.replicas for it in samples], color=_PODS, where="post", label="wanted")
        count.set_xlabel("minutes")
        for axes in (jobs, count):
            axes.set_ylim(bottom=0)
            axes.set_xlim(0, longest)
            axes.yaxis.set_major_formatter(FuncFormatter(_short))
    grid[0][0].set_ylabel("jobs without an answer")
    grid[1][0].set_ylabel("pods")
    figure.legend(*grid[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("Simulated: a tide of half as much again as all pods manage")


def _short(value: float, _: int | None = None) -> str:
    """1,500,000 as 1.5M."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
