"""Asks a service whether it is really up, not only whether its port is open."""

import base64
import http.client
import socket
import urllib.error
import urllib.request

_TIMEOUT_SECONDS = 5

# What an AMQP 0-9-1 client says first, and the frame type (method) that the broker's reply starts with.
_AMQP_GREETING = b"AMQP\x00\x00\x09\x01"
_AMQP_METHOD_FRAME = b"\x01"

# Proxies from the environment are for the world outside, never for this machine.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def amqp_ok(port: int) -> bool:
    """Tell whether a broker on this machine greets back."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_SECONDS) as connection:
            connection.sendall(_AMQP_GREETING)
            return connection.recv(1) == _AMQP_METHOD_FRAME
    except OSError:
        return False


def http_ok(url: str, *, user: str = "", password: str = "") -> bool:
    """Tell whether a GET succeeds."""
    request = urllib.request.Request(url)  # noqa: S310 - the caller's own http:// URL
    if user:
        credentials = base64.b64encode(f"{user}:{password}".encode()).decode()
        request.add_header("Authorization", f"Basic {credentials}")
    try:
        with _opener.open(request, timeout=_TIMEOUT_SECONDS):
            return True
    except (OSError, http.client.HTTPException, urllib.error.URLError):
        return False
