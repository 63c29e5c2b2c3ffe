"""The HTTP server: the OpenAI-compatible endpoints, and its control under `/simulator/`."""

import asyncio
import hmac
import json
import socket
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, assert_never

from aiohttp import web
from pydantic import ValidationError

from deploy.local.model_simulator import answers, image_analysis
from deploy.local.model_simulator.behavior import (
    Answer,
    Behavior,
    Error,
    Hang,
    Malformed,
    Reset,
    Rule,
)
from deploy.local.model_simulator.calls import Call, Picture, State
from deploy.local.model_simulator.request import (
    Conversation,
    RefusedError,
    read_conversation,
    without_pictures,
)

_MAX_BODY_BYTES = 1 << 30
_REMEMBERED_CALLS = 100_000
# DeepInfra's answer has neither code nor type.
# The statuses of requests that OpenAI calls invalid.
_INVALID = frozenset({400, 413, 422})
_BUSY = {"error": {"message": "Model busy, retry later"}}


class ModelSimulator:
    """The state of a simulator, and its request handlers."""

    def __init__(self, behavior: Behavior, *, api_key: str | None) -> None:
        self._initial = behavior
        self._api_key = api_key
        self._behavior = behavior.model_copy(deep=True)
        self._calls: deque[Call] = deque(maxlen=_REMEMBERED_CALLS)
        self._state = State()

    def application(self) -> web.Application:
        """Return the web application."""
        application = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[_refuse_invalid])
        application.add_routes(
            [
                web.get("/v1/models", self.list_models),
                web.post("/v1/chat/completions", self.complete),
                web.post("/simulator/configure", self.configure),
                web.post("/simulator/play", self.play),
                web.post("/simulator/reset", self.reset),
                web.get("/simulator/calls", self.list_calls),
                web.get("/simulator/state", self.show_state),
            ]
        )
        return application

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Answer a chat completion, and remember the call."""
        state, call = self._state, self._remember(request)
        try:
            response = await self._answer(request, call)
            call.status = response.status
        except RefusedError as refused:
            call.status, call.error = refused.status, str(refused)
            raise
        except (asyncio.CancelledError, ConnectionError):
            call.disconnected = True
            raise
        finally:
            state.in_progress -= 1
            call.ended = time.time()
        return response

    async def list_models(self, request: web.Request) -> web.Response:
        """List the models."""
        self._check_key(request)
        models = [
            {"id": model, "object": "model", "created": 0, "owned_by": "vqa-model-simulator"}
            for model in self._behavior.models
        ]
        return web.json_response({"object": "list", "data": models})

    async def configure(self, request: web.Request) -> web.Response:
        """Change the given fields of the behavior."""
        self._behavior = Behavior.model_validate(self._behavior.model_dump() | await request.json())
        return web.json_response({})

    async def play(self, request: web.Request) -> web.Response:
        """Append a rule."""
        self._behavior.rules.append(Rule.model_validate(await request.json()))
        return web.json_response({})

    async def reset(self, _request: web.Request) -> web.Response:
        """Forget all calls, and restore the behavior of the start."""
        self._behavior = self._initial.model_copy(deep=True)
        self._calls.clear()
        # A new object: calls in progress count down on the old one.
        self._state = State()
        return web.json_response({})

    async def list_calls(self, request: web.Request) -> web.Response:
        """List the calls, or those whose question contains the query's `marker`."""
        marker = request.query.get("marker", "")
        return web.json_response([call.model_dump() for call in self._calls if marker in call.question])

    async def show_state(self, _request: web.Request) -> web.Response:
        """Return the counters."""
        return web.json_response(self._state.model_dump())

    def _remember(self, request: web.Request) -> Call:
        self._state.calls += 1
        self._state.in_progress += 1
        headers = {name.lower(): value for name, value in request.headers.items()}
        authorized = headers.pop("authorization", None) is not None
        call = Call(number=self._state.calls, started=time.time(), headers=headers, authorized=authorized)
        self._calls.append(call)
        return call

    async def _answer(self, request: web.Request, call: Call) -> web.StreamResponse:
        if self._behavior.early_status is not None:
            call.error = "answered before the request was read"
            early = _error(self._behavior.early_status, call.error, "scripted_error")
            early.force_close()
            return early
        limit = self._behavior.max_concurrent
        is_busy = limit is not None and self._state.in_progress > limit
        content = await request.read()
        call.body_bytes = len(content)
        self._check_key(request)
        body = _parse(content)
        call.model = str(body.get("model"))
        own = ("model", "messages", "stream")
        call.params = {name: value for name, value in body.items() if name not in own}
        conversation = read_conversation(body.get("messages"))
        call.question, call.links = conversation.question, conversation.links
        if is_busy:
            call.error = _BUSY["error"]["message"]
            headers = {"Retry-After": self._behavior.retry_after} if self._behavior.retry_after else {}
            return web.json_response(_BUSY, status=self._behavior.busy_status, headers=headers)
        outcome = self._behavior.next_outcome(conversation.text)
        call.played = outcome.kind if outcome else None
        call.images = await self._look_at(conversation)
        call.messages = without_pictures(body["messages"], iter(picture.sha256 for picture in call.images))
        self._check_model(body)
        await asyncio.sleep(outcome.after if outcome else self._behavior.latency)
        if isinstance(outcome, Error):
            call.error = outcome.message
            return _scripted_error(outcome)
        changes = outcome if isinstance(outcome, Answer) else Answer()
        usual = answers.body(body, conversation, call.images, changes)
        if outcome is None or isinstance(outcome, Answer):
            wrapping = self._behavior.wrapping
            kind = "text/event-stream" if wrapping == "stream" else "application/json"
            wrapped = answers.wrap(usual, wrapping)
            return web.Response(body=wrapped, content_type=kind, headers=changes.headers)
        if isinstance(outcome, Malformed) and outcome.how == "interrupted":
            return web.json_response(answers.interrupted(usual))
        return await _misbehave(outcome, request, json.dumps(usual).encode())

    async def _look_at(self, conversation: Conversation) -> list[Picture]:
        decode = self._behavior.decode
        return [
            await asyncio.to_thread(image_analysis.look_at, picture, f"image {number}", decode=decode)
            for number, picture in enumerate(conversation.pictures, start=1)
        ]

    def _check_key(self, request: web.Request) -> None:
        given = request.headers.get("Authorization", "")
        if self._api_key is not None and not hmac.compare_digest(given, f"Bearer {self._api_key}"):
            raise RefusedError("Incorrect API key provided", status=401, code="invalid_api_key")

    def _check_model(self, body: dict[str, Any]) -> None:
        model = body.get("model")
        if model not in self._behavior.models:
            raise RefusedError(f"The model {model!r} does not exist", status=404, code="model_not_found")
        if body.get("stream"):
            raise RefusedError("The model simulator does not stream", param="stream")


@web.middleware
async def _refuse_invalid(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except ValidationError as error:
        return web.Response(status=422, text=str(error))
    except RefusedError as refused:
        kind = "invalid_request_error"
        return _error(refused.status, str(refused), kind, param=refused.param, code=refused.code)


def _parse(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except ValueError as error:
        raise RefusedError(f"The body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise RefusedError("The body is not a JSON object")
    return body


def _error(status: int, message: str, kind: str, **fields: str | None) -> web.Response:
    body = {"error": {"message": message, "type": kind, "param": None, "code": None} | fields}
    return web.json_response(body, status=status)


def _scripted_error(outcome: Error) -> web.Response:
    if isinstance(outcome.body, str):
        response = web.Response(status=outcome.status, text=outcome.body)
    elif outcome.body is not None:
        response = web.json_response(outcome.body, status=outcome.status)
    else:
        kind = outcome.type or ("invalid_request_error" if outcome.status in _INVALID else "scripted_error")
        response = _error(outcome.status, outcome.message, kind, code=outcome.code)
    response.headers.update(outcome.headers)
    return response


async def _misbehave(
    outcome: Malformed | Hang | Reset, request: web.Request, usual: bytes
) -> web.StreamResponse:
    match outcome:
        case Malformed(how="not_json"):
            page = "<html><body>Bad gateway, but with a 200</body></html>"
            return web.Response(text=page, content_type="text/html")
        case Malformed(how="no_choices_key"):
            return web.json_response({"result": "not what you expect"})
        case Malformed(how="cut_json"):
            return web.Response(body=usual[: len(usual) // 2], content_type="application/json")
        case Malformed():
            return await _send_truncated(request, usual)
        case Hang():
            return await _hang()
        case Reset():
            _reset_connection(request)
            return await _hang()
        case _:
            assert_never(outcome)


async def _send_truncated(request: web.Request, body: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    response.content_length = len(body)
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    # The half has to arrive before the reset, which drops data on its way.
    await asyncio.sleep(0.05)
    _reset_connection(request)
    return response


async def _hang() -> web.StreamResponse:
    # Cancelled when the caller disconnects or the server stops.
    await asyncio.Event().wait()
    raise AssertionError


def _reset_connection(request: web.Request) -> None:
    """Close the connection with a TCP reset."""
    if request.transport is None:
        return
    connection: socket.socket = request.transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()
