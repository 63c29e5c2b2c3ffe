"""The codes of errors in results."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class ErrorCode(StrEnum):
    """The codes of `error.code` in a result. Readers must accept codes they don't know."""

    INVALID_JOB = "invalid_job"
    IMAGE_NOT_FOUND = "image_not_found"
    IMAGE_FORBIDDEN = "image_forbidden"
    IMAGE_SOURCE_NOT_ALLOWED = "image_source_not_allowed"
    IMAGE_TOO_LARGE = "image_too_large"
    IMAGE_UNSUPPORTED_TYPE = "image_unsupported_type"
    IMAGE_CORRUPT = "image_corrupt"
    TOO_MANY_IMAGES = "too_many_images"
    MODEL_REJECTED = "model_rejected"
    SCHEMA_MISMATCH = "schema_mismatch"
    EMPTY_ANSWER = "empty_answer"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    CANCELLED = "cancelled"
    RESULT_TOO_LARGE = "result_too_large"


# For docs/messages.md: when a code occurs, and what happens in addition to the failed result.
DESCRIPTIONS: Final[Mapping[ErrorCode, str]] = {
    ErrorCode.INVALID_JOB: "The message is not a valid job: not strict JSON in UTF-8 (JSON in a JSON string,"
    " UTF-16 or an unknown `content_encoding`, for example), an invalid or unknown field, no id, a model that"
    " is not allowed, control characters in an object key, `pages` that an image does not have, too many"
    " JSON values, more than 1 MB apart from"
    " data URLs, or a body larger than `VQA_MAX_JOB_BYTES`. If the body has no readable id, a"
    " copy goes to the dead-letter queue; a result is then published only if the message has a `message_id`,"
    " a `reply_to` or a `correlation_id`.",
    ErrorCode.IMAGE_NOT_FOUND: "S3 has no such object, bucket or version. (Without permission to list the"
    " bucket, S3 reports a missing object as forbidden.)",
    ErrorCode.IMAGE_FORBIDDEN: "S3 denies the worker access to this object, or refuses it for another reason"
    " while others are read: it is archived, or encrypted with a key that the worker may not use. The message"
    " contains S3's own.",
    ErrorCode.IMAGE_SOURCE_NOT_ALLOWED: "The bucket is not in `VQA_ALLOWED_BUCKETS`, the link's host is not"
    " in `VQA_ALLOWED_LINK_HOSTS`, or the URL has another scheme, `http://` included.",
    ErrorCode.IMAGE_TOO_LARGE: "The content is larger than `VQA_MAX_SOURCE_BYTES` (`VQA_MAX_IMAGE_BYTES` if"
    " images are not converted), or has more pixels than `VQA_IMAGE_MAX_PIXELS`, or decoding it needs more"
    " memory than `VQA_IMAGE_DECODE_BYTES`.",
    ErrorCode.IMAGE_UNSUPPORTED_TYPE: "The content is neither an image that the model API takes nor one that"
    " can be [converted](images.md); the message says what it is. With `VQA_IMAGE_DELIVERY=link` the model"
    " API checks the type and size of S3 images, not the worker.",
    ErrorCode.IMAGE_CORRUPT: "The image or document is empty, incomplete, damaged or encrypted, its base64 is"
    " invalid (the message names the first wrong character), or it differs from the checksum that S3 has"
    " stored for it.",
    ErrorCode.TOO_MANY_IMAGES: "The job has more images than `VQA_MAX_IMAGES_PER_JOB`, or a document has more"
    " pages than `VQA_PDF_MAX_PAGES` and the job does not choose some.",
    ErrorCode.MODEL_REJECTED: "The model API rejects this request permanently (400, 413, 422, its content"
    " policy; 403 for this job while others succeed). The message contains the error message of the API.",
    ErrorCode.SCHEMA_MISMATCH: "The answer does not satisfy the job's JSON schema, after"
    " `VQA_SCHEMA_REPAIRS` [repairs](structured-answers.md), or the token limit cut it off. The message says"
    " what is wrong, `response` has the answer, and `usage` is that of all calls. It is not retried.",
    ErrorCode.EMPTY_ANSWER: "The model API returned neither text nor a tool call: the token limit was spent"
    " on reasoning, or a content filter removed the text. The request was billed and is not retried; the"
    " result has `finish_reason` and `usage`.",
    ErrorCode.DEADLINE_EXCEEDED: "The job's `deadline` or the `expiration` of its message passed before the"
    " model request, or is earlier than the next attempt.",
    ErrorCode.ATTEMPTS_EXHAUSTED: "Transient errors (a timeout, a lost connection, a 5xx response) exceeded"
    " `VQA_MAX_ATTEMPTS`, or the job was delivered more than `VQA_DELIVERY_LIMIT` times without an outcome."
    " The job also goes to the dead-letter queue.",
    ErrorCode.RESULT_TOO_LARGE: "The result is larger than the broker's `max_message_size` or"
    " `VQA_MAX_RESULT_BYTES`, and `VQA_LARGE_RESULTS` is not set or cannot be written. The request was"
    " billed; `usage` has its cost. With `VQA_RESULT_STORE`, the same job submitted again gets the stored"
    " answer; without it, the answer is lost.",
    ErrorCode.CANCELLED: "The job was cancelled. A running model request may have been billed.",
}
