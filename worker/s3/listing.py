"""Read the pages of S3's ListObjectsV2."""

import html
import re
from urllib.parse import unquote_plus

from worker.errors import Dependency, DependencyDownError

_KEY = re.compile(rb"<Key>([^<]*)</Key>")
_NEXT = re.compile(rb"<NextContinuationToken>([^<]+)</NextContinuationToken>")
_IS_ENCODED = b"<EncodingType>url</EncodingType>"


def keys_of(page: bytes) -> list[str]:
    """Return the object keys of a page, in order."""
    # XML text has no other markup: `<` is always escaped in it.
    keys = [key.decode() for key in _KEY.findall(page)]
    return [*map(unquote_plus if _IS_ENCODED in page else html.unescape, keys)]


def next_query(query: dict[str, str], page: bytes, source: str) -> dict[str, str] | None:
    """Return the query for the next page, or None after the last page.

    Args:
        query: the query of this page.
        page: the XML of this page.
        source: the setting or bucket, for error messages.

    Raises:
        DependencyDownError: the token did not change, so the listing would never end.
    """
    found = _NEXT.search(page)
    if found is None:
        return None
    token = html.unescape(found[1].decode())
    if token == query.get("continuation-token"):
        raise DependencyDownError(Dependency.S3, f"{source}: S3 repeats a continuation token in a listing")
    return {**query, "continuation-token": token}
