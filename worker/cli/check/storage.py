"""Checks of S3: buckets, images, the result store, large results."""

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

from vqa_worker.messages.conversation import ImageRef
from vqa_worker.messages.error_codes import ErrorCode
from worker.app.assembly import conditional_store_at, image_loader, open_s3
from worker.cli.check import Finding, failed, ok, skipped, warning
from worker.cli.sent_images import prepare
from worker.clock import Clock
from worker.errors import DependencyDownError, JobError, TransientError
from worker.images.loader import ImageLoader, display_name
from worker.observability.redaction import display_url
from worker.s3.aws import S3ConfigurationError, S3Object
from worker.s3.large_results import LargeResults
from worker.settings import Settings

if TYPE_CHECKING:
    from worker.s3.client import S3
    from worker.s3.conditional_store import ConditionalStore

_GLOB: Final = frozenset("*?[")
_DENIED: Final = "S3 denies access"


async def storage_findings(settings: Settings, images: Sequence[str]) -> AsyncIterator[Finding]:
    """Check each bucket without wildcards, the given images, the result store and the large results."""
    async with AsyncExitStack() as stack:
        try:
            s3 = await open_s3(settings, stack)
        except S3ConfigurationError as error:
            yield failed("S3", str(error))
            return
        globs = [bucket for bucket in settings.allowed_buckets if _GLOB & set(bucket)]
        buckets = [bucket for bucket in settings.allowed_buckets if bucket not in globs]
        has_image = any(image.startswith("s3://") for image in images)
        # Public buckets need no credentials.
        if not buckets and not has_image and not set(globs) <= set(settings.s3_unsigned):
            yield await _credentials(s3, settings.s3_endpoint_url or "AWS")
        for bucket in buckets:
            yield await _bucket(s3, bucket)
        loader = image_loader(settings, s3, stack)
        for image in images:
            yield await _image(loader, settings.model, image)
        if globs and not images:
            text = f"{', '.join(globs)}: wildcards. To check a bucket, use --image s3://bucket/key."
            yield skipped("buckets", text)
        if settings.result_store is not None:
            yield await _store(conditional_store_at(settings.result_store, s3))
        if settings.large_results is not None:
            yield await _large_results(LargeResults(s3, settings.large_results, Clock()))


async def _credentials(s3: "S3", server: str) -> Finding:
    """Read from a bucket that does not exist: S3 checks the credentials first."""
    problem = await _problem(s3, f"vqa-worker-check-{uuid.uuid4().hex}")
    if not problem or "NoSuchBucket" in problem:
        return ok("S3", f"{server} accepts the credentials")
    is_denied = problem.startswith(_DENIED)
    text = "denies access to a bucket that does not exist. Use --image to check."
    return warning("S3", f"{server} {text}") if is_denied else failed("S3", f"{server}: {problem}")


async def _bucket(s3: "S3", bucket: str) -> Finding:
    check, problem = f"bucket {bucket}", await _problem(s3, bucket)
    if not problem:
        return ok(check, "readable")
    if "NoSuchBucket" in problem:
        return failed(check, "does not exist. Check VQA_ALLOWED_BUCKETS and VQA_S3_ENDPOINT_URL.")
    if problem.startswith(_DENIED):
        text = "S3 denies access to an object that does not exist: the permission to list or read is missing."
        return warning(check, f"{text} Check an object that exists with --image s3://{bucket}/key.")
    return failed(check, problem)


async def _problem(s3: "S3", bucket: str) -> str:
    """Read an object that does not exist; return the error, or an empty string if S3 reports it missing."""
    try:
        await s3.read_beginning(S3Object(bucket, f"vqa-worker-check/{uuid.uuid4().hex}"), 1)
    except JobError as error:
        is_missing = error.code == ErrorCode.IMAGE_NOT_FOUND and "NoSuchBucket" not in error.message
        return "" if is_missing else error.message
    except (TransientError, DependencyDownError) as error:
        return error.message
    return "the server returns content for an object that does not exist: check VQA_S3_ENDPOINT_URL"


async def _image(loader: ImageLoader, model: str, url: str) -> Finding:
    """Open an image as a worker does, and say what would be sent."""
    check, ref = f"image {display_url(url)}", ImageRef("it", url)
    try:
        return ok(check, (await prepare(loader, model, ref, url)).text)
    except (JobError, TransientError, DependencyDownError) as error:
        return failed(check, error.message.removeprefix(f"{display_name(ref)}: "))


async def _store(objects: "ConditionalStore") -> Finding:
    """Use the result store as a worker does, with an object that is deleted afterwards."""
    name = f"check/{uuid.uuid4().hex}"
    try:
        try:
            problem = await _use(objects, name)
        finally:
            await objects.delete(name)
    except DependencyDownError as error:
        return failed("result store", error.message)
    if problem:
        return failed(
            "result store", f"VQA_RESULT_STORE: {problem}. Use an S3 service with conditional writes."
        )
    return ok("result store", "objects can be written, read, listed and deleted, and conditional writes work")


async def _large_results(large_results: LargeResults) -> Finding:
    """Write an object as a worker does at its start."""
    try:
        await large_results.probe()
    except DependencyDownError as error:
        return failed("large results", error.message)
    return ok("large results", "objects can be written")


async def _use(objects: "ConditionalStore", name: str) -> str:
    """Return the problem with the store, or an empty string."""
    etag = await objects.create(name, b"check")
    found = await objects.read(name)
    if etag is None or found is None or found.body != b"check":
        return "it does not return the object that was written"
    if await objects.create(name, b"other") is not None:
        return "it ignores If-None-Match"
    if name.rpartition("/")[2] not in await objects.names("check/"):
        return "a new object is not listed"
    if await objects.replace(name, b"newer", etag) is None:
        return "it refuses If-Match with the current ETag"
    return "" if await objects.replace(name, b"too late", etag) is None else "it ignores If-Match"
