"""`vqa-worker submit`: from the command line to a `Submission`."""

import inspect
import json
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any, Final

from worker.cli.shell import Screen, UsageError
from worker.cli.submit.inputs import FORMS_BY_SUFFIX, Arguments, File, Form, Listing, Source
from worker.cli.submit.options import MAX_QUEUE, UPLOAD_PREFIX, Options

if TYPE_CHECKING:
    from worker.cli.submit.plan import Additions, Bucket
    from worker.cli.submit.submission import Submission
    from worker.settings import CommandSettings, Price

STDIN: Final = "-"
IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp")


async def submit(screen: Screen, **given: Any) -> int:
    """Submit jobs: one, a file of jobs, or images below an S3 prefix.

        vqa-worker submit s3://photos/table.jpg "Which fruit is this?" --wait
        vqa-worker submit a.jpg b.jpg "What differs?" --bucket photos --wait
        vqa-worker submit --prefix s3://photos/2030/ "A person?" --wait -o people.csv
        vqa-worker submit orders.csv --question "Is the parcel damaged?" --dry-run
        generate-jobs | vqa-worker submit - --wait --json | jq .answer
        vqa-worker submit batch.jsonl --wait -o output.jsonl --errors errors.jsonl

    A file of jobs is JSONL with one job per line, an input file of OpenAI's Batch API, or CSV with the
    columns id, image (or image1, image2, …) and question; other columns become metadata of the results.

    If interrupted, run the same command again to resume; no job is submitted twice.
    """
    # These imports load aio-pika and the S3 SDK.
    from worker.cli.submit.submission import estimate, submit_jobs
    from worker.settings import load_command_settings

    options = Options(**given)
    options.check()
    images, question = options.images_and_question()
    settings = screen.load(load_command_settings)
    async with AsyncExitStack() as stack:
        source = await _source(images, options, settings, stack)
        submission = _submission(source, question, options, screen.timeout_s)
        return await (estimate if options.dry_run else submit_jobs)(submission, settings, screen)


# typer reads the options from the signature.
submit.__signature__ = inspect.Signature(  # type: ignore[attr-defined] # functions may have one
    [
        inspect.Parameter("screen", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Screen),
        *inspect.signature(Options).parameters.values(),
    ]
)


def _submission(source: Source, question: str | None, options: Options, timeout_s: float) -> "Submission":
    from worker.cli.outputs import Output
    from worker.cli.submit.estimate import Assumptions
    from worker.cli.submit.submission import Submission

    default_max_queue = 0 if options.exchange else MAX_QUEUE
    return Submission(
        source=source,
        additions=_additions(question, options),
        assumptions=Assumptions(options.image_tokens, options.answer_tokens),
        price=_price(options.price) if options.price else None,
        name=options.name,
        state_file=options.state_file,
        exchange=options.exchange,
        reply_to=options.reply_to,
        keep_days=options.keep_days,
        max_queue=default_max_queue if options.max_queue is None else options.max_queue,
        skips_invalid=options.skip_invalid,
        asks=not options.yes,
        waits=options.wait,
        output=Output(options.output, options.errors, options.output_form),
        timeout_s=timeout_s,
    )


def _additions(question: str | None, options: Options) -> "Additions":
    from worker.cli.submit.plan import Additions

    max_tokens = {"max_tokens": options.max_tokens} if options.max_tokens else {}
    return Additions(
        question=question,
        system=options.system,
        model=options.model,
        deadline=options.deadline,
        params={**max_tokens, **dict(map(_param, options.param or []))},
        metadata=dict(_pair("--metadata", text) for text in options.metadata or []),
        uploads_to=_bucket(options.bucket) if options.bucket else None,
    )


async def _source(
    images: list[str], options: Options, settings: "CommandSettings", stack: AsyncExitStack
) -> Source:
    if options.prefix is not None:
        return await _listing(options.prefix, options.match, settings, stack)
    if not images:
        raise UsageError("nothing to submit. Give a file of jobs, images and a question, or --prefix.")
    form = options.input_form
    if len(images) == 1 and (form or images[0] == STDIN or Path(images[0]).suffix.lower() in FORMS_BY_SUFFIX):
        return _file(images[0], form, stack)
    return Arguments(images, each=options.each)


def _file(path: str, form: Form | None, stack: AsyncExitStack) -> File:
    if path != STDIN:
        return File(Path(path), form)
    # Jobs are read twice: once for the digest, once to plan.
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
        raise UsageError(f"--prefix: {url} is not of the form s3://bucket/prefix.")
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
        raise UsageError(f"{option}: {text} is not of the form NAME=VALUE.")
    return name, value


def _param(text: str) -> tuple[str, Any]:
    name, value = _pair("--param", text)
    try:
        return name, json.loads(value)
    except ValueError:
        raise UsageError(f"--param: the value of {name} is not JSON. Put strings in double quotes.") from None


def _price(text: str) -> "Price":
    from worker.settings import Price

    try:
        prompt, completion = (float(figure) for figure in text.split(","))
    except ValueError:
        raise UsageError(f"--price: {text} is not two numbers with a comma, such as 0.35,0.4.") from None
    return Price(prompt, completion)
