"""The model API: an external one, or the model simulator as its own process, controlled over HTTP."""

import json
import os
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from deploy.local.model_simulator.behavior import Behavior, Outcome, Rule
from deploy.local.model_simulator.calls import Call, State
from deploy.local.ports import PortBlock
from deploy.local.processes import SupervisedProcess
from deploy.local.service import Service, http_ok, no_proxy_opener

_REPOSITORY = Path(__file__).parents[2]
_calls: TypeAdapter[list[Call]] = TypeAdapter(list[Call])


class ModelApi(Service):
    """An OpenAI-compatible API at a URL. A real one costs the owner of the key money."""

    is_simulated = False

    def __init__(
        self,
        base_url: str,
        api_key: str,
        models: tuple[str, ...],
        processes: Sequence[SupervisedProcess] = (),
    ) -> None:
        super().__init__(processes)
        self.base_url = base_url
        self.api_key = api_key
        self.models = models


class SimulatedModel(ModelApi):
    """The simulator on a free port. A restart keeps port, key and first behavior, and forgets calls."""

    is_simulated = True
    ready_timeout_seconds = 30.0
    advice = "If the log names a missing module, run `make setup`."

    def __init__(self, folder: Path, ports: PortBlock, behavior: Behavior | None = None) -> None:
        behavior = behavior or Behavior()
        port = ports.take()
        api_key = f"simulator-{secrets.token_hex(8)}"
        # The package has to be importable from any folder.
        path = os.pathsep.join(filter(None, [str(_REPOSITORY), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "deploy.local.model_simulator", f"--port={port}"]
        process = SupervisedProcess(
            "model simulator",
            [*command, f"--behavior={behavior.model_dump_json()}"],
            environment={**os.environ, "PYTHONPATH": path, "SIMULATOR_API_KEY": api_key},
            folder=folder,
        )
        self._root = f"http://127.0.0.1:{port}"
        super().__init__(f"{self._root}/v1", api_key, tuple(behavior.models), [process])

    def is_ready(self) -> bool:
        """Return whether it answers."""
        return http_ok(f"{self._root}/simulator/state")

    def configure(self, **behavior: object) -> None:
        """Change fields of `Behavior`; the others stay as they are.

        Raises:
            ValueError: There is no such field, or the value is invalid.
        """
        self._request("POST", "/simulator/configure", to_jsonable_python(behavior))

    def play(self, outcome: Outcome, *, times: int | None = 1, marker: str | None = None) -> None:
        """Add an outcome for the next calls.

        Args:
            outcome: What the caller gets.
            times: For how many calls; None for all from now on.
            marker: Only for calls whose messages contain this text.
        """
        rule = Rule(outcome=outcome, times=times, marker=marker)
        self._request("POST", "/simulator/play", rule.model_dump(mode="json"))

    def calls(self, marker: str = "") -> list[Call]:
        """Return all calls, those in progress included, in the order of their arrival.

        Args:
            marker: Only calls whose question contains this text.
        """
        return _calls.validate_python(
            self._request("GET", f"/simulator/calls?{urlencode({'marker': marker})}")
        )

    def state(self) -> State:
        """Return the counters."""
        return State.model_validate(self._request("GET", "/simulator/state"))

    def reset(self) -> None:
        """Forget all calls, and restore the behavior of the start."""
        self._request("POST", "/simulator/reset")

    def _request(self, method: str, path: str, body: object = None) -> Any:
        request = urllib.request.Request(  # noqa: S310 - our own http:// URL
            f"{self._root}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with no_proxy_opener.open(request, timeout=10) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise ValueError(error.read().decode(errors="replace")) from None
