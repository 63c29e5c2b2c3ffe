"""Redact secrets, signed links and image data from logs, results and error messages.

All patterns run in linear time, because their input is untrusted: possessive quantifiers (`*+`) never
backtrack, and no pattern restarts inside text that it has already scanned.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Final
from urllib.parse import quote, unquote

MARK: Final = "[redacted]"
DEFAULT_LIMIT: Final = 2000  # characters of a message
MAX_DISPLAY_CHARS: Final = 300  # of a URL in a message

# Shorter secrets occur by chance in any sentence: redacting every "a" would destroy the message and, by the
# positions of the marks, still reveal the secret.
MIN_SECRET_CHARS: Final = 4

MIN_TOKEN_CHARS: Final = 8
SURELY_A_TOKEN_CHARS: Final = 20

_DATA_URL: Final = re.compile(r"""(data:[^\s,:"']*+),([A-Za-z0-9+/=_%-]++)""", re.IGNORECASE)
_AUTHORITY: Final = re.compile(r"""://([^\s/?#"<>]*+)""")
# The key in an s3:// URL is taken literally: a question mark in it begins no query.
_URL: Final = re.compile(r"""(?<!s3)://[^\s"'<>]*+""")
# An API may echo a URL percent-encoded (even twice), JSON-escaped, or without its scheme. A value extends
# over an encoded separator, which may be a part of the value.
_PARAMETER: Final = re.compile(
    r"""(?:(?<![\w-])|(?<=%[0-9a-f]{2})|(?<=%25[0-9a-f]{2})|(?<=\\u[0-9a-f]{4}))
    ((?:x-(?:amz|goog)-[\w-]++|signature|awsaccesskeyid|googleaccessid|policy|key-pair-id|sig
      |token|access_token|api[_-]?key|password)
     (?:=|%(?:25)?3d|\\u003d))
    [^\s&"'<>]++""",
    re.IGNORECASE | re.VERBOSE,
)
_EQUALS: Final = ("=", "%3d", "%253d", "\\u003d")
_AUTHORIZATION: Final = re.compile(
    r"""(authorization["']?\s{0,2}[:=]\s{0,2}["']?)(?:[a-z]{1,10}\s)?[^\s"',;]++""", re.IGNORECASE
)
_BEARER: Final = re.compile(rf"(\bbearer\s)([\w.~+/=-]{{{MIN_TOKEN_CHARS},}}+)", re.IGNORECASE | re.ASCII)
_SCHEME: Final = re.compile(r"(?:[a-z][a-z0-9+.-]*+:)?[/\\]*+", re.IGNORECASE)
# Images begin so in base64 (PNG, JPEG, WebP, GIF, PDF, HEIC); other base64 is recognised by its length.
_BARE_BASE64: Final = re.compile(r"\s*+(?:iVBOR|/9j/|UklGR|R0lGOD|JVBERi|AAAA|[A-Za-z0-9+/_=%\s-]{32})")
# C0, DEL, C1, line and paragraph separators, and bidirectional formatting characters.
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


class Redactor:
    """Return text without secrets, on one line, of limited length.

    Args:
        secrets: values to redact everywhere, also percent-encoded, decoded or escaped. Values shorter than
            `MIN_SECRET_CHARS` are not redacted.
        limit: maximum number of characters to return.
    """

    def __init__(self, secrets: Iterable[str], limit: int = DEFAULT_LIMIT) -> None:
        self._secrets = _any_of({form for secret in secrets for form in _forms(secret)})
        self._limit = limit

    def __call__(self, text: str) -> str:
        """Return the text with secrets replaced by `MARK`."""
        # Secrets first, since a pattern could remove a part of one, and again at the end, since a removal
        # could join two parts.
        shown = _printable(_without_patterns(self._blank(text)))
        return _cut(shown if shown is text else self._blank(shown), self._limit)

    def _blank(self, text: str) -> str:
        return self._secrets.sub(MARK, text) if self._secrets else text


def _without_patterns(text: str) -> str:
    # A substring search is much faster than a pattern, and few log lines match any.
    lowered = text.lower()
    if "authorization" in lowered:
        text = _AUTHORIZATION.sub(rf"\1{MARK}", text)
    if "bearer" in lowered:
        text = _BEARER.sub(_blank_token, text)
    if "data:" in lowered:
        text = _DATA_URL.sub(_collapse_data, text)
    if "://" in text:
        text = _AUTHORITY.sub(_blank_userinfo, text)
        text = _URL.sub(_blank_query, text)
    if any(sign in lowered for sign in _EQUALS):
        text = _PARAMETER.sub(rf"\1{MARK}", text)
    return text


def _printable(text: str) -> str:
    return text if text.isprintable() else _SURROGATE.sub("\ufffd", _CONTROL.sub(" ", text))


def is_bare_base64(url: str) -> bool:
    """Return whether something in the place of an image's URL can be base64, without `data:`."""
    return "://" not in url[:MAX_DISPLAY_CHARS] and (
        _BARE_BASE64.match(url) is not None or "base64," in url[:MAX_DISPLAY_CHARS].lower()
    )


def display_url(url: str) -> str:
    """Return a URL for a message: without secrets and image data, shortened, printable."""
    scheme = url[:5].lower()
    if scheme == "data:":
        return "data: URL"
    if is_bare_base64(url):
        return f"text of {len(url)} characters"
    url = url[: 64 * 1024]
    shown = url if scheme == "s3://" else _without_secrets(url)
    # Escaping only lengthens: one character more than fits is enough, and escaping all of it takes long.
    shown = shown[: MAX_DISPLAY_CHARS + 1]
    return _cut(_CONTROL.sub(_escape, _SURROGATE.sub(_escape, shown)), MAX_DISPLAY_CHARS)


def _without_secrets(url: str) -> str:
    """Remove user name, password, query and fragment; never raises."""
    address = re.split(r"[?#]", url, maxsplit=1)[0]
    scheme = _SCHEME.match(address)
    start = scheme.end() if scheme else 0
    authority = re.split(r"[/\\]", address[start:], maxsplit=1)[0]
    host = authority.rpartition("@")[2]
    return f"{address[:start]}{host}{address[start + len(authority) :]}"


def _forms(secret: str) -> Iterator[str]:
    """Yield the forms of a secret: literal, URL-encoded, JSON-escaped, `repr`."""
    if len(secret) < MIN_SECRET_CHARS:
        return
    for plain in (secret, unquote(secret)):
        forms = (
            plain,
            quote(plain, safe="", errors="replace"),
            quote(plain, errors="replace"),
            json.dumps(plain)[1:-1],
            json.dumps(plain, ensure_ascii=False)[1:-1],
            repr(plain)[1:-1],
        )
        yield from (form for form in forms if len(plain) >= MIN_SECRET_CHARS)


def _any_of(secrets: set[str]) -> re.Pattern[str] | None:
    # Longest first: a secret that is a prefix of another must not leave the rest.
    ordered = sorted(secrets, key=lambda secret: (-len(secret), secret))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _blank_token(match: re.Match[str]) -> str:
    """Redact a token with a digit or of some length, but not a phrase like "Bearer authentication"."""
    token = match[2]
    is_token = len(token) >= SURELY_A_TOKEN_CHARS or any(map(str.isdigit, token))
    return f"{match[1]}{MARK}" if is_token else match[0]


def _collapse_data(match: re.Match[str]) -> str:
    head, payload = match[1], match[2]
    return f"{head},[{len(payload)} characters]" if head.lower().endswith("base64") else match[0]


def _blank_userinfo(match: re.Match[str]) -> str:
    userinfo, at, host = match[1].rpartition("@")
    return f"://{MARK}@{host}" if at and userinfo else match[0]


def _blank_query(match: re.Match[str]) -> str:
    address, _, query = match[0].partition("?")
    return f"{address}?{MARK}" if query else match[0]


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
