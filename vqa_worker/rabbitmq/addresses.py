"""The addresses of a broker: one URL, or the URLs of the nodes of one cluster."""

import re
from collections.abc import Sequence
from typing import Final
from urllib.parse import unquote, urlsplit

AMQP_PORTS: Final = {"amqp": 5672, "amqps": 5671}
# Passwords may contain commas.
_BETWEEN_URLS: Final = re.compile(r"\s*,\s*(?=amqps?://)", re.IGNORECASE)


def split_urls(text: str) -> list[str]:
    """Return the URLs of a comma-separated list in order, without duplicates."""
    return list(dict.fromkeys(_BETWEEN_URLS.split(text.strip())))


def check_same_cluster(urls: Sequence[str]) -> None:
    """Check that the URLs can be those of one cluster.

    Raises:
        ValueError: their schemes or virtual hosts differ.
    """
    parts = [urlsplit(url) for url in urls]
    if len({it.scheme for it in parts}) > 1:
        raise ValueError("the list of URLs has amqp:// and amqps:// URLs: all must have the same scheme")
    if len({virtual_host(url) for url in urls}) > 1:
        raise ValueError("the list has URLs with different virtual hosts: all must be nodes of one cluster")


def virtual_host(url: str) -> str:
    """Return the virtual host of a URL; the empty path is `/`."""
    return unquote(urlsplit(url).path[1:]) or "/"


def host_and_port(url: str) -> str:
    """Return `host:port` of a URL, with the default port of its scheme."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{parts.port or AMQP_PORTS[parts.scheme]}"
