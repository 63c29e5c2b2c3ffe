"""Find the mark at the end of a file that arrives in pieces, without reading all of it."""

from typing import Final

# A file of one piece up to this size is searched as a whole if the mark is not in its last bytes.
WHOLE_BYTES: Final = 256 * 1024
_TAIL_BYTES: Final = 64


class EndSearch:
    """Looks for a mark of two bytes in the last bytes of a file; if thorough, everywhere."""

    def __init__(self, mark: bytes, *, is_thorough: bool) -> None:
        self._mark = mark
        self._is_thorough = is_thorough
        self._is_found = False
        self._tail = b""
        # The only piece, as long as it is one.
        self._whole: bytes | None = None

    def feed(self, piece: bytes, start: int = 0, *, is_first: bool = False) -> None:
        """Read a piece of the file from `start`; the mark is not before it."""
        if not (self._is_thorough or is_first or start) and len(piece) >= _TAIL_BYTES:
            self._whole, self._tail = None, piece[-_TAIL_BYTES:]
            return
        if self._is_thorough:
            border = self._tail[-1:] + piece[start : start + 1]
            self._is_found = self._is_found or border == self._mark or piece.find(self._mark, start) >= 0
        elif is_first and len(piece) <= WHOLE_BYTES:
            self._whole = piece[start:]
        elif piece:
            self._whole = None
        self._tail = (self._tail + piece[max(start, len(piece) - _TAIL_BYTES) :])[-_TAIL_BYTES:]

    def finish(self) -> bool | None:
        """Return whether the mark was found; None: it was not looked for everywhere."""
        if self._is_found or self._mark in self._tail:
            return True
        if self._whole is not None:
            return self._mark in self._whole
        return False if self._is_thorough else None
