"""Objects under one prefix, written with preconditions or without."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from worker.errors import Dependency, DependencyDownError
from worker.s3.aws import S3Object
from worker.s3.client import S3, Request
from worker.s3.errors import FAILURES, S3ResponseError, translate
from worker.s3.listing import keys_of, next_query

# For one request with its retries for a small object: jobs wait for them.
TIMEOUT_S = 20.0

_NOT_FOUND = 404
# 409: another conditional write to the same object is in progress (Amazon S3 user guide, "Conditional
# writes"); the caller reads the object again.
_CONDITION_FAILED = (409, 412)
_CONDITIONS = ("If-Match", "If-None-Match")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object and its age in seconds by S3's clock."""

    body: bytes
    etag: str
    age_s: float


class ConditionalStore:
    """The objects of one bucket under one prefix.

    All methods raise DependencyDownError if S3 is unreachable, fails or denies access.
    """

    def __init__(
        self,
        s3: S3,
        bucket: str,
        prefix: str,
        *,
        setting: str,
        rights: str = "get, put, delete and list",
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Create it.

        Args:
            s3: the client.
            bucket: of the objects.
            prefix: of their keys; empty, or ends with a slash.
            setting: the name of the setting, for error messages.
            rights: what the worker must be allowed to do with the objects, for error messages.
            timeout_s: for one request with its retries.
        """
        self._s3 = s3
        self._bucket = bucket
        self._prefix = prefix
        self._setting = setting
        self._rights = rights
        self._timeout_s = timeout_s

    async def create(self, name: str, body: bytes) -> str | None:
        """Write an object unless it exists; return its ETag, or None if it exists."""
        return await self._put(name, body, {"If-None-Match": "*"})

    async def replace(self, name: str, body: bytes, etag: str) -> str | None:
        """Write an object if its ETag is still `etag`; return the new ETag, or None if it is not."""
        return await self._put(name, body, {"If-Match": etag})

    async def write(self, name: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Write an object without a condition; `headers`: of the request, such as `Content-Type`."""
        await self._put(name, body, headers or {})

    async def read(self, name: str) -> StoredObject | None:
        """Return the object, or None if it does not exist."""
        try:
            headers, body = await self._send("GET", name)
        except S3ResponseError as error:
            if _is_missing(error):
                return None
            raise self._down(error) from None
        return StoredObject(body, headers.get("ETag", ""), _age_s(headers))

    async def delete(self, name: str, etag: str | None = None) -> None:
        """Delete an object if its ETag is still `etag` (where S3 supports that)."""
        try:
            await self._send("DELETE", name, {"If-Match": etag} if etag else {})
        except S3ResponseError as error:
            if error.status not in (*_CONDITION_FAILED, _NOT_FOUND):
                raise self._down(error) from None

    async def names(self, folder: str) -> list[str]:
        """Return the names of all objects in a folder, which ends with a slash."""
        names: list[str] = []
        query: dict[str, str] | None = {"list-type": "2", "prefix": f"{self._prefix}{folder}"}
        while query is not None:
            try:
                _, page = await self._exchange(Request("GET", S3Object(self._bucket, ""), query=query))
            except S3ResponseError as error:
                raise self._down(error) from None
            names += [key.rpartition("/")[2] for key in keys_of(page)]
            query = next_query(query, page, self._setting)
        return names

    async def _put(self, name: str, body: bytes, headers: Mapping[str, str]) -> str | None:
        try:
            answered, _ = await self._send("PUT", name, headers, body)
        except S3ResponseError as error:
            # AWS answers 404, not 412, to If-Match on a missing object.
            is_missing = "If-Match" in headers and _is_missing(error)
            is_conditional = not headers.keys().isdisjoint(_CONDITIONS)
            if is_missing or (is_conditional and error.status in _CONDITION_FAILED):
                return None
            raise self._down(error) from None
        return answered.get("ETag", "")

    async def _send(
        self, method: str, name: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> tuple[Mapping[str, str], bytes]:
        source = S3Object(self._bucket, f"{self._prefix}{name}")
        return await self._exchange(Request(method, source, headers or {}, body=body))

    async def _exchange(self, request: Request) -> tuple[Mapping[str, str], bytes]:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._s3.exchange(request)
        except S3ResponseError:
            raise
        except FAILURES as error:
            raise DependencyDownError(
                Dependency.RESULT_STORE, f"{self._setting}: {translate(error)}"
            ) from None

    def _down(self, error: S3ResponseError) -> DependencyDownError:
        """Return the error for any error response: each concerns the settings, never the job."""
        what = f"{error.status} {error.code}".rstrip()
        if error.is_wrong_endpoint:
            where = f" ({error.region})" if error.region else ""
            text = f"the bucket is in another region{where} than the worker's S3 ({what})"
        elif isinstance(known := translate(error), DependencyDownError):
            text = known.message
        else:
            text = f"S3 answered {what}: the worker must be allowed to {self._rights} objects there"
        return DependencyDownError(Dependency.RESULT_STORE, f"{self._setting}: {text}")


def _is_missing(error: S3ResponseError) -> bool:
    return error.status == _NOT_FOUND and error.code != "NoSuchBucket"


def _age_s(headers: Mapping[str, str]) -> float:
    """Return the seconds since the object was written, or 0 without usable dates."""
    try:
        dates = [parsedate_to_datetime(headers[name]) for name in ("Date", "Last-Modified")]
    except (KeyError, ValueError, TypeError):
        return 0.0
    return (dates[0] - dates[1]).total_seconds()
