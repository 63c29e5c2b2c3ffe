"""Run the commands of the pages for new users as they are written."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import aio_pika
import pytest

from deploy.local.stack import Stack
from tests.conftest import StartWorker, picture
from tests.documentation import (
    EXAMPLE_IMAGE,
    HOW_TO,
    exported,
    put_example_images,
    settings_with,
    shell_blocks,
)
from tests.running import ROOT, Worker

PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "quickstart.md",
    ROOT / "docs" / "cli.md",
    ROOT / "docs" / "upgrading.md",
    *sorted(HOW_TO.glob("*.md")),
]
# The beginning of each command that is not run here, and the reason.
NOT_RUN = {
    "make demo": "tests/integration/local runs it",
    "make stack": "runs until Ctrl-C; tests/integration/local runs it",
    "source .local/stack.env": "`make stack` writes it; tests/integration/local uses it",
    "pip install": "would change the environment of the other tests",
    "vqa-worker run": "runs until SIGTERM; the worker of these tests is this command",
    "vqa-worker top --worker": "needs a terminal: tests/integration/cli/test_top.py has one",
    "/usr/bin/time": "measures 100,000 jobs, which takes minutes",
    "vllm serve": "needs vLLM and a GPU",
    "llama-server": "needs llama.cpp and a model",
    "ollama pull": "needs Ollama and downloads a model",
}
# These ask for confirmation; tests/integration/cli/dlq answers.
ASKING = ("vqa-worker dlq replay", "vqa-worker dlq purge")
# Commands that need another one first.
AFTER = {"vqa-worker cancel --submission": "vqa-worker submit batch.jsonl --name orders-3f9a1c2b7d"}
DEAD_LETTERS = ("order-4711-photo", "order-4712-photo")


def is_run(command: str) -> bool:
    """Return whether a command runs here; settings have their own test."""
    return not command.startswith(("export ", *NOT_RUN))


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES])
async def test_every_command_of_a_page_succeeds(
    page: Path, stack: Stack, start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = await start_worker()
    folder = prepare(tmp_path / "reader", stack)
    environment = environment_of(worker, folder)
    ran = [command for block in shell_blocks(page) for command in block if is_run(command)]
    assert ran
    for command in ran:
        if command.startswith("vqa-worker dlq"):
            await put_dead_letters(stack, worker)
        shown = f"{command} --yes" if command.startswith(ASKING) else command
        first = "".join(f"{before} && " for start, before in AFTER.items() if command.startswith(start))
        done = await asyncio.to_thread(
            subprocess.run,
            ["/bin/bash", "-c", first + shown.replace("localhost:8080", f"localhost:{worker.port}")],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)


def prepare(folder: Path, stack: Stack) -> Path:
    """Create the files and the objects that the examples name; return the folder."""
    put_example_images(stack)
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    for name in ("photo.jpg", "before.jpg", "after.jpg"):
        (folder / name).write_bytes(picture("JPEG"))
    (folder / "photos").mkdir()
    (folder / "photos" / "table.jpg").write_bytes(picture("JPEG"))
    (folder / "worker.env").write_text("VQA_MODEL_TIMEOUT=90\n", encoding="utf-8")
    question = {"type": "text", "text": "What is the total?"}
    image = {"type": "image_url", "image_url": {"url": EXAMPLE_IMAGE}}
    request = {
        "custom_id": "request-1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": stack.model.models[0],
            "messages": [{"role": "user", "content": [question, image]}],
        },
    }
    (folder / "batch.jsonl").write_text(f"{json.dumps(request)}\n", encoding="utf-8")
    return folder


async def put_dead_letters(stack: Stack, worker: Worker) -> None:
    """Publish the dead letters of the examples."""
    async with await aio_pika.connect(stack.rabbitmq.url) as connection:
        channel = await connection.channel()
        for name in DEAD_LETTERS:
            job = {"id": name, "question": "What is the total?", "images": [EXAMPLE_IMAGE]}
            message = aio_pika.Message(
                json.dumps(job).encode(),
                message_id=name,
                headers={"vqa-error-code": "attempts_exhausted", "vqa-attempts": 5},
            )
            await channel.default_exchange.publish(message, worker.dead_letter_queue)


def environment_of(worker: Worker, folder: Path) -> dict[str, str]:
    """Return the environment of a reader's shell."""
    return {
        **worker.environment,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_STATE_HOME": str(folder / "state"),
    }


def test_every_reason_is_needed() -> None:
    commands = [command for page in PAGES for block in shell_blocks(page) for command in block]
    assert [start for start in NOT_RUN if not any(shown.startswith(start) for shown in commands)] == []


def test_the_settings_of_the_readme_are_valid() -> None:
    (block,) = [
        block for block in shell_blocks(ROOT / "README.md") if any("export VQA_" in it for it in block)
    ]
    exports = "\n".join(command for command in block if command.startswith("export "))
    settings = settings_with(exported(exports.replace("…", "key")))
    assert settings.warnings() == []
