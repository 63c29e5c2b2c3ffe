"""Limits of a message, checked before JSON or pydantic creates an object for each of its values."""

import math
from typing import Any

# A JSON value takes up to 200 bytes and 10 µs, however short it is.
MAX_VALUES = 5_000
# Of a message without the base64 of its data URLs; a text of this size has about 250,000 tokens.
MAX_TEXT_BYTES = 1_000_000
# Parsing and printing long integers takes quadratic time.
MAX_INTEGER_BITS = 256

_NOT_STRUCTURE = bytes(set(range(256)) - set(b',[{"'))


def exceeded_limit(text: bytes) -> str | None:
    """Return which limit a JSON text exceeds, or None; takes linear time and creates no values."""
    if len(text) > MAX_TEXT_BYTES:
        return f"the body has more than {MAX_TEXT_BYTES} bytes without its data URLs"
    if len(text) > MAX_VALUES and _has_too_many_values(text):
        return f"the body has more than {MAX_VALUES} JSON values"
    return None


def _has_too_many_values(text: bytes) -> bool:
    """Count the separators outside strings."""
    structure = text.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _NOT_STRUCTURE)
    # Each value has at most a key and itself as strings.
    if structure.count(b'"') > 4 * MAX_VALUES:
        return True
    # Every second part is outside strings.
    return sum(map(len, structure.split(b'"')[::2])) >= MAX_VALUES


def has_too_large_number(value: Any) -> bool:
    """Return whether a JSON value contains a number such as 1e999 or an integer of more than 256 bits."""
    match value:
        case float():
            return math.isinf(value)
        case int():
            return value.bit_length() > MAX_INTEGER_BITS
        case dict():
            return any(map(has_too_large_number, value.values()))
        case list():
            return any(map(has_too_large_number, value))
        case _:
            return False


def text_chars(value: Any) -> int:
    """Return the number of characters in the strings and keys of a JSON value."""
    match value:
        case str():
            return len(value)
        case dict():
            return sum(len(name) + text_chars(item) for name, item in value.items())
        case list():
            return sum(map(text_chars, value))
        case _:
            return 0
