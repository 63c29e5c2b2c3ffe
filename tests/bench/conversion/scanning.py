"""Measure what an image costs that is sent unchanged: the scan of its structure, next to base64."""

import time
from collections.abc import Callable
from typing import Final

from tests.bench.conversion.report import BASE64, SCAN
from tests.bench.conversion.sources import padded
from tests.bench.results import Results
from worker.images.encoding import encode
from worker.images.scan import scan_for

TYPES: Final = {"JPEG": "image/jpeg", "PNG": "image/png", "WebP": "image/webp"}
SIZES: Final = {"100 KB": 100_000, "1 MB": 1_000_000, "10 MB": 10_000_000}
# As `preparation.SMALL_BYTES`: a smaller image is one piece.
_PIECE_BYTES: Final = 256 * 1024
_AT_LEAST_S: Final = 0.1


def measure(results: Results, *, rounds: int) -> None:
    """Measure each type and size; the scan sees the pieces that the worker reads."""
    for form, media_type in TYPES.items():
        for shown, size in SIZES.items():
            content = padded(media_type, size)
            pieces = [content[start : start + _PIECE_BYTES] for start in range(0, len(content), _PIECE_BYTES)]

            def scan(media_type: str = media_type, pieces: list[bytes] = pieces) -> None:
                scan = scan_for(media_type)
                for piece in pieces:
                    scan.feed(piece)
                assert scan.finish() is None

            def base64(pieces: list[bytes] = pieces) -> None:
                for piece in pieces:
                    encode(piece)

            for number in range(rounds):
                for name, run in ((SCAN, scan), (BASE64, base64)):
                    results.add("scan", name, f"{form}, {shown}", number, {"cpu_us": _cpu_us(run)})


def _cpu_us(run: Callable[[], None]) -> float:
    """Return the CPU time of a call in microseconds, from as many calls as take a while."""
    calls, took_s = 1, 0.0
    while True:
        started = time.process_time()
        for _ in range(calls):
            run()
        took_s = time.process_time() - started
        if took_s >= _AT_LEAST_S:
            return took_s / calls * 1e6
        calls = max(calls * 2, int(calls * 1.2 * _AT_LEAST_S / max(took_s, 1e-6)))
