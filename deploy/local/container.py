"""RabbitMQ from its official image, for machines with Docker and without RabbitMQ."""

import contextlib
import os
import shlex
import subprocess
from pathlib import Path

from deploy.local.ports import PortBlock
from deploy.local.processes import ServiceStartError, SupervisedProcess
from deploy.local.rabbitmq import GUEST, broker_answers

IMAGE = "rabbitmq:4-management"
_READY_SECONDS = 90
# The first start downloads the image.
_COMMAND_SECONDS = 600
_ADVICE = "See `docker logs` of the container for why."


class RabbitMQContainer:
    """As `RabbitMQ`, but in a container; `stop`, `kill` and `restart` keep its ports and its data."""

    user = password = GUEST

    def __init__(self, folder: Path, ports: PortBlock, *, temporary: bool = True) -> None:
        self._port, self._management_port, self._prometheus_port = (ports.take() for _ in range(3))
        self._name = f"vqa-local-{self._port}"
        self._created = False
        # The container belongs to the Docker engine, so something has to remove it when this program is
        # killed: a shell that waits for its own end.
        remove = f"docker rm --force --volumes {shlex.quote(self._name)}"
        self._keeper = SupervisedProcess(
            "RabbitMQ container",
            ["sh", "-c", f"trap '{remove}; exit' TERM; while :; do sleep 1; done"],
            environment=os.environ,
            folder=folder,
            leftovers=[folder] if temporary else [],
        )

    @property
    def url(self) -> str:
        """The AMQP URL, credentials included."""
        return f"amqp://{self.user}:{self.password}@127.0.0.1:{self._port}/"

    @property
    def management_url(self) -> str:
        """The management interface and its API; same credentials."""
        return f"http://127.0.0.1:{self._management_port}"

    @property
    def prometheus_url(self) -> str:
        """The broker's own metrics are under `/metrics` and `/metrics/detailed` here."""
        return f"http://127.0.0.1:{self._prometheus_port}"

    @property
    def running(self) -> bool:
        """Whether the container runs."""
        if not self._created:
            return False
        state = _docker("inspect", "--format", "{{.State.Running}}", self._name, check=False)
        return state.strip() == "true"

    @property
    def pids(self) -> list[int]:
        """The process that watches over the container; the broker's own are Docker's."""
        return [self._keeper.pid]

    def launch(self) -> None:
        """Start without waiting for the broker; the first time this downloads the image."""
        if self._created:
            _docker("start", self._name)
            return
        self._keeper.launch()
        _docker(*self.arguments())
        self._created = True

    def arguments(self) -> list[str]:
        """Return the arguments of `docker` that create the container."""
        ports = {self._port: 5672, self._management_port: 15672, self._prometheus_port: 15692}
        published = [f"--publish=127.0.0.1:{ours}:{inside}" for ours, inside in ports.items()]
        # A fixed host name, as the data folder is named after it.
        return ["run", "--detach", f"--name={self._name}", "--hostname=vqa-local", *published, IMAGE]

    def wait_until_ready(self) -> None:
        """Return when clients, the management interface and the metrics are answered.

        Raises:
            ServiceStartError: It was not ready in time.
        """
        self._keeper.wait_until(self._ready, timeout_seconds=_READY_SECONDS, advice=_ADVICE)

    def start(self) -> None:
        """Start, and wait until it is ready."""
        self.launch()
        self.wait_until_ready()

    def stop(self) -> None:
        """Stop in an orderly way; the data stays."""
        _docker("stop", "--time=30", self._name)

    def kill(self) -> None:
        """End it as a crash would; the data stays as it is on disk."""
        _docker("kill", self._name)

    def restart(self) -> None:
        """Stop in an orderly way and start again on the same ports with the same data."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze the broker: connections stay open and nothing answers."""
        _docker("pause", self._name)

    def resume(self) -> None:
        """Let a frozen broker go on."""
        _docker("unpause", self._name)

    def ctl(self, *arguments: str) -> str:
        """Run `rabbitmqctl` in the container and return what it prints."""
        return _docker("exec", self._name, "rabbitmqctl", "--silent", *arguments)

    def close(self) -> None:
        """Remove the container and its data."""
        with contextlib.suppress(ServiceStartError):
            _docker("rm", "--force", "--volumes", self._name, check=False)
        self._created = False
        self._keeper.kill()

    def _ready(self) -> bool:
        return broker_answers(self._port, self.management_url, self.prometheus_url)


def _docker(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False
    )
    if check and done.returncode:
        raise ServiceStartError(f"docker {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
