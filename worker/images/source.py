"""Parse the URL of an image and check it against the allow-lists."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from vqa_worker.messages.data_urls import payload
from vqa_worker.messages.error_codes import ErrorCode
from worker.errors import Explanation, JobError
from worker.observability.redaction import is_bare_base64
from worker.s3.aws import S3Object

# S3: object keys are at most 1,024 bytes of UTF-8 (Amazon S3 user guide, "Naming objects").
MAX_KEY_BYTES = 1024
MAX_S3_URL_CHARS = 2048
MAX_LINK_CHARS = 16 * 1024

_S3 = re.compile(r"s3://(?P<bucket>[^/]*)/?(?P<key>.*)", re.IGNORECASE | re.DOTALL)
# Access points, also of Object Lambda and Outposts (Amazon S3 user guide, "Access point ARNs"). Those of
# several regions have no region in their ARN and need another signature.
_ACCESS_POINT = re.compile(
    r"[sS]3://(?P<bucket>arn:aws[a-z-]*:s3(?:-object-lambda|-outposts)?:[a-z0-9-]+:[0-9]{12}:"
    r"(?:outpost[:/][a-z0-9-]+[:/])?accesspoint[:/][a-z0-9-]{3,50})/(?P<key>.+)",
    re.DOTALL,
)
# Strict, because URL parsers disagree about backslashes and blanks, which could bypass an allow-list.
_LINK = re.compile(
    r"(?ai:https)://(?:[^/?#@\\\s\x00-\x1f\x7f]*@)?(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
    r"(?:[/?#][^\s\\\x00-\x1f\x7f]*)?",
)
_DATA = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_FORMS = "must be an s3://bucket/key, https:// or data: URL"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")


@dataclass(frozen=True, slots=True)
class Link:
    """A link that is passed on to the model API; the worker never fetches it."""

    url: str


@dataclass(frozen=True, slots=True)
class Embedded:
    """An image in a data URL.

    Attributes:
        text: its base64 with JSON escapes; a view into the message if possible.
    """

    text: memoryview


Source = S3Object | Link | Embedded


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image of a job.

    Attributes:
        name: its place in the job and its URL, for error messages; see `display_name`.
        source: where to read it.
        url: for the result, without secrets.
        max_edge: the longest side in pixels that the job wants it to be sent with; None: as it is.
        pages: the first and last page of each range that the job wants of a document; None: all.
        separator: the JSON of the request between the URLs of two pages.
    """

    name: str
    source: Source
    url: str = ""
    max_edge: int | None = None
    pages: tuple[tuple[int, int], ...] | None = None
    separator: bytes = b""

    @property
    def location(self) -> str:
        """Its place in the job, which contains nothing confidential."""
        return self.name.partition(" ")[0]


@dataclass(frozen=True, slots=True)
class SourcePolicy:
    """Globs of the buckets and link hosts that a job may use."""

    allowed_buckets: Sequence[str]
    allowed_link_hosts: Sequence[str]


def parse_source(url: str, name: str, policy: SourcePolicy, body: bytes) -> Source:
    """Return where the image is.

    Args:
        url: the image's URL, as the job gives it.
        name: the image's name in error messages.
        policy: the buckets and hosts that are allowed.
        body: the message from which the job was decoded.

    Raises:
        JobError: the URL is malformed, or the policy does not allow it.
    """
    scheme = url[:8].lower()
    if scheme.startswith("data:"):
        return _parse_data(url, name, body)
    if is_bare_base64(url):
        text = f"{_FORMS}; base64 needs the prefix data:image/png;base64, (with its type)"
        raise _error(name, ErrorCode.IMAGE_SOURCE_NOT_ALLOWED, text)
    if len(url) > (MAX_S3_URL_CHARS if scheme.startswith("s3://") else MAX_LINK_CHARS):
        raise _error(name, ErrorCode.INVALID_JOB, "the URL is too long")
    if scheme.startswith("s3://"):
        return _parse_s3(url, name, policy.allowed_buckets)
    if scheme.startswith("https://"):
        return _parse_link(url, name, policy.allowed_link_hosts)
    raise _error(name, ErrorCode.IMAGE_SOURCE_NOT_ALLOWED, _FORMS)


def of_version(source: Source, version_id: str | None, name: str) -> Source:
    """Return the source of one version of an object; `name`: as for `parse_source`.

    Raises:
        JobError: it is not an object in S3.
    """
    if version_id is None:
        return source
    if not isinstance(source, S3Object):
        raise _error(name, ErrorCode.INVALID_JOB, "version_id is only for s3:// images")
    return replace(source, version_id=version_id)


def _error(name: str, code: ErrorCode, text: str) -> JobError:
    message, log_message = Explanation.loggable(text).about_image(name)
    return JobError(code, message, log_message=log_message)


def _parse_s3(url: str, name: str, allowed: Sequence[str]) -> S3Object:
    access_point = _ACCESS_POINT.fullmatch(url)
    match = access_point or _S3.fullmatch(url)
    bucket, key = (match["bucket"], match["key"]) if match else ("", "")
    if not (access_point or _BUCKET.fullmatch(bucket)) or not key:
        raise _error(name, ErrorCode.INVALID_JOB, "must be s3://bucket/key with a bucket and a key")
    if _CONTROL.search(key):
        raise _error(name, ErrorCode.INVALID_JOB, "the object key contains control characters")
    if len(key.encode()) > MAX_KEY_BYTES:
        raise _error(name, ErrorCode.INVALID_JOB, f"the object key is longer than {MAX_KEY_BYTES} bytes")
    # A glob such as `*-photos` is for buckets, and not for access points of other accounts.
    globs = [glob for glob in allowed if glob == "*" or glob.startswith("arn:")] if access_point else allowed
    if not _matches(bucket, globs):
        text = f"bucket {bucket} is not in VQA_ALLOWED_BUCKETS"
        raise _error(name, ErrorCode.IMAGE_SOURCE_NOT_ALLOWED, text)
    return S3Object(bucket, key)


def _parse_link(url: str, name: str, allowed: Sequence[str]) -> Link:
    match = _LINK.fullmatch(url)
    if match is None:
        raise _error(name, ErrorCode.INVALID_JOB, "must be a valid https:// URL")
    # Globs contain IPv6 addresses without brackets, since brackets are a character class in a glob.
    host = match["host"].lower().strip("[]").rstrip(".")
    if not _matches(host, [pattern.lower() for pattern in allowed]):
        text = f"host {host} is not in VQA_ALLOWED_LINK_HOSTS"
        raise _error(name, ErrorCode.IMAGE_SOURCE_NOT_ALLOWED, text)
    return Link(url)


def _parse_data(url: str, name: str, body: bytes) -> Embedded:
    if _DATA.match(url) is None:
        raise _error(name, ErrorCode.INVALID_JOB, "a data: URL must have the form data:image/…;base64,…")
    return Embedded(payload(url, body))


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
