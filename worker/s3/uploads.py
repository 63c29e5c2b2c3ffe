"""Putting objects into S3, and listing what is there, for people: what goes wrong is told in their words."""

import asyncio
import html
import re
from collections.abc import AsyncIterator
from urllib.parse import unquote_plus

from worker.errors import Dependency, DependencyDownError
from worker.s3.aws import S3Object
from worker.s3.client import S3, Request
from worker.s3.refusals import FAILURES, S3Refusal, translate

# For an object of some megabytes on a slow line.
TIMEOUT_S = 120.0

_NOT_FOUND = 404
_KEY = re.compile(rb"<Key>([^<]*)</Key>")
_NEXT = re.compile(rb"<NextContinuationToken>([^<]+)</NextContinuationToken>")
_IS_ENCODED = b"<EncodingType>url</EncodingType>"


async def put_once(s3: S3, target: S3Object, content: bytes, content_type: str) -> bool:
    """Put an object there, unless one is; returns whether it was put.

    Raises:
        DependencyDownError: S3 is out of reach or refuses; the message says what to do.
    """
    try:
        async with asyncio.timeout(TIMEOUT_S):
            if await _is_there(s3, target):
                return False
            await s3.exchange(Request("PUT", target, {"Content-Type": content_type}, body=content))
    except FAILURES as error:
        raise _explained(error, target.bucket, "put objects there") from None
    return True


async def _is_there(s3: S3, target: S3Object) -> bool:
    try:
        await s3.exchange(Request("HEAD", target))
    except S3Refusal as error:
        # Without the right to list the bucket, S3 denies that there is nothing.
        if error.status in (_NOT_FOUND, 403):
            return False
        raise
    return True


async def keys(s3: S3, bucket: str, prefix: str, *, page: int = 1000) -> AsyncIterator[str]:
    """The keys of all objects below a prefix, in the order of S3, a page at a time.

    What only marks a folder is left out.

    Raises:
        DependencyDownError: S3 is out of reach or refuses; the message says what to do.
    """
    query = {"list-type": "2", "prefix": prefix, "encoding-type": "url", "max-keys": str(page)}
    while True:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                _, listed = await s3.exchange(Request("GET", S3Object(bucket, ""), query=query))
        except FAILURES as error:
            raise _explained(error, bucket, "list it") from None
        is_encoded = _IS_ENCODED in listed
        for found in _KEY.findall(listed):
            written = found.decode()
            key = unquote_plus(written) if is_encoded else html.unescape(written)
            if not key.endswith("/"):
                yield key
        if not (more := _NEXT.search(listed)):
            return
        query["continuation-token"] = html.unescape(more[1].decode())


def _explained(error: Exception, bucket: str, right: str) -> DependencyDownError:
    if not isinstance(error, S3Refusal):
        return DependencyDownError(Dependency.S3, f"bucket {bucket}: {translate(error)}")
    what = f"{error.status} {error.code}".rstrip()
    if error.is_elsewhere:
        where = f" ({error.region})" if error.region else ""
        advice = f"it is in another region{where}: set AWS_REGION"
    elif error.code == "NoSuchBucket" or error.status == _NOT_FOUND:
        advice = "there is no such bucket at this S3 (VQA_S3_ENDPOINT_URL)"
    elif error.is_busy:
        advice = "S3 is busy: try again later"
    else:
        advice = f"check the AWS credentials, and that they allow to {right}"
    return DependencyDownError(Dependency.S3, f"bucket {bucket}: S3 answered {what}: {advice}")
