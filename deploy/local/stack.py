"""RabbitMQ, S3 and the stand-in model, started together and gone together."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from deploy.local.container import RabbitMQContainer
from deploy.local.external import ExternalModel, external_model, external_rabbitmq, external_s3
from deploy.local.install import UseContainer, ensure_rabbitmq
from deploy.local.ports import PortBlock
from deploy.local.rabbitmq import RabbitMQ
from deploy.local.s3 import S3, Certificate
from deploy.local.simulated_model import SimulatedModel, SimulatorOptions

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["SimulatorOptions", "Stack"]


class Part(Protocol):
    """A service of the stack, whoever runs it. `stop`, `kill` and `restart` keep ports and data."""

    @property
    def running(self) -> bool: ...
    @property
    def pids(self) -> list[int]: ...
    def launch(self) -> None: ...
    def wait_until_ready(self) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...
    def restart(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def close(self) -> None: ...


class Broker(Part, Protocol):
    """RabbitMQ: a private node, a container, or one that the environment names."""

    @property
    def url(self) -> str: ...
    @property
    def management_url(self) -> str: ...
    @property
    def prometheus_url(self) -> str: ...
    def ctl(self, *arguments: str) -> str: ...


class ObjectStore(Part, Protocol):
    """An S3 server."""

    @property
    def endpoint_url(self) -> str: ...
    @property
    def access_key(self) -> str: ...
    @property
    def secret_key(self) -> str: ...
    @property
    def session_token(self) -> str | None: ...
    @property
    def region(self) -> str: ...
    @property
    def bucket(self) -> str: ...
    def client(self) -> "S3Client": ...


class Stack:
    """The three services, up and answering.

    Made by `start`. As a context manager it stops at the end of the block; however else this process ends,
    the services end with it.
    """

    def __init__(
        self, rabbitmq: Broker, s3: ObjectStore, model: SimulatedModel | ExternalModel, resources: ExitStack
    ) -> None:
        self.rabbitmq = rabbitmq
        self.s3 = s3
        self._model = model
        self._resources = resources

    @classmethod
    def start(
        cls,
        *,
        use_environment: bool = False,
        simulator_options: SimulatorOptions | None = None,
        s3_certificate: Certificate | None = None,
        folder: Path | None = None,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> Self:
        """Start everything at once and return when all of it works.

        Args:
            use_environment: Use the servers and the model API that the environment names instead of own
                ones (`VQA_RABBITMQ_URL`, `VQA_S3_ENDPOINT_URL`, `VQA_MODEL_BASE_URL` with
                a key, or just a key: `VQA_MODEL_API_KEY`, `DEEPINFRA_TOKEN`, `OPENAI_API_KEY`). A real
                model costs money.
            simulator_options: How the stand-in model starts.
            s3_certificate: With it, an own S3 server speaks TLS as well, on a second port.
            folder: Where data and logs go and stay; by default a temporary folder that is removed.
            on_progress: Called with a line for a person when something takes long.

        Raises:
            ServiceStartError: A service is not up; nothing of the others is left either.
            IncompleteConfigurationError: A variable that a named server or API needs is missing.
            RabbitMQNotInstalledError: There is no RabbitMQ here and no way to get it.
        """
        given = os.environ if use_environment else {}
        with ExitStack() as resources:
            root = folder or _temporary_folder(resources)
            ports = PortBlock()
            resources.callback(ports.close)
            temporary = folder is None
            s3 = external_s3(given) or S3(root / "s3", ports, temporary=temporary, certificate=s3_certificate)
            model = external_model(given) or SimulatedModel(
                root / "model", ports, simulator_options, temporary=temporary
            )
            # Last, because it may install RabbitMQ: in vain, if what is given is incomplete.
            rabbitmq = external_rabbitmq(given) or _own_broker(
                root / "rabbitmq", ports, on_progress, temporary=temporary
            )
            parts: tuple[Part, ...] = (rabbitmq, s3, model)
            for part in parts:
                resources.callback(part.close)
                part.launch()
            for part in parts:
                part.wait_until_ready()
            return cls(rabbitmq, s3, model, resources.pop_all())
        raise AssertionError  # mypy: the block above does not swallow exceptions

    @property
    def model(self) -> SimulatedModel:
        """The stand-in model.

        Raises:
            RuntimeError: The environment names a real model: there is `model_api` for what both have.
        """
        if isinstance(self._model, ExternalModel):
            raise RuntimeError(f"{self._model!r} is real: it cannot be told how to behave.")  # noqa: TRY004
        return self._model

    @property
    def model_api(self) -> SimulatedModel | ExternalModel:
        """The model API in use, real or not."""
        return self._model

    def environment(self) -> dict[str, str]:
        """Return the environment variables that make the worker, and boto3, use this stack."""
        variables = {
            "VQA_RABBITMQ_URL": self.rabbitmq.url,
            "VQA_S3_ENDPOINT_URL": self.s3.endpoint_url,
            "VQA_ALLOWED_BUCKETS": os.environ.get("VQA_ALLOWED_BUCKETS") or "*",
            "AWS_ACCESS_KEY_ID": self.s3.access_key,
            "AWS_SECRET_ACCESS_KEY": self.s3.secret_key,
            # Empty rather than left out: a token from the surrounding shell does not go with these keys.
            "AWS_SESSION_TOKEN": self.s3.session_token or "",
            "AWS_REGION": self.s3.region,
            "VQA_MODEL_BASE_URL": self._model.base_url,
            "VQA_MODEL_API_KEY": self._model.api_key,
            "VQA_MODEL": self._model.models[0],
            "VQA_ALLOWED_MODELS": ",".join(self._model.models),
        }
        return variables | _no_proxy(os.environ)

    def dead_parts(self) -> list[str]:
        """Return the names of the parts that have ended by themselves, or were stopped."""
        parts: dict[str, Part] = {"RabbitMQ": self.rabbitmq, "S3": self.s3, "the model": self._model}
        return [name for name, part in parts.items() if not part.running]

    def stop(self) -> None:
        """End everything that was started here and remove its data. Safe to call again."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _temporary_folder(resources: ExitStack) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="vqa-local-"))
    # Helpers of a killed service may still be writing for a moment.
    resources.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _own_broker(
    folder: Path, ports: PortBlock, on_progress: Callable[[str], None], *, temporary: bool
) -> RabbitMQ | RabbitMQContainer:
    found = ensure_rabbitmq(on_progress)
    if isinstance(found, UseContainer):
        on_progress("RabbitMQ is not installed; running its official image in Docker")
        return RabbitMQContainer(folder, ports, temporary=temporary)
    return RabbitMQ(found, folder, ports, temporary=temporary)


def _no_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what keeps a proxy, if the environment has one, from getting the calls to this machine."""
    if not any(environment.get(name) for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")):
        return {}
    before = environment.get("NO_PROXY") or environment.get("no_proxy") or ""
    hosts = ",".join(filter(None, [before, "127.0.0.1", "localhost"]))
    return {"NO_PROXY": hosts, "no_proxy": hosts}
