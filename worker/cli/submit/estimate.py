"""Estimate the cost of jobs before they are sent."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vqa_worker.messages.job import ChatMessage, Job, TextPart
from worker.cli.shell import counted
from worker.settings import Price

# A rule of thumb for English text.
CHARS_PER_TOKEN: Final = 4
CENT_USD: Final = 0.01
PER_PRICE: Final = 1_000_000
# The params that limit the length of an answer.
_LIMITS: Final = ("max_tokens", "max_completion_tokens")


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Token counts that are unknown in advance: per image, and per answer without a limit."""

    image_tokens: int
    answer_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.image_tokens:,} tokens per image (--image-tokens),"
            f" {CHARS_PER_TOKEN} characters of text per token,"
            f" {self.answer_tokens:,} tokens per answer (--answer-tokens) unless the job limits it"
        )


@dataclass
class Estimate:
    """Sums over jobs; tokens are per model, because prices are."""

    assumptions: Assumptions
    default_model: str
    prices: Mapping[str, Price]
    price: Price | None = None
    """Overrides `prices` for every model."""
    jobs: int = 0
    images: int = 0
    uploads: int = 0
    prompt_tokens: Counter[str] = field(default_factory=Counter)
    completion_tokens: Counter[str] = field(default_factory=Counter)

    def add(self, job: Job) -> None:
        """Count one more job."""
        model = job.model or self.default_model
        images, chars = _size_of(job)
        self.jobs += 1
        self.images += images
        self.prompt_tokens[model] += images * self.assumptions.image_tokens + -(-chars // CHARS_PER_TOKEN)
        self.completion_tokens[model] += self._answer_tokens(job.params or {})

    def usd(self) -> float | None:
        """Return the cost in USD; None if a model's price is unknown."""
        sums = [self._usd_of(model) for model in self.prompt_tokens]
        known = [usd for usd in sums if usd is not None]
        return sum(known) if len(known) == len(sums) else None

    def as_json(self) -> dict[str, Any]:
        """Return the estimate for `--json`."""
        return {
            "jobs": self.jobs,
            "images": self.images,
            "uploads": self.uploads,
            "models": sorted(self.prompt_tokens),
            "prompt_tokens": self.prompt_tokens.total(),
            "completion_tokens": self.completion_tokens.total(),
            "cost_usd": self.usd(),
            "assumptions": str(self.assumptions),
        }

    def lines(self) -> Iterator[str]:
        """Yield the estimate as lines of text."""
        models = ", ".join(sorted(self.prompt_tokens))
        yield f"{counted(self.jobs, 'job')} with {counted(self.images, 'image')} for {models}"
        if self.uploads:
            yield f"{counted(self.uploads, 'local file')} to upload, except those already in S3"
        prompt, completion = self.prompt_tokens.total(), self.completion_tokens.total()
        yield f"about {prompt:,} prompt and {completion:,} completion tokens"
        usd = self.usd()
        if usd is None:
            unknown = ", ".join(sorted(self.prompt_tokens.keys() - self.prices.keys()))
            yield f"cost unknown: VQA_PRICES has no price for {unknown}; use --price"
        else:
            yield f"about {dollars(usd)}"
        yield f"assuming {self.assumptions}"

    def _usd_of(self, model: str) -> float | None:
        price = self.price or self.prices.get(model)
        if price is None:
            return None
        usd = self.prompt_tokens[model] * price.prompt + self.completion_tokens[model] * price.completion
        return usd / PER_PRICE

    def _answer_tokens(self, params: Mapping[str, Any]) -> int:
        limits = [params[name] for name in _LIMITS if isinstance(params.get(name), int)]
        return min([*limits, self.assumptions.answer_tokens]) if limits else self.assumptions.answer_tokens


def _size_of(job: Job) -> tuple[int, int]:
    """Return a job's number of images and of characters of text."""
    format_chars = len(json.dumps((job.params or {}).get("response_format") or "")) - 2
    if job.messages is None:
        return len(job.images or ()), format_chars + len(job.question or "") + len(job.system or "")
    sizes = [_size_of_message(message) for message in job.messages]
    return sum(images for images, _ in sizes), format_chars + sum(chars for _, chars in sizes)


def _size_of_message(message: ChatMessage) -> tuple[int, int]:
    if not isinstance(message.content, list):
        return 0, len(message.content or "")
    texts = [part.text for part in message.content if isinstance(part, TextPart)]
    return len(message.content) - len(texts), sum(map(len, texts))


def dollars(usd: float) -> str:
    """Format USD; amounts below a cent get six decimal places."""
    return f"${usd:,.2f}" if usd >= CENT_USD or not usd else f"${usd:.6f}"
