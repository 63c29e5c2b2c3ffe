"""Checks of S3: credentials, buckets, images, the result store."""

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.image_types import SIGNATURE_BYTES, media_type
from worker.app.assembly import conditional_store_at, open_s3
from worker.cli.check.finding import Finding, failed, ok, skipped, warning
from worker.errors import DependencyDownError, JobError, TransientError
from worker.images.source import Link, SourcePolicy, parse_source
from worker.observability.redaction import display_url
from worker.s3.aws import S3ConfigurationError, S3Object
from worker.settings import Settings

if TYPE_CHECKING:
    from worker.s3.client import S3
    from worker.s3.conditional_store import ConditionalStore

_GLOB: Final = frozenset("*?[")


async def storage_findings(settings: Settings, images: Sequence[str]) -> AsyncIterator[Finding]:
    """Check each bucket without wildcards, the given images, and the result store."""
    async with AsyncExitStack() as stack:
        try:
            s3 = await open_s3(settings, stack)
        except S3ConfigurationError as error:
            yield failed("S3", str(error))
            return
        yield await _credentials(s3, settings)
        for bucket in settings.allowed_buckets:
            if not _GLOB & set(bucket):
                yield await _bucket(s3, bucket)
        globs = [bucket for bucket in settings.allowed_buckets if _GLOB & set(bucket)]
        if globs and not images:
            named = ", ".join(globs)
            yield skipped(
                "buckets", f"{named}: cannot check wildcards. Name an object with --image s3://bucket/key."
            )
        for image in images:
            yield await _image(s3, settings, image)
        if settings.result_store is not None:
            yield await _store(conditional_store_at(settings.result_store, s3))


async def _credentials(s3: "S3", settings: Settings) -> Finding:
    """Sign a URL, which needs credentials but no request."""
    try:
        await s3.link(S3Object("bucket", "key"), 1)
    except DependencyDownError as error:
        return failed("S3", error.message)
    return ok("S3", f"{settings.s3_endpoint_url or 'AWS'}; credentials found (not verified)")


async def _bucket(s3: "S3", bucket: str) -> Finding:
    """Read an object that does not exist: S3 answers 404, or why access is denied."""
    check = f"bucket {bucket}"
    try:
        await s3.read_beginning(S3Object(bucket, f"vqa-worker-check/{uuid.uuid4().hex}"), 1)
    except JobError as error:
        if "NoSuchBucket" in error.message:
            return failed(check, "does not exist. Check VQA_ALLOWED_BUCKETS and VQA_S3_ENDPOINT_URL.")
        if error.code == ErrorCode.IMAGE_FORBIDDEN:
            return warning(
                check,
                "S3 denies access to an object that does not exist: the permission to list the bucket (or to"
                f" read it) is missing. Check an object that exists with --image s3://{bucket}/key.",
            )
    except (TransientError, DependencyDownError) as error:
        return failed(check, error.message)
    return ok(check, "readable")


async def _image(s3: "S3", settings: Settings, url: str) -> Finding:
    """Check an image as a worker does, up to its first bytes."""
    check = f"image {display_url(url)}"
    policy = SourcePolicy(settings.allowed_buckets, settings.allowed_link_hosts)
    try:
        source = parse_source(url, "it", policy, url.encode())
        if isinstance(source, Link):
            return ok(check, "allowed; the API fetches it")
        if not isinstance(source, S3Object):
            return skipped(check, "part of the job")
        size, beginning = await s3.read_beginning(source, SIGNATURE_BYTES)
    except (JobError, TransientError, DependencyDownError) as error:
        return failed(check, error.message)
    kind = media_type(beginning)
    if kind is None:
        return failed(check, "not a JPEG, PNG or WebP image")
    if size > settings.max_image_bytes:
        return failed(check, f"has {size} bytes; the limit VQA_MAX_IMAGE_BYTES is {settings.max_image_bytes}")
    return ok(check, f"{kind}, {size} bytes")


async def _store(objects: "ConditionalStore") -> Finding:
    """Use the result store as a worker does, with an object that is deleted afterwards."""
    check, name = "result store", f"check/{uuid.uuid4().hex}"
    try:
        try:
            problem = await _use(objects, name)
        finally:
            await objects.delete(name)
        problem = problem or ("a deleted object can still be read" if await objects.read(name) else "")
    except DependencyDownError as error:
        return failed(check, error.message)
    if problem:
        return failed(check, f"VQA_RESULT_STORE: {problem}. Use an S3 service with conditional writes.")
    return ok(check, "objects can be written, read, listed and deleted, and conditional writes work")


async def _use(objects: "ConditionalStore", name: str) -> str:
    """Return the problem with the store, or an empty string."""
    etag = await objects.create(name, b"check")
    if etag is None:
        return "creating a new object fails with 412"
    if await objects.create(name, b"other") is not None:
        return "it ignores If-None-Match"
    found = await objects.read(name)
    if found is None or found.body != b"check":
        return "it returns another object than was written"
    if name.rpartition("/")[2] not in await objects.names("check/"):
        return "a new object is not listed"
    if await objects.replace(name, b"newer", etag) is None:
        return "it refuses If-Match with the current ETag"
    if await objects.replace(name, b"too late", etag) is not None:
        return "it ignores If-Match"
    return ""
