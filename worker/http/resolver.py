"""Resolve host names; `localhost` to both of its addresses."""

import socket
from typing import Final

from aiohttp import ThreadedResolver
from aiohttp.abc import ResolveResult

_LOOPBACK: Final = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


class Resolver(ThreadedResolver):
    """Resolves `localhost` as RFC 6761 §6.3 says, and everything else with the operating system.

    aiohttp looks up addresses of configured families only. On a machine whose only IPv6 address is `::1` it
    would never try that one, on which a server may be listening.
    """

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the addresses of a host."""
        if host.rstrip(".").lower() != "localhost":
            return await super().resolve(host, port, family)
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=0)
            for kind, address in _LOOPBACK
            if family in (socket.AF_UNSPEC, kind)
        ]
