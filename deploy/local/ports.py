"""Free ports for one stack, such that several stacks on one machine never use the same."""

import contextlib
import random
import socket

# Below the range of local ports of outgoing connections (Linux from 32768, macOS from 49152): while a test
# has a service stopped, no connection can take its port.
_FIRST, _END = 20_000, 30_000
_BLOCK_SIZE = 25


class PortBlock:
    """Neighbouring ports that belong to one stack until `close`.

    The first port of the block is a lock, which the operating system releases when this process ends.
    """

    def __init__(self) -> None:
        starts = list(range(_FIRST, _END, _BLOCK_SIZE))
        random.SystemRandom().shuffle(starts)
        for start in starts:
            lock = socket.socket()
            try:
                lock.bind(("127.0.0.1", start))
                lock.listen()
            except OSError:
                lock.close()
                continue
            self._lock = lock
            self._free = [port for port in range(start + 1, start + _BLOCK_SIZE) if _is_free(port)]
            return
        raise RuntimeError(
            f"No free ports between {_FIRST} and {_END}: stop some of the stacks on this machine."
        )

    def take(self) -> int:
        """Return a port that no process listens on."""
        return self._free.pop()

    def close(self) -> None:
        """Release the block."""
        self._lock.close()


def _is_free(port: int) -> bool:
    # On all interfaces, as another service may listen on any of them.
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("", port))
        return True
    return False
