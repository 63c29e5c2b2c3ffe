"""Where a job says an image is, and whether the worker may use it from there."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from worker.errors import ErrorCode, JobError
from worker.s3.aws import S3Object

# S3: object keys are at most 1,024 bytes of UTF-8 (Amazon S3 user guide, "Naming objects").
MAX_KEY_BYTES = 1024
# Of a data URL, to find it in the message: a kilobyte of an image is hardly ever there twice.
SEARCHED_BYTES = 1024

_S3 = re.compile(r"s3://(?P<bucket>[^/]*)/?(?P<key>.*)", re.IGNORECASE | re.DOTALL)
# Strict on purpose: where readers of URLs disagree (backslashes, blanks), an allow-list can be fooled.
_LINK = re.compile(
    r"(?ai:https)://(?:[^/?#@\\\s\x00-\x1f\x7f]*@)?(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
    r"(?:[/?#][^\s\\\x00-\x1f\x7f]*)?",
)
_DATA = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")


@dataclass(frozen=True, slots=True)
class Link:
    """A link that the API is given as it is; the worker never fetches it."""

    url: str


@dataclass(frozen=True, slots=True)
class Embedded:
    """Base64 that the job itself carries: a part of the message's body, wherever that can be."""

    text: memoryview


Source = S3Object | Link | Embedded


@dataclass(frozen=True, slots=True)
class SourcePolicy:
    """Globs of what a job may point at."""

    allowed_buckets: Sequence[str]
    allowed_link_hosts: Sequence[str]


def parse_source(url: str, name: str, policy: SourcePolicy, body: bytes) -> Source:
    """Tell where the image is; `name` is how messages call it, `body` the message that has the URL in it.

    Raises:
        JobError: the URL is malformed, or the policy does not allow it.
    """
    scheme = url[:8].lower()
    if scheme.startswith("s3://"):
        return _parse_s3(url, name, policy.allowed_buckets)
    if scheme.startswith("https://"):
        return _parse_link(url, name, policy.allowed_link_hosts)
    if scheme.startswith("data:"):
        return _parse_data(url, name, body)
    raise JobError(
        ErrorCode.IMAGE_SOURCE_NOT_ALLOWED,
        f"{name}: only s3://bucket/key, https:// links and data: URLs are taken",
    )


def _parse_s3(url: str, name: str, allowed: Sequence[str]) -> S3Object:
    match = _S3.fullmatch(url)
    bucket, key = (match["bucket"], match["key"]) if match else ("", "")
    if not _BUCKET.fullmatch(bucket) or not key:
        raise JobError(ErrorCode.INVALID_JOB, f"{name}: must be s3://bucket/key with a bucket and a key")
    if _CONTROL.search(key):
        raise JobError(ErrorCode.INVALID_JOB, f"{name}: the object key holds control characters")
    if len(key.encode()) > MAX_KEY_BYTES:
        raise JobError(ErrorCode.INVALID_JOB, f"{name}: the object key is longer than {MAX_KEY_BYTES} bytes")
    if not _matches(bucket, allowed):
        raise JobError(
            ErrorCode.IMAGE_SOURCE_NOT_ALLOWED,
            f"{name}: bucket {bucket} is not among VQA_ALLOWED_BUCKETS",
        )
    return S3Object(bucket, key)


def _parse_link(url: str, name: str, allowed: Sequence[str]) -> Link:
    match = _LINK.fullmatch(url)
    if match is None:
        raise JobError(ErrorCode.INVALID_JOB, f"{name}: is not a well-formed https:// URL")
    # Globs name an IPv6 address without its brackets, which would be a set of characters in a glob.
    host = match["host"].lower().strip("[]").rstrip(".")
    if not _matches(host, [pattern.lower() for pattern in allowed]):
        raise JobError(
            ErrorCode.IMAGE_SOURCE_NOT_ALLOWED,
            f"{name}: host {host} is not among VQA_ALLOWED_LINK_HOSTS",
        )
    return Link(url)


def _parse_data(url: str, name: str, body: bytes) -> Embedded:
    if _DATA.match(url) is None:
        raise JobError(ErrorCode.INVALID_JOB, f"{name}: a data: URL must read data:image/…;base64,…")
    encoded = url.encode()
    start = encoded.index(b",") + 1
    if (at := _find(encoded, body)) is not None:
        return Embedded(memoryview(body)[at + start : at + len(encoded)])
    # JSON can say it in other characters, as PHP does: backslash and slash for a slash.
    return Embedded(memoryview(encoded)[start:])


def _find(text: bytes, body: bytes) -> int | None:
    """Where a long text stands in the body: by its beginning first, as a search for all of it is slow."""
    at = body.find(text[:SEARCHED_BYTES])
    while at >= 0 and not body.startswith(text, at):
        at = body.find(text[:SEARCHED_BYTES], at + 1)
    return at if at >= 0 else None


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
