"""RabbitMQ: an external broker, or a private node."""

import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.local.install import Installation
from deploy.local.ports import PortBlock
from deploy.local.processes import SupervisedProcess
from deploy.local.service import ExternalServiceError, Service, http_ok

_GUEST = "guest"  # user and password of a new broker, accepted from this machine only
_CTL_TIMEOUT_SECONDS = 60
_CONFIGURATION = """\
listeners.tcp.local = 127.0.0.1:{amqp}
log.console = true
log.file = false
# A full disk or a small machine should not block publishers of a temporary broker.
disk_free_limit.absolute = 50MB
"""
_MONITORING = """\
management.tcp.ip = 127.0.0.1
management.tcp.port = {management}
prometheus.tcp.ip = 127.0.0.1
prometheus.tcp.port = {prometheus}
"""


class Broker(Service):
    """A broker at a URL."""

    def __init__(
        self,
        url: str,
        management_url: str = "",
        prometheus_url: str = "",
        processes: Sequence[SupervisedProcess] = (),
    ) -> None:
        """Describe the broker.

        Args:
            url: The AMQP URL with credentials.
            management_url: The management UI and API; empty: unknown.
            prometheus_url: The broker's metrics are under `/metrics` and `/metrics/detailed` here.
            processes: Those started here, if it is not external.
        """
        super().__init__(processes)
        self.url = url
        self.management_url = management_url
        self.prometheus_url = prometheus_url

    def ctl(self, *arguments: str) -> str:
        """Run `rabbitmqctl` and return its output, without headers and progress lines.

        Raises:
            ExternalServiceError: The broker was not started here.
            RuntimeError: With what rabbitmqctl prints.
        """
        raise ExternalServiceError(f"rabbitmqctl {' '.join(arguments)}: the broker was not started here.")


class LocalBroker(Broker):
    """A broker on this machine, with new data."""

    def __init__(self, ports: Sequence[int], processes: Sequence[SupervisedProcess]) -> None:
        """`ports`: those of AMQP, of the management API and of the metrics."""
        self._amqp_port, management, prometheus = ports
        super().__init__(
            f"amqp://{_GUEST}:{_GUEST}@127.0.0.1:{self._amqp_port}/",
            f"http://127.0.0.1:{management}",
            f"http://127.0.0.1:{prometheus}",
            processes,
        )

    def is_ready(self) -> bool:
        """Return whether AMQP clients, the management API and the metrics are answered."""
        return (
            _speaks_amqp(self._amqp_port)
            and http_ok(self.management_url)
            and http_ok(f"{self.prometheus_url}/metrics")
        )


@dataclass(frozen=True)
class Member:
    """What a node of a cluster has in common with the others.

    Attributes:
        node: the node's own name.
        home: the folder with the Erlang cookie.
        epmd_port: that of the running Erlang port mapper.
        configuration: further lines of `rabbitmq.conf`.
    """

    node: str
    home: Path
    epmd_port: int
    configuration: str


class RabbitMQ(LocalBroker):
    """A private node on free ports, with its own data and Erlang port mapper, apart from a system service.

    A member of a cluster uses a port mapper that runs already, and has no management API and no metrics.
    """

    advice = "If the log does not show the reason, try again; check that `localhost` resolves to 127.0.0.1."

    def __init__(
        self, installation: Installation, folder: Path, ports: PortBlock, member: Member | None = None
    ) -> None:
        used = [ports.take() for _ in range(3)]
        self._programs = installation.ctl.parent
        self._member = member
        self.node = member.node if member else f"vqa-{used[0]}@localhost"
        epmd_port = member.epmd_port if member else ports.take()
        environment = _environment(installation, folder, self.node, epmd_port, ports.take())
        _write_configuration(folder, used, member)
        if member:
            environment["HOME"] = str(member.home)
        self._environment = environment
        processes = [
            SupervisedProcess("RabbitMQ", [str(installation.server)], environment=environment, folder=folder)
        ]
        if not member:
            # RabbitMQ would start the port mapper itself, but as a daemon that outlives it.
            processes.append(port_mapper(installation, epmd_port, folder))
        super().__init__(used, processes)

    def is_ready(self) -> bool:
        """See `LocalBroker.is_ready`."""
        return _speaks_amqp(self._amqp_port) if self._member else super().is_ready()

    def ctl(self, *arguments: str) -> str:
        """See `Broker.ctl`."""
        return self.tool("rabbitmqctl", *arguments)

    def tool(self, program: str, *arguments: str) -> str:
        """Run another one of RabbitMQ's programs, such as `rabbitmq-queues`, as `ctl`.

        Raises:
            RuntimeError: With what it prints.
        """
        done = subprocess.run(
            [str(self._programs / program), "--node", self.node, "--silent", *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=_CTL_TIMEOUT_SECONDS,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(
                f"{program} {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}"
            )
        return done.stdout


def port_mapper(installation: Installation, port: int, folder: Path) -> SupervisedProcess:
    """Return Erlang's port mapper, which nodes find each other by."""
    command = [str(installation.epmd), "-port", str(port), "-address", "127.0.0.1"]
    return SupervisedProcess("epmd", command, environment=os.environ, folder=folder)


def _speaks_amqp(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            # The answer begins with a method frame.
            return connection.recv(1) == b"\x01"
    except OSError:
        return False


def _write_configuration(folder: Path, ports: Sequence[int], member: Member | None) -> None:
    amqp, management, prometheus = ports
    (folder / "conf.d").mkdir(parents=True)
    text = _CONFIGURATION.format(amqp=amqp)
    if member:
        text, plugins = text + member.configuration, "[]."
    else:
        text += _MONITORING.format(management=management, prometheus=prometheus)
        plugins = "[rabbitmq_management,rabbitmq_prometheus]."
    (folder / "rabbitmq.conf").write_text(text)
    (folder / "enabled_plugins").write_text(plugins)
    # Empty, so that the machine's /etc/rabbitmq/rabbitmq-env.conf is not read.
    (folder / "rabbitmq-env.conf").write_text("")


def _environment(
    installation: Installation, folder: Path, node: str, epmd_port: int, distribution_port: int
) -> dict[str, str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("RABBITMQ_", "ERL_"))
    }
    return inherited | {
        # The Erlang cookie is written here.
        "HOME": str(folder),
        # The scripts look for `erl` on PATH, which a service manager or an IDE may have shortened.
        "PATH": os.pathsep.join([str(installation.epmd.parent), inherited.get("PATH", os.defpath)]),
        "ERL_EPMD_PORT": str(epmd_port),
        # Makes the script become the server instead of waiting for it.
        "RUNNING_UNDER_SYSTEMD": "true",
        "RABBITMQ_NODENAME": node,
        "RABBITMQ_DIST_PORT": str(distribution_port),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
        "RABBITMQ_CONFIG_FILES": str(folder / "conf.d"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced"),
        "RABBITMQ_CONF_ENV_FILE": str(folder / "rabbitmq-env.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        # No other machine may reach a node with a well-known password.
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
    }
