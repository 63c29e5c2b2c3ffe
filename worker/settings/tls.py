"""TLS for the connection to RabbitMQ: validate the files and create the context."""

import ssl
from pathlib import Path
from typing import Annotated, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, FilePath, ValidationInfo

from worker.settings.faults import shown, variable
from worker.settings.urls import split_broker_urls


def _only_with_tls(path: Path | None, info: ValidationInfo) -> Path | None:
    url = info.data.get("rabbitmq_url")
    if path is not None and url is not None and not _is_tls(url.get_secret_value()):
        raise ValueError(
            f"has no effect without TLS: change {variable('rabbitmq_url')} to amqps://, or remove this"
        )
    return path


def _is_tls(urls: str) -> bool:
    # The URLs of a list have the same scheme.
    return urlsplit(split_broker_urls(urls)[0]).scheme == "amqps"


def _holds_certificates(path: Path | None) -> Path | None:
    try:
        if path is not None:
            tls_context(path, None, None)
    except (OSError, ValueError):
        raise ValueError(f"{shown(path)} has no readable certificates in PEM format") from None
    return path


def _belongs_to_certificate(path: Path | None, info: ValidationInfo) -> Path | None:
    if "rabbitmq_cert_file" not in info.data:  # it is invalid, which is reported separately
        return path
    certificate = info.data["rabbitmq_cert_file"]
    if (certificate is None) != (path is None):
        raise ValueError(f"and {variable('rabbitmq_cert_file')} go together: give both or neither")
    try:
        if path is not None:
            tls_context(None, certificate, path)
    except (OSError, ValueError):
        raise ValueError(
            f"and {variable('rabbitmq_cert_file')} cannot be loaded as a certificate and its own key:"
            " both must be PEM, belong together, and the key must not be encrypted"
        ) from None
    return path


TlsFile: TypeAlias = Annotated[FilePath | None, AfterValidator(_only_with_tls)]
CaFile: TypeAlias = Annotated[TlsFile, AfterValidator(_holds_certificates)]
KeyFile: TypeAlias = Annotated[TlsFile, AfterValidator(_belongs_to_certificate)]


def tls_context(ca_file: Path | None, cert_file: Path | None, key_file: Path | None) -> ssl.SSLContext:
    """Return a TLS context that verifies the broker and sends the client certificate, if there is one.

    Raises:
        OSError, ValueError: a file cannot be loaded.
    """
    context = ssl.create_default_context(cafile=ca_file)
    if cert_file is not None and key_file is not None:
        # The empty password makes an encrypted key an error; without it OpenSSL would prompt on the terminal.
        context.load_cert_chain(cert_file, key_file, password="")
    return context
