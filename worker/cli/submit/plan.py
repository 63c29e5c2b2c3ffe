"""Plan a submission: complete each job, validate it as a worker does, and add it to the state file.

Jobs are sent only after all of them are planned.
"""

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from vqa_worker.messages.decoding import InvalidJobError, decode
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.image_types import media_type
from vqa_worker.messages.job import valid_id
from vqa_worker.messages.result import JobFailure, Result
from vqa_worker.messages.serialization import to_json
from worker.cli.shell import UsageError
from worker.cli.submit.estimate import Estimate
from worker.cli.submit.inputs import Entry, InvalidEntry, Source
from worker.cli.submit.state import Planned, Received, SubmissionState

# Enough to see what is wrong with a file.
MAX_ERRORS_SHOWN: Final = 10
# After so many jobs the event loop runs, so that Ctrl-C works.
YIELD_EVERY_JOBS: Final = 200

_SCHEMES: Final = ("s3://", "https://", "data:")
_SPAN: Final = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
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
        """Replace a span as deadline by a time: `2h` is two hours from now.

        Raises:
            UsageError: the deadline is not a time or span.
        """
        if self.deadline is None:
            return self
        if found := _SPAN.fullmatch(self.deadline):
            span = timedelta(seconds=float(found[1]) * _SECONDS[found[2]])
            return replace(self, deadline=(datetime.now(UTC) + span).isoformat(timespec="seconds"))
        try:
            datetime.fromisoformat(self.deadline)
        except ValueError:
            known = "a time (2030-01-31T12:00:00Z) or a span (90s, 30m, 2h, 1d)"
            raise UsageError(f"--deadline: {self.deadline} is not {known}.") from None
        return self

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
    """Add the jobs of a source to a state file.

    Attributes:
        errors: one message per invalid job, at most `MAX_ERRORS_SHOWN`.
        error_count: the number of invalid jobs.
    """

    def __init__(
        self,
        state: SubmissionState,
        name: str,
        additions: Additions,
        estimate: Estimate,
        *,
        max_job_bytes: int,
        skips_invalid: bool,
    ) -> None:
        """`skips_invalid`: add a failed result for each invalid job."""
        self._state = state
        self._name = name
        self._additions = additions
        self._estimate = estimate
        self._max_job_bytes = max_job_bytes
        self._skips_invalid = skips_invalid
        self._number = 0
        self._may_exist = False
        self.errors: list[str] = []
        self.error_count = 0

    async def plan(self, source: Source) -> None:
        """Add all jobs of the source that are not in the state file. Call it in a transaction."""
        files = _LocalFiles(source.folder, self._additions.uploads_to)
        self._may_exist = source.may_grow
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
        for holder, key in _images(job):
            holder[key] = self._upload_url(files, holder[key])
        body = to_json(job)
        checked = decode(body, None, self._max_job_bytes)
        if self._state.add(Planned(str(checked.id), body, item.custom_id)):
            self._estimate.add(checked)
        elif not self._may_exist:
            raise ValueError(f"duplicate {'custom_id' if item.custom_id else 'id'}")

    def _upload_url(self, files: "_LocalFiles", image: Any) -> Any:
        if not isinstance(image, str) or image[:8].lower().startswith(_SCHEMES):
            return image
        url, path = files.locate(image)
        if self._state.add_upload(url, str(path)):
            self._estimate.uploads += 1
        return url

    def _id(self, key: str | None) -> str:
        """Return the id of a job without one: the same each time the same jobs are submitted."""
        own = f"{self._name}-{self._number if key is None else key}"
        return own if valid_id(own) else f"{self._name}-{hashlib.sha256(own.encode()).hexdigest()[:32]}"

    def _reject(self, invalid: InvalidEntry, item: Entry | None = None) -> None:
        self.error_count += 1
        if len(self.errors) < MAX_ERRORS_SHOWN:
            self.errors.append(f"{invalid.where}: {invalid.reason}")
        if self._skips_invalid:
            given = valid_id(item.job.get("id")) if item is not None else None
            own = given or self._id(invalid.custom_id)
            # A duplicate id fails too; its result needs another id than the first job's.
            for job_id in (own,) if self._may_exist else (own, f"{self._name}-{self._number}-invalid"):
                failed = _failed(job_id, invalid.reason)
                if self._state.add(Planned(job_id, None, invalid.custom_id, failed)):
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
