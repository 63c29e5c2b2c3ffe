"""Servers that somebody else runs, named by the environment: used instead of starting them here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from worker.settings.urls import fallback_key_variable

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_DEEPINFRA = "https://api.deepinfra.com/v1/openai"
_OPENAI = "https://api.openai.com/v1"


class ExternalServiceError(RuntimeError):
    """This part belongs to somebody else, so it is neither stopped nor restarted nor configured from here."""


class IncompleteConfigurationError(RuntimeError):
    """The environment names a server or an API without all that it takes to use it; the message says what."""


class _Given:
    """What all of them have in common: they are there, and stay there."""

    running = True

    @property
    def pids(self) -> list[int]:
        """No processes of ours."""
        return []

    def launch(self) -> None:
        """Nothing to start."""

    def wait_until_ready(self) -> None:
        """Nothing to wait for: whoever runs it has it running."""

    def start(self) -> None:
        """Nothing to start."""

    def close(self) -> None:
        """Leave it running."""

    def stop(self) -> None:
        """Refuse."""
        raise ExternalServiceError(f"{self!r} was not started here, so it is not stopped here.")

    kill = restart = pause = resume = stop


@dataclass(frozen=True)
class ExternalRabbitMQ(_Given):
    """The broker of `VQA_RABBITMQ_URL`."""

    url: str
    management_url: str = ""
    prometheus_url: str = ""

    def ctl(self, *arguments: str) -> str:
        """Refuse."""
        raise ExternalServiceError(f"rabbitmqctl {' '.join(arguments)}: the broker was not started here.")

    def __repr__(self) -> str:
        return "the broker of VQA_RABBITMQ_URL"


@dataclass(frozen=True)
class ExternalS3(_Given):
    """The server of `VQA_S3_ENDPOINT_URL`, with the credentials that boto3 finds."""

    endpoint_url: str
    access_key: str
    secret_key: str
    region: str
    bucket: str
    session_token: str | None = None

    def client(self) -> "S3Client":
        """Return a new boto3 client for this server."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            aws_session_token=self.session_token,
            region_name=self.region,
            config=Config(signature_version="s3v4"),
        )

    def __repr__(self) -> str:
        return "the server of VQA_S3_ENDPOINT_URL"


@dataclass(frozen=True)
class ExternalModel(_Given):
    """A real model API. It is paid for by whoever owns the key."""

    base_url: str
    api_key: str
    models: tuple[str, ...]
    is_simulated = False

    def __repr__(self) -> str:
        return f"the model API at {self.base_url}"


def external_rabbitmq(environment: Mapping[str, str]) -> ExternalRabbitMQ | None:
    """Return the broker that the environment names, if any."""
    url = environment.get("VQA_RABBITMQ_URL")
    return ExternalRabbitMQ(url) if url else None


def external_s3(environment: Mapping[str, str]) -> ExternalS3 | None:
    """Return the S3 server that the environment names, if any.

    Raises:
        IncompleteConfigurationError: There are no credentials for it.
    """
    endpoint = environment.get("VQA_S3_ENDPOINT_URL")
    if not endpoint:
        return None
    try:
        session = boto3.Session()
        credentials = session.get_credentials()
        frozen = credentials.get_frozen_credentials() if credentials else None
    except BotoCoreError as error:
        raise IncompleteConfigurationError(
            f"VQA_S3_ENDPOINT_URL is set, but its credentials fail: {error}"
        ) from error
    if frozen is None:
        raise IncompleteConfigurationError(
            "VQA_S3_ENDPOINT_URL is set without credentials: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or unset it to have an S3 server started here."
        )
    return ExternalS3(
        endpoint_url=endpoint,
        access_key=frozen.access_key or "",
        secret_key=frozen.secret_key or "",
        session_token=frozen.token,
        region=session.region_name or "us-east-1",
        bucket=environment.get("VQA_DEMO_BUCKET") or "vqa-images",
    )


def external_model(environment: Mapping[str, str]) -> ExternalModel | None:
    """Return the model API that the environment names by URL or by key, if any.

    The common variables stand in for a missing `VQA_MODEL_API_KEY` as they do for the worker: a key of one
    provider is never sent to another.

    Raises:
        IncompleteConfigurationError: There is a URL but no key for it.
    """
    deepinfra, openai = environment.get("DEEPINFRA_TOKEN"), environment.get("OPENAI_API_KEY")
    own_url, own_key = environment.get("VQA_MODEL_BASE_URL"), environment.get("VQA_MODEL_API_KEY")
    own_model = environment.get("VQA_MODEL")
    if own_url:
        common = fallback_key_variable(own_url)
        key = own_key or (common and environment.get(common))
        if not key:
            wanted = f"{common} or VQA_MODEL_API_KEY" if common else "VQA_MODEL_API_KEY"
            raise IncompleteConfigurationError(
                f"VQA_MODEL_BASE_URL is set without a key for it: set {wanted}, "
                "or unset it to have a stand-in for the model started here."
            )
        return ExternalModel(own_url, key, (own_model or _default_model(own_url),))
    if own_key or deepinfra:
        return ExternalModel(
            _DEEPINFRA, own_key or deepinfra or "", (own_model or _default_model(_DEEPINFRA),)
        )
    if openai:
        return ExternalModel(_OPENAI, openai, (own_model or _default_model(_OPENAI),))
    return None


def _default_model(base_url: str) -> str:
    """The worker's default model, but at OpenAI, which does not have it."""
    if fallback_key_variable(base_url) == "OPENAI_API_KEY":
        return "gpt-4o-mini"
    return "meta-llama/Llama-3.2-90B-Vision-Instruct"
