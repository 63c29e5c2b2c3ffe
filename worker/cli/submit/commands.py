"""`vqa-worker submit`: from the command line to a `Submission`."""

import json
import re
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any, Final

from worker.cli.shell import Screen, UsageError
from worker.cli.submit import inputs
from worker.cli.submit.inputs import FORMS_BY_SUFFIX, IMAGE_SUFFIXES, Form, Source
from worker.cli.submit.options import UPLOAD_PREFIX, Options, Output

if TYPE_CHECKING:
    from worker.settings import CommandSettings

STDIN: Final = "-"


async def submit(screen: Screen, options: Options, output: Output) -> int:
    """Submit jobs: a file of jobs, or images and a question.

        vqa-worker submit s3://photos/table.jpg "Which fruit is this?" --wait
        vqa-worker submit a.jpg b.jpg "What differs?" --bucket photos --wait
        vqa-worker submit photos/ "A person?" --bucket photos --wait -o people.csv
        vqa-worker submit --prefix s3://photos/2030/ "A person?" --wait -o all.csv
        vqa-worker submit orders.csv --question "Is the parcel damaged?" --dry-run
        generate-jobs | vqa-worker submit - --wait --json | jq .answer
        vqa-worker submit batch.jsonl --wait -o output.jsonl --errors errors.jsonl

    A file of jobs is JSONL with one job per line, an input file of OpenAI's Batch API, or CSV with the
    columns id, image (or image1, image2, …) and question; other columns become metadata of the results.

    If interrupted, run the same command again to resume; no job is submitted twice.
    """
    # These imports load aio-pika and the S3 SDK.
    from worker.cli.submit.submission import Submission
    from worker.settings import load_command_settings

    limits = (("--stop-after-failures", options.stop_after_failures), ("--max-cost", options.max_cost))
    for option, value in (*limits, ("--output", output.path), ("--wait-timeout", options.wait_timeout)):
        if value is not None and not options.wait:
            later = "" if (option, value) in limits else ", or use `vqa-worker submissions collect` later"
            raise UsageError(f"{option} requires --wait. Add it{later}.")
    images, question = _images_and_question(options)
    settings = screen.load(load_command_settings)
    with ExitStack() as stack:
        source = _source(images, question, options, settings, stack)
        additions, uploads_to = _additions(question, options), _uploads_to(options.bucket, settings)
        submission = Submission(source, additions, uploads_to, options, output, settings, screen)
        return await (submission.dry_run() if options.dry_run or options.estimate else submission.run())


def _images_and_question(options: Options) -> tuple[list[str], str | None]:
    """Split the arguments: the question is the last of several, unless an option has it.

    Raises:
        UsageError: with `--prefix`, there are images or two questions.
    """
    words, question = options.inputs or [], options.question
    if options.prefix is not None:
        questions = [*words, *([] if question is None else [question])]
        if len(questions) != 1:
            raise UsageError("--prefix takes one question and no images.")
        return [], questions[0]
    is_last_a_question = question is None and len(words) > 1 and not inputs.looks_like_image(words[-1])
    return (words[:-1], words[-1]) if is_last_a_question else (words, question)


def _additions(question: str | None, options: Options) -> dict[str, Any]:
    """Return the fields that all jobs get."""
    fields = {
        "question": question,
        "system": options.system,
        "model": options.model,
        "deadline": options.deadline,
        "params": {**_response_format(options.schema), **dict(map(_param, options.param or []))} or None,
        "metadata": dict(_pair("--metadata", text) for text in options.metadata or []) or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _response_format(path: Path | None) -> dict[str, Any]:
    """Return the param for answers that satisfy the JSON schema in a file.

    Raises:
        UsageError: the file is not a JSON object.
    """
    if path is None:
        return {}
    try:
        schema = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"--schema: {path} is not JSON: {error}.") from None
    if not isinstance(schema, dict):
        raise UsageError(f"--schema: {path} is not a JSON object.")
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", path.stem)[:64]
    return {"response_format": {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}}


def _source(
    images: list[str], question: str | None, options: Options, settings: "CommandSettings", stack: ExitStack
) -> Source:
    """Return the source of the jobs.

    Raises:
        UsageError: there is none, or the question is missing.
    """
    if options.prefix is not None:
        return _prefix(options.prefix, options.match, settings)
    if not images:
        raise UsageError("nothing to submit. Give a file of jobs, images and a question, or --prefix.")
    folder = next((Path(image) for image in images if Path(image).is_dir()), None)
    if len(images) == 1 and _is_file_of_jobs(images[0], question, options.input_form):
        return _file(images[0], options.input_form, stack)
    if question is None:
        raise UsageError(f'the question is missing. Add it: vqa-worker submit {images[0]} "What is this?"')
    if folder is None:
        return inputs.from_arguments(images, each=options.each)
    if len(images) > 1:
        raise UsageError(f"{folder}/ is a folder. Submit it without other images.")
    return _folder(folder, options.match)


def _is_file_of_jobs(path: str, question: str | None, form: Form | None) -> bool:
    if form or path == STDIN or Path(path).suffix.lower() in FORMS_BY_SUFFIX:
        return True
    return question is None and not inputs.looks_like_image(path) and not Path(path).is_dir()


def _file(path: str, form: Form | None, stack: ExitStack) -> Source:
    if path != STDIN:
        return inputs.from_file(Path(path), form)
    # Jobs are read twice: once for the digest, once to plan.
    spool = stack.enter_context(NamedTemporaryFile(prefix="vqa-stdin-"))  # noqa: SIM115 - the stack closes it
    shutil.copyfileobj(sys.stdin.buffer, spool)
    spool.flush()
    return inputs.from_file(Path(spool.name), form, title="stdin", folder=Path())


def _folder(folder: Path, match: str | None) -> Source:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    images = (str(path) for path in files if _matches(path.relative_to(folder).as_posix(), match))
    whole = folder.resolve()
    return inputs.from_listing(f"{whole} {match or ''}", inputs.as_async(images), title=whole.name)


def _prefix(url: str, match: str | None, settings: "CommandSettings") -> Source:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not url.startswith("s3://") or not bucket:
        raise UsageError(f"--prefix: {url} is not of the form s3://bucket/prefix.")

    async def images() -> AsyncIterator[str]:
        from worker.cli.storage import open_s3
        from worker.s3.uploads import list_keys

        async with open_s3(settings) as s3:
            async for key in list_keys(s3, bucket, prefix):
                if _matches(key, match):
                    yield f"s3://{bucket}/{key}"

    return inputs.from_listing(f"{url} {match or ''}", images(), title=prefix or bucket)


def _matches(name: str, match: str | None) -> bool:
    return fnmatchcase(name, match) if match else name.lower().endswith(IMAGE_SUFFIXES)


def _uploads_to(bucket: str | None, settings: "CommandSettings") -> str | None:
    """Return the URL of the bucket and prefix for uploads.

    Raises:
        UsageError: the settings do not allow this bucket.
    """
    if bucket is None:
        return None
    name, _, prefix = bucket.removeprefix("s3://").partition("/")
    allowed = settings.allowed_buckets
    if allowed and not any(fnmatchcase(name, glob) for glob in allowed):
        raise UsageError(f"--bucket: {name} is not among VQA_ALLOWED_BUCKETS ({', '.join(allowed)}).")
    return f"s3://{name}/{prefix.rstrip('/') or UPLOAD_PREFIX}/"


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
        return name, value
