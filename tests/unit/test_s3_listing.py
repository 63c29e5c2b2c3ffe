"""Listings of several pages end, for all characters in keys and continuation tokens."""

from collections.abc import Awaitable, Callable, Mapping
from html import escape
from urllib.parse import quote_plus

import pytest

from worker.errors import DependencyDownError
from worker.s3.client import S3, Request
from worker.s3.conditional_store import ConditionalStore
from worker.s3.uploads import list_keys

KEYS = ["a&b/<c>/1", "a&b/<c>/2", "a&b/<c>/é +%26&amp;", "a&b/<c>/last"]


class PagedS3(S3):
    """A fake S3 with one object per page; the continuation token is the previous key."""

    def __init__(self, *, repeats: bool = False) -> None:
        self._repeats = repeats

    async def exchange(self, request: Request) -> tuple[Mapping[str, str], bytes]:
        token = request.query.get("continuation-token")
        # S3 rejects a token that it did not issue.
        at = 0 if token is None else KEYS.index(token) + 1
        encoded = request.query.get("encoding-type") == "url"
        text = quote_plus(KEYS[at]) if encoded else escape(KEYS[at])
        more = KEYS[0] if self._repeats else KEYS[at] if at + 1 < len(KEYS) else None
        kind = "<EncodingType>url</EncodingType>" if encoded else ""
        following = f"<NextContinuationToken>{escape(more)}</NextContinuationToken>" if more else ""
        return {}, f"<List>{kind}<Contents><Key>{text}</Key></Contents>{following}</List>".encode()


async def store_names(s3: S3) -> list[str]:
    return await ConditionalStore(s3, "bucket", "a&b/", setting="VQA_RESULT_STORE").names("<c>/")


async def uploaded_keys(s3: S3) -> list[str]:
    return [key async for key in list_keys(s3, "bucket", "a&b/<c>/")]


async def test_a_listing_of_several_pages_has_all_keys() -> None:
    assert await uploaded_keys(PagedS3()) == KEYS
    assert await store_names(PagedS3()) == [key.rpartition("/")[2] for key in KEYS]


@pytest.mark.parametrize("listing", [store_names, uploaded_keys])
async def test_a_listing_with_a_repeated_token_fails(
    listing: Callable[[S3], Awaitable[list[str]]],
) -> None:
    with pytest.raises(DependencyDownError, match="repeats a continuation token"):
        await listing(PagedS3(repeats=True))
