"""Estimate the cost of jobs before they are sent."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vqa_worker.messages.job import Job, TextPart
from worker.cli.shell import counted, dollars
from worker.settings import Price

# Rules of thumb: for a photo, for an answer without a limit, and for English text.
IMAGE_TOKENS: Final = 1000
ANSWER_TOKENS: Final = 200
CHARS_PER_TOKEN: Final = 4
PER_PRICE: Final = 1_000_000
# The params that limit the length of an answer.
_LIMITS: Final = ("max_tokens", "max_completion_tokens")


@dataclass
class Estimate:
    """Sums over jobs; tokens are per model, because prices are."""

    default_model: str
    prices: Mapping[str, Price]
    jobs: int = 0
    images: int = 0
    prompt_tokens: Counter[str] = field(default_factory=Counter)
    completion_tokens: Counter[str] = field(default_factory=Counter)

    def add(self, job: Job) -> None:
        """Count one more job."""
        model, params = job.model or self.default_model, job.params or {}
        contents = list(_contents(job))
        images = contents.count(None)
        chars = sum(map(len, filter(None, contents)))
        limits = [params[name] for name in _LIMITS if isinstance(params.get(name), int)]
        self.jobs += 1
        self.images += images
        self.prompt_tokens[model] += images * IMAGE_TOKENS + -(-chars // CHARS_PER_TOKEN)
        self.completion_tokens[model] += min([ANSWER_TOKENS, *limits])

    def usd(self) -> float | None:
        """Return the cost in USD; None if a model's price is unknown."""
        if self._unpriced():
            return None
        prompt = sum(tokens * self.prices[model].prompt for model, tokens in self.prompt_tokens.items())
        answers = sum(
            tokens * self.prices[model].completion for model, tokens in self.completion_tokens.items()
        )
        return (prompt + answers) / PER_PRICE

    def as_json(self) -> dict[str, Any]:
        """Return the estimate for `--json`."""
        return {
            "jobs": self.jobs,
            "images": self.images,
            "models": sorted(self.prompt_tokens),
            "prompt_tokens": self.prompt_tokens.total(),
            "completion_tokens": self.completion_tokens.total(),
            "cost_usd": self.usd(),
        }

    def lines(self) -> Iterator[str]:
        """Yield the estimate as lines of text."""
        models = ", ".join(sorted(self.prompt_tokens))
        yield f"{counted(self.jobs, 'job')} with {counted(self.images, 'image')} for {models}"
        prompt, completion, usd = self.prompt_tokens.total(), self.completion_tokens.total(), self.usd()
        cost = "cost unknown" if usd is None else dollars(usd)
        yield f"about {prompt:,} prompt and {completion:,} completion tokens, {cost}"
        yield f"assuming {IMAGE_TOKENS:,} tokens per image and at most {ANSWER_TOKENS} per answer"
        if unpriced := self._unpriced():
            yield f"VQA_PRICES has no price for {', '.join(sorted(unpriced))}"

    def _unpriced(self) -> set[str]:
        return self.prompt_tokens.keys() - self.prices.keys()


def _contents(job: Job) -> Iterator[str | None]:
    """Yield the texts of a job, and None for each image."""
    yield json.dumps(schema) if (schema := (job.params or {}).get("response_format")) else ""
    yield from (job.question or "", job.system or "", *(None for _ in job.images or ()))
    for message in job.messages or ():
        parts = message.content or ""
        if isinstance(parts, str):
            yield parts
        else:
            yield from (part.text if isinstance(part, TextPart) else None for part in parts)
