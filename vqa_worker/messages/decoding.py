"""Decode the body of a message into a job."""

import json
import re
from typing import Any

import pydantic_core

from vqa_worker.messages.content_encoding import ContentEncodingError, decompress
from vqa_worker.messages.data_urls import extract, is_reference
from vqa_worker.messages.job import ImagePart, Job, valid_id
from vqa_worker.messages.limits import MAX_INTEGER_BITS, MAX_TEXT_BYTES, exceeded_limit, has_too_large_number
from vqa_worker.messages.validation_errors import explain

# Of a rejected body, to read its id without parsing all of it.
BEGINNING_BYTES = 64 * 1024
# RFC 8259, §8.1: a parser may ignore it.
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# What a JSON value begins with, if it is an object, an array or a string.
_JSON_BEGINNING = re.compile(r"\ufeff?[ \t\r\n]*[{\[\"]")
# An object in a string, possibly in a string again.
_ENCODED_TWICE = re.compile(rb'[ \t\r\n]*"(?:[ \\"]|\\[nrt])*\{')
# Far more white space than any encoder writes.
_SNIFFED_BYTES = 1024


class InvalidJobError(Exception):
    """The message is not a job.

    Attributes:
        message: what is wrong, for a person; contains no values of the job.
        job_id: the id of the body or else the AMQP message_id; None if neither is valid.
        id_in_body: whether the id of the body could be read.
    """

    def __init__(self, message: str, *, job_id: str | None, id_in_body: bool) -> None:
        super().__init__(message)
        self.message = message
        self.job_id = job_id
        self.id_in_body = id_in_body


def decode(body: bytes, message_id: str | None, max_bytes: int) -> Job:
    """Parse and validate the body of a message as strict JSON (RFC 8259).

    Args:
        body: of the message.
        message_id: of the message; the job's id if the body has none.
        max_bytes: `VQA_MAX_JOB_BYTES`.

    Returns:
        A job with an id. The base64 of long data URLs is replaced with references: see `payload`.

    Raises:
        InvalidJobError: the body is not a job, or exceeds a limit.
    """
    fallback = valid_id(message_id)
    if len(body) > max_bytes:
        too_large = f"the body has {len(body)} bytes; VQA_MAX_JOB_BYTES allows {max_bytes}"
        raise _invalid(too_large, _id_of_beginning(body[:max_bytes]), fallback)
    text, references = extract(body)
    text = text.removeprefix(BYTE_ORDER_MARK)
    if (wrong := _wrong_encoding(text[:_SNIFFED_BYTES])) is not None:
        raise _invalid(wrong, None, fallback)
    if (excess := exceeded_limit(text)) is not None:
        raise _invalid(excess, _id_of_beginning(text), fallback)
    try:
        job = Job.model_validate(_parse(text))
        if references != _count_references(job):
            job = Job.model_validate(_parse_whole(body.removeprefix(BYTE_ORDER_MARK)))
    except (ValueError, RecursionError) as error:
        raise _invalid(explain(error), _id_of(text), fallback) from None
    if job.id is not None:
        return job
    if fallback is None:
        raise _invalid("id: missing, and the message has no valid message_id", None, None)
    return job.model_copy(update={"id": fallback})


def decompressed(body: bytes, content_encoding: str, message_id: str | None, max_bytes: int) -> bytes:
    """Return the body of a message without its `content_encoding`, for `decode`.

    It can take up to 0.1 s: do not call it in an event loop.

    Raises:
        InvalidJobError: the encoding is unknown, the body is damaged, or the result exceeds `max_bytes`.
    """
    if len(body) > max_bytes:
        # `decode` rejects it.
        return body
    try:
        return decompress(body, content_encoding, max_bytes)
    except ContentEncodingError as error:
        own_id = _id_of_beginning(error.beginning)
        raise _invalid(str(error), own_id, valid_id(message_id)) from None


def parse_leniently(body: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a body that need not be a valid job; None if it is not a JSON object."""
    try:
        # Invalid UTF-8 becomes lone surrogates, which a valid id does not contain.
        text = body.removeprefix(BYTE_ORDER_MARK).decode(errors="surrogateescape")
        value = json.loads(text, parse_int=_parse_int)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _parse_int(text: str) -> int | float:
    return int(text) if len(text) < MAX_INTEGER_BITS else float(text)


def _invalid(message: str, own_id: str | None, fallback: str | None) -> InvalidJobError:
    return InvalidJobError(message, job_id=own_id or fallback, id_in_body=own_id is not None)


def _wrong_encoding(beginning: bytes) -> str | None:
    """Return how a body is encoded that cannot be a job because of that, or None."""
    encoding = json.detect_encoding(beginning)
    if encoding != "utf-8" and _JSON_BEGINNING.match(beginning.decode(encoding, errors="replace")):
        name = encoding.upper().removesuffix("-LE").removesuffix("-BE")
        return f"the body is {name}: publish it in UTF-8 (RFC 8259)"
    if _ENCODED_TWICE.match(beginning):
        return "the body is a JSON string that contains JSON: encode the job only once"
    return None


def _parse(body: bytes) -> dict[str, Any]:
    value = pydantic_core.from_json(body, allow_inf_nan=False)
    if not isinstance(value, dict):
        raise ValueError("the body must be a JSON object")  # noqa: TRY004 - the caller expects one type
    if has_too_large_number(value):
        raise ValueError("a number is too large: floats have 64 bits, integers at most 256")
    return value


def _parse_whole(body: bytes) -> dict[str, Any]:
    """Parse a body that has data URLs where no image belongs: there, they are text."""
    if len(body) > MAX_TEXT_BYTES:
        raise ValueError(f"the body has more than {MAX_TEXT_BYTES} bytes without the data URLs of its images")
    return _parse(body)


def _count_references(job: Job) -> int:
    urls = [image if isinstance(image, str) else image.url for image in job.images or ()]
    for message in job.messages or ():
        if isinstance(message.content, list):
            urls += [part.image_url.url for part in message.content if isinstance(part, ImagePart)]
    return sum(map(is_reference, urls))


def _id_of(body: bytes) -> str | None:
    """Return the id of an invalid body, if it can be read."""
    return valid_id((parse_leniently(body) or {}).get("id"))


def _id_of_beginning(body: bytes) -> str | None:
    """Return the id of a body that is not parsed as a whole, if it is near the beginning."""
    try:
        value = pydantic_core.from_json(body[:BEGINNING_BYTES], allow_partial=True)
    except ValueError:
        return None
    return valid_id(value.get("id")) if isinstance(value, dict) else None
