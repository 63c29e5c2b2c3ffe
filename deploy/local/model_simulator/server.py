"""The stand-in's HTTP side: the OpenAI-compatible endpoints, and under `/standin/` its remote control."""

import asyncio
import contextlib
import hmac
import json
import socket
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, assert_never

from aiohttp import web
from pydantic import ValidationError

from deploy.local.model_simulator import answers, image_analysis
from deploy.local.model_simulator.behavior import (
    Answer,
    Behavior,
    Drip,
    Error,
    Hang,
    Malformed,
    Outcome,
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

SERVER_NAME = "vqa-model-simulator"
_MAX_BODY_BYTES = 1 << 30
_REMEMBERED_CALLS = 100_000
_BUSY = {"error": {"message": "Model busy, retry later"}}


class ModelSimulator:
    """The state of one stand-in, and its request handlers."""

    def __init__(self, behavior: Behavior, *, api_key: str | None) -> None:
        self._initial = behavior
        self._api_key = api_key
        self._changed = asyncio.Condition()
        self._behavior = behavior.model_copy(deep=True)
        self._calls: deque[Call] = deque(maxlen=_REMEMBERED_CALLS)
        self._state = State()

    def application(self) -> web.Application:
        """Return the web application."""
        application = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[_name_the_server])
        application.add_routes(
            [
                web.get("/v1/models", self.list_models),
                web.post("/v1/chat/completions", self.complete),
                web.post("/simulator/configure", self.configure),
                web.post("/simulator/play", self.play),
                web.post("/simulator/reset", self.reset),
                web.get("/simulator/calls", self.list_calls),
                web.get("/simulator/state", self.tell_state),
            ]
        )
        return application

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Answer one chat completion, and remember it."""
        call = self._arrive(request)
        try:
            async with self._counted():
                response = await self._answer(request, call)
            call.status = response.status
        except RefusedError as refused:
            response = _error(refused, call)
        except (asyncio.CancelledError, ConnectionError):
            call.disconnected = True
            raise
        finally:
            call.ended = time.time()
            await self._tell_waiting()
        return response

    async def list_models(self, request: web.Request) -> web.Response:
        """List the models, as stand-ins."""
        try:
            self._check_key(request)
        except RefusedError as refused:
            return _error(refused)
        models = [
            {"id": model, "object": "model", "created": 0, "owned_by": SERVER_NAME}
            for model in self._behavior.models
        ]
        return web.json_response({"object": "list", "data": models})

    async def configure(self, request: web.Request) -> web.Response:
        """Change the given fields of the behavior."""
        try:
            self._behavior = Behavior.model_validate(self._behavior.model_dump() | await request.json())
        except ValidationError as error:
            return web.Response(status=422, text=str(error))
        return web.json_response({})

    async def play(self, request: web.Request) -> web.Response:
        """Add a rule behind those there are."""
        try:
            rule = Rule.model_validate(await request.json())
        except ValidationError as error:
            return web.Response(status=422, text=str(error))
        self._behavior.rules.append(rule)
        return web.json_response({})

    async def reset(self, _request: web.Request) -> web.Response:
        """Forget everything."""
        self._forget()
        return web.json_response({})

    async def list_calls(self, request: web.Request) -> web.Response:
        """List the calls, on request as soon as there are `at_least` so many (`ended=1`: finished ones)."""
        at_least = int(request.query.get("at_least", "0"))
        ended = request.query.get("ended", "0") == "1"

        def enough() -> bool:
            return sum(not ended or call.ended is not None for call in self._calls) >= at_least

        try:
            async with asyncio.timeout(float(request.query.get("timeout", "0"))), self._changed:
                await self._changed.wait_for(enough)
        except TimeoutError:
            if not enough():
                return web.Response(status=408, text=f"{len(self._calls)} calls, not {at_least}")
        return web.json_response([call.model_dump() for call in self._calls])

    async def tell_state(self, _request: web.Request) -> web.Response:
        """Tell the counters."""
        return web.json_response(self._state.model_dump())

    def _forget(self) -> None:
        self._behavior = self._initial.model_copy(deep=True)
        self._calls.clear()
        # A new object: calls that are still in progress count down on the old one.
        self._state = State()

    def _arrive(self, request: web.Request) -> Call:
        self._state.calls += 1
        headers = {name.lower(): value for name, value in request.headers.items()}
        authorized = headers.pop("authorization", None) is not None
        call = Call(number=self._state.calls, started=time.time(), headers=headers, authorized=authorized)
        self._calls.append(call)
        return call

    @contextlib.asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        state = self._state
        state.in_progress += 1
        state.most_at_once = max(state.most_at_once, state.in_progress)
        await self._tell_waiting()
        try:
            yield
        finally:
            state.in_progress -= 1

    async def _tell_waiting(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _answer(self, request: web.Request, call: Call) -> web.StreamResponse:
        busy = self._is_busy()
        content = await request.read()
        call.body_bytes = len(content)
        self._check_key(request)
        body = _parse(content)
        call.model = str(body.get("model"))
        call.params = {name: value for name, value in body.items() if name not in ("model", "messages")}
        conversation = read_conversation(body.get("messages"))
        call.question, call.links = conversation.question, conversation.links
        if busy:
            call.error = _BUSY["error"]["message"]
            headers = {"Retry-After": self._behavior.retry_after} if self._behavior.retry_after else {}
            return web.json_response(_BUSY, status=429, headers=headers)
        outcome = self._behavior.next_outcome(conversation.text)
        call.played = outcome.kind if outcome else None
        call.images = await self._look(conversation)
        call.messages = without_pictures(body["messages"], iter(picture.sha256 for picture in call.images))
        self._check_model(body)
        return await self._play(outcome, request, call, body, conversation)

    def _is_busy(self) -> bool:
        limit = self._behavior.max_concurrent
        return limit is not None and self._state.in_progress > limit

    async def _look(self, conversation: Conversation) -> list[Picture]:
        read_text = self._behavior.read_text and answers.asks_for_text(conversation.question)
        return [
            await asyncio.to_thread(
                image_analysis.look_at,
                picture,
                f"image {number}",
                decode=self._behavior.decode,
                read_text=read_text,
            )
            for number, picture in enumerate(conversation.pictures, start=1)
        ]

    async def _play(
        self,
        outcome: Outcome | None,
        request: web.Request,
        call: Call,
        body: dict[str, Any],
        conversation: Conversation,
    ) -> web.StreamResponse:
        """Give the answer that was asked for, or the usual one."""
        await asyncio.sleep(outcome.after if outcome else self._behavior.latency)
        usual = answers.body(
            body,
            conversation,
            call.images,
            changes=outcome if isinstance(outcome, Answer) else None,
            estimated_cost=self._behavior.estimated_cost,
        )
        match outcome:
            case None | Answer():
                return web.json_response(usual, headers=outcome.headers if outcome else None)
            case Error():
                return _scripted_error(outcome, call)
            case _:
                return await _misbehave(outcome, request, json.dumps(usual).encode())

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
async def _name_the_server(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Say in every answer who gave it."""
    response = await handler(request)
    if not response.prepared:
        response.headers["Server"] = SERVER_NAME
    return response


def _parse(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except ValueError as error:
        raise RefusedError(f"The body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise RefusedError("The body is not a JSON object")
    return body


def _error_body(
    message: str, *, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _error(refused: RefusedError, call: Call | None = None) -> web.Response:
    if call is not None:
        call.status, call.error = refused.status, str(refused)
    body = _error_body(str(refused), kind="invalid_request_error", param=refused.param, code=refused.code)
    return web.json_response(body, status=refused.status)


def _scripted_error(outcome: Error, call: Call) -> web.Response:
    call.error = outcome.message
    if isinstance(outcome.body, str):
        return web.Response(status=outcome.status, text=outcome.body, headers=outcome.headers)
    body = outcome.body
    if body is None:
        body = _error_body(outcome.message, kind=outcome.type or "scripted_error", code=outcome.code)
    return web.json_response(body, status=outcome.status, headers=outcome.headers)


async def _misbehave(
    outcome: Malformed | Hang | Reset | Drip, request: web.Request, usual: bytes
) -> web.StreamResponse:
    match outcome:
        case Malformed(how="truncated"):
            return await _send_truncated(request, usual)
        case Malformed():
            return _malformed(outcome, usual)
        case Drip():
            return await _drip(request, usual, outcome)
        case Hang():
            return await _hang()
        case Reset():
            _reset(request)
            return await _hang()
        case _:
            assert_never(outcome)


def _malformed(outcome: Malformed, usual: bytes) -> web.Response:
    if outcome.how == "not_json":
        return web.Response(
            text="<html><body>Bad gateway, but with a 200</body></html>", content_type="text/html"
        )
    if outcome.how == "no_choices_key":
        return web.json_response({"result": "not what you expect"})
    return web.Response(body=usual[: len(usual) // 2], content_type="application/json")


async def _send_truncated(request: web.Request, body: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Server": SERVER_NAME})
    response.content_length = len(body)
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    # The half should arrive before the reset, which drops what is still on its way.
    await asyncio.sleep(0.05)
    _reset(request)
    return response


async def _drip(request: web.Request, body: bytes, outcome: Drip) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Server": SERVER_NAME})
    response.content_length = len(body)
    await response.prepare(request)
    size = -(-len(body) // outcome.pieces)
    for start in range(0, len(body), size):
        await response.write(body[start : start + size])
        await asyncio.sleep(outcome.seconds / outcome.pieces)
    await response.write_eof()
    return response


async def _hang() -> web.StreamResponse:
    # Ends by cancellation, when the caller leaves or the server stops.
    await asyncio.Event().wait()
    raise AssertionError


def _reset(request: web.Request) -> None:
    """Close the connection so that the caller gets a reset, not an orderly end."""
    transport = request.transport
    if transport is None:
        return
    connection: socket.socket = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
