"""The options of `vqa-worker submit`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from worker.cli.shell import UsageError
from worker.cli.state_dir import check_name
from worker.cli.submit.inputs import Form

# More jobs than these wait on the queue only if the user says so.
MAX_QUEUE: Final = 100_000
UPLOAD_PREFIX: Final = "vqa-uploads/"

_JOBS: Final = "Jobs"
_COST: Final = "Cost"
_SENDING: Final = "Sending"
_RESULTS: Final = "Results"


def _valid_name(value: str | None) -> str | None:
    try:
        return value if value is None else check_name(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


OutputPath = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Write the results to this file.", dir_okay=False, rich_help_panel=_RESULTS
    ),
]
ErrorsPath = Annotated[
    Path | None,
    typer.Option(
        "--errors",
        help="Error file of the Batch API, written if a request failed (default: next to the output file).",
        dir_okay=False,
        rich_help_panel=_RESULTS,
    ),
]
OutputForm = Annotated[
    Form | None,
    typer.Option(
        "--output-format",
        help="Format of the results (default: by the output file's name; batch for a Batch API input file).",
        rich_help_panel=_RESULTS,
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[INPUT | IMAGE... QUESTION]",
        help="A file of jobs (JSONL, CSV or OpenAI's Batch API; - is stdin), or images and a question.",
        show_default=False,
    ),
]
Prefix = Annotated[
    str | None,
    typer.Option(
        metavar="S3_URL", help="Create one job per image below s3://bucket/prefix.", rich_help_panel=_JOBS
    ),
]
Match = Annotated[
    str | None,
    typer.Option(
        metavar="GLOB",
        help="With --prefix: only matching keys (default: *.jpg, *.jpeg, *.png and *.webp).",
        rich_help_panel=_JOBS,
    ),
]
Question = Annotated[
    str | None, typer.Option("--question", help="Question for all images.", rich_help_panel=_JOBS)
]
Each = Annotated[
    bool,
    typer.Option(
        "--each",
        help="Create one job per image instead of one job for all images.",
        rich_help_panel=_JOBS,
    ),
]
InputForm = Annotated[
    Form | None,
    typer.Option(
        "--input-format",
        help="Format of the input file (default: by its name and first line).",
        rich_help_panel=_JOBS,
    ),
]
UploadTo = Annotated[
    str | None,
    typer.Option(
        metavar="BUCKET[/PREFIX]",
        help=f"Upload local images to this bucket, each once (default prefix: {UPLOAD_PREFIX}).",
        rich_help_panel=_JOBS,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(help="Model for all jobs; overrides the model of each job.", rich_help_panel=_JOBS),
]
System = Annotated[str | None, typer.Option(help="System message.", rich_help_panel=_JOBS)]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Maximum tokens in the answer.", rich_help_panel=_JOBS)
]
Params = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=JSON", help="Any other field of the API request.", rich_help_panel=_JOBS),
]
Metadata = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=TEXT", help="Metadata, echoed in the results.", rich_help_panel=_JOBS),
]
Deadline = Annotated[
    str | None,
    typer.Option(
        metavar="TIME|SPAN",
        help="Send no model request after this time: 2h, 2030-01-31T12:00:00Z.",
        rich_help_panel=_JOBS,
    ),
]
SkipInvalid = Annotated[
    bool,
    typer.Option(
        "--skip-invalid",
        help="Submit valid lines; report invalid lines as failed results.",
        rich_help_panel=_JOBS,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Validate and estimate the cost; submit nothing.", rich_help_panel=_COST),
]
Prices = Annotated[
    str | None,
    typer.Option(
        metavar="PROMPT,COMPLETION",
        help="Price in USD per million tokens, instead of VQA_PRICES.",
        rich_help_panel=_COST,
    ),
]
ImageTokens = Annotated[int, typer.Option(min=0, help="Assumed tokens per image.", rich_help_panel=_COST)]
AnswerTokens = Annotated[int, typer.Option(min=0, help="Assumed tokens per answer.", rich_help_panel=_COST)]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Skip confirmation.", rich_help_panel=_COST)]
Name = Annotated[
    str | None,
    typer.Option(
        callback=_valid_name,
        help="Name of the submission (default: derived from the input).",
        rich_help_panel=_SENDING,
    ),
]
StateFile = Annotated[
    Path | None,
    typer.Option(
        help="State file of the submission (default: in ~/.local/state/vqa-worker).",
        dir_okay=False,
        rich_help_panel=_SENDING,
    ),
]
MaxQueue = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Wait while the queue holds this many jobs; 0: do not wait. "
        f"[default: {MAX_QUEUE}; 0 with --exchange]",
        rich_help_panel=_SENDING,
    ),
]
Exchange = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Publish to this exchange instead of the default exchange.",
        rich_help_panel=_SENDING,
    ),
]
ReplyTo = Annotated[
    str | None,
    typer.Option(
        metavar="QUEUE",
        help="Send the results to this queue; another program reads them.",
        rich_help_panel=_SENDING,
    ),
]
KeepDays = Annotated[
    int,
    typer.Option(min=1, max=28, help="Days until uncollected results expire.", rich_help_panel=_SENDING),
]
Wait = Annotated[
    bool, typer.Option("--wait", "-w", help="Collect the results as they arrive.", rich_help_panel=_RESULTS)
]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line of `submit`, as typer parses it."""

    inputs: Inputs = None
    prefix: Prefix = None
    match: Match = None
    question: Question = None
    each: Each = False
    input_form: InputForm = None
    bucket: UploadTo = None
    model: Model = None
    system: System = None
    max_tokens: MaxTokens = None
    param: Params = None
    metadata: Metadata = None
    deadline: Deadline = None
    skip_invalid: SkipInvalid = False
    dry_run: DryRun = False
    price: Prices = None
    image_tokens: ImageTokens = 1000
    answer_tokens: AnswerTokens = 200
    yes: Yes = False
    name: Name = None
    state_file: StateFile = None
    max_queue: MaxQueue = None
    exchange: Exchange = ""
    reply_to: ReplyTo = None
    keep_days: KeepDays = 7
    wait: Wait = False
    output: OutputPath = None
    errors: ErrorsPath = None
    output_form: OutputForm = None

    def check(self) -> None:
        """Check options that exclude each other.

        Raises:
            UsageError: two options cannot be combined.
        """
        if self.output is not None and not self.wait:
            raise UsageError("--output requires --wait. Add --wait, or use `vqa-worker results` later.")
        if self.reply_to is not None and self.wait:
            raise UsageError("--reply-to and --wait cannot be combined: another program reads that queue.")

    def images_and_question(self) -> tuple[list[str], str | None]:
        """Split the arguments: the question is the last of several, unless an option has it.

        Raises:
            UsageError: with `--prefix`, there are images or two questions.
        """
        words = self.inputs or []
        if self.prefix is not None and words:
            if self.question is not None or len(words) > 1:
                raise UsageError("--prefix takes one question and no images.")
            return [], words[0]
        if self.question is not None or len(words) < 2:  # noqa: PLR2004 - an image and a question
            return words, self.question
        return words[:-1], words[-1]
