"""Bounds on a message, checked before JSON or pydantic builds an object for each of its values."""

import math
from typing import Any

# A value costs up to 200 bytes and 10 µs, however short its JSON is.
MAX_VALUES = 5_000
# More than the context of any model holds: one million tokens have about four characters each.
MAX_TEXT_CHARS = 4_000_000
# Reading an escape such as \n takes ten times as long as reading a plain character.
MAX_ESCAPES = 2_000_000
_WINDOW_BYTES = 64 * 1024

_NOT_SEPARATORS = bytes(set(range(256)) - set(b",[{"))
_NOT_STRUCTURE = bytes(set(range(256)) - set(b',[{"'))


def exceeded_limit(body: bytes) -> str | None:
    """Return what a JSON text has too much of, or None; takes linear time and builds no values."""
    if len(body) > 2 * MAX_ESCAPES and body.count(b"\\") > MAX_ESCAPES:
        return f"the body has more than {MAX_ESCAPES} escaped characters"
    if _has_too_many_values(body):
        return f"the body has more than {MAX_VALUES} JSON values"
    return None


def _has_too_many_values(body: bytes) -> bool:
    # The cheap upper bound counts separators inside strings too, and decides for nearly all messages.
    if len(body) <= MAX_VALUES:
        return False
    upper = 0
    for start in range(0, len(body), _WINDOW_BYTES):
        upper += len(body[start : start + _WINDOW_BYTES].translate(None, _NOT_SEPARATORS))
        if upper >= MAX_VALUES:
            return _has_too_many_separators(body)
    return False


def _has_too_many_separators(body: bytes) -> bool:
    """Count the separators outside strings, window by window, and stop at the limit."""
    separators = quotes = start = 0
    while start < len(body):
        window = body[start : start + _WINDOW_BYTES]
        if (len(window) - len(window.rstrip(b"\\"))) % 2:
            # The window ends within an escape.
            window = body[start : start + _WINDOW_BYTES + 1]
        start += len(window)
        structure = window.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _NOT_STRUCTURE)
        # Every second part is outside strings.
        parts = structure.split(b'"')
        separators += sum(map(len, parts[quotes % 2 :: 2]))
        quotes += len(parts) - 1
        # Each value has at most a key and itself as strings.
        if separators >= MAX_VALUES or quotes > 4 * MAX_VALUES:
            return True
    return False


def contains_infinity(value: Any) -> bool:
    """Return whether a number such as 1e999 was read as infinity, which JSON cannot express."""
    match value:
        case float():
            return math.isinf(value)
        case dict():
            return any(map(contains_infinity, value.values()))
        case list():
            return any(map(contains_infinity, value))
        case _:
            return False


def text_chars(value: Any, key: str = "") -> int:
    """Return the number of characters in a JSON value's strings and keys, without the URLs of images."""
    match value:
        case str():
            return 0 if key in {"url", "images"} else len(value)
        case dict():
            return sum(len(name) + text_chars(item, name) for name, item in value.items())
        case list():
            return sum(text_chars(item, key) for item in value)
        case _:
            return 0
