"""The client's wheel in a new virtual environment, with the locked versions of its dependencies only."""

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from deploy.local.stack import Stack
from tests.conftest import PutImage
from tests.running import ROOT, Worker, build_wheel

ASK = """\
import sys
from vqa_worker import Client
with Client(sys.argv[1], jobs_queue=sys.argv[2]) as client:
    print(client.ask(sys.argv[3], "What is this?", timeout=60).raise_for_error().answer)
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    wheel = build_wheel(ROOT / "vqa_worker", tmp_path)
    versions = re.findall(r"^[a-z0-9-]+==[^\s;]+", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    (tmp_path / "constraints.txt").write_text("\n".join(versions))
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    subprocess.run(  # noqa: S603 - a test's own
        [
            *(sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"),
            *("--constraint", str(tmp_path / "constraints.txt"), str(wheel)),
        ],
        check=True,
    )
    return python


def test_a_job_is_answered_without_the_libraries_of_the_worker(
    stack: Stack, worker: Worker, put_image: PutImage, python: Path, tmp_path: Path
) -> None:
    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [str(python), "-c", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)  # noqa: S603

    for library in ("boto3", "openai", "aiohttp", "worker"):
        assert "ModuleNotFoundError" in run(f"import {library}").stderr, library
    done = run(ASK, stack.rabbitmq.url, worker.jobs_queue, put_image())
    assert (done.returncode, done.stderr) == (0, "")
    assert "PNG" in done.stdout
