"""Results that are too large for a message, as objects under `VQA_LARGE_RESULTS`."""

import asyncio
import hashlib

import structlog

from vqa_worker.messages.result import Result
from vqa_worker.messages.serialization import to_json
from vqa_worker.rabbitmq.rate_limited_warnings import RateLimitedWarnings
from worker.clock import Clock
from worker.errors import DependencyDownError, UnwrittenResultError
from worker.s3.client import S3
from worker.s3.conditional_store import ConditionalStore

log = structlog.get_logger(__name__)

SETTING = "VQA_LARGE_RESULTS"
# For one write of some hundred megabytes, with its quick retries.
REQUEST_TIMEOUT_S = 120.0
# How long to try to write a result, which is paid for.
WRITE_TIMEOUT_S = 300.0
FIRST_DELAY_S, MAX_DELAY_S = 1.0, 30.0

_JSON = {"Content-Type": "application/json"}
# Overwritten by each probe, so that no right to delete is needed.
_PROBE = "check"


class LargeResults:
    """Writes results under `VQA_LARGE_RESULTS`."""

    def __init__(self, s3: S3, url: str, clock: Clock) -> None:
        """`url`: the value of the setting."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self._objects = ConditionalStore(
            s3,
            bucket,
            f"{prefix}/" if prefix else "",
            setting=SETTING,
            rights="put",
            timeout_s=REQUEST_TIMEOUT_S,
        )
        self._url = url
        self._clock = clock
        self._warnings = RateLimitedWarnings()

    async def write(self, result: Result, body: bytes) -> str:
        """Write a result and return the URL of the object; try again for `WRITE_TIMEOUT_S` if S3 fails.

        The same answer to the same job always has the same object: a redelivered job overwrites it.

        Args:
            result: names the object.
            body: of the message that is too large; becomes the object.

        Raises:
            UnwrittenResultError: S3 failed or refused all the time.
        """
        # In a thread: hashing a large answer would block the event loop.
        name = f"{await asyncio.to_thread(_digest, result)}.json"
        ends, delay_s = self._clock.monotonic() + WRITE_TIMEOUT_S, FIRST_DELAY_S
        while True:
            try:
                await self._objects.write(name, body, _JSON)
            except DependencyDownError as error:
                if self._clock.monotonic() + delay_s > ends:
                    raise UnwrittenResultError(error.message) from None
                if self._warnings.should_log(SETTING, error.message):
                    log.warning("large_result_write_failed", reason=error.message, next_try_s=delay_s)
            else:
                self._warnings.recovered(SETTING)
                return f"{self._url}/{name}"
            await self._clock.sleep(delay_s)
            delay_s = min(delay_s * 2, MAX_DELAY_S)

    async def probe(self) -> None:
        """Write a small object, to find out whether results can be written.

        Raises:
            DependencyDownError: S3 fails or refuses.
        """
        await self._objects.write(_PROBE, b"")


def _digest(result: Result) -> str:
    """Return a hash of what distinguishes results of jobs; not of the timings, which are always new."""
    digest = hashlib.sha256()
    error = result.error and result.error.model_dump()
    # One by one, so that there is only one more copy in memory at a time.
    for part in (result.id, result.answer, result.response, error):
        digest.update(to_json(part) + b"\n")
    return digest.hexdigest()
