"""Decode the body of a message into a job."""

import json
from typing import Any

import pydantic_core

from vqa_worker.messages.data_urls import extract, is_reference
from vqa_worker.messages.job import ImagePart, Job, valid_id
from vqa_worker.messages.limits import MAX_INTEGER_BITS, MAX_TEXT_BYTES, exceeded_limit, has_too_large_number
from vqa_worker.messages.validation_errors import explain

# Of a rejected body, to read its id without parsing all of it.
BEGINNING_BYTES = 64 * 1024


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
    if (excess := exceeded_limit(text)) is not None:
        raise _invalid(excess, _id_of_beginning(text), fallback)
    try:
        job = Job.model_validate(_parse(text))
        if references != _count_references(job):
            job = Job.model_validate(_parse_whole(body))
    except (ValueError, RecursionError) as error:
        raise _invalid(explain(error), _id_of(text), fallback) from None
    if job.id is not None:
        return job
    if fallback is None:
        raise _invalid("id: missing, and the message has no valid message_id", None, None)
    return job.model_copy(update={"id": fallback})


def parse_leniently(body: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a body that need not be a valid job; None if it is not a JSON object."""
    try:
        # Invalid UTF-8 becomes lone surrogates, which a valid id does not contain.
        value = json.loads(body.decode(errors="surrogateescape"), parse_int=_parse_int)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _parse_int(text: str) -> int | float:
    return int(text) if len(text) < MAX_INTEGER_BITS else float(text)


def _invalid(message: str, own_id: str | None, fallback: str | None) -> InvalidJobError:
    return InvalidJobError(message, job_id=own_id or fallback, id_in_body=own_id is not None)


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
