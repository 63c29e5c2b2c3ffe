import base64
import io
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
from PIL import Image

from deploy.local.simulated_model import SimulatedModel
from deploy.local.stack import Stack
from tests.integration.local.fixture_types import Ask, Inline, Plain, encoded


@pytest.fixture
def model(stack: Stack) -> Iterator[SimulatedModel]:
    stack.model.reset()
    yield stack.model
    stack.model.reset()


@pytest.fixture
async def http(model: SimulatedModel) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": f"Bearer {model.api_key}"}
    async with aiohttp.ClientSession(
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=20),
        connector=aiohttp.TCPConnector(force_close=True),
    ) as session:
        yield session


@pytest.fixture
def ask(model: SimulatedModel, http: aiohttp.ClientSession) -> Ask:
    async def ask(question: str, *images: str, **fields: Any) -> tuple[int, dict[str, Any]]:
        parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
        parts += [{"type": "image_url", "image_url": {"url": url}} for url in images]
        body = {"model": model.models[0], "messages": [{"role": "user", "content": parts}]} | fields
        # As a file, since aiohttp warns about large bodies in memory.
        content = io.BytesIO(json.dumps(body).encode())
        async with http.post(f"{model.base_url}/chat/completions", data=content) as response:
            return response.status, await response.json()

    return ask


@pytest.fixture
def plain() -> Plain:
    def encode(colour: str, *, kind: str = "PNG", size: tuple[int, int] = (64, 64)) -> bytes:
        return encoded(Image.new("RGB", size, colour), kind)

    return encode


@pytest.fixture
def inline() -> Inline:
    def data_url(content: bytes, media_type: str = "image/png") -> str:
        return f"data:{media_type};base64,{base64.b64encode(content).decode()}"

    return data_url
