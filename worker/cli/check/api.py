"""Checks of the model API at `VQA_MODEL_BASE_URL`."""

import difflib
import time
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack
from typing import Final

import pydantic_core

from worker.app.assembly import open_model
from worker.cli.check import Finding, failed, ok, skipped, warning
from worker.errors import HTTP_500, DependencyDownError, JobError, RateLimitedError, TransientError
from worker.model.answer import Answer
from worker.model.client import Model
from worker.model.request import RequestBody, body_parts
from worker.observability.redaction import Redactor
from worker.settings import Settings
from worker.settings.urls import endpoint

CHECK: Final = "model API"
TIMEOUT_S: Final = 30.0
# What providers have between the host and `/chat/completions`.
PATHS: Final = ("/v1", "/openai", "/v1/openai", "/openai/v1", "/api/v1")
QUESTION: Final = "Which color is this? Answer with one word."
# A red PNG of 64 by 64 pixels: some models refuse images smaller than their patches of up to 32 pixels.
RED_PNG: Final = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJAAAAb0lEQVR4nO3PAQkAAAyEwO9feoshgnABdLep8QUNyP"
    "EFDcjxBQ3I8QUNyPEFDcjxBQ3I8QUNyPEFDcjxBQ3I8QUNyPEFDcjxBQ3I8QUNyPEFDcjxBQ3I8QUNyPEFDcjxBQ3I"
    "8QUNyPEFDcjxBQ3IPanc8OLDQitxAAAAAElFTkSuQmCC"
)


async def api_findings(settings: Settings, *, ask: bool) -> AsyncIterator[Finding]:
    """Check URL, key and models without a billed request; with `ask`, send a question."""
    url = settings.model_base_url
    async with AsyncExitStack() as stack:
        model = open_model(settings, Redactor(settings.secret_values()), stack)
        try:
            names = await model.list_models()
        except DependencyDownError as error:
            yield failed(CHECK, f"{url}: {error.message}")
            return
        access = await _access(model, settings, names)
        if names is None and access.status == "failed" and (better := await _base_url(settings)):
            text = f"{access.message}. The API is at {better}: set VQA_MODEL_BASE_URL={better}"
            access = failed(CHECK, text)
        yield access
        for name in settings.allowed_models if names else ():
            yield _listed(name, names or ())
        if ask:
            yield await _asked(model, settings)


async def _base_url(settings: Settings) -> str | None:
    """Return a URL on the same host that has a list of models."""
    for other in (endpoint(settings.model_base_url, path) for path in PATHS):
        async with AsyncExitStack() as stack:
            changed = settings.model_copy(update={"model_base_url": other})
            model = open_model(changed, Redactor(settings.secret_values()), stack)
            try:
                if await model.list_models() is not None:
                    return other
            except DependencyDownError as error:
                # The URL is right and the key is not.
                if "answered 401" in error.message:
                    return other
    return None


async def _access(model: Model, settings: Settings, names: Collection[str] | None) -> Finding:
    """Send a request without messages: an API checks the key, then refuses it, and bills nothing."""
    url = settings.model_base_url
    name = settings.model if not names or settings.model in names else min(names)
    try:
        body = pydantic_core.to_json({"model": name, "stream": False})
        await model.complete(name, RequestBody([body], []), time_left_s=TIMEOUT_S)
    except (JobError, RateLimitedError, TransientError, DependencyDownError) as error:
        is_accepted = _accepts_key(error)
        if is_accepted is None:
            return warning(CHECK, f"{url}: {error} (to a request without messages). Use --ask.")
        if not is_accepted:
            return failed(CHECK, f"{url}: {error}")
    if names is None:
        return skipped(CHECK, f"{url} accepts the key, but lists no models. Check the model with --ask.")
    return ok(CHECK, f"{url} accepts the key and lists {len(names)} models")


def _accepts_key(error: Exception) -> bool | None:
    """Return whether the API accepted the key before this error; None if it failed or is overloaded."""
    match error:
        case RateLimitedError():
            return None if error.is_overloaded else True
        case TransientError():
            is_down = error.reason in ("http_5xx", HTTP_500)
            return None if is_down else error.refused and error.reason != "http_403"
    return isinstance(error, JobError)


def _listed(name: str, names: Collection[str]) -> Finding:
    check = f"model {name}"
    if name in names:
        return ok(check, "available")
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return failed(check, f"not listed by the API. Check VQA_MODEL and VQA_ALLOWED_MODELS{hint}.")


async def _asked(model: Model, settings: Settings) -> Finding:
    """Send one billed request with a small image."""
    check, name, started = f"question to {settings.model}", settings.model, time.monotonic()
    image = {"url": f"data:image/png;base64,{RED_PNG}"}
    content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    body = RequestBody(body_parts(name, messages, {}, streams=settings.profile.only_streams(name)), [])
    try:
        answer = await model.complete(name, body, time_left_s=settings.model_timeout)
    except (JobError, TransientError, DependencyDownError, RateLimitedError) as error:
        return failed(check, str(error))
    return ok(check, f"answered in {time.monotonic() - started:.2f} s{_cost(answer)}")


def _cost(answer: Answer) -> str:
    usage = answer.usage
    if usage is None or usage.prompt_tokens is None:
        return ", no token usage reported"
    cost = "" if usage.cost_usd is None else f", ${usage.cost_usd:.6f}"
    return f", {usage.prompt_tokens} + {usage.completion_tokens or 0} tokens{cost}"
