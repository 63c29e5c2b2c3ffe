"""A private RabbitMQ node: own ports, data and Erlang port mapper, nothing shared with a system service."""

import os
import subprocess
from pathlib import Path

from deploy.local.install import Installation
from deploy.local.ports import PortBlock
from deploy.local.probes import amqp_ok, http_ok
from deploy.local.processes import SupervisedProcess

_READY_SECONDS = 90
_CTL_SECONDS = 60
_ADVICE = "If the log does not say why, try again, and check that `localhost` resolves to 127.0.0.1."

_CONFIGURATION = """\
listeners.tcp.local = 127.0.0.1:{amqp}
management.tcp.ip = 127.0.0.1
management.tcp.port = {management}
prometheus.tcp.ip = 127.0.0.1
prometheus.tcp.port = {prometheus}
log.console = true
log.file = false
# A full disk or a small machine should not block publishers of a throw-away broker.
disk_free_limit.absolute = 50MB
"""
_PLUGINS = "[rabbitmq_management,rabbitmq_prometheus]."

GUEST = "guest"
"""The user and the password of a new broker, which takes them from this machine only."""


def broker_answers(port: int, management_url: str, prometheus_url: str) -> bool:
    """Tell whether a broker answers clients, on its management interface and on its metrics."""
    return (
        amqp_ok(port)
        and http_ok(f"{management_url}/api/overview", user=GUEST, password=GUEST)
        and http_ok(f"{prometheus_url}/metrics")
    )


class RabbitMQ:
    """RabbitMQ on free ports; `stop`, `kill` and `restart` keep its ports and its data."""

    user = password = GUEST

    def __init__(
        self, installation: Installation, folder: Path, ports: PortBlock, *, temporary: bool = True
    ) -> None:
        self._installation = installation
        self._folder = folder
        self._port, self._management_port, self._prometheus_port = (ports.take() for _ in range(3))
        self._distribution_port, self._epmd_port = ports.take(), ports.take()
        self._node = f"vqa-{self._port}@localhost"
        self._write_configuration()
        environment = self._environment()
        leftovers = [folder] if temporary else []
        # RabbitMQ would start the port mapper itself, but as a daemon that outlives it.
        self._epmd = SupervisedProcess(
            "epmd",
            [str(installation.epmd), "-port", str(self._epmd_port), "-address", "127.0.0.1"],
            environment=environment,
            folder=folder,
            leftovers=leftovers,
        )
        self._server = SupervisedProcess(
            "RabbitMQ",
            [str(installation.server)],
            environment=environment,
            folder=folder,
            leftovers=leftovers,
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
        """Whether the server process lives."""
        return self._server.running

    @property
    def pids(self) -> list[int]:
        """The process ids of the server and its port mapper."""
        return [self._server.pid, self._epmd.pid]

    def launch(self) -> None:
        """Start without waiting."""
        self._epmd.launch()
        self._server.launch()

    def wait_until_ready(self) -> None:
        """Return when clients, the management interface and the metrics are answered.

        Raises:
            ServiceStartError: With the end of the log.
        """
        self._server.wait_until(self._ready, timeout_seconds=_READY_SECONDS, advice=_ADVICE)

    def start(self) -> None:
        """Start, and wait until it is ready."""
        self.launch()
        self.wait_until_ready()

    def stop(self) -> None:
        """Stop in an orderly way; the data stays."""
        self._server.stop()

    def kill(self) -> None:
        """End it as a crash would; the data stays as it is on disk."""
        self._server.kill()

    def restart(self) -> None:
        """Stop in an orderly way and start again on the same ports with the same data."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze the broker: connections stay open and nothing answers."""
        self._server.pause()

    def resume(self) -> None:
        """Let a frozen broker go on."""
        self._server.resume()

    def ctl(self, *arguments: str) -> str:
        """Run `rabbitmqctl` against this node and return what it prints, without headers and progress lines.

        Raises:
            RuntimeError: With what rabbitmqctl had to say.
        """
        command = [str(self._installation.ctl), "--node", self._node, "--silent", *arguments]
        done = subprocess.run(
            command,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=_CTL_SECONDS,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(
                f"rabbitmqctl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}"
            )
        return done.stdout

    def close(self) -> None:
        """End it for good; nobody needs the data, so there is no orderly stop to wait for."""
        self._server.kill()
        self._epmd.kill()

    def _ready(self) -> bool:
        return broker_answers(self._port, self.management_url, self.prometheus_url)

    def _write_configuration(self) -> None:
        (self._folder / "conf.d").mkdir(parents=True)
        (self._folder / "rabbitmq.conf").write_text(
            _CONFIGURATION.format(
                amqp=self._port, management=self._management_port, prometheus=self._prometheus_port
            )
        )
        (self._folder / "enabled_plugins").write_text(_PLUGINS)
        # Empty, so that the machine's own /etc/rabbitmq/rabbitmq-env.conf is not read.
        (self._folder / "rabbitmq-env.conf").write_text("")

    def _environment(self) -> dict[str, str]:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("RABBITMQ_", "ERL_"))
        }
        folder = self._folder
        return inherited | {
            # The Erlang cookie is made here.
            "HOME": str(folder),
            # The scripts look for `erl` on PATH, which a service manager or an IDE may have cut short.
            "PATH": os.pathsep.join([str(self._installation.epmd.parent), inherited.get("PATH", os.defpath)]),
            "ERL_EPMD_PORT": str(self._epmd_port),
            # The script then becomes the server instead of waiting for it.
            "RUNNING_UNDER_SYSTEMD": "true",
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
            "RABBITMQ_CONFIG_FILES": str(folder / "conf.d"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "rabbitmq-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            # Nobody outside this machine may talk to a node whose password everybody knows.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }
