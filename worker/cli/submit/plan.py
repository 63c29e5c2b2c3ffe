"""Plan a submission: complete each job and validate it as a worker does.

Jobs are sent only after all of them are planned.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
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
from worker.cli.submit.inputs import IMAGE_SCHEMES, Entry, InvalidEntry, Source
from worker.cli.submit.state import Plan, Planned, Received
from worker.cli.times import parse_time
from worker.settings import CommandSettings

# Enough to see what is wrong with a file.
MAX_ERRORS_SHOWN: Final = 10
# After so many jobs the event loop runs, so that Ctrl-C works.
YIELD_EVERY_JOBS: Final = 200

_SUFFIXES: Final = {"image/jpeg": "jpg", "image/png": "png", "image/webp": "webp"}


@dataclass(frozen=True)
class Bucket:
    """The bucket and key prefix for uploads."""

    name: str
    prefix: str

    def url(self, key: str) -> str:
        """Return the URL of an object."""
        return f"s3://{self.name}/{self.prefix}{key}"


@dataclass(frozen=True, kw_only=True)
class Additions:
    """Fields from the command line for all jobs; they override the jobs' own."""

    question: str | None = None
    system: str | None = None
    model: str | None = None
    deadline: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    uploads_to: Bucket | None = None

    def resolved(self) -> "Additions":
        """Return these additions with the deadline as a time: `2h` is two hours from now.

        Raises:
            UsageError: the deadline is not a time or duration, or has passed.
        """
        if self.deadline is None:
            return self
        try:
            deadline = parse_time(self.deadline, from_now=1)
        except ValueError as error:
            raise UsageError(f"--deadline: {error}.") from None
        if deadline <= datetime.now(UTC):
            raise UsageError(f"--deadline: {self.deadline!r} has passed.")
        return replace(self, deadline=deadline.isoformat(timespec="seconds"))

    def digest(self) -> str:
        """Identify these additions."""
        return json.dumps(asdict(self), sort_keys=True)

    def applied(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return the job with the additions."""
        texts = {
            "question": self.question,
            "system": self.system,
            "model": self.model,
            "deadline": self.deadline,
        }
        job = {**job, **{name: text for name, text in texts.items() if text is not None}}
        for name, more in (("params", self.params), ("metadata", self.metadata)):
            if more:
                own = job.get(name) or {}
                job[name] = {**own, **more} if isinstance(own, dict) else own
        return job


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
        additions: Additions,
        settings: CommandSettings,
        *,
        is_known: Callable[[str], bool] | None = None,
    ) -> None:
        """`is_known`: whether the submission already has a job, if it can; with it, ids may repeat.

        Raises:
            UsageError: an addition is invalid.
        """
        self._name = name
        self._additions = additions.resolved()
        self._is_known = is_known
        self._settings = settings
        self._number = 0
        self.plan = Plan()
        self.estimate = Estimate(settings.model, settings.prices)
        self.errors: list[str] = []
        self.error_count = 0

    async def run(self, source: Source) -> None:
        """Plan all jobs; invalid ones become failed results."""
        files = _LocalFiles(source.folder, self._additions.uploads_to)
        async for item in source:
            self._number += 1
            if self._number % YIELD_EVERY_JOBS == 0:
                await asyncio.sleep(0)
            if isinstance(item, InvalidEntry):
                self._reject(item)
                continue
            try:
                self._add(item, files)
            except (InvalidJobError, ValueError) as error:
                self._reject(InvalidEntry(item.where, str(error), item.custom_id), item)

    def _add(self, item: Entry, files: "_LocalFiles") -> None:
        job = self._additions.applied(item.job)
        job.setdefault("id", self._id(item.key))
        if self._is_known is not None and self._is_known(job["id"]):
            return
        for holder, key in _images(job):
            holder[key] = self._upload_url(files, holder[key])
        body = to_json(job)
        checked = decode(body, None, self._settings.max_job_bytes)
        self._check_model(checked)
        if self.plan.add(Planned(str(checked.id), body, item.custom_id)):
            self.estimate.add(checked)
        elif self._is_known is None:
            raise ValueError(f"duplicate {'custom_id' if item.custom_id else 'id'}")

    def _check_model(self, job: Job) -> None:
        # Only if the setting is there: the workers' settings need not be those of the command.
        is_set = "allowed_models" in self._settings.model_fields_set
        if is_set and job.model is not None and job.model not in self._settings.allowed_models:
            raise ValueError(f"model: {job.model} is not among VQA_ALLOWED_MODELS")

    def _upload_url(self, files: "_LocalFiles", image: Any) -> Any:
        if not isinstance(image, str) or image[:8].lower().startswith(IMAGE_SCHEMES):
            return image
        url, path = files.locate(image)
        self.plan.uploads[url] = path
        return url

    def _id(self, key: str | None) -> str:
        """Return the id of a job without one: the same each time the same jobs are submitted."""
        own = f"{self._name}-{self._number if key is None else key}"
        return own if valid_id(own) else f"{self._name}-{hashlib.sha256(own.encode()).hexdigest()[:32]}"

    def _reject(self, invalid: InvalidEntry, item: Entry | None = None) -> None:
        self.error_count += 1
        if len(self.errors) < MAX_ERRORS_SHOWN:
            where = "" if invalid.reason.startswith(f"{invalid.where}: ") else f"{invalid.where}: "
            self.errors.append(f"{where}{invalid.reason}")
        own = (valid_id(item.job.get("id")) if item else None) or self._id(invalid.custom_id)
        # A duplicate id fails too; its result needs another id than the first job's.
        for job_id in (own,) if self._is_known else (own, f"{self._name}-{self._number}-invalid"):
            failed = _failed(job_id, invalid.reason)
            if self.plan.add(Planned(job_id, None, invalid.custom_id, failed)):
                break


def _failed(job_id: str, reason: str) -> Received:
    """Return the failed result of an invalid job, as a worker would publish it."""
    error = JobFailure(code=ErrorCode.INVALID_JOB, message=reason, retryable=False)
    body = Result(id=job_id, status="failed", error=error).to_body()
    return Received(job_id, body, int(time.time()), failed=True)


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


class _LocalFiles:
    """Local images, and their URLs after the upload: named by the SHA-256 of their content."""

    def __init__(self, folder: Path, bucket: Bucket | None) -> None:
        self._folder = folder
        self._bucket = bucket
        self._key = lru_cache(maxsize=4096)(_key)

    def locate(self, image: str) -> tuple[str, Path]:
        """Return the URL of a local image after the upload, and its path.

        Raises:
            ValueError: it cannot be uploaded.
        """
        if "://" in image:
            raise ValueError(f"{image}: an image must be s3://bucket/key, https://…, data:… or a local file")
        path = (self._folder / image).absolute()
        if self._bucket is None:
            if path.is_file():
                raise ValueError(f"{image}: is a local file; use --bucket to upload it")
            raise ValueError(f"{image}: no such file (and not a URL)")
        return self._bucket.url(self._key(path)), path


def _key(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    kind = media_type(content)
    if kind is None:
        raise ValueError(f"{path}: is not a JPEG, PNG or WebP image")
    return f"{hashlib.sha256(content).hexdigest()}.{_SUFFIXES[kind]}"
