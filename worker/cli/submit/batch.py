"""The files of OpenAI's Batch API: its requests become jobs, results lines of its output and error files.

The shapes are those of `BatchRequestInput` and `BatchRequestOutput` in OpenAI's own description of its API.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Final

URL: Final = "/v1/chat/completions"
# Worth nothing to say, and the worker's to set: an answer that is not streamed, and one of it.
_HARMLESS: Final = {"stream": (None, False), "n": (None, 1)}
_OK: Final = 200


def is_request(line: Mapping[str, Any]) -> bool:
    """Whether a line of JSON is a request of a batch rather than a job."""
    return "custom_id" in line and "body" in line


def job_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """The job that a request is; without its id.

    Raises:
        ValueError: it is a request that no worker can answer; the message says why.
    """
    if not isinstance(line.get("custom_id"), str) or not line["custom_id"]:
        raise ValueError("custom_id: must be a text that is not empty")
    if line.get("method", "POST") != "POST" or line.get("url", URL) != URL:
        raise ValueError(f"only POST {URL} can be answered, not {line.get('method')} {line.get('url')}")
    body = line.get("body")
    if not isinstance(body, dict):
        raise ValueError("body: must be an object")  # noqa: TRY004 - one type for all of it
    params = {name: value for name, value in body.items() if name not in ("model", "messages")}
    for name, harmless in _HARMLESS.items():
        if params.pop(name, None) not in harmless:
            raise ValueError(f"body.{name}: answers come whole, and one for each request")
    job = {name: body[name] for name in ("model", "messages") if name in body}
    return {**job, "params": params} if params else job


def line_of(custom_id: str, result: Mapping[str, Any], created: int) -> dict[str, Any]:
    """A line of the output file or, for a job that failed, of the error file.

    `created`: when the result came, in seconds since 1970, where the API's own answer is not there.
    """
    job_id = result.get("id") or custom_id
    line = {"id": f"batch_req_{_digest(job_id)}", "custom_id": custom_id}
    if error := result.get("error"):
        return {**line, "response": None, "error": {name: error.get(name) for name in ("code", "message")}}
    body = result.get("response") or _completion(result, created)
    response = {"status_code": _OK, "request_id": f"req_{_digest(job_id)}", "body": body}
    return {**line, "response": response, "error": None}


def _completion(result: Mapping[str, Any], created: int) -> dict[str, Any]:
    """The API's answer, made again of what the result says (`VQA_INCLUDE_RESPONSE` keeps the real one)."""
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
