"""From what was written to what is sent: each job completed, checked as a worker checks it, and put down.

Nothing is sent before all of it is known to be in order.
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

from worker.cli.shell import UsageError
from worker.cli.submit.estimate import Estimate
from worker.cli.submit.inputs import Entry, Fault, Source
from worker.cli.submit.manifest import Manifest, Planned, Received
from worker.errors import ErrorCode
from worker.images.content import media_type
from worker.messages.decoding import InvalidJobError, decode
from worker.messages.job import valid_id
from worker.messages.result import JobFailure, Result
from worker.messages.serialization import to_json

# Enough to see what is wrong with a file.
MAX_FAULTS_SHOWN: Final = 10
# So often others get their turn, Ctrl-C among them.
BREATH_JOBS: Final = 200

_SCHEMES: Final = ("s3://", "https://", "data:")
_SPAN: Final = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SUFFIXES: Final = {"image/jpeg": "jpg", "image/png": "png", "image/webp": "webp"}


@dataclass(frozen=True)
class Bucket:
    """Where local files go: a bucket, and what stands before their names there."""

    name: str
    prefix: str

    def url(self, key: str) -> str:
        """The URL of a file that goes by this name."""
        return f"s3://{self.name}/{self.prefix}{key}"


@dataclass(frozen=True, kw_only=True)
class Additions:
    """What the command line says of all jobs; it comes before what they say themselves."""

    question: str | None = None
    system: str | None = None
    model: str | None = None
    deadline: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    uploads_to: Bucket | None = None

    def resolved(self) -> "Additions":
        """The same with a time in the place of a span: a deadline of `2h` is two hours from now.

        Raises:
            UsageError: the deadline is neither.
        """
        if self.deadline is None:
            return self
        if found := _SPAN.fullmatch(self.deadline):
            span = timedelta(seconds=float(found[1]) * _SECONDS[found[2]])
            return replace(self, deadline=(datetime.now(UTC) + span).isoformat(timespec="seconds"))
        try:
            datetime.fromisoformat(self.deadline)
        except ValueError:
            known = "a time (2030-01-31T12:00:00Z) nor a span (90s, 30m, 2h, 1d)"
            raise UsageError(f"--deadline: {self.deadline} is neither {known}") from None
        return self

    def digest(self) -> str:
        """What tells these additions from others."""
        return json.dumps(asdict(self), sort_keys=True)

    def applied(self, job: dict[str, Any]) -> dict[str, Any]:
        """The job with what is said of all."""
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
    """Puts down the jobs of one submission.

    Attributes:
        faults: what is wrong, a line each; of many only the first ones.
        fault_count: how many there are.
    """

    def __init__(
        self,
        manifest: Manifest,
        name: str,
        additions: Additions,
        estimate: Estimate,
        *,
        max_job_bytes: int,
        keeps_invalid: bool,
    ) -> None:
        """`keeps_invalid`: what is no job becomes a failed result instead of a fault."""
        self._manifest = manifest
        self._name = name
        self._additions = additions
        self._estimate = estimate
        self._max_job_bytes = max_job_bytes
        self._keeps_invalid = keeps_invalid
        self._number = 0
        self._may_be_there = False
        self.faults: list[str] = []
        self.fault_count = 0

    async def plan(self, source: Source) -> None:
        """Put down all jobs of the source that are not there; within a transaction of the manifest."""
        place = _Place(source.folder, self._additions.uploads_to)
        self._may_be_there = source.may_grow
        async for item in source:
            self._number += 1
            if self._number % BREATH_JOBS == 0:
                await asyncio.sleep(0)
            if isinstance(item, Fault):
                self._fault(item)
                continue
            try:
                self._put_down(item, place)
            except (InvalidJobError, ValueError) as error:
                self._fault(Fault(item.where, str(error), item.custom_id), item)

    def _put_down(self, item: Entry, place: "_Place") -> None:
        job = self._additions.applied(item.job)
        job.setdefault("id", self._id(item.key))
        for holder, key in _images(job):
            holder[key] = self._at_url(place, holder[key])
        body = to_json(job)
        checked = decode(body, None, self._max_job_bytes)
        if self._manifest.add(Planned(str(checked.id), body, item.custom_id)):
            self._estimate.add(checked)
        elif not self._may_be_there:
            raise ValueError(
                f"there is another job with the {'custom_id' if item.custom_id else 'id'} before it"
            )

    def _at_url(self, place: "_Place", image: Any) -> Any:
        if not isinstance(image, str) or image[:8].lower().startswith(_SCHEMES):
            return image
        url, path = place.of(image)
        if self._manifest.add_upload(url, str(path)):
            self._estimate.uploads += 1
        return url

    def _id(self, key: str | None) -> str:
        """The id of a job that has none: the same whenever the same is submitted."""
        own = f"{self._name}-{self._number if key is None else key}"
        return own if valid_id(own) else f"{self._name}-{hashlib.sha256(own.encode()).hexdigest()[:32]}"

    def _fault(self, fault: Fault, item: Entry | None = None) -> None:
        self.fault_count += 1
        if len(self.faults) < MAX_FAULTS_SHOWN:
            self.faults.append(f"{fault.where}: {fault.reason}")
        if self._keeps_invalid:
            given = valid_id(item.job.get("id")) if item is not None else None
            own = given or self._id(fault.custom_id)
            # A second job of the same id fails, too, and its result has to be told from the first one's.
            for job_id in (own,) if self._may_be_there else (own, f"{self._name}-{self._number}-invalid"):
                failed = _failed(job_id, fault.reason)
                if self._manifest.add(Planned(job_id, None, fault.custom_id, failed)):
                    break


def _failed(job_id: str, reason: str) -> Received:
    """The result of a job that cannot be sent, as a worker would have given it."""
    error = JobFailure(code=ErrorCode.INVALID_JOB, message=reason, retryable=False)
    body = Result(id=job_id, status="failed", error=error).to_body()
    return Received(job_id, body, int(time.time()), failed=True)


def _images(job: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Where images are named in a job, as container and key; what has another form is left to the check."""
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


class _Place:
    """Where local images are, and where they go: under the SHA-256 of their content."""

    def __init__(self, folder: Path, bucket: Bucket | None) -> None:
        self._folder = folder
        self._bucket = bucket
        self._key = lru_cache(maxsize=4096)(_key)

    def of(self, image: str) -> tuple[str, Path]:
        """The URL that a local image will have, and its path.

        Raises:
            ValueError: it is no image that can be uploaded; the message says why.
        """
        if "://" in image:
            raise ValueError(
                f"{image}: images are s3://bucket/key, https:// links, data: URLs or local files"
            )
        path = (self._folder / image).absolute()
        if self._bucket is None:
            what = (
                "a local file: --bucket says where to upload it"
                if path.is_file()
                else "neither a URL nor a file"
            )
            raise ValueError(f"{image}: is {what}")
        return self._bucket.url(self._key(path)), path


def _key(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    kind = media_type(content)
    if kind is None:
        raise ValueError(f"{path}: is no JPEG, PNG or WebP image")
    return f"{hashlib.sha256(content).hexdigest()}.{_SUFFIXES[kind]}"
