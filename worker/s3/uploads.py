"""Put objects into S3 and list them, for the command line: errors say what to do."""

import asyncio
from collections.abc import AsyncIterator

from worker.errors import Dependency, DependencyDownError
from worker.s3.aws import S3Object
from worker.s3.client import S3, Request
from worker.s3.errors import FAILURES, S3ResponseError, translate
from worker.s3.listing import keys_of, next_query

# For an object of some megabytes on a slow line.
TIMEOUT_S = 120.0

_NOT_FOUND = 404


async def upload_if_missing(s3: S3, target: S3Object, content: bytes, content_type: str) -> bool:
    """Put an object unless it exists; return whether it was put.

    Raises:
        DependencyDownError: S3 is unreachable or refuses; the message says what to do.
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
    except S3ResponseError as error:
        # Without the right to list the bucket, S3 denies that there is nothing.
        if error.status in (_NOT_FOUND, 403):
            return False
        raise
    return True


async def list_keys(s3: S3, bucket: str, prefix: str, *, page: int = 1000) -> AsyncIterator[str]:
    """Yield the keys of all objects with a prefix, in S3's order, without folder markers.

    Raises:
        DependencyDownError: S3 is unreachable or refuses; the message says what to do.
    """
    query: dict[str, str] | None = {
        "list-type": "2",
        "prefix": prefix,
        "encoding-type": "url",
        "max-keys": str(page),
    }
    while query is not None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                _, listed = await s3.exchange(Request("GET", S3Object(bucket, ""), query=query))
        except FAILURES as error:
            raise _explained(error, bucket, "list it") from None
        for key in keys_of(listed):
            if not key.endswith("/"):
                yield key
        query = next_query(query, listed, f"bucket {bucket}")


def _explained(error: Exception, bucket: str, right: str) -> DependencyDownError:
    if not isinstance(error, S3ResponseError):
        return DependencyDownError(Dependency.S3, f"bucket {bucket}: {translate(error)}")
    what = f"{error.status} {error.code}".rstrip()
    if error.is_elsewhere:
        where = f" ({error.region})" if error.region else ""
        advice = f"it is in another region{where}: set AWS_REGION"
    elif error.code == "NoSuchBucket" or error.status == _NOT_FOUND:
        advice = "the bucket does not exist at this S3 (VQA_S3_ENDPOINT_URL)"
    elif error.is_busy:
        advice = "S3 is busy: try again later"
    else:
        advice = f"check the AWS credentials, and that they allow to {right}"
    return DependencyDownError(Dependency.S3, f"bucket {bucket}: S3 answered {what}: {advice}")
