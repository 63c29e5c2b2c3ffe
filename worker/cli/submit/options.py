"""The options of `vqa-worker submit`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from worker.cli.shell import UsageError, seconds
from worker.cli.state_dir import check_name
from worker.cli.submit.inputs import Form, looks_like_image

MAX_QUEUE: Final = 100_000
UPLOAD_PREFIX: Final = "vqa-uploads/"


def _valid_name(value: str | None) -> str | None:
    try:
        return value if value is None else check_name(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _jobs(*names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Jobs", **more)


def _publishing(*names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Publishing", **more)


def _results(*names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Results", **more)


OutputPath = Annotated[
    Path | None, _results("--output", "-o", help="Write the results to this file.", dir_okay=False)
]
ErrorsPath = Annotated[
    Path | None,
    _results(
        "--errors", help="Error file of the Batch API (default: next to the output file).", dir_okay=False
    ),
]
OutputForm = Annotated[
    Form | None,
    _results(
        "--output-format",
        help="Format of the results (default: by the names of the output and input files).",
    ),
]
WaitTimeout = Annotated[
    float | None,
    _results("--wait-timeout", metavar="SECONDS", parser=seconds, help="Maximum time to wait for results."),
]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line of `submit`, as typer parses it."""

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
        _jobs(
            metavar="GLOB",
            help="Only matching images of a prefix or folder (default: *.jpg, *.jpeg, *.png, *.webp).",
        ),
    ] = None
    question: Annotated[str | None, _jobs(help="Question for all images.")] = None
    each: Annotated[
        bool, _jobs("--each", help="Create one job per image instead of one job for all images.")
    ] = False
    input_form: Annotated[
        Form | None,
        _jobs(
            "--input-format",
            help="Format of the input file (default: detected from its name and first line).",
        ),
    ] = None
    bucket: Annotated[
        str | None,
        _jobs(
            metavar="BUCKET[/PREFIX]",
            help=f"Upload local images to this bucket, each once (default prefix: {UPLOAD_PREFIX}).",
        ),
    ] = None
    model: Annotated[str | None, _jobs(help="Model for all jobs; overrides the model of each job.")] = None
    system: Annotated[str | None, _jobs(help="System message.")] = None
    param: Annotated[
        list[str] | None,
        _jobs(
            metavar="NAME=VALUE",
            help="Any other field of the API request, as JSON or text: max_tokens=100.",
        ),
    ] = None
    metadata: Annotated[
        list[str] | None, _jobs(metavar="NAME=TEXT", help="Metadata, echoed in the results.")
    ] = None
    deadline: Annotated[
        str | None,
        _jobs(
            metavar="TIME|DURATION",
            help="Send no model request after this time: 2h, 2030-01-31T12:00:00Z.",
        ),
    ] = None
    skip_invalid: Annotated[
        bool,
        _jobs("--skip-invalid", help="Submit valid lines; report invalid lines as failed results."),
    ] = False
    dry_run: Annotated[
        bool, _publishing("--dry-run", help="Validate and estimate the cost; submit nothing.")
    ] = False
    yes: Annotated[bool, _publishing("--yes", "-y", help="Skip confirmation.")] = False
    name: Annotated[
        str | None,
        _publishing(callback=_valid_name, help="Name of the submission (default: derived from the input)."),
    ] = None
    max_queue: Annotated[
        int | None,
        _publishing(
            min=0,
            help="Pause publishing while the jobs queue has at least this many messages; 0: no limit. "
            f"[default: {MAX_QUEUE}; 0 with --exchange]",
        ),
    ] = None
    exchange: Annotated[
        str, _publishing(metavar="NAME", help="Publish to this exchange instead of the default exchange.")
    ] = ""
    reply_to: Annotated[
        str | None,
        _publishing(metavar="QUEUE", help="Send the results to this queue; another program reads them."),
    ] = None
    wait: Annotated[bool, _results("--wait", "-w", help="Wait for all results and print or write them.")] = (
        False
    )
    wait_timeout: WaitTimeout = None
    output: OutputPath = None
    errors: ErrorsPath = None
    output_form: OutputForm = None

    def check(self) -> None:
        """Check options that exclude each other.

        Raises:
            UsageError: two options cannot be combined.
        """
        for option, value in (("--output", self.output), ("--wait-timeout", self.wait_timeout)):
            if value is not None and not self.wait:
                text = f"{option} requires --wait. Add it, or use `vqa-worker submissions collect` later."
                raise UsageError(text)
        if self.reply_to is not None and self.wait:
            raise UsageError("--reply-to and --wait cannot be combined: another program reads that queue.")

    def images_and_question(self) -> tuple[list[str], str | None]:
        """Split the arguments: the question is the last of several, unless an option has it.

        Raises:
            UsageError: with `--prefix`, there are images or two questions.
        """
        words = self.inputs or []
        if self.prefix is not None:
            questions = [*words, *([] if self.question is None else [self.question])]
            if len(questions) != 1:
                raise UsageError("--prefix takes one question and no images.")
            return [], questions[0]
        is_last_a_question = self.question is None and len(words) > 1 and not looks_like_image(words[-1])
        return (words[:-1], words[-1]) if is_last_a_question else (words, self.question)
