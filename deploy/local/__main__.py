"""`make stack`: run RabbitMQ, S3, a model and a worker in the foreground until Ctrl-C.

Writes a file with the environment variables that lead to them, and prints a command to try.
"""

import argparse
import fcntl
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from deploy.local.external import LOCAL_STACK, without_local_stack
from deploy.local.sample_images import sample_images
from deploy.local.stack import Stack
from deploy.local.terminal import print_status, raise_keyboard_interrupt
from deploy.local.worker import LocalWorker, running_worker

_CHECK_SECONDS = 0.5
_REPOSITORY = Path(__file__).parents[2]
_MODEL_VARIABLES = ("VQA_MODEL", "DEEPINFRA_TOKEN", "OPENAI_API_KEY")


def main() -> int:
    """Run the stack; return the exit code."""
    options = _parser().parse_args()
    # Also if they were ignored before, as in the background of a script.
    signal.signal(signal.SIGINT, raise_keyboard_interrupt)
    signal.signal(signal.SIGTERM, raise_keyboard_interrupt)
    print_status("Starting RabbitMQ, S3 and a model …")
    # RabbitMQ and S3 are always local: the worker must not consume the jobs of a real system.
    around = without_local_stack(os.environ, print_status)
    given = {name: value for name, value in around.items() if name.startswith(_MODEL_VARIABLES)}
    try:
        with ExitStack() as running:
            running.enter_context(_claimed(options.env_file))
            stack = running.enter_context(Stack.start(given, on_progress=print_status))
            variables = {"VQA_ALLOWED_BUCKETS": stack.s3.bucket}
            running.enter_context(_env_file(options.env_file, stack.environment() | variables))
            _upload_samples(stack)
            worker = None if options.no_worker else running.enter_context(_worker(stack))
            _print_ready(stack, worker, options.env_file)
            return _wait(stack, worker)
    except KeyboardInterrupt:
        print_status("Stopped; its data is deleted.")
        return 0
    except RuntimeError as error:
        print_status(str(error))
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description=__doc__)
    parser.add_argument("--no-worker", action="store_true", help="start no worker")
    parser.add_argument(
        "--env-file",
        type=Path,
        default=_REPOSITORY / ".local" / "stack.env",
        help="file for the environment variables (default: .local/stack.env); deleted at the end",
    )
    return parser


@contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Let no other stack write this file meanwhile.

    Raises:
        RuntimeError: another one does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            shown = os.path.relpath(path)
            raise RuntimeError(
                f"A stack with {shown} is running already: use it (source {shown}), or stop it (Ctrl-C)."
            ) from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _env_file(path: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Write the variables as lines for a shell, readable by their owner only; delete the file at the end."""
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()]
    lines.append(f"export {LOCAL_STACK}=1\n")
    lines.append(f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"\n')
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.writelines(lines)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _upload_samples(stack: Stack) -> None:
    client = stack.s3.client()
    for sample in sample_images():
        client.put_object(Bucket=stack.s3.bucket, Key=sample.name, Body=sample.content)
    client.close()


@contextmanager
def _worker(stack: Stack) -> Iterator[LocalWorker]:
    with (
        tempfile.TemporaryDirectory(prefix="vqa-worker-") as folder,
        running_worker(stack, Path(folder), VQA_LOG_FORMAT="console") as worker,
    ):
        yield worker


def _print_ready(stack: Stack, worker: LocalWorker | None, env_file: Path) -> None:
    """Print what runs to standard error, and the command to try to standard output."""
    model = stack.model_api
    kind = "simulated: it only describes the image file" if model.is_simulated else "real, costs money"
    sample = sample_images()[0]
    path = Path(os.path.relpath(env_file))
    command = f'vqa-worker submit s3://{stack.s3.bucket}/{sample.name} "{sample.question}" --wait'
    source = f"source {shlex.quote(str(path))}"
    start = "" if worker else f"Start a worker in another shell: {source} && vqa-worker run\n"
    log = f"Worker:   vqa-worker top --worker {worker.address}; log: {worker.log}\n" if worker else ""
    print_status(
        f"\nModel:    {model.models[0]} ({kind})\n"
        f"RabbitMQ: {stack.rabbitmq.management_url} (user and password: guest)\n"
        f"S3:       bucket {stack.s3.bucket} with sample images\n"
        f"{log}"
        f"\nReady; Ctrl-C stops everything and deletes its data. {start}Try it in another shell:\n"
    )
    print(f"  {source} && {command}\n", flush=True)


def _wait(stack: Stack, worker: LocalWorker | None) -> int:
    services = {"RabbitMQ": stack.rabbitmq, "S3": stack.s3, "the model": stack.model_api}
    services |= {"the worker": worker} if worker else {}
    while not (stopped := [name for name, service in services.items() if not service.running]):
        time.sleep(_CHECK_SECONDS)
    print_status(f"Stopped unexpectedly: {', '.join(stopped)}. Stopping the rest.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
