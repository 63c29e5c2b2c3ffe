"""What the tests of the S3 client share: an isolated AWS configuration, and reads of a fake server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from worker.errors import DependencyDownError, JobError, TransientError
from worker.http.client import proxy_options
from worker.s3.aws import AddressingStyle, Aws, Endpoint, S3Object
from worker.s3.client import S3

CONTENT = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 100
IMAGE = S3Object("photos", "cats/cat.png")
# The SDK reads objects of directory buckets.
SDK_IMAGE = S3Object("photos--use1-az4--x-s3", "cats/cat.png")
HOME = "eu-central-1"
FAR = "eu-west-3"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "AKIDUSUAL", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": HOME}


def isolate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set credentials in the environment; ignore the machine's own configuration."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("", "_S3", "_STS"):
        monkeypatch.delenv(f"AWS_ENDPOINT_URL{name}", raising=False)
    monkeypatch.delenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", raising=False)
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    proxy_options.cache_clear()


@asynccontextmanager
async def an_s3(url: str | None, style: AddressingStyle = "auto", **options: Any) -> AsyncIterator[S3]:
    """Open a client; `options` of the endpoint."""
    s3 = S3(Aws(Endpoint(url, style, **options)))
    try:
        yield s3
    finally:
        await s3.close()


async def read(s3: S3, source: S3Object = IMAGE) -> bytes:
    """Return the content of an object."""
    async with asyncio.timeout(30):
        reading = await s3.open(source)
        try:
            content = b"".join([bytes(piece) async for piece in reading])
        finally:
            reading.close()
    assert len(content) == reading.size
    return content


async def fault(url: str, source: S3Object = IMAGE) -> Exception:
    """Return the error of a read."""
    async with an_s3(url) as s3:
        with pytest.raises((JobError, TransientError, DependencyDownError)) as caught:
            await read(s3, source)
    return caught.value
