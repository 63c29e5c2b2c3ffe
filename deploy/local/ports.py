"""Free ports for one stack, such that several stacks on one machine never ask for the same."""

import random
import socket

# Below the range from which systems draw the local ports of outgoing connections (Linux from 32768, macOS
# from 49152): while a service is stopped for a test, no connection can take the port it comes back to.
_FIRST, _END = 20_000, 30_000
_BLOCK_SIZE = 25


class PortBlock:
    """Neighbouring ports that belong to one stack while this object is open.

    The first port of the block is held as a lock, which the operating system lets go when this process ends.
    """

    def __init__(self) -> None:
        starts = list(range(_FIRST, _END, _BLOCK_SIZE))
        random.SystemRandom().shuffle(starts)
        for start in starts:
            lock = _listen(start)
            if lock is not None:
                self._lock = lock
                self._free = [port for port in range(start + 1, start + _BLOCK_SIZE) if _is_free(port)]
                return
        raise RuntimeError(
            f"No free ports between {_FIRST} and {_END}: stop some of the stacks on this machine."
        )

    def take(self) -> int:
        """Return a port that nobody listens on."""
        return self._free.pop()

    def close(self) -> None:
        """Give the block back."""
        self._lock.close()


def _listen(port: int) -> socket.socket | None:
    listener = socket.socket()
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()
    except OSError:
        listener.close()
        return None
    return listener


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            # All interfaces, as a service of somebody else may listen on any of them.
            probe.bind(("", port))
        except OSError:
            return False
    return True
