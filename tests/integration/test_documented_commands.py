"""Run the commands of the pages for new users as they are written."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local.stack import Stack
from tests.conftest import picture
from tests.documentation import HOW_TO, exported, put_example_image, settings_with, shell_blocks
from tests.running import ROOT, Worker

PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "quickstart.md",
    ROOT / "docs" / "upgrading.md",
    *sorted(HOW_TO.glob("*.md")),
]
# The beginning of each command that is not run here, and the reason.
NOT_RUN = {
    "make demo": "tests/integration/local runs it",
    "make stack": "runs until Ctrl-C; tests/integration/local runs it",
    "source .local/stack.env": "`make stack` writes it; tests/integration/local uses it",
    "pip install": "would change the environment of the other tests",
    "vqa-worker run": "runs until SIGTERM; the fixture `worker` is this command",
    "vqa-worker top --worker": "needs a terminal: tests/integration/cli/test_top.py has one",
    "vllm serve": "needs vLLM and a GPU",
    "llama-server": "needs llama.cpp and a model",
    "ollama pull": "needs Ollama and downloads a model",
}


def is_run(command: str) -> bool:
    """Return whether a command runs here; settings have their own test."""
    return not command.startswith(("export ", *NOT_RUN))


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES])
async def test_every_command_of_a_page_succeeds(
    page: Path, stack: Stack, worker: Worker, tmp_path: Path
) -> None:
    prepare(tmp_path, stack)
    environment = environment_of(worker, tmp_path)
    ran = [command for block in shell_blocks(page) for command in block if is_run(command)]
    assert ran
    for command in ran:
        done = await asyncio.to_thread(
            subprocess.run,
            ["/bin/bash", "-c", command],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)


def prepare(folder: Path, stack: Stack) -> None:
    """Create the files and the object that the examples name."""
    put_example_image(stack)
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "photo.jpg").write_bytes(picture("JPEG"))
    question = {"type": "text", "text": "What is the total?"}
    image = {"type": "image_url", "image_url": {"url": "s3://invoices/2025/4711.jpg"}}
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
