"""The request: a decoded and validated job, without image data."""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

from vqa_worker.messages.content_encoding import is_encoded
from vqa_worker.messages.conversation import Conversation, ImageRef
from vqa_worker.messages.decoding import decode, decompressed
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.job import Job, PromptOrder
from worker.errors import JobError
from worker.images.source import Embedded, ImageSource
from worker.jobs.attempt import Attempt
from worker.jobs.delivery import Delivery
from worker.model.answer import Answer
from worker.model.answer_schema import AnswerSchema
from worker.model.request import (
    PLACEHOLDER,
    body_parts,
    fingerprint,
    page_separators,
    with_token_bounds,
    with_token_limit,
)
from worker.model.response_format import with_schema_in_prompt
from worker.s3.aws import S3Object

# A job over the delivery limit is decoded in this many further deliveries, to find the id for its result.
# Decoding may be what crashes the workers.
MAX_DECODES_OVER_LIMIT = 3

# The service tier of OpenAI, DeepInfra, Groq and others that is cheaper, slower and may have no capacity.
FLEX: Final = "flex"

_TOO_OFTEN = (
    "the job was delivered {} times without an outcome (VQA_DELIVERY_LIMIT): it may crash the workers"
)


class DeliveredTooOftenError(Exception):
    """The job was delivered more than `VQA_DELIVERY_LIMIT` times without an outcome."""

    def __init__(self, deliveries: int) -> None:
        super().__init__(_TOO_OFTEN.format(deliveries))


@dataclass(frozen=True, slots=True)
class RequestRules:
    """The settings that a job is checked against.

    Attributes:
        stores_results: whether requests need a key in the result store.
        prompt_order: of jobs that do not say it (`VQA_PROMPT_ORDER`).
        flex_fallback: whether a job whose tier `flex` has no capacity is sent again without a tier.
        token_limit: the name of the token limit in requests; any other: as the job has it.
        default_max_tokens: the token limit of jobs that name none; `max_tokens_limit`: the highest one.
        stream_only_models: those that answer only as a stream.
        max_schema_repairs: see `Request.max_repairs`; None: answers are not validated (`off`).
        schema_in_prompt: whether a JSON schema is sent as text, because the API does not take it.
        json_mode: whether the API then takes `{"type": "json_object"}`.
    """

    default_model: str
    allowed_models: Collection[str]
    max_job_bytes: int
    delivery_limit: int
    send_image_detail: bool
    stores_results: bool = False
    prompt_order: PromptOrder = "images_first"
    flex_fallback: bool = False
    token_limit: str = ""
    default_max_tokens: int | None = None
    max_tokens_limit: int | None = None
    stream_only_models: Collection[str] = ()
    max_schema_repairs: int | None = None
    schema_in_prompt: bool = False
    json_mode: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """A decoded and validated job, without image data.

    Attributes:
        model: the name of the model.
        body_parts: the JSON body of the model request, split at the image URLs.
        images: where the images are, in order.
        deadline: the job fails if the model request does not start before: its own, or when its message
            expires.
        store_key: identifies the job in the result store; empty without one.
        is_expiration: whether `deadline` is when the message expires.
        service_tier: that the job asks for.
        fallback: the same request in the default tier, for when this one's has no capacity; or None.
        schema: that the answer must satisfy; None: any answer will do.
        max_repairs: how many further requests may follow an answer that does not satisfy it.
        draft: the answer that this request is to repair.
    """

    model: str
    body_parts: Sequence[bytes]
    images: Sequence[ImageSource]
    deadline: datetime | None
    store_key: str = ""
    is_expiration: bool = False
    service_tier: str | None = None
    fallback: "Request | None" = None
    schema: AnswerSchema | None = None
    max_repairs: int = 0
    draft: Answer | None = None

    @property
    def reads_s3(self) -> bool:
        """Whether any image is read from S3."""
        return any(isinstance(image.source, S3Object) for image in self.images)

    def check_deadline(self, now: datetime, *, in_s: float = 0.0) -> None:
        """Check that the deadline is still ahead, `in_s` seconds from now.

        Raises:
            JobError: it is not.
        """
        if self.deadline is not None and now + timedelta(seconds=in_s) >= self.deadline:
            when = "comes before the API may be called again" if in_s else "has passed"
            raise JobError(ErrorCode.DEADLINE_EXCEEDED, f"{self._deadline_name} {when}")

    @property
    def _deadline_name(self) -> str:
        name = "message's expiration" if self.is_expiration else "deadline"
        return f"the {name} {self.deadline and self.deadline.isoformat()}"


async def decompress(delivery: Delivery, attempt: Attempt, rules: RequestRules) -> Delivery:
    """Return the delivery with a body without its `content_encoding`.

    Raises:
        InvalidJobError: the encoding is unknown, or the body is damaged or too large.
        DeliveredTooOftenError: it was delivered so often that it is not decoded again.
    """
    encoding = delivery.content_encoding
    if encoding is None or not is_encoded(encoding):
        return delivery
    _check_decodes(delivery, attempt, rules)
    # In a thread: it takes longer than the event loop may be blocked.
    body = await asyncio.to_thread(
        decompressed, delivery.body, encoding, delivery.message_id, rules.max_job_bytes
    )
    return replace(delivery, body=body)


def read_job(delivery: Delivery, attempt: Attempt, rules: RequestRules) -> Job:
    """Decode the message, and set the attempt's job id, deadline and metadata.

    An expired message is like a job past its deadline.

    Raises:
        InvalidJobError: it is not a job.
        DeliveredTooOftenError: it was delivered so often that it is not decoded again.
    """
    _check_decodes(delivery, attempt, rules)
    job = decode(delivery.body, delivery.message_id, rules.max_job_bytes)
    attempt.set_job(job)
    attempt.deadline = _earlier(job.deadline, delivery.expires_at)
    return job


def check_job(
    job: Job,
    delivery: Delivery,
    attempt: Attempt,
    rules: RequestRules,
    check_images: Callable[[Sequence[ImageRef], bytes], list[ImageSource]],
) -> Request:
    """Check a job, set the attempt's model, and return the validated job.

    Raises:
        DeliveredTooOftenError: it must not be attempted again.
        JobError: the job breaks one of the rules.
    """
    model = attempt.allowed_model = _model_of(job, rules)
    if delivery.deliveries > rules.delivery_limit:
        raise DeliveredTooOftenError(delivery.deliveries)
    conversation = Conversation(job)
    images = check_images(conversation.images(), delivery.body)
    messages = _messages(conversation, PLACEHOLDER, rules)
    params: Mapping[str, Any] = job.params or {}
    if rules.schema_in_prompt:
        messages, params = with_schema_in_prompt(messages, params, json_mode=rules.json_mode)
    images = [
        replace(image, separator=separator)
        for image, separator in zip(images, page_separators(messages), strict=True)
    ]
    params = with_token_bounds(params, default=rules.default_max_tokens, limit=rules.max_tokens_limit)
    params = with_token_limit(params, rules.token_limit)
    tier, streams = params.get("service_tier"), model in rules.stream_only_models
    request = Request(
        model=model,
        body_parts=body_parts(model, messages, params, streams=streams),
        images=images,
        deadline=(deadline := _earlier(job.deadline, delivery.expires_at)),
        store_key=_store_key(job, images, model, rules),
        is_expiration=deadline != job.deadline,
        service_tier=tier if isinstance(tier, str) else None,
    )
    if tier != FLEX or not rules.flex_fallback:
        return request
    others = {name: value for name, value in params.items() if name != "service_tier"}
    parts = body_parts(model, messages, others, streams=streams)
    fallback = replace(request, body_parts=parts, service_tier=None)
    return replace(request, fallback=fallback)


def _messages(conversation: Conversation, url: str, rules: RequestRules) -> list[dict[str, Any]]:
    """Return the messages of a request with this URL in place of every image's."""
    return conversation.render(url, send_detail=rules.send_image_detail, prompt_order=rules.prompt_order)


def _earlier(deadline: datetime | None, expires_at: datetime | None) -> datetime | None:
    return min((it for it in (deadline, expires_at) if it is not None), default=None)


def _check_decodes(delivery: Delivery, attempt: Attempt, rules: RequestRules) -> None:
    if delivery.deliveries > rules.delivery_limit + MAX_DECODES_OVER_LIMIT:
        attempt.job_id = delivery.message_id
        raise DeliveredTooOftenError(delivery.deliveries)


def _model_of(job: Job, rules: RequestRules) -> str:
    model = job.model if job.model is not None else rules.default_model
    if model not in rules.allowed_models:
        raise JobError(ErrorCode.INVALID_JOB, "model: is not among VQA_ALLOWED_MODELS")
    return model


def _store_key(job: Job, images: Sequence[ImageSource], model: str, rules: RequestRules) -> str:
    """Return the job's key in the result store, which only someone who knows the whole job can compute."""
    if not rules.stores_results:
        return ""
    conversation = Conversation(job)
    messages = _messages(conversation, "", rules)
    # A long data URL of a decoded job only refers to the body.
    urls = [
        _embedded_identity(image.source, ref) if isinstance(image.source, Embedded) else _identity(ref)
        for ref, image in zip(conversation.images(), images, strict=True)
    ]
    return fingerprint(job.id or "", model, messages, job.params or {}, urls)


def _identity(ref: ImageRef) -> bytes:
    """Return what the key depends on: another version, size or page of an object is another image."""
    wanted = {"max_edge": ref.max_edge, "pages": ref.pages}
    parts = [ref.url, ref.version_id, *(f"{name}={value}" for name, value in wanted.items() if value)]
    # No URL contains a line break.
    return "\n".join(part for part in parts if part is not None).encode()


def _embedded_identity(source: Embedded, ref: ImageRef) -> bytes | memoryview:
    wanted = _identity(replace(ref, url=""))
    return b"%s\n%s" % (source.text, wanted) if wanted else source.text
