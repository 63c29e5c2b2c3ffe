"""Expiring AWS credentials: renewed in the background while valid, waited for once expired."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from botocore.credentials import CredentialProvider, RefreshableCredentials
from botocore.exceptions import ClientError, CredentialRetrievalError, NoCredentialsError
from botocore.session import Session, get_session

from tests.running import until
from worker.s3 import credentials
from worker.s3.credentials import CredentialsCache

MINUTE_S = 60
# Renewal may begin, but is not mandatory yet.
SOON_S = 12 * MINUTE_S
NOW_S = 9 * MINUTE_S
# A job that waits for a delayed renewal takes longer than this; other jobs take far less.
AT_ONCE_S = 60


class Chain(CredentialProvider):
    """Provides credentials that expire after `first_s` seconds; renewed ones are valid for an hour."""

    METHOD = "test"

    def __init__(self, first_s: float) -> None:
        super().__init__()
        self.renewals = 0
        self.failure: Exception | None = None
        self.may_end = threading.Event()
        self.may_end.set()
        self._first = self._said("first", first_s)

    def load(self) -> Any:
        """Load the credentials, as the SDK does once."""
        return RefreshableCredentials.create_from_metadata(self._first, self._renew, self.METHOD)

    def _renew(self) -> dict[str, str]:
        self.renewals += 1
        number = self.renewals
        assert self.may_end.wait(60), "nobody let the renewal go on"
        if self.failure is not None:
            raise self.failure
        return self._said(f"renewed-{number}", 60 * MINUTE_S)

    def _said(self, key: str, seconds: float) -> dict[str, str]:
        ends = datetime.now(UTC) + timedelta(seconds=seconds)
        return {"access_key": key, "secret_key": "s", "token": "t", "expiry_time": ends.isoformat()}

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """Delay renewals until the end of the block."""
        self.may_end.clear()
        try:
            yield
        finally:
            self.may_end.set()


def refused(code: str) -> ClientError:
    answer: Any = {"Error": {"Code": code, "Message": "User: arn:aws:iam::123456789012:user/secret"}}
    return ClientError(answer, "AssumeRole")


def cache_of(chain: CredentialProvider) -> CredentialsCache:
    session: Session = get_session()
    session.get_component("credential_provider").insert_before("env", chain)
    return CredentialsCache(lambda: session)


async def keys(cache: CredentialsCache, times: int = 1) -> list[str | None]:
    """Return the access keys that `times` concurrent callers get."""
    async with asyncio.timeout(AT_ONCE_S):
        return [got.access_key for got in await asyncio.gather(*[cache.current() for _ in range(times)])]


async def test_credentials_that_expire_late_are_not_renewed() -> None:
    chain = Chain(60 * MINUTE_S)
    assert await keys(cache_of(chain), 5) == ["first"] * 5
    assert chain.renewals == 0


async def found(chain: Chain) -> CredentialsCache:
    """Return a cache that holds the first credentials and has not renewed them yet."""
    cache = cache_of(chain)
    chain.failure, kept = refused("Throttling"), chain.failure
    assert await keys(cache) == ["first"]
    chain.failure, chain.renewals = kept, 0
    return cache


@pytest.mark.parametrize("failure", [None, refused("ExpiredToken")], ids=["slow", "slow, then refused"])
async def test_a_slow_renewal_blocks_no_job_while_the_credentials_are_valid(
    failure: Exception | None,
) -> None:
    chain = Chain(SOON_S)
    cache = await found(chain)
    chain.failure = failure
    with chain.held_up():
        for _ in range(3):
            assert await keys(cache, 10) == ["first"] * 10
        await until(lambda: chain.renewals, "the renewal begins")
        assert await keys(cache, 10) == ["first"] * 10
        assert chain.renewals == 1
    if failure is None:

        async def is_renewed() -> bool:
            return await keys(cache) == ["renewed-1"]

        await until(is_renewed, "the new credentials are used")
    assert chain.renewals == 1


async def test_a_failed_renewal_is_not_repeated_for_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chain = Chain(SOON_S)
    cache = await found(chain)
    chain.failure = refused("AccessDenied")
    clock = [time.monotonic()]
    monkeypatch.setattr(credentials, "time", type("Clock", (), {"monotonic": lambda: clock[0]}))
    assert await keys(cache) == ["first"]
    await until(lambda: chain.renewals == 1, "the renewal is tried")
    clock[0] += 58
    for _ in range(20):
        assert await keys(cache, 5) == ["first"] * 5
        await asyncio.sleep(0.005)
    assert chain.renewals == 1
    clock[0] += 5
    assert await keys(cache, 5) == ["first"] * 5
    await until(lambda: chain.renewals == 2, "the renewal is tried again")


async def test_jobs_wait_for_one_shared_renewal_of_expiring_credentials() -> None:
    chain = Chain(NOW_S)
    cache = cache_of(chain)
    with chain.held_up():
        waiting = asyncio.create_task(keys(cache, 20))
        await until(lambda: chain.renewals, "the renewal begins")
        assert not waiting.done()
    assert await waiting == ["renewed-1"] * 20
    assert chain.renewals == 1


async def test_the_failed_renewal_of_expiring_credentials_raises_the_error_code() -> None:
    chain = Chain(NOW_S)
    chain.failure = refused("AccessDenied")
    with pytest.raises(CredentialRetrievalError) as caught:
        await keys(cache_of(chain))
    assert "AccessDenied" in str(caught.value)
    assert "arn:" not in str(caught.value)


async def test_jobs_wait_for_a_background_renewal_once_the_credentials_expire(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the deadline callers get the credentials of the renewal in progress, not the old ones."""
    chain = Chain(SOON_S)
    cache = await found(chain)
    with chain.held_up():
        assert await keys(cache) == ["first"]
        await until(lambda: chain.renewals, "the renewal begins")
        monkeypatch.setattr(credentials, "MUST_RENEW_S", SOON_S + MINUTE_S)
        monkeypatch.setattr(RefreshableCredentials, "_mandatory_refresh_timeout", SOON_S + MINUTE_S)
        waiting = asyncio.create_task(keys(cache, 5))
        await asyncio.sleep(0.05)
        assert not waiting.done()
    assert await waiting == ["renewed-1"] * 5
    assert chain.renewals == 1


async def test_a_chain_without_credentials_is_asked_again() -> None:
    class Empty(CredentialProvider):
        METHOD = "test"
        given: Any = None

        def load(self) -> Any:
            return self.given

    chain = Empty()
    session = get_session()
    session.get_component("credential_provider").providers[:] = [chain]
    cache = CredentialsCache(lambda: session)
    with pytest.raises(NoCredentialsError):
        await keys(cache)
    chain.given = Chain(60 * MINUTE_S).load()
    assert await keys(cache) == ["first"]
