"""RabbitMQ from its official image, for machines with Docker and without RabbitMQ."""

import os
import subprocess
from pathlib import Path

from deploy.local.ports import PortBlock
from deploy.local.processes import ServiceStartError, SupervisedProcess
from deploy.local.rabbitmq import LocalBroker

IMAGE = "rabbitmq:4-management"
# The first start downloads the image.
_COMMAND_TIMEOUT_SECONDS = 600


class RabbitMQContainer(LocalBroker):
    """A broker in a container; `stop`, `kill` and `restart` keep its ports and its data."""

    advice = "`docker logs` of the container may show the reason."

    def __init__(self, folder: Path, ports: PortBlock) -> None:
        used = [ports.take() for _ in range(3)]
        self._name = f"vqa-local-{used[0]}"
        published = [
            f"--publish=127.0.0.1:{port}:{inside}"
            for port, inside in zip(used, (5672, 15672, 15692), strict=True)
        ]
        # A fixed host name, since RabbitMQ names its data folder after it.
        self._create = ["run", "--detach", f"--name={self._name}", "--hostname=vqa", *published, IMAGE]
        # The container belongs to the Docker engine: this process deletes it if this program dies.
        delete = f"docker rm --force --volumes {self._name}"
        watcher = SupervisedProcess(
            "RabbitMQ container",
            ["sh", "-c", f"trap '{delete}; exit' TERM; while :; do sleep 1; done"],
            environment=os.environ,
            folder=folder,
            leftovers=[folder],
        )
        super().__init__(used, [watcher])

    @property
    def running(self) -> bool:
        """Whether the container runs."""
        state = self._docker("inspect", "--format={{.State.Running}}", self._name, check=False)
        return state.strip() == "true"

    def launch(self) -> None:
        """Create the container, or start it again; the first time this downloads the image."""
        super().launch()
        if self._docker("inspect", self._name, check=False).strip() in ("", "[]"):
            self._docker(*self._create)
        else:
            self._docker("start", self._name)

    def stop(self) -> None:
        """See `Service.stop`."""
        self._docker("stop", "--time=30", self._name)

    def kill(self) -> None:
        """See `Service.kill`."""
        self._docker("kill", self._name)

    def ctl(self, *arguments: str) -> str:
        """See `Broker.ctl`."""
        return self._docker("exec", self._name, "rabbitmqctl", "--silent", *arguments)

    def close(self) -> None:
        """See `Service.close`; deletes the container and its data."""
        self._docker("rm", "--force", "--volumes", self._name, check=False)
        super().close()

    def _docker(self, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(
            ["docker", *arguments],
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_SECONDS,
            check=False,
        )
        if check and done.returncode:
            raise ServiceStartError(f"docker {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout
