"""Plan a submission: complete each job, validate it as a worker does, and estimate the cost.

Jobs are sent only after all of them are planned.
"""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from vqa_worker.messages.conversation import Conversation, ImageRef
from vqa_worker.messages.decoding import InvalidJobError, decode
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.image_types import SUFFIXES, describe, media_type
from vqa_worker.messages.job import valid_id
from vqa_worker.messages.result import JobFailure, Result
from vqa_worker.messages.serialization import to_json
from worker.cli.shell import UsageError, counted, dollars
from worker.cli.submit.inputs import IMAGE_SCHEMES, Entry, Source
from worker.cli.submit.state import JobResult, SubmissionState
from worker.cli.times import parse_time
from worker.settings import CommandSettings

# Enough to see what is wrong with a file.
MAX_ERRORS_SHOWN: Final = 10
# After so many jobs the event loop runs, so that Ctrl-C works.
YIELD_EVERY_JOBS: Final = 200
# Rules of thumb for a photo and for an answer.
IMAGE_TOKENS: Final = 1000
ANSWER_TOKENS: Final = 200
# How many images `--estimate` reads.
MAX_SAMPLES: Final = 20
PER_PRICE: Final = 1_000_000


def parse_deadline_option(text: str) -> str:
    """Return the RFC 3339 time of `--deadline`: `2h` is two hours from now.

    Raises:
        UsageError: the text is not a time or duration, or has passed.
    """
    try:
        deadline = parse_time(text, from_now=1)
    except ValueError as error:
        raise UsageError(f"--deadline: {error}.") from None
    if deadline <= datetime.now(UTC):
        raise UsageError(f"--deadline: {text!r} has passed.")
    return deadline.isoformat(timespec="seconds")


class Planner:
    """Plan the jobs of a source.

    Attributes:
        draft: the jobs.
        uploads: the local images, by the URL to upload them to.
        jobs, images: the numbers of valid jobs and of their images, by model.
        samples: the first images, each with its model.
        tokens_per_image: for the estimate.
        errors: one message per invalid job, at most `MAX_ERRORS_SHOWN`.
        error_count: the number of invalid jobs.
    """

    def __init__(
        self, name: str, additions: Mapping[str, Any], uploads_to: str | None, settings: CommandSettings
    ) -> None:
        """Plan the submission `name`.

        Args:
            name: a part of the ids of jobs that have none.
            additions: fields for all jobs, which override the jobs' own.
            uploads_to: the URL of a bucket and prefix for local images.
            settings: the settings of the command.
        """
        self._name = name
        self._additions = additions
        self._uploads_to = uploads_to
        self._settings = settings
        self._number = 0
        self._key = lru_cache(maxsize=4096)(_key)
        self.draft = SubmissionState.draft()
        self.uploads: dict[str, Path] = {}
        self.jobs: Counter[str] = Counter()
        self.images: Counter[str] = Counter()
        self.samples: list[tuple[str, ImageRef]] = []
        self.tokens_per_image = IMAGE_TOKENS
        self.errors: list[str] = []
        self.error_count = 0

    async def run(self, source: Source) -> None:
        """Plan all jobs; invalid ones become failed results."""
        async for entry in source.entries:
            self._number += 1
            if self._number % YIELD_EVERY_JOBS == 0:
                await asyncio.sleep(0)
            try:
                if entry.error:
                    raise ValueError(entry.error)  # noqa: TRY301 - handled as the errors of valid entries
                self._add(entry, source.folder)
            except (InvalidJobError, ValueError) as error:
                self._reject(entry, str(error))

    def usd(self) -> float | None:
        """Return the estimated cost in USD; None if a model's price is unknown."""
        prices = self._settings.prices
        if self.jobs.keys() - prices.keys():
            return None
        tokens = self.tokens_per_image
        prompts = sum(prices[model].prompt * tokens * count for model, count in self.images.items())
        answers = sum(prices[model].completion * ANSWER_TOKENS * count for model, count in self.jobs.items())
        return (prompts + answers) / PER_PRICE

    def estimate(self) -> list[str]:
        """Return the estimate as lines of text."""
        jobs, images = counted(self.jobs.total(), "job"), counted(self.images.total(), "image")
        what, usd = f"{jobs} with {images} for {', '.join(sorted(self.jobs))}", self.usd()
        if usd is None:
            unknown = sorted(self.jobs.keys() - self._settings.prices.keys())
            return [what, f"cost unknown: VQA_PRICES has no price for {', '.join(unknown)}"]
        per_image = f"{self.tokens_per_image:,} prompt tokens per image"
        basis = f"for {per_image} and {ANSWER_TOKENS} completion tokens per job"
        return [what, f"about {dollars(usd)}, {basis}"]

    def _add(self, entry: Entry, folder: Path) -> None:
        job = _with(entry.job, self._additions)
        job.setdefault("id", self._id(entry.key))
        images = list(_images(job))
        for holder, key in images:
            holder[key] = self._upload_url(holder[key], folder)
        body = to_json(job)
        checked = decode(body, None, self._settings.max_job_bytes)
        # Only if the setting is there: the workers' settings need not be those of the command.
        is_set = "allowed_models" in self._settings.model_fields_set
        if is_set and checked.model is not None and checked.model not in self._settings.allowed_models:
            raise ValueError(f"model: {checked.model} is not among VQA_ALLOWED_MODELS")
        if not self.draft.add(str(checked.id), body, entry.custom_id):
            raise ValueError(f"duplicate {'custom_id' if entry.custom_id else 'id'}")
        model = checked.model or self._settings.model
        self.jobs[model] += 1
        self.images[model] += len(images)
        if len(self.samples) < MAX_SAMPLES:
            self.samples += [(model, ref) for ref in Conversation(checked).images()]
            del self.samples[MAX_SAMPLES:]

    def _upload_url(self, image: Any, folder: Path) -> Any:
        """Return the URL of an image; a local one is uploaded, named by the SHA-256 of its content."""
        if not isinstance(image, str) or image[:8].lower().startswith(IMAGE_SCHEMES):
            return image
        if "://" in image:
            raise ValueError(f"{image}: an image must be s3://bucket/key, https://…, data:… or a local file")
        path = (folder / image).absolute()
        if self._uploads_to is None and not path.is_file():
            raise ValueError(f"{image}: no such file (and not a URL)")
        if self._uploads_to is None:
            raise ValueError(f"{image}: is a local file; use --bucket to upload it")
        url = f"{self._uploads_to}{self._key(path)}"
        self.uploads[url] = path
        return url

    def _id(self, key: str | None) -> str:
        """Return the id of a job without one: the same each time the same jobs are submitted."""
        own = f"{self._name}-{self._number if key is None else key}"
        return own if valid_id(own) else f"{self._name}-{hashlib.sha256(own.encode()).hexdigest()[:32]}"

    def _reject(self, entry: Entry, reason: str) -> None:
        self.error_count += 1
        if len(self.errors) < MAX_ERRORS_SHOWN:
            where = "" if reason.startswith(f"{entry.where}: ") else f"{entry.where}: "
            self.errors.append(f"{where}{reason}")
        own = valid_id(entry.job.get("id")) or self._id(entry.custom_id)
        # A duplicate id fails too; its result needs another id than the first job's.
        for job_id in (own, f"{self._name}-{self._number}-invalid"):
            failed = failed_result(job_id, ErrorCode.INVALID_JOB, reason, retryable=False)
            if self.draft.add(job_id, None, entry.custom_id, failed):
                break


def failed_result(job_id: str, code: ErrorCode, message: str, *, retryable: bool) -> JobResult:
    """Return the failed result of a job that is not sent, as a worker would publish it."""
    error = JobFailure(code=code, message=message, retryable=retryable)
    body = Result(id=job_id, status="failed", error=error).to_body()
    return JobResult(job_id, body, int(time.time()), failed=True, code=code)


def _with(job: Mapping[str, Any], additions: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job with additions; those that are objects are merged with the job's own."""
    merged = {**job, **additions}
    for name, more in additions.items():
        if isinstance(more, dict) and (own := job.get(name)):
            merged[name] = {**own, **more} if isinstance(own, dict) else own
    return merged


def _images(job: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield container and key of each image in a job; `decode` rejects malformed ones."""
    listed = job.get("images")
    for number, image in enumerate(listed if isinstance(listed, list) else ()):
        yield (image, "url") if isinstance(image, dict) and "url" in image else (listed, number)
    messages = job.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            image = part.get("image_url") if isinstance(part, dict) else None
            if isinstance(image, dict) and "url" in image:
                yield image, "url"


def _key(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    kind = media_type(content)
    if kind is None:
        raise ValueError(f"{path}: the content is {describe(content)}")
    return f"{hashlib.sha256(content).hexdigest()}.{SUFFIXES[kind]}"
