"""Convert requests of OpenAI's Batch API to jobs, and results to lines of its output and error files.

The formats are `BatchRequestInput` and `BatchRequestOutput` of OpenAI's API specification.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Final

URL: Final = "/v1/chat/completions"
# Fields that the worker sets itself, with the values that a request may have.
_IGNORED: Final = {"stream": (None, False), "n": (None, 1)}
_OK: Final = 200


def is_request(line: Mapping[str, Any]) -> bool:
    """Return whether a line of JSON is a batch request, not a job."""
    return "custom_id" in line and "body" in line


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
    """Convert a result to a line of the output file or, if the job failed, of the error file.

    `created`: when the result arrived, in Unix seconds; used if the result lacks the API's response.
    """
    job_id = result.get("id") or custom_id
    line = {"id": f"batch_req_{_digest(job_id)}", "custom_id": custom_id}
    if error := result.get("error"):
        return {**line, "response": None, "error": {name: error.get(name) for name in ("code", "message")}}
    body = result.get("response") or _completion(result, created)
    response = {"status_code": _OK, "request_id": f"req_{_digest(job_id)}", "body": body}
    return {**line, "response": response, "error": None}


def _completion(result: Mapping[str, Any], created: int) -> dict[str, Any]:
    """Rebuild the API's response from a result (`VQA_INCLUDE_RESPONSE` keeps the original)."""
    message = {"role": "assistant", "content": result.get("answer"), "refusal": None}
    usage = result.get("usage") or {}
    return {
        "id": f"chatcmpl-{_digest(result.get('id') or '')}",
        "object": "chat.completion",
        "created": created,
        "model": result.get("model"),
        "choices": [
            {
                "index": 0,
                "message": message,
                "logprobs": None,
                "finish_reason": result.get("finish_reason") or "stop",
            }
        ],
        "usage": {
            name: usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        },
    }


def _digest(job_id: str) -> str:
    return hashlib.sha256(job_id.encode()).hexdigest()[:24]
