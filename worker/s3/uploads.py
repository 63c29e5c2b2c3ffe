"""Upload and list objects for the command line; error messages say what to do."""

import asyncio
from collections.abc import AsyncIterator

from worker.errors import Dependency, DependencyDownError
from worker.s3.aws import S3Object
from worker.s3.client import S3, Request
from worker.s3.errors import FAILURES, S3ResponseError, translate
from worker.s3.listing import keys_of, next_query

# Enough for an object of some megabytes on a slow connection.
TIMEOUT_S = 120.0

_NOT_FOUND = 404


async def upload_if_missing(s3: S3, target: S3Object, content: bytes, content_type: str) -> bool:
    """Upload an object unless it exists; return whether it was uploaded.

    Raises:
        DependencyDownError: S3 is unreachable or denies access.
    """
    try:
        async with asyncio.timeout(TIMEOUT_S):
            if await _exists(s3, target):
                return False
            await s3.exchange(Request("PUT", target, {"Content-Type": content_type}, body=content))
    except FAILURES as error:
        raise _describe(error, target.bucket, "put objects there") from None
    return True


async def _exists(s3: S3, target: S3Object) -> bool:
    try:
        await s3.exchange(Request("HEAD", target))
    except S3ResponseError as error:
        # Without permission to list the bucket, S3 answers 403 for a missing object.
        if error.status in (_NOT_FOUND, 403):
            return False
        raise
    return True


async def list_keys(s3: S3, bucket: str, prefix: str, *, page: int = 1000) -> AsyncIterator[str]:
    """Yield the keys of all objects with a prefix, in S3's order, without folder markers.

    Raises:
        DependencyDownError: S3 is unreachable or denies access.
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
            raise _describe(error, bucket, "list it") from None
        for key in keys_of(listed):
            if not key.endswith("/"):
                yield key
        query = next_query(query, listed, f"bucket {bucket}")


def _describe(error: Exception, bucket: str, action: str) -> DependencyDownError:
    if not isinstance(error, S3ResponseError):
        return DependencyDownError(Dependency.S3, f"bucket {bucket}: {translate(error)}")
    what = f"{error.status} {error.code}".rstrip()
    if error.is_wrong_endpoint:
        where = f" ({error.region})" if error.region else ""
        advice = f"it is in another region{where}: set AWS_REGION"
    elif error.code == "NoSuchBucket" or error.status == _NOT_FOUND:
        advice = "the bucket does not exist at this S3 (VQA_S3_ENDPOINT_URL)"
    elif error.is_unavailable:
        advice = "S3 is busy: try again later"
    else:
        advice = f"check the AWS credentials, and that they allow to {action}"
    return DependencyDownError(Dependency.S3, f"bucket {bucket}: S3 answered {what}: {advice}")
