"""What is looked at in S3: buckets, images, the result store."""

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

from worker.app.assembly import conditional_store_at, open_s3
from worker.cli.check.finding import Finding, failed, ok, skipped, warning
from worker.errors import DependencyDownError, ErrorCode, JobError, TransientError
from worker.images.content import SIGNATURE_BYTES, media_type
from worker.images.source import Link, MessageBody, SourcePolicy, parse_source
from worker.observability.redaction import display_url
from worker.s3.aws import S3ConfigurationError, S3Object
from worker.settings import Settings

if TYPE_CHECKING:
    from worker.s3.client import S3
    from worker.s3.conditional_store import ConditionalStore

_GLOB: Final = frozenset("*?[")


async def storage_findings(settings: Settings, images: Sequence[str]) -> AsyncIterator[Finding]:
    """The buckets that are named in full, the images given, and the result store."""
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
            yield skipped("buckets", f"{named}: name an object to try, --image s3://bucket/key")
        for image in images:
            yield await _image(s3, settings, image)
        if settings.result_store is not None:
            yield await _store(conditional_store_at(settings.result_store, s3))


async def _credentials(s3: "S3", settings: Settings) -> Finding:
    """Sign something, which nobody gets."""
    try:
        await s3.link(S3Object("bucket", "key"), 1)
    except DependencyDownError as error:
        return failed("S3", error.message)
    return ok("S3", f"{settings.s3_endpoint_url or 'Amazon'}, and there are credentials")


async def _bucket(s3: "S3", bucket: str) -> Finding:
    """Ask for an object that is not there: S3 says so, or why it doesn't."""
    check = f"bucket {bucket}"
    try:
        await s3.read_beginning(S3Object(bucket, f"vqa-worker-check/{uuid.uuid4().hex}"), 1)
    except JobError as error:
        if "NoSuchBucket" in error.message:
            return failed(check, "does not exist: check VQA_ALLOWED_BUCKETS and VQA_S3_ENDPOINT_URL")
        if error.code == ErrorCode.IMAGE_FORBIDDEN:
            return warning(
                check,
                "S3 denies an object that is not there, as it does to those who may not list the bucket (or"
                f" not read it): name one that is there, --image s3://{bucket}/key",
            )
    except (TransientError, DependencyDownError) as error:
        return failed(check, error.message)
    return ok(check, "may be read")


async def _image(s3: "S3", settings: Settings, url: str) -> Finding:
    """What the worker would do with an image, up to its first bytes."""
    check = f"image {display_url(url)}"
    policy = SourcePolicy(settings.allowed_buckets, settings.allowed_link_hosts)
    try:
        source = parse_source(url, "it", policy, MessageBody(url.encode()))
        if isinstance(source, Link):
            return ok(check, "is allowed, and left to the API to fetch")
        if not isinstance(source, S3Object):
            return skipped(check, "is in the job itself")
        size, beginning = await s3.read_beginning(source, SIGNATURE_BYTES)
    except (JobError, TransientError, DependencyDownError) as error:
        return failed(check, error.message)
    kind = media_type(beginning)
    if kind is None:
        return failed(check, "is neither JPEG nor PNG nor WebP")
    if size > settings.max_image_bytes:
        return failed(check, f"has {size} bytes; VQA_MAX_IMAGE_BYTES allows {settings.max_image_bytes}")
    return ok(check, f"{kind}, {size} bytes")


async def _store(objects: "ConditionalStore") -> Finding:
    """Do once what the worker does there, with an object that goes again."""
    check, name = "result store", f"check/{uuid.uuid4().hex}"
    try:
        try:
            trouble = await _use(objects, name)
        finally:
            await objects.delete(name)
        trouble = trouble or ("it did not go when deleted" if await objects.read(name) else "")
    except DependencyDownError as error:
        return failed(check, error.message)
    if trouble:
        return failed(check, f"VQA_RESULT_STORE: {trouble}: answers cannot be kept safely in such a store")
    return ok(check, "objects can be put, read, listed and deleted, and conditions are heeded")


async def _use(objects: "ConditionalStore", name: str) -> str:
    """What is wrong; empty if nothing is."""
    etag = await objects.create(name, b"check")
    if etag is None:
        return "a new object was taken for an old one"
    if await objects.create(name, b"other") is not None:
        return "it does not heed If-None-Match"
    found = await objects.read(name)
    if found is None or found.body != b"check":
        return "what was put is not what is read"
    if name.rpartition("/")[2] not in await objects.names("check/"):
        return "what was put is not listed"
    if await objects.replace(name, b"newer", etag) is None:
        return "a replacement with the right ETag was refused"
    if await objects.replace(name, b"too late", etag) is not None:
        return "it does not heed If-Match"
    return ""
