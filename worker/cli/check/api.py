"""Checks of the model API at `VQA_MODEL_BASE_URL`."""

import base64
import difflib
import struct
import time
import zlib
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack
from typing import Final

from worker.app.assembly import open_model
from worker.cli.check.finding import Finding, failed, ok, skipped
from worker.errors import DependencyDownError, JobError, RateLimitedError, TransientError
from worker.model.answer import Answer
from worker.model.client import Model
from worker.model.request import RequestBody, body_parts
from worker.observability.redaction import Redactor
from worker.settings import Settings

QUESTION: Final = "Which colour is this? Answer with one word."
# Some models refuse images smaller than their patches, which have up to 32 pixels.
SIDE_PIXELS: Final = 64
CHECK: Final = "model API"


async def api_findings(settings: Settings, *, ask: bool) -> AsyncIterator[Finding]:
    """Check the list of models; with `ask`, send a question."""
    async with AsyncExitStack() as stack:
        model = open_model(settings, Redactor(settings.secret_values()), stack)
        try:
            names = await model.list_models()
        except DependencyDownError as error:
            yield failed(CHECK, f"{settings.model_base_url}: {error.message}")
            return
        if names is None:
            text = f"{settings.model_base_url}: GET /models returned 404; URL and key not verified"
            yield skipped(CHECK, text if ask else f"{text}. Use --ask.")
        else:
            yield ok(CHECK, f"{settings.model_base_url} lists {len(names)} models")
            for name in settings.allowed_models:
                yield _listed(name, names)
        if ask:
            yield await _asked(model, settings)


def _listed(name: str, names: Collection[str]) -> Finding:
    check = f"model {name}"
    if name in names:
        return ok(check, "available")
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return failed(check, f"not listed by the API. Check VQA_MODEL and VQA_ALLOWED_MODELS{hint}.")


async def _asked(model: Model, settings: Settings) -> Finding:
    """Send one billed request with a small image."""
    check = f"question to {settings.model}"
    started = time.monotonic()
    try:
        answer = await model.complete(
            settings.model, _question(settings.model), time_left_s=settings.model_timeout
        )
    except (JobError, TransientError, DependencyDownError) as error:
        return failed(check, error.message)
    except RateLimitedError as error:
        return failed(check, f"{error}. Try again later.")
    took_s = time.monotonic() - started
    return ok(check, f"answered in {took_s:.2f} s{_cost(answer)}{_empty_note(answer)}")


def _question(model: str) -> RequestBody:
    url = f"data:image/png;base64,{base64.b64encode(red_square(SIDE_PIXELS)).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return RequestBody(body_parts(model, [{"role": "user", "content": content}], {}), [])


def _cost(answer: Answer) -> str:
    if answer.usage is None:
        return ", no token usage reported"
    tokens = f", {answer.usage.prompt_tokens} + {answer.usage.completion_tokens} tokens"
    cost = answer.usage.cost_usd
    return tokens if cost is None else f"{tokens}, ${cost:.6f}"


def _empty_note(answer: Answer) -> str:
    return f" (empty answer: finish_reason {answer.finish_reason})" if answer.is_empty else ""


def red_square(side: int) -> bytes:
    """Return a PNG (RFC 2083) of a red square with this side in pixels."""
    row = b"\0" + b"\xff\0\0" * side
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(row * side)),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
