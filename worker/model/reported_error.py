"""Find an error in the body of a response with status 200."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from vqa_worker.messages.serialization import to_json
from worker.model.error_body import parse_error_body

_CODES: Final = ("code", "status", "status_code", "statusCode", "http_code", "type")


def error_in(response: Mapping[str, Any]) -> bytes | None:
    """Return the JSON body of the error response that a response should have been; None without an error.

    The error is in `error`, in the first of `errors`, in `choices[0].error` (OpenRouter docs, Errors), or it
    is the whole body (vLLM and FastAPI).
    """
    error = next((found for found in _candidates(response) if found), None)
    return None if error is None else to_json({"error": error})


def _candidates(response: Mapping[str, Any]) -> Iterator[Any]:
    yield response.get("error")
    errors = response.get("errors")
    yield errors[0] if isinstance(errors, list) and errors else errors
    choices = response.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        yield choices[0].get("error")
    if "choices" not in response and _is_error(response):
        yield response


def _is_error(response: Mapping[str, Any]) -> bool:
    if "error" in (response.get("object"), response.get("type")) or "detail" in response:
        return True
    codes = {name: response[name] for name in _CODES if isinstance(response.get(name), int | str)}
    return parse_error_body(to_json(codes)).status is not None
