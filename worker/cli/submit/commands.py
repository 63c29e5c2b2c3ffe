"""`vqa-worker submit`: the command line."""

import json
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from worker.cli.shell import DEFAULT_PATIENCE_S, Json, Patience, Screen, UsageError, read
from worker.cli.state_dir import check_name
from worker.cli.submit.inputs import FORMS_BY_SUFFIX, Arguments, File, Form, Listing, Source

if TYPE_CHECKING:
    from worker.cli.submit.plan import Bucket
    from worker.settings import CommandSettings, Price

STDIN: Final = "-"
MAX_QUEUE: Final = 100_000
UPLOAD_PREFIX: Final = "vqa-uploads/"
IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp")

_WHAT: Final = "What to ask"
_SENDING: Final = "Sending"
_COST: Final = "Cost"
_RESULTS: Final = "Results"


def _name(value: str | None) -> str | None:
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
        help="Where the Batch API's error file goes, if there are errors; by default beside the output.",
        dir_okay=False,
        rich_help_panel=_RESULTS,
    ),
]
OutputForm = Annotated[
    Form | None,
    typer.Option(
        "--output-format",
        help="Form of the results; by default that of the output's name, or batch if that was submitted.",
        rich_help_panel=_RESULTS,
    ),
]


async def submit(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUT | IMAGE... QUESTION]",
            help="A file of jobs (JSONL, CSV, OpenAI's Batch API; - is stdin), or images and a question.",
            show_default=False,
        ),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            metavar="S3_URL", help="Ask about every image below s3://bucket/prefix.", rich_help_panel=_WHAT
        ),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            metavar="GLOB",
            help="With --prefix: only keys like this; by default *.jpg, *.jpeg, *.png and *.webp.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="Ask this of all.", rich_help_panel=_WHAT)
    ] = None,
    each: Annotated[
        bool,
        typer.Option(
            "--each", help="Ask about each image by itself, not all together.", rich_help_panel=_WHAT
        ),
    ] = False,
    input_form: Annotated[
        Form | None,
        typer.Option(
            "--input-format", help="Form of the input, if its name does not tell.", rich_help_panel=_WHAT
        ),
    ] = None,
    bucket: Annotated[
        str | None,
        typer.Option(
            metavar="BUCKET[/PREFIX]",
            help=f"Upload local images here, each once; without a prefix below {UPLOAD_PREFIX}",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Ask this model, whatever the jobs say.", rich_help_panel=_WHAT)
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.", rich_help_panel=_WHAT)] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens.", rich_help_panel=_WHAT)
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=JSON", help="Any other field of the API's request.", rich_help_panel=_WHAT
        ),
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=TEXT", help="Echoed in the results.", rich_help_panel=_WHAT),
    ] = None,
    deadline: Annotated[
        str | None,
        typer.Option(
            metavar="TIME|SPAN",
            help="Pay for no job later than that: 2h, 2030-01-31T12:00:00Z.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    skip_invalid: Annotated[
        bool,
        typer.Option(
            "--skip-invalid",
            help="Lines that are no jobs become failed results instead of stopping all.",
            rich_help_panel=_WHAT,
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check, count and estimate.", rich_help_panel=_COST)
    ] = False,
    price: Annotated[
        str | None,
        typer.Option(
            metavar="PROMPT,COMPLETION",
            help="USD per million tokens, instead of VQA_PRICES.",
            rich_help_panel=_COST,
        ),
    ] = None,
    image_tokens: Annotated[
        int, typer.Option(min=0, help="Assumed for each image.", rich_help_panel=_COST)
    ] = 1000,
    answer_tokens: Annotated[
        int, typer.Option(min=0, help="Assumed for each answer.", rich_help_panel=_COST)
    ] = 200,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Don't ask before much is submitted.", rich_help_panel=_COST)
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(
            callback=_name,
            help="Name of the submission; by default it follows from what is submitted.",
            rich_help_panel=_SENDING,
        ),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="File that remembers what was submitted; by default in ~/.local/state/vqa-worker.",
            dir_okay=False,
            rich_help_panel=_SENDING,
        ),
    ] = None,
    max_queue: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Wait while more jobs than this are in the queue; 0: never. "
            f"[default: {MAX_QUEUE}, and 0 with --exchange]",
            rich_help_panel=_SENDING,
        ),
    ] = None,
    exchange: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Publish by this exchange (vqa.jobs.intake), if the default one is closed to the user.",
            rich_help_panel=_SENDING,
        ),
    ] = "",
    reply_to: Annotated[
        str | None,
        typer.Option(
            metavar="QUEUE",
            help="Let the results go to this queue, for somebody else to read.",
            rich_help_panel=_SENDING,
        ),
    ] = None,
    keep_days: Annotated[
        int,
        typer.Option(
            min=1,
            max=28,
            help="Days after which results that nobody gathers are gone.",
            rich_help_panel=_SENDING,
        ),
    ] = 7,
    wait: Annotated[
        bool, typer.Option("--wait", "-w", help="Gather the results as they come.", rich_help_panel=_RESULTS)
    ] = False,
    output: OutputPath = None,
    errors: ErrorsPath = None,
    output_form: OutputForm = None,
    as_json: Json = False,
    timeout: Patience = DEFAULT_PATIENCE_S,
) -> int:
    """Submit jobs: by hand, from files, or about a whole folder in S3.

    **By hand:**

        vqa-worker submit s3://photos/table.jpg "Which fruit is this?" --wait

        vqa-worker submit a.jpg b.jpg "What differs?" --bucket photos --wait

    **A whole folder in S3, one question:**

        vqa-worker submit --prefix s3://photos/2030/ "Is there a person?" --wait -o people.csv

    **Files:** JSONL with a job a line, or CSV with columns id, image (or image1, image2, …) and question;
    further columns come back as metadata:

        vqa-worker submit orders.csv --question "Is the parcel damaged?" --dry-run

        generate-jobs | vqa-worker submit - --wait --json | jq .answer

    **An input file of OpenAI's Batch API, unchanged:**

        vqa-worker submit batch.jsonl --wait -o output.jsonl --errors errors.jsonl

    Broken off, the same command goes on where it was: what is in the queue is not submitted twice.
    """
    # Loaded here: it brings aio-pika and the SDK of S3.
    from worker.cli.outputs import Output
    from worker.cli.submit.estimate import Assumptions
    from worker.cli.submit.plan import Additions
    from worker.cli.submit.state import Order, carry_out, estimate
    from worker.settings import load_command_settings

    screen = Screen(as_json=as_json)
    words, question = _question(what or [], question, is_listing=prefix is not None)
    if output is not None and not wait:
        raise UsageError(
            "--output is for results that are waited for: add --wait, or see `vqa-worker results`"
        )
    if reply_to is not None and wait:
        raise UsageError(
            "--reply-to: the results go to a queue that others read, so that --wait cannot have them"
        )
    settings = read(load_command_settings, screen)
    async with AsyncExitStack() as stack:
        order = Order(
            source=await _source(
                words, prefix=prefix, match=match, each=each, form=input_form, settings=settings, stack=stack
            ),
            additions=Additions(
                question=question,
                system=system,
                model=model,
                deadline=deadline,
                params={
                    **({"max_tokens": max_tokens} if max_tokens else {}),
                    **dict(map(_param, param or [])),
                },
                metadata=dict(_pair("--metadata", text) for text in metadata or []),
                uploads_to=_bucket(bucket) if bucket else None,
            ),
            assumptions=Assumptions(image_tokens, answer_tokens),
            price=_price(price) if price else None,
            name=name,
            manifest=manifest,
            exchange=exchange,
            reply_to=reply_to,
            keep_days=keep_days,
            max_queue=(0 if exchange else MAX_QUEUE) if max_queue is None else max_queue,
            keeps_invalid=skip_invalid,
            asks=not yes,
            waits=wait,
            output=Output(output, errors, output_form),
            patience_s=timeout,
        )
        return await (estimate if dry_run else carry_out)(order, settings, screen)


def _question(words: list[str], question: str | None, *, is_listing: bool) -> tuple[list[str], str | None]:
    """What is asked about, and the question: the last of several words, unless an option says it."""
    if is_listing and words:
        if question is not None or len(words) > 1:
            raise UsageError("--prefix: give one question, and no images beside")
        return [], words[0]
    if question is not None or len(words) < 2:  # noqa: PLR2004 - an image and a question
        return words, question
    return words[:-1], words[-1]


async def _source(
    words: list[str],
    *,
    prefix: str | None,
    match: str | None,
    each: bool,
    form: Form | None,
    settings: "CommandSettings",
    stack: AsyncExitStack,
) -> Source:
    if prefix is not None:
        return await _listing(prefix, match, settings, stack)
    if not words:
        raise UsageError("nothing to submit: give a file of jobs, images and a question, or --prefix")
    if len(words) == 1 and (form or words[0] == STDIN or Path(words[0]).suffix.lower() in FORMS_BY_SUFFIX):
        return _file(words[0], form, stack)
    return Arguments(words, each=each)


def _file(path: str, form: Form | None, stack: AsyncExitStack) -> File:
    if path != STDIN:
        return File(Path(path), form)
    # Read twice: once to tell it from others, once to plan.
    spool = stack.enter_context(NamedTemporaryFile(prefix="vqa-stdin-"))  # noqa: SIM115 - the stack closes it
    shutil.copyfileobj(sys.stdin.buffer, spool)
    spool.flush()
    return File(Path(spool.name), form, title="stdin", folder=Path())


async def _listing(
    url: str, match: str | None, settings: "CommandSettings", stack: AsyncExitStack
) -> Listing:
    from worker.cli.storage import open_s3
    from worker.s3.uploads import list_keys

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not url.startswith("s3://") or not bucket:
        raise UsageError(f"--prefix: {url} is not s3://bucket/prefix")
    s3 = await stack.enter_async_context(open_s3(settings))

    async def urls() -> AsyncIterator[str]:
        async for key in list_keys(s3, bucket, prefix):
            if fnmatchcase(key, match) if match else key.lower().endswith(IMAGE_SUFFIXES):
                yield f"s3://{bucket}/{key}"

    return Listing(f"{url} {match or ''}", urls(), title=prefix or bucket)


def _bucket(text: str) -> "Bucket":
    from worker.cli.submit.plan import Bucket

    name, _, prefix = text.removeprefix("s3://").partition("/")
    return Bucket(name, f"{prefix.rstrip('/')}/" if prefix.strip("/") else UPLOAD_PREFIX)


def _pair(option: str, text: str) -> tuple[str, str]:
    name, is_pair, value = text.partition("=")
    if not is_pair or not name:
        raise UsageError(f"{option}: {text} is not NAME=VALUE")
    return name, value


def _param(text: str) -> tuple[str, Any]:
    name, value = _pair("--param", text)
    try:
        return name, json.loads(value)
    except ValueError:
        raise UsageError(f"--param: the value of {name} must be JSON (a text in double quotes)") from None


def _price(text: str) -> "Price":
    from worker.settings import Price

    try:
        prompt, completion = (float(figure) for figure in text.split(","))
    except ValueError:
        raise UsageError(f"--price: {text} is not two numbers with a comma between, as 0.35,0.4") from None
    return Price(prompt, completion)
