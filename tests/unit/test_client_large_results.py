"""The client's reads of large results: where it looks for them, and what it says if it cannot read them."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tests.fake_s3 import FakeS3, give, head, refuse, say
from tests.unit.s3 import isolate
from vqa_worker.large_results import LargeResults, UnreadableObjectError

URL = "s3://bucket/large/a%20b.json"
RESULT = json.dumps({"id": "j", "status": "succeeded", "answer": "a", "parsed": [1], "newer": 1}).encode()
FOUND = {"answer": "a", "parsed": [1], "response": None}


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolate(monkeypatch, tmp_path)


async def read(reader: LargeResults) -> dict[str, object]:
    return await asyncio.to_thread(reader.read, URL, job_id="j", status="succeeded")


@pytest.mark.parametrize("source", ["argument", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
async def test_an_object_is_read_from_the_configured_server_by_its_literal_key(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    async with FakeS3.serving(RESULT) as fake:
        if source != "argument":
            monkeypatch.setenv(source, fake.url)
        reader = LargeResults(fake.url if source == "argument" else None)
        assert await read(reader) == FOUND
        assert await read(reader) == FOUND
    assert {(it.method, it.target) for it in fake.asked} == {("GET", "/bucket/large/a%2520b.json")}
    assert fake.asked[0].signed_by == ("AKIDUSUAL", "eu-central-1")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (refuse(404, "NoSuchKey"), "the object does not exist"),
        (refuse(404, "NoSuchBucket"), "the bucket does not exist at this S3"),
        (refuse(403, "AccessDenied"), "the permission s3:GetObject is missing"),
        (refuse(403, "ExpiredToken"), "S3 answered ExpiredToken"),
        (give(b"no S3", 502), "S3 answered 502"),
        (say(head(1000), b"{"), ""),
    ],
    ids=["missing", "no bucket", "denied", "expired", "no S3", "interrupted"],
)
async def test_an_object_that_s3_does_not_return_is_named_with_the_reason(
    answer: object, reason: str
) -> None:
    async with FakeS3.serving(b"") as fake:
        fake.answer = answer  # type: ignore[assignment]  # of the table
        with pytest.raises(UnreadableObjectError) as caught:
            await read(LargeResults(fake.url))
    assert str(caught.value).startswith(f"{URL} cannot be read: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("endpoint_url", ["http://127.0.0.1:1", "nonsense"])
async def test_a_server_that_cannot_be_reached_is_named(endpoint_url: str) -> None:
    with pytest.raises(UnreadableObjectError, match=f"cannot be read: .*{endpoint_url}"):
        await read(LargeResults(endpoint_url))


@pytest.mark.parametrize("library", ["boto3", "botocore.exceptions"])
async def test_without_boto3_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UnreadableObjectError, match=r"vqa-worker-client\[s3\]"):
        await read(LargeResults())
