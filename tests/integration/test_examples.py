"""Run the examples of the docs as a reader would."""

import asyncio
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local.stack import Stack
from tests.conftest import PutImage, picture
from tests.debian import cache_folder
from tests.running import ROOT, Worker

EXAMPLE = ROOT / "examples" / "javascript"
PYTHON_EXAMPLES = ROOT / "examples" / "python"
PUBLISHING = ROOT / "docs" / "publishing.md"
QUICKSTART = ROOT / "docs" / "quickstart.md"


@pytest.fixture(scope="module")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example's library with npm, cached for all test runs on this machine."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    cache = cache_folder()
    folder = cache / "javascript"
    folder.mkdir(parents=True, exist_ok=True)
    with (cache / "javascript.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.copy(EXAMPLE / "package.json", folder)
        if not (folder / "node_modules" / "amqplib").is_dir():
            fetched = subprocess.run(
                ["npm", "install", "--no-audit", "--no-fund"],  # noqa: S607 - the reader's own
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
            )
            if fetched.returncode != 0:
                pytest.skip(f"npm cannot fetch amqplib: {fetched.stderr.strip().splitlines()[:1]}")
    run = tmp_path_factory.mktemp("javascript")
    shutil.copytree(EXAMPLE, run, dirs_exist_ok=True)
    (run / "node_modules").symlink_to(folder / "node_modules")
    return run


async def ask(folder: Path, stack: Stack, queue: str, image: str) -> "subprocess.CompletedProcess[str]":
    return await asyncio.to_thread(
        subprocess.run,
        ["node", "ask.mjs", image, "What is this?"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "VQA_RABBITMQ_URL": stack.rabbitmq.url, "VQA_JOBS_QUEUE": queue},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_the_javascript_example_prints_its_answer(
    javascript: Path, stack: Stack, worker: Worker, put_image: PutImage
) -> None:
    answered = await ask(javascript, stack, worker.jobs_queue, put_image())
    assert (answered.returncode, answered.stderr) == (0, "")
    assert "PNG" in answered.stdout


async def test_the_javascript_example_prints_the_error(
    javascript: Path, stack: Stack, worker: Worker
) -> None:
    failed = await ask(javascript, stack, worker.jobs_queue, "s3://no-bucket/key")
    assert failed.returncode == 1
    assert failed.stderr.startswith("image_not_found: images[0] (s3://no-bucket/key)")
    nobody = await ask(javascript, stack, "no-such-queue", "s3://no-bucket/key")
    assert nobody.returncode == 1
    assert "the queue no-such-queue does not exist" in nobody.stderr


def test_the_docs_contain_the_tested_example() -> None:
    (shown,) = re.findall(r"```javascript\n(.*?)```", PUBLISHING.read_text(encoding="utf-8"), re.DOTALL)
    assert shown == (EXAMPLE / "ask.mjs").read_text(encoding="utf-8")


def test_the_example_declares_its_library() -> None:
    assert list(json.loads((EXAMPLE / "package.json").read_text())["dependencies"]) == ["amqplib"]


async def test_the_python_examples_of_the_docs_work(stack: Stack, worker: Worker, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(picture("JPEG"))
    without_asyncio, with_asyncio = [
        await run_shown(shown, stack, worker, tmp_path)
        for shown in re.findall(r"```python\n(.*?)```", PUBLISHING.read_text(encoding="utf-8"), re.DOTALL)
    ]
    assert "JPEG" in without_asyncio
    assert with_asyncio.count("image_not_found") == len(with_asyncio.splitlines()) == 3


async def run_shown(shown: str, stack: Stack, worker: Worker, folder: Path) -> str:
    here = f'Client("{stack.rabbitmq.url}", jobs_queue="{worker.jobs_queue}")'
    program = shown.replace('Client("amqp://user:password@rabbitmq/")', here).replace("1000", "3")
    assert program != shown
    (folder / "program.py").write_text(program, encoding="utf-8")
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "program.py"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_quickstart_contains_the_tested_examples() -> None:
    shown = re.findall(r"```python\n(.*?)```", QUICKSTART.read_text(encoding="utf-8"), re.DOTALL)
    files = ("ask_with_client.py", "ask_with_pika.py", "ask_with_aio_pika.py")
    assert shown == [(PYTHON_EXAMPLES / file).read_text(encoding="utf-8") for file in files]


async def run_example(
    name: str, stack: Stack, worker: Worker, image: str
) -> "subprocess.CompletedProcess[str]":
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, str(PYTHON_EXAMPLES / name), image, "What is in the image?"],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "VQA_RABBITMQ_URL": stack.rabbitmq.url,
            "VQA_JOBS_QUEUE": worker.jobs_queue,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", ["ask_with_client.py", "ask_with_pika.py", "ask_with_aio_pika.py"])
async def test_the_examples_of_the_quickstart_print_an_answer_or_an_error(
    stack: Stack, worker: Worker, put_image: PutImage, name: str
) -> None:
    answered = await run_example(name, stack, worker, put_image())
    assert (answered.returncode, answered.stderr) == (0, "")
    assert "PNG" in answered.stdout
    failed = await run_example(name, stack, worker, "s3://no-bucket/key")
    assert failed.returncode == 1
    assert failed.stderr.startswith("image_not_found: images[0] (s3://no-bucket/key)")
