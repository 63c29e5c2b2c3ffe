"""The recipes of the how-to pages: valid settings, the documented URLs, and `vqa-worker check`."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from unittest.mock import patch
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest
from aiohttp import web

from deploy.local.stack import Stack
from tests.documentation import EXAMPLE_IMAGE, HOW_TO, Section, put_example_images, sections, settings_with
from tests.integration.cli.running import Cli, commands
from worker.s3.aws import Aws, Endpoint, S3Object

MODEL_APIS = [pytest.param(recipe, id=recipe.title) for recipe in sections(HOW_TO / "model-apis.md")]
STORES = [pytest.param(recipe, id=recipe.title) for recipe in sections(HOW_TO / "s3-stores.md")]
UNENCRYPTED = "VQA_MODEL_BASE_URL: sends the API key unencrypted over the network; use https://"


class Gateway:
    """Forward requests for any path to the model simulator, as a provider's host would receive them."""

    def __init__(self, stack: Stack, base_path: str) -> None:
        self._stack = stack
        self._base_path = base_path
        self.paths: list[str] = []
        self.keys: set[str] = set()

    async def forward(self, request: web.Request) -> web.Response:
        """Send a request to the simulator, with its path and its key."""
        self.paths.append(request.path)
        self.keys.add(request.headers["Authorization"])
        if not request.path.startswith(self._base_path):
            raise web.HTTPNotFound
        simulator = self._stack.model
        url = f"{simulator.base_url}{request.path.removeprefix(self._base_path)}"
        headers = {"Authorization": f"Bearer {simulator.api_key}", "Content-Type": "application/json"}
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                request.method, url, headers=headers, data=await request.read() or None
            ) as response,
        ):
            return web.Response(
                status=response.status, body=await response.read(), content_type="application/json"
            )


@asynccontextmanager
async def serving(gateway: Gateway) -> AsyncIterator[str]:
    """Run the gateway; yield scheme, host and port."""
    application = web.Application(client_max_size=10**7)
    application.router.add_route("*", "/{path:.*}", gateway.forward)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


@pytest.fixture
def cli(stack: Stack, tmp_path: Path) -> Iterator[Cli]:
    """Return commands with the environment of a worker."""
    with commands(stack, tmp_path) as cli:
        yield cli.with_settings(**stack.environment())


@pytest.mark.parametrize("recipe", MODEL_APIS)
async def test_the_recipe_of_a_model_api_sends_requests_to_the_documented_url(
    stack: Stack, cli: Cli, recipe: Section
) -> None:
    settings = settings_with({**recipe.settings, "VQA_ALLOWED_BUCKETS": "invoices"})
    documented = urlsplit(recipe.documented_url("Requests go to"))
    base = urlsplit(settings.model_base_url)
    assert (base.scheme, base.netloc) == (documented.scheme, documented.netloc)
    private = base.scheme == "https" or base.hostname == "localhost"
    assert settings.warnings() == ([] if private else [UNENCRYPTED])

    key = settings.model_api_key.get_secret_value()
    gateway = Gateway(stack, base.path)
    async with AsyncExitStack() as exits:
        exits.callback(stack.model.reset)
        stack.model.configure(models=[settings.model])
        address = await exits.enter_async_context(serving(gateway))
        local = {"VQA_MODEL_BASE_URL": f"{address}{base.path}", "VQA_MODEL_API_KEY": key}
        allowed = {"VQA_ALLOWED_MODELS": settings.model}
        checked = await cli.run("check", "--ask", **{**recipe.settings, **local, **allowed})
    assert checked.code == 0, checked
    assert documented.path in gateway.paths
    assert f"{base.path}/models" in gateway.paths
    assert gateway.keys == {f"Bearer {key}"}


@pytest.mark.parametrize("recipe", STORES)
async def test_the_recipe_of_a_store_reads_objects_from_the_documented_url(
    stack: Stack, cli: Cli, recipe: Section
) -> None:
    variables = recipe.settings
    settings = settings_with({**variables, "VQA_MODEL_API_KEY": "unused"})
    assert settings.warnings() == []
    with patch.dict(os.environ, variables, clear=True):
        aws = Aws(Endpoint(settings.s3_endpoint_url, settings.s3_addressing_style))
        link = urlsplit(await aws.link(S3Object("invoices", "KEY"), 60))
    assert f"{link.scheme}://{link.netloc}{link.path}" == recipe.documented_url("Objects are read from")
    key, _, region, *_ = parse_qs(link.query)["X-Amz-Credential"][0].split("/")
    assert (key, region) == (variables["AWS_ACCESS_KEY_ID"], variables["AWS_REGION"])

    put_example_images(stack)
    server = {
        name: cli.settings[name]
        for name in ("VQA_S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    }
    checked = await cli.run("check", "--image", EXAMPLE_IMAGE, **{**variables, **server})
    assert checked.code == 0, checked
    assert "image/jpeg" in checked.out


def test_every_provider_and_store_has_a_recipe() -> None:
    assert [recipe.title for recipe in sections(HOW_TO / "model-apis.md")] == [
        "DeepInfra",
        "OpenAI",
        "Azure OpenAI",
        "Gemini",
        "OpenRouter",
        "vLLM",
        "llama.cpp",
        "Ollama",
    ]
    assert [recipe.title for recipe in sections(HOW_TO / "s3-stores.md")] == [
        "AWS",
        "Cloudflare R2",
        "Google Cloud Storage",
        "MinIO",
        "Backblaze B2",
        "Ceph RGW",
    ]
