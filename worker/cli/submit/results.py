"""Read results defensively: the publisher of a result need not be a worker of this version."""

import json
from collections.abc import Mapping
from typing import Any, Final

from vqa_worker.large_results import LargeResults, NotTheResultError
from vqa_worker.messages.decoding import parse_leniently
from vqa_worker.rabbitmq.replies import Reply
from worker.cli.submit.state import JobResult

TOKENS: Final = ("prompt_tokens", "completion_tokens", "total_tokens")
# Larger numbers are errors, and the sums of some of them would overflow.
_MAX_TOKENS: Final = 10**12
_MAX_USD: Final = 10**9
_MAX_CODE_CHARS: Final = 64


def received(reply: Reply) -> JobResult:
    """Return what the state file stores of a result; one without a status counts as failed."""
    result = parse(reply.body)
    usage = result["usage"]
    failed = result["status"] != "succeeded"
    return JobResult(
        id=result["id"] or "",
        body=reply.body,
        at=reply.at,
        failed=failed,
        tokens=usage["total_tokens"] or 0,
        cost=usage["cost_usd"],
        code=_code(result) if failed else None,
    )


def _code(result: Mapping[str, Any]) -> str:
    """Return the error code for statistics; `unknown` for a text that cannot be one."""
    code, _ = failure(result)
    return code if code.isascii() and code.isprintable() and len(code) <= _MAX_CODE_CHARS else "unknown"


def result_url(body: bytes) -> Any:
    """Return the URL of a result in S3; None if the body is the whole result."""
    return (parse_leniently(body) or {}).get("result_url")


def completed(reply: Reply, large_results: LargeResults) -> Reply:
    """Return the whole result of a reply with a `result_url`; a failed one if the URL is wrong. Blocks.

    Raises:
        UnreadableObjectError: S3 does not return the object.
    """
    fields, known = parse_leniently(reply.body) or {}, parse(reply.body)
    try:
        changes = large_results.read(fields["result_url"], job_id=known["id"], status=known["status"])
    except NotTheResultError as error:
        failure = {"code": "invalid_result_url", "message": f"{error}", "retryable": False}
        changes = {"status": "failed", "error": failure}
    return Reply(json.dumps({**fields, **changes}).encode(), reply.at)


def parse(body: bytes) -> dict[str, Any]:
    """Return the fields of a result with the types that they should have; others are None or empty."""
    found = parse_leniently(body) or {}
    texts = {name: _if(str, found.get(name)) for name in ("id", "answer", "model", "finish_reason")}
    objects = {name: _if(dict, found.get(name)) or {} for name in ("error", "metadata", "response", "usage")}
    usage = {name: _number(objects["usage"].get(name), _MAX_TOKENS, int) for name in TOKENS}
    usage["cost_usd"] = _number(objects["usage"].get("cost_usd"), _MAX_USD, int, float)
    return {
        **texts,
        **objects,
        "status": "succeeded" if found.get("status") == "succeeded" else "failed",
        "parsed": found.get("parsed"),
        "attempts": _number(found.get("attempts"), _MAX_TOKENS, int),
        "usage": usage,
    }


def failure(result: Mapping[str, Any]) -> tuple[str, str]:
    """Return the error code and message of a failed result."""
    code, message = (_if(str, result["error"].get(name)) for name in ("code", "message"))
    return code or "unknown", message or "the result has no error message"


def _number(value: Any, most: int, *kinds: type) -> Any:
    """Return a number from 0 to `most` of one of the types; None for anything else."""
    return value if type(value) in kinds and 0 <= value <= most else None


def _if(kind: type, value: object) -> Any:
    return value if isinstance(value, kind) else None
