"""RabbitMQ, S3 and the model API, started and stopped together."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Self

from deploy.local.container import RabbitMQContainer
from deploy.local.external import external_model, external_rabbitmq, external_s3
from deploy.local.install import Installation, ensure_rabbitmq, find_installation, succeeds
from deploy.local.model_simulator.behavior import Behavior
from deploy.local.ports import PortBlock
from deploy.local.rabbitmq import Broker, RabbitMQ
from deploy.local.s3 import S3, Certificate, ObjectStore
from deploy.local.simulated_model import ModelApi, SimulatedModel


class Stack(AbstractContextManager["Stack"]):
    """The three services, ready.

    Made by `start`. As a context manager it stops at the end of the block; however this process ends, the
    services end with it.
    """

    def __init__(self, rabbitmq: Broker, s3: ObjectStore, model_api: ModelApi, resources: ExitStack) -> None:
        self.rabbitmq = rabbitmq
        self.s3 = s3
        self.model_api = model_api
        self._resources = resources

    @classmethod
    def start(
        cls,
        given: Mapping[str, str] = MappingProxyType({}),
        *,
        simulator: Behavior | None = None,
        s3_certificate: Certificate | None = None,
        installation: Installation | None = None,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> Self:
        """Start all services at the same time, and wait until they are ready.

        Args:
            given: Environment variables. Use the servers and the model API that they name, not local ones
                (`VQA_RABBITMQ_URL`, `VQA_S3_ENDPOINT_URL`, `VQA_MODEL_BASE_URL` with a key, or only a key:
                `VQA_MODEL_API_KEY`, `DEEPINFRA_TOKEN`, `OPENAI_API_KEY`). A real model costs money.
            simulator: How the model simulator behaves at first.
            s3_certificate: With it a local S3 server also speaks TLS, on a second port.
            installation: The programs of a local broker, by default this machine's RabbitMQ.
            on_progress: Called with a line of text before a step that takes long.

        Raises:
            ServiceStartError: A service did not start; the others are stopped.
            IncompleteConfigurationError: A variable that an external server or API needs is missing.
            RabbitMQNotInstalledError: RabbitMQ is not installed and cannot be installed.
        """
        with ExitStack() as resources:
            root = _temporary_folder(resources)
            ports = PortBlock()
            resources.callback(ports.close)
            s3 = external_s3(given) or S3(root / "s3", ports, s3_certificate)
            model = external_model(given) or SimulatedModel(root / "model", ports, simulator)
            # Last, as it may install RabbitMQ: only when the configuration is known to be complete.
            folder = root / "rabbitmq"
            own = RabbitMQ(installation, folder, ports) if installation else None
            rabbitmq = own or external_rabbitmq(given) or local_rabbitmq(folder, ports, on_progress)
            services = rabbitmq, s3, model
            for service in services:
                resources.callback(service.close)
                service.launch()
            for service in services:
                service.wait_until_ready()
            return cls(rabbitmq, s3, model, resources.pop_all())
        raise AssertionError  # mypy: the block above does not swallow exceptions

    @property
    def model(self) -> SimulatedModel:
        """The model simulator.

        Raises:
            RuntimeError: The environment names a real model: use `model_api`.
        """
        if not isinstance(self.model_api, SimulatedModel):
            raise RuntimeError("The model API is real and cannot be controlled.")  # noqa: TRY004 - not a type
        return self.model_api

    def environment(self) -> dict[str, str]:
        """Return the environment variables with which the worker and boto3 use this stack."""
        variables = {
            "VQA_RABBITMQ_URL": self.rabbitmq.url,
            "VQA_S3_ENDPOINT_URL": self.s3.endpoint_url,
            "VQA_ALLOWED_BUCKETS": os.environ.get("VQA_ALLOWED_BUCKETS") or "*",
            "AWS_ACCESS_KEY_ID": self.s3.access_key,
            "AWS_SECRET_ACCESS_KEY": self.s3.secret_key,
            # Empty rather than missing: a token of the surrounding shell does not belong to these keys.
            "AWS_SESSION_TOKEN": self.s3.session_token or "",
            "AWS_REGION": self.s3.region,
            "VQA_MODEL_BASE_URL": self.model_api.base_url,
            "VQA_MODEL_API_KEY": self.model_api.api_key,
            "VQA_MODEL": self.model_api.models[0],
            "VQA_ALLOWED_MODELS": ",".join(self.model_api.models),
        }
        return variables | _no_proxy(os.environ)

    def __exit__(self, *_: object) -> None:
        """Stop all services that were started here, and delete their data."""
        self._resources.close()


def local_rabbitmq(folder: Path, ports: PortBlock, on_progress: Callable[[str], None]) -> Broker:
    """Return the installed RabbitMQ; else one in Docker; else install it, which changes the machine."""
    if find_installation() is None and succeeds("docker", "info"):
        on_progress("RabbitMQ is not installed: its official image is used, in Docker")
        return RabbitMQContainer(folder, ports)
    return RabbitMQ(ensure_rabbitmq(on_progress), folder, ports)


def _temporary_folder(resources: ExitStack) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="vqa-local-"))
    # Children of a killed service may still write for a moment.
    resources.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _no_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that exclude this machine from the environment's proxy, if it has one."""
    if not any(environment.get(name) for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")):
        return {}
    before = environment.get("NO_PROXY") or environment.get("no_proxy") or ""
    hosts = ",".join(filter(None, [before, "127.0.0.1", "localhost"]))
    return {"NO_PROXY": hosts, "no_proxy": hosts}
