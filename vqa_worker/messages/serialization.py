"""Write JSON."""

import json
from typing import Any


def to_json(value: Any, *, sort_keys: bool = False) -> bytes:
    """Return compact JSON in UTF-8; lone surrogates, which UTF-8 cannot encode, become question marks.

    Raises:
        ValueError: the value contains NaN or infinity.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=sort_keys)
    return text.encode(errors="replace")


def escape_json(text: str) -> bytes:
    """Return `text` escaped for use between the quotes of a JSON string."""
    return to_json(text)[1:-1]
