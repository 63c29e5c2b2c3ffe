"""Keep the base64 of long data URLs out of the JSON that is parsed.

Parsing a data URL of 16 MB takes 50 ms of the event loop and several times its size in memory. So `extract`
replaces the base64 with a reference to its position in the body, and `payload` returns it from there.
"""

import re
import uuid

from vqa_worker.messages.limits import MAX_TEXT_BYTES, MAX_VALUES
from vqa_worker.messages.serialization import escape_json

# Shorter data URLs are parsed with the rest of the message.
MIN_EXTRACTED_BYTES = 1024
MAX_PREFIX_BYTES = 256
_MARK = uuid.uuid4().hex
_REFERENCE = re.compile(rf"{_MARK}-([0-9]+)-([0-9]+)")


def extract(body: bytes) -> tuple[bytes, int]:
    """Replace the base64 of long data URLs with references.

    It stops after the first megabyte without a data URL: such a message has too much text anyway.

    Returns:
        The rest of the body, and the number of references in it.
    """
    pieces: list[bytes] = []
    copied = position = 0
    for _ in range(MAX_VALUES):
        start = body.find(b'"data:', position, position + MAX_TEXT_BYTES)
        end = position = body.find(b'"', start + 1)
        if start < 0 or end < 0:
            break
        comma = body.find(b",", start, min(end, start + MAX_PREFIX_BYTES)) + 1
        # After a backslash, the quotation mark belongs to a string: this is not a whole data URL.
        is_whole = body[start - 1 : start] != b"\\" and body[end - 1 : end] != b"\\"
        if comma and is_whole and end - comma >= MIN_EXTRACTED_BYTES:
            pieces += [body[copied:comma], f"{_MARK}-{comma}-{end}".encode()]
            copied = end
    return b"".join([*pieces, body[copied:]]) if pieces else body, len(pieces) // 2


def is_reference(url: str) -> bool:
    """Return whether `extract` has replaced the base64 of a data URL."""
    return _REFERENCE.fullmatch(url.partition(",")[2]) is not None


def payload(url: str, body: bytes) -> memoryview:
    """Return the base64 of a data URL of a job that was decoded from `body`, with JSON escapes."""
    text = url.partition(",")[2]
    reference = _REFERENCE.fullmatch(text)
    if reference is None:
        return memoryview(escape_json(text))
    return memoryview(body)[int(reference[1]) : int(reference[2])]
