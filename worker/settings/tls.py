"""The TLS connection to the broker: the checks of its files, and the context made of them."""

import ssl
from pathlib import Path
from typing import Annotated, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, FilePath, ValidationInfo

from worker.settings.faults import shown, variable


def _only_with_tls(path: Path | None, info: ValidationInfo) -> Path | None:
    url = info.data.get("rabbitmq_url")
    if path is not None and url is not None and urlsplit(url.get_secret_value()).scheme != "amqps":
        raise ValueError(
            f"is of no use without TLS: {variable('rabbitmq_url')} must begin with amqps://, or leave it out"
        )
    return path


def _holds_certificates(path: Path | None) -> Path | None:
    try:
        if path is not None:
            tls_context(path, None, None)
    except (OSError, ValueError):
        raise ValueError(f"{shown(path)} holds no certificates in PEM form that can be read") from None
    return path


def _belongs_to_certificate(path: Path | None, info: ValidationInfo) -> Path | None:
    if "rabbitmq_cert_file" not in info.data:  # it has a fault of its own
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
    """Check the broker against the CA file or the system's certificates; show it ours, if there is one.

    Raises:
        OSError, ValueError: a file cannot be loaded.
    """
    context = ssl.create_default_context(cafile=ca_file)
    if cert_file is not None and key_file is not None:
        # The empty password makes an encrypted key an error; without it OpenSSL would ask at the terminal,
        # and wait.
        context.load_cert_chain(cert_file, key_file, password="")
    return context
