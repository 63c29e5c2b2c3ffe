"""External servers and model APIs that environment variables name: used instead of starting local ones."""

from collections.abc import Callable, Mapping

import boto3
from botocore.exceptions import BotoCoreError

from deploy.local.rabbitmq import Broker
from deploy.local.s3 import ObjectStore
from deploy.local.simulated_model import ModelApi
from worker.settings.urls import fallback_key_variable

_DEEPINFRA = "https://api.deepinfra.com/v1/openai"
_OPENAI = "https://api.openai.com/v1"


# Set by the file with a stack's environment variables.
LOCAL_STACK = "LOCAL_VQA_STACK"


def without_local_stack(
    environment: Mapping[str, str], on_ignored: Callable[[str], None]
) -> Mapping[str, str]:
    """Return the environment without the settings of a local stack, if the shell has read its file."""
    if LOCAL_STACK not in environment:
        return environment
    on_ignored("This shell has the settings of a local stack (.local/stack.env): they are ignored here.")
    return {name: text for name, text in environment.items() if not name.startswith(("VQA_", "AWS_"))}


class IncompleteConfigurationError(RuntimeError):
    """The environment names a server or an API, but not everything that is needed to use it."""


def external_rabbitmq(environment: Mapping[str, str]) -> Broker | None:
    """Return the broker of `VQA_RABBITMQ_URL`, if it is set."""
    url = environment.get("VQA_RABBITMQ_URL")
    return Broker(url) if url else None


def external_s3(environment: Mapping[str, str]) -> ObjectStore | None:
    """Return the server of `VQA_S3_ENDPOINT_URL`, if it is set, with the credentials that boto3 finds.

    Raises:
        IncompleteConfigurationError: There are no credentials for it.
    """
    endpoint = environment.get("VQA_S3_ENDPOINT_URL")
    if not endpoint:
        return None
    try:
        session = boto3.Session()
        found = session.get_credentials()
        credentials = found.get_frozen_credentials() if found else None
    except BotoCoreError as error:
        raise IncompleteConfigurationError(
            f"VQA_S3_ENDPOINT_URL is set, but its credentials fail: {error}"
        ) from error
    if credentials is None:
        raise IncompleteConfigurationError(
            "VQA_S3_ENDPOINT_URL is set without credentials: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or unset it to start a local S3 server."
        )
    return ObjectStore(
        endpoint,
        credentials.access_key or "",
        credentials.secret_key or "",
        session_token=credentials.token,
        region=session.region_name or "us-east-1",
        bucket=environment.get("VQA_DEMO_BUCKET") or "vqa-images",
    )


def external_model(environment: Mapping[str, str]) -> ModelApi | None:
    """Return the model API that the environment names by its URL or by a key, if it does.

    As in the worker, `DEEPINFRA_TOKEN` and `OPENAI_API_KEY` replace a missing `VQA_MODEL_API_KEY`, each only
    for its own provider.

    Raises:
        IncompleteConfigurationError: There is a URL but no key for it.
    """
    url, key = environment.get("VQA_MODEL_BASE_URL"), environment.get("VQA_MODEL_API_KEY")
    if not url:
        if key or environment.get("DEEPINFRA_TOKEN"):
            url = _DEEPINFRA
        elif environment.get("OPENAI_API_KEY"):
            url = _OPENAI
        else:
            return None
    fallback = fallback_key_variable(url)
    key = key or (environment.get(fallback) if fallback else None)
    if not key:
        wanted = f"{fallback} or VQA_MODEL_API_KEY" if fallback else "VQA_MODEL_API_KEY"
        raise IncompleteConfigurationError(
            f"VQA_MODEL_BASE_URL is set without a key for it: set {wanted}, "
            "or unset it to start the model simulator."
        )
    return ModelApi(url, key, (environment.get("VQA_MODEL") or _default_model(url),))


def _default_model(base_url: str) -> str:
    """Return the worker's default model, or one of OpenAI's there."""
    if fallback_key_variable(base_url) == "OPENAI_API_KEY":
        return "gpt-4o-mini"
    return "meta-llama/Llama-3.2-90B-Vision-Instruct"
