"""The options of `vqa-worker submit`, as typer parses them."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Final, get_args

import typer

from worker.cli.shell import Yes, seconds
from worker.cli.state_dir import check_name
from worker.cli.submit.inputs import FORMS_BY_SUFFIX, Form
from worker.cli.submit.limits import check_failure_limit, check_max_cost

MAX_QUEUE: Final = 100_000
UPLOAD_PREFIX: Final = "vqa-uploads"
FORMS: Final = "|".join(get_args(Form))


_jobs, _publishing, _results = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("Jobs", "Publishing", "Results")
)

WaitTimeout = Annotated[
    float | None,
    _results("--wait-timeout", metavar="SECONDS", parser=seconds, help="Maximum time to wait for results."),
]


@dataclass(frozen=True, kw_only=True)
class Output:
    """The destination of results; without `path` it is stdout."""

    path: Annotated[
        Path | None,
        _results("--output", "-o", metavar="FILE", dir_okay=False, help="Write the results to this file."),
    ] = None
    errors: Annotated[
        Path | None,
        _results(
            metavar="FILE",
            dir_okay=False,
            help="Error file of the Batch API (default: next to the output file).",
        ),
    ] = None
    form: Annotated[
        Form | None,
        _results(
            "--output-format",
            metavar=FORMS,
            help="Format of the results (default: by the names of the files).",
        ),
    ] = None

    def form_for(self, submitted: str) -> Form:
        """Return the output form for jobs submitted in the form `submitted`."""
        by_name = FORMS_BY_SUFFIX.get(self.path.suffix.lower()) if self.path is not None else None
        if self.form is not None or by_name == "csv":
            return self.form or "csv"
        return "batch" if submitted == "batch" else "jsonl"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The jobs and how to publish them."""

    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT",
            help="A file of jobs (- is stdin), or images or a folder and a question.",
            show_default=False,
        ),
    ] = None
    prefix: Annotated[
        str | None, _jobs(metavar="S3_URL", help="Create one job per image below s3://bucket/prefix.")
    ] = None
    match: Annotated[
        str | None,
        _jobs(metavar="GLOB", help="Only these images of a prefix or folder (default: by their suffix)."),
    ] = None
    question: Annotated[str | None, _jobs(metavar="TEXT", help="Question for all images.")] = None
    each: Annotated[bool, _jobs("--each", help="Create one job per image instead of one for all images.")] = (
        False
    )
    input_form: Annotated[
        Form | None,
        _jobs(
            "--input-format",
            metavar=FORMS,
            help="Format of the input file (default: by its name and first line).",
        ),
    ] = None
    bucket: Annotated[
        str | None,
        _jobs(
            metavar="BUCKET[/PREFIX]",
            help=f"Upload local images to this bucket, each once (default prefix: {UPLOAD_PREFIX}/).",
        ),
    ] = None
    model: Annotated[
        str | None, _jobs(metavar="TEXT", help="Model for all jobs; overrides the model of each job.")
    ] = None
    system: Annotated[str | None, _jobs(metavar="TEXT", help="System message.")] = None
    param: Annotated[
        list[str] | None,
        _jobs(metavar="NAME=VALUE", help="Any field of the API request, as JSON or text: max_tokens=100."),
    ] = None
    schema: Annotated[
        Path | None,
        _jobs(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="JSON schema for all answers; a CSV file gets a column for each of its fields.",
        ),
    ] = None
    metadata: Annotated[
        list[str] | None, _jobs(metavar="NAME=TEXT", help="Metadata, echoed in the results.")
    ] = None
    deadline: Annotated[
        str | None,
        _jobs(metavar="TIME", help="Send no model request after this time: 2h, 2030-01-31T12:00:00Z."),
    ] = None
    skip_invalid: Annotated[
        bool, _jobs("--skip-invalid", help="Submit valid jobs; report the others as failed results.")
    ] = False
    dry_run: Annotated[bool, _publishing("--dry-run", help="Only validate, and estimate the cost.")] = False
    estimate: Annotated[
        bool,
        _publishing(
            "--estimate",
            help="Like --dry-run; also reads a few images, and shows what a worker would send of them.",
        ),
    ] = False
    yes: Yes = False
    name: Annotated[
        str | None,
        _publishing(
            metavar="NAME", parser=check_name, help="Name of the submission (default: made from the input)."
        ),
    ] = None
    max_queue: Annotated[
        int | None,
        _publishing(
            metavar="N",
            min=0,
            help="Pause publishing while the jobs queue has at least this many messages; 0: no limit. "
            f"[default: {MAX_QUEUE}; 0 with --exchange]",
        ),
    ] = None
    stop_after_failures: Annotated[
        str | None,
        _publishing(
            metavar="SHARE|N",
            parser=check_failure_limit,
            help="Cancel the rest when more than this share of the results (5%) or N results failed; needs"
            " --wait.",
        ),
    ] = None
    max_cost: Annotated[
        str | None,
        _publishing(
            metavar="USD",
            parser=check_max_cost,
            help="Stop publishing when the results and the jobs on the queue cost this much; needs --wait.",
        ),
    ] = None
    exchange: Annotated[
        str, _publishing(metavar="NAME", help="Publish to this exchange instead of the default exchange.")
    ] = ""
    wait: Annotated[bool, _results("--wait", "-w", help="Wait for the results; print or write them.")] = False
    wait_timeout: WaitTimeout = None
