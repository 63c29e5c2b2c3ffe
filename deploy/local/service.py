"""What every service of the local stack can do, and how to check that one answers."""

import http.client
import urllib.request
from collections.abc import Sequence

from deploy.local.processes import SupervisedProcess

_PROBE_TIMEOUT_SECONDS = 5
# Proxies in the environment are for other machines.
no_proxy_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ExternalServiceError(RuntimeError):
    """The service was not started here: it is not stopped, restarted or configured here either."""


class Service:
    """A service; `stop`, `kill` and `restart` keep its ports and its data.

    Without processes it is external: it counts as running, and is never stopped.
    """

    ready_timeout_seconds = 90.0
    advice = "If the log does not show the reason, try again."

    def __init__(self, processes: Sequence[SupervisedProcess] = ()) -> None:
        """`processes`: the server itself, then its helper processes."""
        self._processes = processes

    @property
    def running(self) -> bool:
        """Whether all processes live."""
        return all(process.running for process in self._processes)

    @property
    def pids(self) -> list[int]:
        """The process ids, the server's first."""
        return [process.pid for process in self._processes]

    def is_ready(self) -> bool:
        """Return whether the service answers."""
        return True

    def launch(self) -> None:
        """Start without waiting until the service answers."""
        for process in reversed(self._processes):
            process.launch()

    def wait_until_ready(self) -> None:
        """Wait until the service answers.

        Raises:
            ServiceStartError: It ended, or does not answer in time.
        """
        for server in self._processes[:1]:
            server.wait_until(self.is_ready, timeout_seconds=self.ready_timeout_seconds, advice=self.advice)

    def start(self) -> None:
        """Start, and wait until the service answers."""
        self.launch()
        self.wait_until_ready()

    def stop(self) -> None:
        """Stop orderly (SIGTERM)."""
        for process in self._own():
            process.stop()

    def kill(self) -> None:
        """Kill as in a crash (SIGKILL)."""
        for process in self._own():
            process.kill()

    def restart(self) -> None:
        """Stop orderly and start again."""
        self.stop()
        self.start()

    def close(self) -> None:
        """End permanently, without saving data; an external service keeps running."""
        for process in self._processes:
            process.kill()

    def _own(self) -> Sequence[SupervisedProcess]:
        if not self._processes:
            raise ExternalServiceError(f"{type(self).__name__} was not started here.")
        return self._processes


def http_ok(url: str) -> bool:
    """Return whether a GET succeeds."""
    try:
        with no_proxy_opener.open(url, timeout=_PROBE_TIMEOUT_SECONDS):
            return True
    except (OSError, http.client.HTTPException):
        return False
