"""Convert requests of OpenAI's Batch API to jobs, and results to lines of its output and error files.

The formats are `BatchRequestInput` and `BatchRequestOutput` of OpenAI's API specification.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Final

import pydantic_core

from vqa_worker.messages.error_codes import ErrorCode
from worker.cli.submit.results import TOKENS, failure

URL: Final = "/v1/chat/completions"
# Fields that the worker sets itself, with the values that a request may have.
_IGNORED: Final = {"stream": (None, False), "n": (None, 1)}
_OK: Final = 200
_SERVER_ERROR: Final = 500
# In the message of a failed result, if the API rejected the request: see `worker.model.errors`.
_API_ANSWER: Final = re.compile(r"the API answered (\d{3})(?:: (.*))?", re.DOTALL)


def is_request(line: str) -> bool:
    """Return whether a line of a file is a batch request, not a job."""
    try:
        found = pydantic_core.from_json(line)
    except ValueError:
        return False
    return isinstance(found, dict) and "custom_id" in found and "body" in found


def job_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a batch request to a job without an id.

    Raises:
        ValueError: the request is malformed or not supported.
    """
    if not isinstance(line.get("custom_id"), str) or not line["custom_id"]:
        raise ValueError("custom_id: must be a non-empty string")
    if line.get("method", "POST") != "POST" or line.get("url", URL) != URL:
        raise ValueError(f"only POST {URL} is supported, not {line.get('method')} {line.get('url')}")
    body = line.get("body")
    if not isinstance(body, dict):
        raise ValueError("body: must be an object")  # noqa: TRY004 - callers handle one type
    params = {name: value for name, value in body.items() if name not in ("model", "messages")}
    for name, allowed in _IGNORED.items():
        if params.pop(name, None) not in allowed:
            raise ValueError(f"body.{name}: streaming and several answers per request are not supported")
    job = {name: body[name] for name in ("model", "messages") if name in body}
    return {**job, "params": params} if params else job


def line_of(custom_id: str, result: Mapping[str, Any], created: int) -> dict[str, Any]:
    """Convert a parsed result to a line of the output file or, if the job failed, of the error file.

    `created`: when the result arrived, in Unix seconds; used if the result lacks the API's response.
    """
    digest = hashlib.sha256((result["id"] or custom_id).encode(errors="replace")).hexdigest()[:24]
    line = {"id": f"batch_req_{digest}", "custom_id": custom_id}
    response: dict[str, Any] = {"status_code": _OK, "request_id": f"req_{digest}"}
    if result["status"] == "succeeded":
        body = result["response"] or _completion(digest, result, created)
        return {**line, "response": {**response, "body": body}, "error": None}
    code, message = failure(result)
    error = {"code": code, "message": message}
    if code in {ErrorCode.EMPTY_ANSWER, ErrorCode.SCHEMA_MISMATCH}:
        body = result["response"] or _completion(digest, result, created)
        return {**line, "response": {**response, "body": body}, "error": error}
    if (answered := _API_ANSWER.search(message)) is None:
        return {**line, "response": None, "error": error}
    status = int(answered[1])
    kind = "server_error" if status >= _SERVER_ERROR else "invalid_request_error"
    refusal = {"message": answered[2] or message, "type": kind, "param": None, "code": code}
    response |= {"status_code": status, "body": {"error": refusal}}
    return {**line, "response": response, "error": None}


def _completion(digest: str, result: Mapping[str, Any], created: int) -> dict[str, Any]:
    """Rebuild the API's response from a result (`VQA_INCLUDE_RESPONSE` keeps the original)."""
    # The format has no unknown numbers, and 0 would be wrong.
    usage = {name: result["usage"].get(name) for name in TOKENS}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": result["answer"], "refusal": None},
        "logprobs": None,
        "finish_reason": result["finish_reason"] or "stop",
    }
    return {
        "id": f"chatcmpl-{digest}",
        "object": "chat.completion",
        "created": created,
        "model": result["model"],
        "choices": [choice],
        "usage": usage if None not in usage.values() else None,
    }
