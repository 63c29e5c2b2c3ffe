"""Starts the stand-in model API as a process of its own, and tells it how to behave."""

import http.client
import json
import os
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from deploy.local.model_simulator.behavior import DEFAULT_MODELS, Outcome, Rule
from deploy.local.model_simulator.calls import Call, State
from deploy.local.ports import PortBlock
from deploy.local.probes import http_ok
from deploy.local.processes import SupervisedProcess

_READY_SECONDS = 30
_ADVICE = "Is the log about a missing module? Then run `make setup`."
_REPOSITORY = Path(__file__).parents[2]

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_calls: TypeAdapter[list[Call]] = TypeAdapter(list[Call])


@dataclass(frozen=True)
class SimulatorOptions:
    """How the stand-in starts; `SimulatedModel.configure` changes most of it while it runs."""

    models: tuple[str, ...] = DEFAULT_MODELS
    max_concurrent: int | None = None
    latency: float = 0.0
    decode: bool = True
    """False saves the stand-in's CPU for measurements: it reads the pictures' headers only."""
    read_text: bool = True
    """Whether it reads the pictures' text where the optional OCR package is installed."""


class SimulatedModel:
    """The stand-in on a free port. A restart keeps port, key and options and forgets calls and behavior."""

    is_simulated = True

    def __init__(
        self,
        folder: Path,
        ports: PortBlock,
        options: SimulatorOptions | None = None,
        *,
        temporary: bool = True,
    ) -> None:
        options = options or SimulatorOptions()
        port = ports.take()
        self._root = f"http://127.0.0.1:{port}"
        self.base_url = f"{self._root}/v1"
        self.api_key = f"simulator-{secrets.token_hex(8)}"
        self.models = options.models
        self._server = SupervisedProcess(
            "model simulator",
            _command(port, options),
            environment=_environment(self.api_key),
            folder=folder,
            leftovers=[folder] if temporary else [],
        )

    @property
    def running(self) -> bool:
        """Whether the server process lives."""
        return self._server.running

    @property
    def pids(self) -> list[int]:
        """The process id of the server."""
        return [self._server.pid]

    def launch(self) -> None:
        """Start without waiting."""
        self._server.launch()

    def wait_until_ready(self) -> None:
        """Return when it answers.

        Raises:
            ServiceStartError: With the end of the log.
        """
        self._server.wait_until(
            lambda: http_ok(f"{self._root}/simulator/state"),
            timeout_seconds=_READY_SECONDS,
            advice=_ADVICE,
        )

    def start(self) -> None:
        """Start, and wait until it is ready."""
        self.launch()
        self.wait_until_ready()

    def stop(self) -> None:
        """Stop it; open calls are cut off."""
        self._server.stop(grace_seconds=5)

    def kill(self) -> None:
        """End it as a crash would."""
        self._server.kill()

    def restart(self) -> None:
        """Stop and start again on the same port."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing answers."""
        self._server.pause()

    def resume(self) -> None:
        """Let it go on."""
        self._server.resume()

    def close(self) -> None:
        """End it for good."""
        self._server.kill()

    def configure(self, **behavior: object) -> None:
        """Change some of the stand-in's behavior; see `model_simulator.behavior.Behavior` for the names.

        Raises:
            ValueError: A name or a value that the stand-in does not know.
        """
        self._ask("POST", "/simulator/configure", _plain(behavior))

    def play(self, outcome: Outcome, *, times: int | None = 1, marker: str | None = None) -> None:
        """Add an outcome to play for coming calls.

        Args:
            outcome: What the caller gets.
            times: For how many calls; None for all from now on.
            marker: Only for calls whose messages contain this text.
        """
        rule = Rule(outcome=outcome, times=times, marker=marker)
        self._ask("POST", "/simulator/play", rule.model_dump(mode="json"))

    def calls(self) -> list[Call]:
        """Return every call so far, those in progress included, in the order of their arrival."""
        return _calls.validate_python(self._ask("GET", "/simulator/calls"))

    def wait_for_calls(self, count: int, *, ended: bool = False, timeout_seconds: float = 10) -> list[Call]:
        """Return the calls as soon as there are `count` of them.

        Args:
            count: How many to wait for.
            ended: Whether only finished calls count.
            timeout_seconds: How long to wait.

        Raises:
            TimeoutError: There were not so many in time.
        """
        path = f"/simulator/calls?at_least={count}&ended={int(ended)}&timeout={timeout_seconds}"
        return _calls.validate_python(self._ask("GET", path, timeout_seconds=timeout_seconds + 5))

    def state(self) -> State:
        """Return the counters: calls, calls in progress, the most there ever were at once."""
        return State.model_validate(self._ask("GET", "/simulator/state"))

    def reset(self) -> None:
        """Forget all calls and go back to the behavior it started with."""
        self._ask("POST", "/simulator/reset")

    def _ask(self, method: str, path: str, body: object = None, *, timeout_seconds: float = 10) -> Any:
        request = urllib.request.Request(  # noqa: S310 - our own http:// URL
            f"{self._root}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with _opener.open(request, timeout=timeout_seconds) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error) from None


def _environment(api_key: str) -> dict[str, str]:
    """Return an environment in which this package can be imported from any folder."""
    path = os.pathsep.join(filter(None, [str(_REPOSITORY), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "SIMULATOR_API_KEY": api_key}


def _refusal(error: urllib.error.HTTPError) -> Exception:
    message = error.read().decode(errors="replace")
    if error.code == http.client.REQUEST_TIMEOUT:
        return TimeoutError(message)
    return ValueError(message)


def _plain(behavior: Mapping[str, object]) -> dict[str, object]:
    """Return the behavior as JSON data; rules may be given as objects."""
    plain = dict(behavior)
    rules = plain.get("rules")
    if isinstance(rules, Iterable):
        plain["rules"] = [rule.model_dump(mode="json") if isinstance(rule, Rule) else rule for rule in rules]
    return plain


def _command(port: int, options: SimulatorOptions) -> list[str]:
    command = [sys.executable, "-m", "deploy.local.model_simulator", "--port", str(port)]
    command += [f"--model={model}" for model in options.models]
    command += [f"--latency={options.latency}"]
    if options.max_concurrent is not None:
        command += [f"--max-concurrent={options.max_concurrent}"]
    if not options.decode:
        command += ["--no-decode"]
    if not options.read_text:
        command += ["--no-read-text"]
    return command
