"""`python -m deploy.local.model_simulator`: serves the stand-in model on this machine."""

import argparse
import asyncio
import contextlib
import os
import signal
import sys

from aiohttp import web
from PIL import Image

from deploy.local.model_simulator.behavior import DEFAULT_MODELS, Behavior
from deploy.local.model_simulator.server import ModelSimulator

_KEY_VARIABLE = "SIMULATOR_API_KEY"


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    arguments = _parser().parse_args()
    # Pillow would only warn about pictures of too many pixels; `looking` refuses them.
    Image.MAX_IMAGE_PIXELS = None
    behavior = Behavior(
        models=arguments.model or list(DEFAULT_MODELS),
        latency=arguments.latency,
        max_concurrent=arguments.max_concurrent,
        decode=arguments.decode,
        read_text=arguments.read_text,
    )
    # Not as an argument by default: arguments can be read by everybody on the machine.
    api_key = arguments.api_key or os.environ.get(_KEY_VARIABLE) or None
    asyncio.run(_serve(behavior, arguments.host, arguments.port, api_key))


async def _serve(behavior: Behavior, host: str, port: int, api_key: str | None) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # With handler cancellation a call notices that its caller has left.
    runner = web.AppRunner(
        ModelSimulator(behavior, api_key=api_key).application(),
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=0.2,
    )
    await runner.setup()
    await web.TCPSite(runner, host, port, backlog=1024).start()
    sys.stderr.write(f"Model simulator at http://{host}:{port}/v1\n")
    with contextlib.suppress(asyncio.CancelledError):
        await stop.wait()
    await runner.cleanup()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.local.model_simulator",
        description="A stand-in for a multimodal model behind an OpenAI-compatible API. It is no model: it "
        "decodes the pictures it gets, says what is in their pixels, and fails in scripted ways for tests.",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument(
        "--api-key", help=f"the key that callers need (default: ${_KEY_VARIABLE}, else any key does)"
    )
    parser.add_argument(
        "--model", action="append", help=f"a model to serve (default: {', '.join(DEFAULT_MODELS)})"
    )
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before every answer")
    parser.add_argument("--max-concurrent", type=int, help="answer 429 beyond this many calls at once")
    parser.add_argument(
        "--decode",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode every picture in full; without, only headers are read",
    )
    parser.add_argument(
        "--read-text",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read text in pictures where rapidocr-onnxruntime is installed",
    )
    return parser


if __name__ == "__main__":
    main()
