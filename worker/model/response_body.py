"""Find the chat completion in the body of a response.

Gateways put other text around the JSON, or send it as a stream that nobody requested. It was billed in any
case, so this reads everything whose meaning is clear.
"""

import codecs
import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Final

from worker.model.stream import is_chunk, join_chunks

# Text before the JSON can have braces; each one costs a parse of what follows.
_MAX_FALSE_STARTS: Final = 16
_MAX_DEPTH: Final = 4
_LINE_END: Final = re.compile(r"\r\n|\n|\r")
_DATA: Final = "data:"
# OpenAI API reference, Chat Completions, Streaming: the last event.
_STREAM_END: Final = re.compile(r"(?:^|[\r\n])[^\S\r\n]*data:\s*\[DONE\]")


def _finite_float(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


# NaN and 1e999, which the JSON of the result cannot contain, become null; here and in `_parse`.
_DECODER: Final = json.JSONDecoder(parse_constant=lambda _: None, parse_float=_finite_float)


class MalformedBodyError(Exception):
    """There is no JSON object in the body; the message says what there is."""


def read_object(body: bytes) -> dict[str, Any]:
    """Return the chat completion, or the error, that is in a body.

    It may have a byte order mark, text before or after it, comments as in server-sent events, the whole
    framing of server-sent events, or one JSON value around it.

    Raises:
        MalformedBodyError: the body contains neither.
    """
    try:
        value = _parse(body)
    except (ValueError, RecursionError):
        return _read_text(_decode(body))
    return _unwrapped(value)


def _parse(text: bytes | str) -> Any:
    return json.loads(text, parse_constant=lambda _: None, parse_float=_finite_float)


def is_complete(body: bytes) -> bool:
    """Return whether a body that was interrupted has all of its JSON, or the end of its stream."""
    try:
        return isinstance(_parse(body), dict)
    except (ValueError, RecursionError):
        return _STREAM_END.search(_decode(body)) is not None


def _decode(body: bytes) -> str:
    encoding = "utf-16" if body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    return body.decode(encoding, errors="replace").removeprefix("\ufeff")


def _read_text(text: str) -> dict[str, Any]:
    objects = list(_objects(_without_framing(text)))
    if any(map(is_chunk, objects)):
        return join_chunks(objects, has_end=_STREAM_END.search(text) is not None)
    responses = [response for found in objects if (response := _response_in(found)) is not None]
    if not responses:
        raise MalformedBodyError("the body is not JSON" if text.strip() else "the body is empty")
    return next((response for response in responses if response.get("choices")), responses[0])


def _without_framing(text: str) -> str:
    """Return the data of server-sent events; without any, the text without their comments."""
    lines = _LINE_END.split(text)
    data = [line.strip().removeprefix(_DATA) for line in lines if line.lstrip().startswith(_DATA)]
    return "\n".join(data or (line for line in lines if not line.startswith(":")))


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in a text, in order."""
    position, false_starts = text.find("{"), 0
    while position >= 0 and false_starts < _MAX_FALSE_STARTS:
        try:
            found, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            false_starts, position = false_starts + 1, position + 1
        else:
            yield found
        position = text.find("{", position)


def _unwrapped(value: Any) -> dict[str, Any]:
    """Return the response in a JSON value.

    Raises:
        MalformedBodyError: there is none.
    """
    if isinstance(value, list) and any(map(is_chunk, value)):
        return join_chunks([item for item in value if isinstance(item, dict)], has_end=False)
    if is_chunk(value):
        return join_chunks([value], has_end=False)
    if (response := _response_in(value)) is not None:
        return response
    if isinstance(value, dict):
        return value
    raise MalformedBodyError("the body is not a JSON object")


def _response_in(value: Any, depth: int = 0) -> dict[str, Any] | None:
    """Return the value itself, or the only response in it: in a list, in a field, or in JSON as a string."""
    if isinstance(value, dict) and ("choices" in value or value.get("error") or value.get("errors")):
        return value
    if depth == _MAX_DEPTH:
        return None
    found = [it for inside in _inside(value) if (it := _response_in(inside, depth + 1)) is not None]
    return found[0] if len(found) == 1 else None


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with suppress(ValueError, RecursionError):
            return [_parse(value)]
    return value if isinstance(value, list) else ()
