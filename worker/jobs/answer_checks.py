"""Check answers against their job's JSON schema, and create the requests that repair them."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from vqa_worker.messages.error_codes import ErrorCode
from worker.errors import JobError
from worker.jobs.request import Request, RequestRules
from worker.model.answer import Answer
from worker.model.answer_schema import AnswerSchema, Checked, InvalidSchemaError
from worker.model.request import with_further_messages
from worker.model.response_format import SCHEMA_PATH, repair_messages, schema_of
from worker.model.usage import total

CUT_OFF: Final = "the token limit cut the answer off (finish_reason length): raise params.max_tokens"


async def with_schema(request: Request, params: Mapping[str, Any], rules: RequestRules) -> Request:
    """Return the request with the compiled JSON schema of its job, if it has one.

    Raises:
        JobError: the schema is wrong, or too large.
    """
    schema = schema_of(params)
    if schema is None or rules.max_schema_repairs is None:
        return request
    try:
        # In a thread: a large schema takes longer than the event loop may be blocked.
        compiled = await asyncio.to_thread(AnswerSchema, schema)
    except InvalidSchemaError as error:
        raise JobError(
            ErrorCode.INVALID_JOB, f"{SCHEMA_PATH}: {error}", log_message=f"{SCHEMA_PATH}: is not supported"
        ) from None
    fallback = request.fallback
    if fallback is not None:
        fallback = replace(fallback, schema=compiled, max_repairs=rules.max_schema_repairs)
    return replace(request, schema=compiled, max_repairs=rules.max_schema_repairs, fallback=fallback)


def received(request: Request, answer: Answer) -> Answer:
    """Return the answer to a request; if that repairs another answer, with the usage of both."""
    draft = request.draft
    if draft is None:
        return answer
    return replace(answer, usage=total(draft.usage, answer.usage), repairs=draft.repairs + 1)


def checked(request: Request, answer: Answer) -> Answer:
    """Return the answer with its value, or with what is wrong. It can take 0.3 s."""
    if request.schema is None or answer.checked is not None or answer.text is None or answer.calls_tools:
        return answer
    is_cut_off = answer.finish_reason == "length"
    result = request.schema.check(answer.text, is_cut_off=is_cut_off)
    if is_cut_off and result.errors is not None:
        result = Checked(errors=CUT_OFF, is_final=True)
    return replace(answer, checked=result)


def repair_of(request: Request, answer: Answer) -> Request | None:
    """Return the request that repairs an answer; None if there is nothing to repair, or no repair left."""
    result = answer.checked
    if result is None or result.errors is None or result.is_final or answer.repairs >= request.max_repairs:
        return None
    further = repair_messages(answer.text or "", result.errors)
    fallback = request.fallback
    if fallback is not None:
        fallback_parts = with_further_messages(fallback.body_parts, further)
        fallback = replace(fallback, body_parts=fallback_parts, draft=answer)
    parts = with_further_messages(request.body_parts, further)
    return replace(request, body_parts=parts, draft=answer, fallback=fallback)
