"""Plan a submission: complete each job and validate it as a worker does.

Jobs are sent only after all of them are planned.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from vqa_worker.messages.decoding import InvalidJobError, decode
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.image_types import media_type
from vqa_worker.messages.job import Job, valid_id
from vqa_worker.messages.result import JobFailure, Result
from vqa_worker.messages.serialization import to_json
from worker.cli.shell import UsageError
from worker.cli.submit.estimate import Estimate
from worker.cli.submit.inputs import IMAGE_SCHEMES, Entry, Source
from worker.cli.submit.state import Plan, Received
from worker.cli.times import parse_time
from worker.settings import CommandSettings

# Enough to see what is wrong with a file.
MAX_ERRORS_SHOWN: Final = 10
# After so many jobs the event loop runs, so that Ctrl-C works.
YIELD_EVERY_JOBS: Final = 200

_SUFFIXES: Final = {"image/jpeg": "jpg", "image/png": "png", "image/webp": "webp"}


def resolve_deadline(additions: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the additions with the deadline as a time: `2h` is two hours from now.

    Raises:
        UsageError: the deadline is not a time or duration, or has passed.
    """
    if (text := additions.get("deadline")) is None:
        return additions
    try:
        deadline = parse_time(text, from_now=1)
    except ValueError as error:
        raise UsageError(f"--deadline: {error}.") from None
    if deadline <= datetime.now(UTC):
        raise UsageError(f"--deadline: {text!r} has passed.")
    return {**additions, "deadline": deadline.isoformat(timespec="seconds")}


class Planner:
    """Plan the jobs of a source.

    Attributes:
        plan: the jobs that are not in the submission yet.
        estimate: of these jobs' cost.
        errors: one message per invalid job, at most `MAX_ERRORS_SHOWN`.
        error_count: the number of invalid jobs.
    """

    def __init__(
        self,
        name: str,
        additions: Mapping[str, Any],
        uploads_to: str | None,
        settings: CommandSettings,
        *,
        is_known: Callable[[str], bool] | None = None,
    ) -> None:
        """Plan the submission `name`.

        Args:
            name: a part of the ids of jobs that have none.
            additions: fields for all jobs, which override the jobs' own.
            uploads_to: the URL of a bucket and prefix for local images.
            settings: the settings of the command.
            is_known: whether the submission already has a job, if it can; with it, ids may repeat.

        Raises:
            UsageError: an addition is invalid.
        """
        self._name = name
        self._additions = resolve_deadline(additions)
        self._uploads_to = uploads_to
        self._is_known = is_known
        self._settings = settings
        self._number = 0
        self._key = lru_cache(maxsize=4096)(_key)
        self.plan = Plan()
        self.estimate = Estimate(settings.model, settings.prices)
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

    def _add(self, entry: Entry, folder: Path) -> None:
        job = _with(entry.job, self._additions)
        job.setdefault("id", self._id(entry.key))
        if self._is_known is not None and self._is_known(job["id"]):
            return
        for holder, key in _images(job):
            holder[key] = self._upload_url(holder[key], folder)
        body = to_json(job)
        checked = decode(body, None, self._settings.max_job_bytes)
        self._check_model(checked)
        if self.plan.add(str(checked.id), body, entry.custom_id):
            self.estimate.add(checked)
        elif self._is_known is None:
            raise ValueError(f"duplicate {'custom_id' if entry.custom_id else 'id'}")

    def _check_model(self, job: Job) -> None:
        # Only if the setting is there: the workers' settings need not be those of the command.
        is_set = "allowed_models" in self._settings.model_fields_set
        if is_set and job.model is not None and job.model not in self._settings.allowed_models:
            raise ValueError(f"model: {job.model} is not among VQA_ALLOWED_MODELS")

    def _upload_url(self, image: Any, folder: Path) -> Any:
        """Return the URL of an image; a local one is uploaded, named by the SHA-256 of its content."""
        if not isinstance(image, str) or image[:8].lower().startswith(IMAGE_SCHEMES):
            return image
        if "://" in image:
            raise ValueError(f"{image}: an image must be s3://bucket/key, https://…, data:… or a local file")
        path = (folder / image).absolute()
        if self._uploads_to is None:
            if not path.is_file():
                raise ValueError(f"{image}: no such file (and not a URL)")
            raise ValueError(f"{image}: is a local file; use --bucket to upload it{self._known_bucket()}")
        url = f"{self._uploads_to}{self._key(path)}"
        self.plan.uploads[url] = path
        return url

    def _known_bucket(self) -> str:
        """Return the option for the only bucket that workers may use, if the settings name one."""
        buckets = self._settings.allowed_buckets
        return f" (--bucket {buckets[0]})" if len(buckets) == 1 and "*" not in buckets[0] else ""

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
        for job_id in (own,) if self._is_known else (own, f"{self._name}-{self._number}-invalid"):
            failed = failed_result(job_id, ErrorCode.INVALID_JOB, reason, retryable=False)
            if self.plan.add(job_id, None, entry.custom_id, failed):
                break


def failed_result(job_id: str, code: ErrorCode, message: str, *, retryable: bool) -> Received:
    """Return the failed result of a job that is not sent, as a worker would publish it."""
    error = JobFailure(code=code, message=message, retryable=retryable)
    body = Result(id=job_id, status="failed", error=error).to_body()
    return Received(job_id, body, int(time.time()), failed=True)


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
        raise ValueError(f"{path}: is not a JPEG, PNG or WebP image")
    return f"{hashlib.sha256(content).hexdigest()}.{_SUFFIXES[kind]}"
