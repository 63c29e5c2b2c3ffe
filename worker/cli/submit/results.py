"""Read results defensively: the publisher of a result need not be a worker of this version."""

from collections.abc import Mapping
from typing import Any, Final

from vqa_worker.messages.decoding import parse_leniently
from vqa_worker.rabbitmq.replies import Reply
from worker.cli.submit.state import Received

TOKENS: Final = ("prompt_tokens", "completion_tokens", "total_tokens")
# Larger numbers are errors, and the sums of some of them would overflow.
_MAX_TOKENS: Final = 10**12
_MAX_USD: Final = 1e9
_TEXTS: Final = ("id", "answer", "model", "finish_reason")
_OBJECTS: Final = ("error", "metadata", "response")


def received(reply: Reply) -> Received:
    """Return what the state file stores of a result; one without a status counts as failed."""
    result = parse(reply.body)
    usage = result["usage"]
    return Received(
        id=result["id"] or "",
        body=reply.body,
        at=reply.at,
        failed=result["status"] != "succeeded",
        tokens=usage.get("total_tokens", 0),
        cost=usage.get("cost_usd"),
    )


def parse(body: bytes) -> dict[str, Any]:
    """Return the fields of a result with the types that they should have; others are None or empty."""
    found = parse_leniently(body) or {}
    return {
        **found,
        **{name: _if(str, found.get(name)) for name in _TEXTS},
        **{name: _if(dict, found.get(name)) or {} for name in _OBJECTS},
        "status": "succeeded" if found.get("status") == "succeeded" else "failed",
        "attempts": found.get("attempts") if _is_count(found.get("attempts")) else None,
        "usage": _usage(found.get("usage")),
    }


def failure(result: Mapping[str, Any]) -> tuple[str, str]:
    """Return the error code and message of a failed result."""
    code, message = (_if(str, result["error"].get(name)) for name in ("code", "message"))
    return code or "unknown", message or "the result has no error message"


def _usage(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {}
    usage: dict[str, Any] = {name: value[name] for name in TOKENS if _is_count(value.get(name))}
    cost = value.get("cost_usd")
    if isinstance(cost, int | float) and not isinstance(cost, bool) and 0 <= cost <= _MAX_USD:
        usage["cost_usd"] = float(cost)
    return usage


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_TOKENS


def _if(kind: type, value: object) -> Any:
    return value if isinstance(value, kind) else None
