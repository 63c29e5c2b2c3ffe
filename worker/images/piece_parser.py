"""Run a parser on a file that arrives in pieces of any size."""

from collections.abc import Generator
from typing import TypeAlias

# A parser yields how many bytes to skip and how many to read then; it receives those that were read.
Parsing: TypeAlias = Generator[tuple[int, int], bytes, None]


class PieceParser:
    """Feeds a parser, and keeps only what it is waiting for.

    Attributes:
        is_done: the parser has ended, or is not needed any longer.
    """

    def __init__(self, parsing: Parsing) -> None:
        self.is_done = False
        self._parsing = parsing
        self._skip, self._wanted = next(parsing)
        self._read = bytearray()

    def feed(self, piece: bytes) -> int:
        """Give the parser what it asks for; return how many bytes of the piece it took."""
        if self.is_done:
            return 0
        # Local variables: a PNG of 10 MB has more than a thousand chunks.
        wanted, end, send = self._wanted, len(piece), self._parsing.send
        start = self._skip
        stop = start + wanted
        while stop <= end:
            content = piece[start:stop]
            if self._read:
                content = bytes(self._read + content)
                self._read.clear()
            try:
                skip, wanted = send(content)
            except StopIteration:
                self.is_done = True
                return stop
            start = stop + skip
            stop = start + wanted
        self._skip, self._wanted = max(0, start - end), wanted
        if start < end:
            self._read += piece[start:]
            self._wanted -= end - start
        return end
