"""Large results: the names of their objects, and how long the worker tries to write them."""

import hashlib
from typing import Any

import pytest
from structlog.testing import CapturingLogger

from tests.fake_s3 import FakeS3, give, refuse
from tests.unit.s3 import an_s3, isolate
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.result import JobFailure, Result, Timings
from worker.clock import Clock
from worker.errors import UnwrittenResultError
from worker.s3 import large_results
from worker.s3.large_results import WRITE_TIMEOUT_S, LargeResults

RESULT = Result(id="j", status="succeeded", answer="a", timings=Timings(total_s=1.0))
ERROR = JobFailure(code=ErrorCode.EMPTY_ANSWER, message="m", retryable=False)


class SkippingClock(Clock):
    """A clock on which every sleep is over at once."""

    def __init__(self) -> None:
        self.time = 0.0

    def monotonic(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> CapturingLogger:
    isolate(monkeypatch, tmp_path)
    log = CapturingLogger()
    monkeypatch.setattr(large_results, "log", log)
    return log


async def url_of(fake: FakeS3, result: Result, url: str = "s3://bucket/large") -> str:
    async with an_s3(fake.url) as s3:
        return await LargeResults(s3, url, SkippingClock()).write(result, b"body")


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/large", "s3://bucket/a/b"])
async def test_a_result_is_one_object_below_the_prefix(url: str) -> None:
    async with FakeS3.serving(b"") as fake:
        written = await url_of(fake, RESULT, url)
        assert await url_of(fake, RESULT, url) == written
    base, _, name = written.rpartition("/")
    assert base == url
    assert len(name) == len(f"{hashlib.sha256().hexdigest()}.json")
    assert {(it.method, it.target) for it in fake.asked} == {("PUT", written.replace("s3:/", ""))}
    assert fake.asked[0].headers["content-type"] == "application/json"


async def test_only_another_job_or_answer_is_another_object() -> None:
    same: list[dict[str, Any]] = [{"timings": Timings(total_s=2.0)}, {"attempts": 2}, {"images": []}]
    others: list[dict[str, Any]] = [
        {"id": "k"},
        {"id": None},
        {"answer": "b"},
        {"answer": None},
        {"response": {"a": 1}},
        {"error": ERROR},
    ]
    async with FakeS3.serving(b"") as fake:
        url = await url_of(fake, RESULT)
        assert {await url_of(fake, RESULT.model_copy(update=it)) for it in same} == {url}
        urls = {url, *[await url_of(fake, RESULT.model_copy(update=it)) for it in others]}
    assert len(urls) == 1 + len(others)


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (404, "NoSuchBucket"), (412, "Odd")])
async def test_a_refusal_is_an_error_after_five_minutes_and_few_warnings(
    status: int, code: str, log: CapturingLogger
) -> None:
    clock = SkippingClock()
    async with FakeS3.serving(b"") as fake, an_s3(fake.url) as s3:
        fake.answer = refuse(status, code)
        with pytest.raises(UnwrittenResultError, match=f"^VQA_LARGE_RESULTS: S3 answered {status} {code}"):
            await LargeResults(s3, "s3://bucket/large", clock).write(RESULT, b"body")
        asked = len(fake.asked)
    assert WRITE_TIMEOUT_S - 30 < clock.time <= WRITE_TIMEOUT_S
    # After 1, 2, 4, 8, 16, and then every 30 seconds.
    assert asked == 1 + 5 + 8
    assert [call.args for call in log.calls] == [("large_result_write_failed",)]


async def test_a_write_succeeds_as_soon_as_s3_allows_it(log: CapturingLogger) -> None:
    async with FakeS3.serving(b"") as fake, an_s3(fake.url) as s3:
        fake.answer = refuse(403, "AccessDenied")

        class Allowing(SkippingClock):
            async def sleep(self, seconds: float) -> None:
                await super().sleep(seconds)
                if self.time > 100:
                    fake.answer = give(b"")

        writer = LargeResults(s3, "s3://bucket/large", Allowing())
        assert (await writer.write(RESULT, b"body")).startswith("s3://bucket/large/")
        assert len(log.calls) == 1
