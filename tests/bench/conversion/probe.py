"""Poll `/livez` of a worker every 20 ms: `python -m tests.bench.conversion.probe PORT`.

When its standard input ends, it writes the latencies in milliseconds as JSON. The endpoint is served by the
event loop that processes the jobs, so its latency includes the event loop's lag.
"""

import contextlib
import json
import select
import socket
import sys
import time

INTERVAL_S = 0.02
_REQUEST = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


def main() -> None:
    """Poll until the standard input ends."""
    latencies: list[float] = []
    with contextlib.closing(socket.create_connection(("127.0.0.1", int(sys.argv[1])))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        due = answered = time.perf_counter()
        while not select.select([sys.stdin], [], [], max(0.0, due - time.perf_counter()))[0]:
            # After a late answer, the next requests count from the time at which they were due.
            is_late = answered > due
            asked = due if is_late else time.perf_counter()
            connection.sendall(_REQUEST)
            _read_answer(connection)
            answered = time.perf_counter()
            latencies.append((answered - asked) * 1000)
            due += INTERVAL_S
            if not is_late:
                due = max(due, asked)
    json.dump(latencies, sys.stdout)


def _read_answer(connection: socket.socket) -> None:
    head, _, body = b"", b"", b""
    while b"\r\n\r\n" not in head:
        head += _received(connection)
    head, _, body = head.partition(b"\r\n\r\n")
    lengths = [
        line.split(b":")[1] for line in head.lower().splitlines() if line.startswith(b"content-length:")
    ]
    left = int(lengths[0]) - len(body)
    while left > 0:
        left -= len(_received(connection))


def _received(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    if not data:
        raise ConnectionError("the worker closed the connection")
    return data


if __name__ == "__main__":
    main()
