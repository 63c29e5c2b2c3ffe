"""`python -m deploy.local.model_simulator`: serve the model simulator."""

import argparse
import asyncio
import os
import signal
import sys

from aiohttp import web
from PIL import Image

from deploy.local.model_simulator.behavior import Behavior
from deploy.local.model_simulator.server import ModelSimulator

_KEY_VARIABLE = "SIMULATOR_API_KEY"


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    arguments = _parser().parse_args()
    # Pillow would only warn about images of too many pixels; `image_analysis` refuses them.
    Image.MAX_IMAGE_PIXELS = None
    behavior = Behavior.model_validate_json(arguments.behavior)
    # Not an argument, as every user of the machine can read those.
    simulator = ModelSimulator(behavior, api_key=os.environ.get(_KEY_VARIABLE))
    asyncio.run(_serve(simulator.application(), arguments.host, arguments.port))


async def _serve(application: web.Application, host: str, port: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # With handler cancellation a call notices that its caller disconnected.
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.2)
    await runner.setup()
    await web.TCPSite(runner, host, port, backlog=1024).start()
    sys.stderr.write(f"Model simulator at http://{host}:{port}/v1\n")
    await stop.wait()
    await runner.cleanup()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.local.model_simulator",
        description="Simulate a multimodal model behind an OpenAI-compatible API. It is not a model: it "
        "decodes the images, describes their pixels, and fails in scripted ways for tests. "
        f"Callers need the key in ${_KEY_VARIABLE}, if it is set.",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--behavior", default="{}", help="JSON: see `behavior.Behavior` for the fields")
    return parser


if __name__ == "__main__":
    main()
