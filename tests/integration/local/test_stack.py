"""The local services start, keep their data, and clean up."""

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aio_pika
import boto3
import pytest

from deploy.local import stack as stack_module
from deploy.local.external import without_local_stack
from deploy.local.install import Installation
from deploy.local.processes import ServiceStartError
from deploy.local.stack import Stack
from tests.integration.local.proc import alive, family, wait_until_ended
from tests.running import ROOT

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
WITHOUT_WORKER = signal.SIGTERM


@dataclass
class Up:
    """A running `python -m deploy.local`."""

    process: subprocess.Popen[str]
    folder: Path
    env_file: Path
    output: str
    environment: dict[str, str]
    pids: list[int]


@pytest.fixture(scope="module")
def ups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[signal.Signals, Up]]:
    """Start one stack for each signal, all at the same time."""
    folders = {number: tmp_path_factory.mktemp(number.name) for number in SIGNALS}
    files = {number: tmp_path_factory.mktemp(f"{number.name}-env") / "stack.env" for number in SIGNALS}
    processes = {
        number: start_up(folders[number], files[number], without_worker=number == WITHOUT_WORKER)
        for number in SIGNALS
    }
    try:
        yield {
            number: wait_for(process, folders[number], files[number]) for number, process in processes.items()
        }
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def start_up(folder: Path, env_file: Path, *, without_worker: bool) -> subprocess.Popen[str]:
    names = ("VQA_MODEL", "DEEPINFRA_TOKEN", "OPENAI_API_KEY")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    options = ["--no-worker"] if without_worker else []
    return subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-m", "deploy.local", f"--env-file={env_file}", *options],
        env={**inherited, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], folder: Path, env_file: Path) -> Up:
    """Read the output up to the command to try."""
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("  source "):
            break
    assert env_file.exists(), output
    return Up(process, folder, env_file, output, read_exports(env_file), family(process.pid))


def read_exports(env_file: Path) -> dict[str, str]:
    exports = {}
    for line in env_file.read_text().splitlines():
        [word, assignment] = shlex.split(line)
        name, _, value = assignment.partition("=")
        assert word == "export"
        exports[name] = value
    return exports


def test_several_stacks_run_concurrently(stack: Stack, ups: dict[signal.Signals, Up]) -> None:
    environments = [stack.environment(), *(up.environment for up in ups.values())]
    for name in ("VQA_RABBITMQ_URL", "VQA_S3_ENDPOINT_URL", "VQA_MODEL_BASE_URL"):
        assert len({environment[name] for environment in environments}) == len(environments)
    for up in ups.values():
        # Each service and its supervisor.
        assert len(up.pids) >= 8
        assert alive(up.pids) == up.pids


def test_the_printed_command_is_answered(ups: dict[signal.Signals, Up]) -> None:
    up = ups[signal.SIGINT]
    command = up.output.rstrip().splitlines()[-1]
    ran = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603, S607 - as a reader does
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("[simulated model] I see a JPEG picture")
    assert "log: " in up.output


def test_without_a_worker_the_output_says_how_to_start_one(ups: dict[signal.Signals, Up]) -> None:
    output = ups[WITHOUT_WORKER].output
    assert re.search(r"source \S+ && vqa-worker run\n", output)
    assert "Worker:" not in output


def test_a_second_stack_with_the_same_file_is_refused(ups: dict[signal.Signals, Up]) -> None:
    """It would replace the addresses in it."""
    up = ups[signal.SIGINT]
    before = up.env_file.read_text()
    command = [sys.executable, "-m", "deploy.local", f"--env-file={up.env_file}"]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert second.returncode == 1
    assert "is running already: use it" in second.stderr
    assert up.env_file.read_text() == before


def test_the_settings_of_another_stack_are_ignored(ups: dict[signal.Signals, Up]) -> None:
    """A shell keeps them after the stack has ended."""
    ignored: list[str] = []
    around = {**ups[signal.SIGINT].environment, "DEEPINFRA_TOKEN": "t"}
    kept = without_local_stack(around, ignored.append)
    assert "DEEPINFRA_TOKEN" in kept
    assert not [name for name in kept if name.startswith(("VQA_", "AWS_"))]
    assert len(ignored) == 1
    alone = {"VQA_MODEL": "m"}
    assert without_local_stack(alone, ignored.append) == alone


def test_the_file_is_for_its_owner_only(ups: dict[signal.Signals, Up]) -> None:
    assert {up.env_file.stat().st_mode & 0o777 for up in ups.values()} == {0o600}


async def test_the_variables_of_the_file_lead_to_working_services(ups: dict[signal.Signals, Up]) -> None:
    environment = ups[signal.SIGINT].environment
    async with await aio_pika.connect(environment["VQA_RABBITMQ_URL"]) as connection:
        assert not connection.is_closed
    s3 = boto3.client(
        "s3",
        endpoint_url=environment["VQA_S3_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_REGION"],
    )
    assert [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]] == ["vqa-images"]
    s3.close()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_foreground_stack_leaves_nothing_after_every_kind_of_end(
    ups: dict[signal.Signals, Up], number: signal.Signals
) -> None:
    up = ups[number]
    pids = family(up.process.pid)
    up.process.send_signal(number)
    code = up.process.wait(20)
    assert code == (-number if number == signal.SIGKILL else 0)
    assert up.env_file.exists() == (number == signal.SIGKILL)
    assert wait_until_ended(pids) == []
    assert wait_until_empty(up.folder) == []
    port = up.environment["VQA_S3_ENDPOINT_URL"].rpartition(":")[2]
    assert not Path(f"/tmp/seaweedfs-s3-{port}.sock").exists()  # noqa: S108 - where SeaweedFS puts it


def wait_until_empty(folder: Path) -> list[Path]:
    give_up = time.monotonic() + 10
    while list(folder.iterdir()) and time.monotonic() < give_up:
        time.sleep(0.05)
    return list(folder.iterdir())


def test_a_stack_that_fails_to_start_stops_its_other_services(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "rabbitmq-server"
    broken.write_text("#!/bin/sh\nsleep 0.5\necho the disk is full\nexit 1\n")
    broken.chmod(0o755)
    installation = Installation(broken, broken, Path("/bin/cat"))
    monkeypatch.setattr(stack_module, "ensure_rabbitmq", lambda _: installation)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    before = set(family(os.getpid()))
    with pytest.raises(ServiceStartError, match=r"RabbitMQ ended(.|\n)*the disk is full"):
        Stack.start()
    assert wait_until_ended(set(family(os.getpid())) - before) == []
    assert list((tmp_path / "temporary").iterdir()) == []


async def test_a_broker_restart_keeps_a_durable_message_and_the_address(stack: Stack) -> None:
    name = "kept-through-restart"
    async with await aio_pika.connect(stack.rabbitmq.url) as connection:
        channel = await connection.channel()
        await channel.declare_queue(name, durable=True, arguments={"x-queue-type": "quorum"})
        message = aio_pika.Message(b"still here", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, name)
    stack.rabbitmq.restart()
    async with await aio_pika.connect(stack.rabbitmq.url) as connection:
        channel = await connection.channel()
        queue = await channel.get_queue(name)
        kept = await queue.get(timeout=10)
        assert kept.body == b"still here"
        await kept.ack()
        await queue.delete(if_unused=False, if_empty=False)


def test_rabbitmqctl_connects_to_the_stack_s_broker(stack: Stack) -> None:
    assert "guest" in stack.rabbitmq.ctl("list_users").split()
    with pytest.raises(RuntimeError, match="no_such_command"):
        stack.rabbitmq.ctl("no_such_command")


def test_the_object_store_keeps_its_objects_through_a_restart(stack: Stack) -> None:
    client = stack.s3.client()
    client.put_object(Bucket=stack.s3.bucket, Key="kept", Body=b"picture")
    stack.s3.restart()
    assert client.get_object(Bucket=stack.s3.bucket, Key="kept")["Body"].read() == b"picture"
    client.delete_object(Bucket=stack.s3.bucket, Key="kept")
    client.close()


def test_the_environment_has_all_settings_that_the_worker_needs(stack: Stack) -> None:
    assert set(stack.environment()) >= {
        "VQA_RABBITMQ_URL",
        "VQA_S3_ENDPOINT_URL",
        "VQA_ALLOWED_BUCKETS",
        "VQA_MODEL_BASE_URL",
        "VQA_MODEL_API_KEY",
        "VQA_MODEL",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_REGION",
    }


def test_the_machine_s_proxy_is_not_used(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "intranet.example")
    assert stack.environment()["NO_PROXY"] == "intranet.example,127.0.0.1,localhost"
    assert stack.s3.client().list_buckets()["Buckets"]
    assert stack.model.state().in_progress == 0
