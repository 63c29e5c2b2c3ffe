"""Draw the charts of `docs/scaling.md`."""

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
_REPORTED: Final = "#d1792b"
_PODS: Final = "#0b6e4f"
_LIGHT: Final = "#b9d8cc"
_OTHER: Final = "#a23b72"
_GREY: Final = "#777777"
# The window for jobs per second.
_RATE_WINDOW_S: Final = 3.0


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
        times, [it.messages for it in samples], color=_REPORTED, where="post", label="as reported to KEDA"
    )
    jobs.set_ylabel("jobs")
    _draw_pods(pods, run)
    arrival_rate = rates(samples, lambda it: it.published, _RATE_WINDOW_S)
    answered = rates(samples, lambda it: it.answered, _RATE_WINDOW_S)
    most = [it.ready * run.concurrency / run.call_s for it in samples]
    speed.fill_between(
        times, most, step="post", color=_LIGHT, linewidth=0, label="capacity of the ready pods"
    )
    speed.plot(times, arrival_rate, color=_GREY, linestyle="--", label="arriving")
    speed.plot(times, answered, color=_JOBS, label="answered")
    speed.set_ylabel("jobs per second")
    speed.set_xlabel(f"seconds of the run (time is scaled by {run.factor:g})")
    for axes in (jobs, pods, speed):
        axes.set_xlim(0, times[-1])
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left", fontsize=9, ncols=2)
    minutes = jobs.secondary_xaxis(
        "top", functions=(lambda it: it * run.factor / 60, lambda it: it * 60 / run.factor)
    )
    minutes.set_xlabel("minutes in a cluster")
    figure.suptitle(f"Two load peaks: from zero pods to {run.pods} and back to zero")


def _draw_pods(axes: Axes, run: Run) -> None:
    samples = run.real.samples
    times = [it.at for it in samples]
    ready = [it.ready for it in samples]
    terminating = [it.ready + it.terminating for it in samples]
    simulated = run.simulated.samples
    axes.fill_between(times, ready, step="post", color=_LIGHT, linewidth=0, label="ready")
    axes.fill_between(
        times,
        ready,
        terminating,
        step="post",
        color=_OTHER,
        alpha=0.7,
        linewidth=0,
        label="terminating",
    )
    axes.step(times, [it.replicas for it in samples], color=_PODS, where="post", label="desired")
    axes.step(
        [it.at for it in simulated],
        [it.replicas for it in simulated],
        color="black",
        linestyle=":",
        where="post",
        label="desired, simulated",
    )
    axes.set_ylabel("pods")
    axes.set_yticks(range(0, run.pods + 1, max(1, run.pods // 4)))
    # Space for the legend.
    axes.set_ylim(top=1.45 * run.pods)


def _draw_sizes(figure: Figure, findings: Findings) -> None:
    grid = figure.subplots(2, len(findings.sizes), sharex=True, sharey=False)
    longest = max(recording.samples[-1].at for recording in findings.sizes.values()) / 60
    for column, (pods, recording) in enumerate(findings.sizes.items()):
        samples = recording.samples
        minutes = [it.at / 60 for it in samples]
        jobs, count = grid[0][column], grid[1][column]
        jobs.fill_between(minutes, [it.backlog for it in samples], color=_JOBS, alpha=0.25, linewidth=0)
        jobs.plot(minutes, [it.backlog for it in samples], color=_JOBS)
        jobs.set_title(f"{pods:,} pods", fontsize=10)
        count.fill_between(
            minutes, [it.ready for it in samples], step="post", color=_LIGHT, linewidth=0, label="ready"
        )
        count.step(minutes, [it.replicas for it in samples], color=_PODS, where="post", label="desired")
        count.set_xlabel("minutes")
        for axes in (jobs, count):
            axes.set_ylim(bottom=0)
            axes.set_xlim(0, longest)
            axes.yaxis.set_major_formatter(FuncFormatter(_short))
    grid[0][0].set_ylabel("jobs without an answer")
    grid[1][0].set_ylabel("pods")
    figure.legend(*grid[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("Simulated: a load peak of 1.5 times the capacity of all pods")


def _short(value: float, _: int | None = None) -> str:
    """Format 1,500,000 as 1.5M."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
