"""Read token counts and cost in each provider's spelling. An unclear number is unknown, never 0."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol

from vqa_worker.messages.result import Usage

TOKENS_PER_PRICE: Final = 1_000_000
# Larger counts and costs are ignored: 64-bit floats, and so metrics, are exact up to here.
MAX_AMOUNT: Final = 2**53
# xAI docs, Cost Tracking: 1 USD is 10^10 ticks.
TICKS_PER_USD: Final = 10**10
# LiteLLM docs, Response Headers: the cost in USD that the proxy computed.
COST_HEADER: Final = "x-litellm-response-cost"

# The first name that is known counts; a dot leads into an object. The second names are those of OpenAI's
# Responses API and of Anthropic, the third those of Gemini, which gateways pass on.
_PROMPT: Final = ("prompt_tokens", "input_tokens", "promptTokenCount")
_COMPLETION: Final = ("completion_tokens", "output_tokens", "candidatesTokenCount")
_TOTAL: Final = ("total_tokens", "totalTokenCount")
_CACHED: Final = (
    "prompt_tokens_details.cached_tokens",
    "input_tokens_details.cached_tokens",
    "prompt_cache_hit_tokens",  # DeepSeek docs, Context Caching
    "cache_read_input_tokens",  # Anthropic docs, Prompt caching; LiteLLM passes it on
    "cachedContentTokenCount",
    "cached_tokens",  # Moonshot docs, Context Caching
)
_REASONING: Final = (
    "completion_tokens_details.reasoning_tokens",
    "output_tokens_details.reasoning_tokens",
    "reasoning_tokens",  # Perplexity docs, Chat Completions
    "thoughtsTokenCount",
)
# DeepInfra, then OpenRouter (credits, which are US dollars), then Perplexity.
_COST: Final = ("estimated_cost", "cost", "cost.total_cost", "total_cost")
# OpenRouter docs, Usage Accounting: with the user's own key, the provider bills this in addition.
_OWN_KEY_COST: Final = "cost_details.upstream_inference_cost"
_DECIMAL: Final = re.compile(r"[0-9]{1,20}(\.[0-9]+)?([eE]-?[0-9]{1,3})?")


class Price(Protocol):
    """USD per million tokens."""

    @property
    def prompt(self) -> float:
        """Of prompt tokens, images included."""

    @property
    def completion(self) -> float:
        """Of completion tokens."""

    @property
    def cached_prompt(self) -> float | None:
        """Of prompt tokens that the provider has in its cache; None: as other prompt tokens."""


def total(usage: Usage | None, other: Usage | None) -> Usage | None:
    """Return the usage of both requests; if only one is known, that one."""
    return usage + other if usage is not None and other is not None else other or usage


def read_usage(reported: object, price: Price | None, headers: Mapping[str, str]) -> Usage | None:
    """Return the reported usage, even if incomplete; None if nothing is reported.

    Args:
        reported: the response's `usage`.
        price: of the model, used if the provider reports no cost.
        headers: of the response.
    """
    usage: Mapping[str, Any] = reported if isinstance(reported, dict) else {}
    prompt, completion, total = (_first(usage, names, _count) for names in (_PROMPT, _COMPLETION, _TOTAL))
    cost = _reported_cost(usage, headers)
    if all(amount is None for amount in (prompt, completion, total, cost)):
        return None
    if not total and prompt is not None and completion is not None:
        total = prompt + completion
    counted = Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=total,
        cost_usd=cost,
        cached_tokens=_first(usage, _CACHED, _count),
        reasoning_tokens=_first(usage, _REASONING, _count),
    )
    if cost is not None:
        return counted
    return counted.model_copy(update={"cost_usd": _computed_cost(counted, price)})


def _first(usage: Mapping[str, Any], names: Iterable[str], read: Callable[[object], Any]) -> Any:
    return next((value for name in names if (value := read(_at(usage, name))) is not None), None)


def _at(usage: Mapping[str, Any], name: str) -> object:
    value: object = usage
    for step in name.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _count(value: object) -> int | None:
    """Return a whole number of tokens, which some gateways send as text or as a float."""
    number = _number(value)
    return int(number) if number is not None and number == int(number) else None


def _number(value: object) -> int | float | None:
    """Return a number from 0 to MAX_AMOUNT, or None."""
    if isinstance(value, str) and _DECIMAL.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MAX_AMOUNT:
        return value
    return None


def _reported_cost(usage: Mapping[str, Any], headers: Mapping[str, str]) -> float | None:
    """Return what the provider says that the request costs, in USD."""
    ticks = _number(usage.get("cost_in_usd_ticks"))
    if ticks is not None:
        return ticks / TICKS_PER_USD
    cost = _first(usage, _COST, _number)
    if cost is None:
        cost = _number(headers.get(COST_HEADER))
    elif usage.get("is_byok") is True:
        cost += _number(_at(usage, _OWN_KEY_COST)) or 0
    return None if cost is None else float(cost)


def _computed_cost(usage: Usage, price: Price | None) -> float | None:
    """Return tokens times price, or None if either is unknown."""
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    if price is None or prompt is None or completion is None:
        return None
    cached = min(usage.cached_tokens or 0, prompt)
    cached_price = price.prompt if price.cached_prompt is None else price.cached_prompt
    billed = completion + _uncounted_reasoning(usage)
    usd = (prompt - cached) * price.prompt + cached * cached_price + billed * price.completion
    return usd / TOKENS_PER_PRICE if math.isfinite(usd) else None


def _uncounted_reasoning(usage: Usage) -> int:
    """Return the reasoning tokens that only the total includes: xAI's completion tokens are without them."""
    reasoning = usage.reasoning_tokens or 0
    others = (usage.prompt_tokens or 0) + (usage.completion_tokens or 0)
    return reasoning if (usage.total_tokens or 0) >= others + reasoning else 0
