"""Validate URLs, and find the provider's variable for the API key of a URL.

Validators raise ValueError with the rest of a sentence that begins with the variable's name.
"""

import ipaddress
import re
from typing import Annotated, Final, TypeAlias
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, SecretStr, ValidationInfo

from worker.providers import GENERIC, load_profile, provider_of

AMQP_PORTS: Final = {"amqp": 5672, "amqps": 5671}
# The host of each provider's variable; the settings' fields have the same names in lower case.
FALLBACK_KEYS: Final = {"deepinfra.com": "DEEPINFRA_TOKEN", "api.openai.com": "OPENAI_API_KEY"}
CHAT_COMPLETIONS: Final = "/chat/completions"
_SEVERAL_HOSTS: Final = re.compile(r"amqps?://[^/?#]*,[^@/?#]*(?:[/?#]|$)", re.IGNORECASE)
# The only query that is accepted, as others may contain secrets: Azure's.
_API_VERSION: Final = re.compile(r"api-version=[A-Za-z0-9.-]+")


def _split_url(url: str, *schemes: str) -> SplitResult:
    """Parse a URL strictly; reject URLs that parsers read differently. Errors do not include the URL."""
    if not re.fullmatch(r"[!-\[\]-~]+", url):
        raise ValueError(
            "must be a URL without spaces, backslashes, control or non-ASCII characters (percent-encode them)"
        )
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError(
            "is not a URL: host or port cannot be read"
            " (special characters in a password must be percent-encoded)"
        ) from None
    if parts.scheme not in schemes:
        raise ValueError(f"must begin with {' or '.join(f'{scheme}://' for scheme in schemes)}")
    if not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", parts.hostname or ""):
        raise ValueError(f"must have a host, as in {schemes[0]}://host/")
    return parts


def _broker_urls(secret: SecretStr) -> SecretStr:
    """Validate one URL, or a comma-separated list, which is returned without duplicates."""
    urls = split_broker_urls(secret.get_secret_value())
    for nth, url in enumerate(urls, start=1):
        try:
            _check_broker_url(url)
        except ValueError as error:
            if len(urls) == 1:
                raise
            raise ValueError(f"URL {nth} of {len(urls)} {error}") from None
    if len(urls) > 1:
        from vqa_worker.rabbitmq.addresses import check_same_cluster  # noqa: PLC0415 - see below

        check_same_cluster(urls)
    return SecretStr(",".join(urls))


def split_broker_urls(text: str) -> list[str]:
    """Return the URLs of a comma-separated list without duplicates, see `vqa_worker.rabbitmq.addresses`."""
    if "," not in text:
        # Without the import of aio-pika and more, which takes a third of a second.
        return [text]
    from vqa_worker.rabbitmq.addresses import split_urls  # noqa: PLC0415

    return split_urls(text)


def _check_broker_url(url: str) -> None:
    if _SEVERAL_HOSTS.match(url):
        raise ValueError(
            "has several hosts: give a whole URL for each, as in amqp://user:password@host/,amqp://…"
        )
    if _split_url(url, *AMQP_PORTS).fragment:
        raise ValueError("has a '#' in it: special characters in a password must be percent-encoded")


def _http_url(url: str) -> str:
    parts = _split_url(url, "https", "http")
    if "@" in parts.netloc:
        raise ValueError("must not carry a user name or password: URLs are shown in logs")
    if "?" in url or "#" in url:
        raise ValueError("must not have a query or a fragment: paths are appended to it")
    return url.rstrip("/")


def _model_url(url: str, info: ValidationInfo) -> str:
    """Return the base URL of a model API: without `/chat/completions`, with the path of a known provider."""
    parts = _split_url(url, "https", "http")
    if "@" in parts.netloc:
        raise ValueError("must not carry a user name or password: URLs are shown in logs")
    if "#" in url:
        raise ValueError("must not have a fragment: paths are appended to it")
    if "?" in url and not _API_VERSION.fullmatch(parts.query):
        raise ValueError("must not have a query, except ?api-version=… (Azure): URLs are shown in logs")
    provider = info.data.get("provider") or provider_of(host_of(url))
    path = parts.path.rstrip("/").removesuffix(CHAT_COMPLETIONS).rstrip("/")
    if not path and provider != GENERIC:
        path = urlsplit(load_profile(provider).base_url).path
    if "/deployments/" in path and provider == "azure" and not parts.query:
        right = f"{parts.scheme}://{parts.netloc}{path}?api-version=2024-10-21"
        raise ValueError(f"needs the version of the API, for example {right}")
    return f"{parts.scheme}://{parts.netloc}{path}{f'?{parts.query}' if parts.query else ''}"


def endpoint(base_url: str, path: str) -> str:
    """Return the URL of a path of the model API; the query of the base URL is kept at the end."""
    address, mark, query = base_url.partition("?")
    return f"{address.rstrip('/')}{path}{mark}{query}"


def host_of(url: str) -> str:
    """Return the host of a URL in lower case, without port; empty if it has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def fallback_key_variable(base_url: str) -> str | None:
    """Return the provider's variable that may replace `VQA_MODEL_API_KEY` for this URL.

    A provider's key is never sent to another provider.
    """
    host = f".{host_of(base_url)}"
    return next((name for domain, name in FALLBACK_KEYS.items() if host.endswith(f".{domain}")), None)


def shows_key(base_url: str) -> bool:
    """Return whether requests to this URL send the key unencrypted over a network."""
    host = host_of(base_url)
    if urlsplit(base_url).scheme == "https" or host == "localhost" or host.endswith(".localhost"):
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


def _api_key(secret: SecretStr, info: ValidationInfo) -> SecretStr:
    base_url = info.data.get("model_base_url", "")
    if not secret.get_secret_value():
        fallback_field = (fallback_key_variable(base_url) or "").lower()
        secret = info.data.get(fallback_field, secret)
    key = secret.get_secret_value()
    if not key:
        raise ValueError(_missing_key(base_url))
    if not re.fullmatch(r"[!-~]+", key):
        fallback = fallback_key_variable(base_url)
        either = f"(or {fallback}) " if fallback else ""
        raise ValueError(
            f"{either}contains spaces, control or non-ASCII characters: check that it was copied correctly"
        )
    return secret


def _missing_key(base_url: str) -> str:
    problem = f"is not set: set the API key for {host_of(base_url) or 'VQA_MODEL_BASE_URL'}"
    if fallback := fallback_key_variable(base_url):
        return f"{problem} (or set {fallback}, which is used for this host)"
    others = " and ".join(FALLBACK_KEYS.values())
    return f"{problem} (any value if it requires none; {others} are used for their own hosts only)"


def _store_url(url: str) -> str:
    if not re.fullmatch(r"s3://[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9](/[!-~]*)?", url):
        raise ValueError("must be s3://bucket/prefix, without spaces")
    return url.rstrip("/")


BrokerUrl: TypeAlias = Annotated[SecretStr, AfterValidator(_broker_urls)]
StoreUrl: TypeAlias = Annotated[str, AfterValidator(_store_url)]
HttpUrl: TypeAlias = Annotated[str, AfterValidator(_http_url)]
ModelUrl: TypeAlias = Annotated[str, AfterValidator(_model_url)]
ApiKey: TypeAlias = Annotated[SecretStr, AfterValidator(_api_key)]
