"""Read the header and the structure of JPEG, PNG and WebP images from a stream, without decoding them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from struct import Struct
from typing import Final, TypeAlias

from worker.images.end_search import EndSearch
from worker.images.exif import EXIF_BYTES, PREFIX, read_orientation
from worker.images.piece_parser import Parsing, PieceParser

# The header must be within this many bytes: the caller holds them back until it knows the header.
HEADER_BYTES: Final = 1024 * 1024
# More than real files have; they bound the time for files that consist of nothing else.
_MAX_MARKER_BYTES: Final = 8192
_MAX_CHUNKS: Final = 100_000

# JPEG markers: ISO/IEC 10918-1, table B.1.
_SOI: Final = b"\xff\xd8"
_EOI: Final = b"\xff\xd9"
_START_OF_SCAN: Final = 0xDA
_APP1: Final = 0xE1
_NO_MARKERS: Final = (0x00, 0xFF)
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# SOF9 and higher, and those of other processes than baseline, extended and progressive.
_ARITHMETIC: Final = 0xC9
_DECODED_FRAMES: Final = frozenset((0xC0, 0xC1, 0xC2, 0xC9, 0xCA))
_WITHOUT_LENGTH: Final = frozenset((0x01, *range(0xD0, 0xD9)))
_SEGMENTS_TO_READ: Final = {_APP1: 2**16, **dict.fromkeys(_FRAMES, 6)}
_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
# First chunks of a WebP, with the length of their headers, and chunks with pixels: RFC 9649 §2.5 to §2.7.
_WEBP_HEADERS: Final = {b"VP8 ": 10, b"VP8L": 5, b"VP8X": 10}
_WEBP_PIXELS: Final = (b"VP8 ", b"VP8L", b"ANMF")
_WEBP_ANIMATION, _WEBP_EXIF = 0x02, 0x08

_PNG_CHUNK: Final = Struct(">I4s")
_WEBP_CHUNK: Final = Struct("<4sI")
_Reader: TypeAlias = Callable[[bytes], object]
_big = partial(int.from_bytes, byteorder="big")
_little = partial(int.from_bytes, byteorder="little")


class Scan(ABC):
    """The header and the structure of an image that is fed in pieces. No method raises on any content.

    Attributes:
        width: in pixels, before the orientation is applied; None: unknown.
        height: likewise.
        orientation: EXIF orientation, 1 to 8; 1 without one.
        is_cmyk: the image has four channels of ink.
        is_16_bit: its samples have more than 8 bits.
        is_animated: it has several frames.
        is_arithmetic: a JPEG with arithmetic coding, which many decoders lack.
        is_lossless: a JPEG of the lossless or hierarchical process, which nearly all decoders lack.
        has_header: the attributes above are final, but for the orientation of a WebP (see
            `is_orientation_unknown`), and of a PNG whose EXIF comes after its pixels.
        is_orientation_unknown: the orientation stands at the end of the file, which has not been fed yet.
        needs_search: set by `finish`: the end may be earlier; scan again with `thorough`.
    """

    def __init__(self) -> None:
        self.width: int | None = None
        self.height: int | None = None
        self.orientation = 1
        self.is_cmyk = self.is_16_bit = self.is_animated = self.is_arithmetic = self.is_lossless = False
        self.has_header = self.is_orientation_unknown = self.needs_search = False
        self._size = 0
        # What the file must have according to its header.
        self._declared_size = 0
        self._fault: str | None = None
        self._parser = PieceParser(self._parse())
        # What reads the next piece.
        self._reader: _Reader = self._parser.feed

    def feed(self, piece: bytes) -> None:
        """Read the next piece of the file."""
        size = self._size
        self._size = size + len(piece)
        if self.has_header or self._size < HEADER_BYTES:
            self._reader(piece)
            return
        left = HEADER_BYTES - size
        self._reader(piece[:left])
        if not self.has_header:
            self._give_up()
        self._reader(piece[left:])

    def check(self, size: int) -> str | None:
        """Return what is known to be wrong with a file of `size` bytes; None: nothing yet."""
        if self._fault is not None:
            return self._fault
        if 0 in (self.width, self.height):
            return "its width or height is zero"
        if size < self._declared_size:
            return f"the end of the image is missing (it has {size} of {self._declared_size} bytes)"
        return None

    def finish(self) -> str | None:
        """Return what is wrong or missing after the last piece; None if the image is complete."""
        return self.check(self._size) or self._missing()

    @abstractmethod
    def _parse(self) -> Parsing:
        """Parse the file; set the attributes."""

    @abstractmethod
    def _missing(self) -> str | None:
        """Return what is missing at the end of the file."""

    def _give_up(self) -> None:
        """Leave the rest of the header unknown."""
        self.has_header = True

    def _fail(self, fault: str) -> None:
        self._fault = fault
        self.has_header = True


class _JpegScan(Scan):
    """Walks the segments up to the first scan; of what follows, only the end counts."""

    def __init__(self, *, is_thorough: bool) -> None:
        super().__init__()
        self._has_exif = False
        self._end_search = EndSearch(_EOI, is_thorough=is_thorough)
        self._reader = self._read_header

    def _read_header(self, piece: bytes) -> None:
        start = self._parser.feed(piece)
        if self._parser.is_done:
            self._end_search.feed(piece, start, is_first=self._size == len(piece))
            self._reader = self._end_search.feed

    def _give_up(self) -> None:
        super()._give_up()
        self._parser.is_done = True
        self._reader = self._end_search.feed

    def _missing(self) -> str | None:
        if not self._parser.is_done:
            return "the end of the image is missing (the file ends in its header)"
        is_found = self._end_search.finish()
        self.needs_search = is_found is None
        return None if is_found else "the end of the image is missing (no EOI marker)"

    def _parse(self) -> Parsing:
        """Parse marker segments (ISO/IEC 10918-1, B.1.1.4)."""
        if (yield 0, 2) != _SOI:
            self._fail("it does not begin with a JPEG header")
            return
        skip, is_marker = 0, False
        for _ in range(_MAX_MARKER_BYTES):
            marker = (yield skip, 1)[0]
            skip = 0
            if not is_marker or marker in _NO_MARKERS:
                # Fill bytes are allowed before a marker; like decoders, skip others too.
                is_marker = marker == _NO_MARKERS[1]
                continue
            is_marker = False
            if marker in _WITHOUT_LENGTH:
                continue
            if marker == _EOI[1]:
                self._fail("the image data is missing (no SOS marker)")
                return
            skip = _big((yield 0, 2)) - 2
            if skip < 0:
                break
            if marker == _START_OF_SCAN:
                self.has_header = True
                if self.width is None:
                    self._fail("its header is damaged (no SOF marker)")
                yield skip, 0
                return
            content = yield 0, min(skip, _SEGMENTS_TO_READ.get(marker, 0))
            self._set_header(marker, content)
            skip -= len(content)
        # Not a sequence of segments, but decoders may make something of it.
        self._give_up()

    def _set_header(self, marker: int, content: bytes) -> None:
        """Read a frame header (B.2.2: precision, height, width, number of components), or EXIF."""
        if marker == _APP1 and not self._has_exif:
            self._has_exif = content.startswith(PREFIX)
            self.orientation = read_orientation(content) if self._has_exif else 1
        elif marker != _APP1 and content and self.width is None:
            self.is_16_bit = content[0] > 8  # noqa: PLR2004 bits
            self.is_arithmetic = marker >= _ARITHMETIC
            self.is_lossless = marker not in _DECODED_FRAMES
            self.height, self.width = _big(content[1:3]), _big(content[3:5])
            self.is_cmyk = content[5:] == b"\4"


class _PngScan(Scan):
    """Walks the chunks (PNG 3rd edition, 5.3)."""

    def _missing(self) -> str | None:
        return None if self._parser.is_done else "the end of the image is missing (no IEND chunk)"

    def _parse(self) -> Parsing:
        beginning = yield 0, 8 + 8 + 13
        if beginning[:16] != _PNG_SIGNATURE + b"\0\0\0\x0dIHDR":
            self._fail("it does not begin with a PNG header")
            return
        self.width, self.height = _big(beginning[16:20]), _big(beginning[20:24])
        self.is_16_bit = beginning[24] == 16  # noqa: PLR2004 bits
        # The CRC of each chunk is skipped with its content.
        skip, has_pixels = 4, False
        for _ in range(_MAX_CHUNKS):
            length, kind = _PNG_CHUNK.unpack((yield skip, 8))
            skip = length + 4
            if kind == b"IDAT":
                self.has_header = has_pixels = True
                continue
            if not kind.isalpha():
                self._fail("its structure is damaged (an invalid chunk)")
                return
            if kind == b"IEND":
                break
            # EXIF may come after the pixels (5.6). The caller sees it in time only in the first piece, which
            # is the whole file if that is small.
            if (kind == b"eXIf" and (has_pixels or not self.has_header)) or (
                kind == b"acTL" and not self.has_header
            ):
                content = yield 0, min(length, EXIF_BYTES)
                skip -= len(content)
                if self.has_header and not has_pixels:
                    continue
                if kind == b"eXIf":
                    self.orientation = read_orientation(content)
                else:  # the number of frames comes first: 11.3.6.1
                    self.is_animated = _big(content[:4]) > 1
        else:
            return
        self.has_header = True
        if not has_pixels:
            self._fail("the image data is missing (no IDAT chunk)")
        yield skip, 0


class _WebpScan(Scan):
    """Reads the first chunk; walks the chunks of the extended format, to find the orientation."""

    def _missing(self) -> str | None:
        return None if self.has_header else "the end of the image is missing (the file ends in its header)"

    def _parse(self) -> Parsing:
        beginning = yield 0, 20
        kind, length = beginning[12:16], _little(beginning[16:20])
        if beginning[:4] != b"RIFF" or beginning[8:12] != b"WEBP" or length < _WEBP_HEADERS.get(kind, 2**32):
            self._fail("it does not begin with a WebP header")
            return
        end = self._declared_size = 8 + _little(beginning[4:8])
        header = yield 0, _WEBP_HEADERS[kind]
        self._set_header(kind, header)
        if 20 + length > end:
            self._fail("its structure is damaged (a chunk is longer than the file)")
        if kind == b"VP8X" and self._fault is None:
            yield from self._parse_chunks(20 + len(header), length - len(header), end)

    def _set_header(self, kind: bytes, header: bytes) -> None:
        """Read the size: RFC 6386 §9.1 (VP8), RFC 9649 §3.4 (VP8L) and §2.7.1 (VP8X)."""
        self.has_header = True
        if kind == b"VP8X":
            self.is_animated = bool(header[0] & _WEBP_ANIMATION)
            self.is_orientation_unknown = bool(header[0] & _WEBP_EXIF)
            self.width = _little(header[4:7]) + 1
            self.height = _little(header[7:10]) + 1
        elif kind == b"VP8L" and header[0] == 0x2F:  # noqa: PLR2004 its signature
            bits = _little(header[1:])
            self.width, self.height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        elif kind == b"VP8 " and header[3:6] == b"\x9d\x01\x2a":
            self.width = _little(header[6:8]) & 0x3FFF
            self.height = _little(header[8:10]) & 0x3FFF
        else:
            self._fail("its header is damaged")

    def _parse_chunks(self, position: int, left: int, end: int) -> Parsing:
        """Parse the chunks up to `end`, after `left` bytes (and padding) of the chunk at `position`."""
        skip, has_pixels = left + left % 2, False
        for _ in range(_MAX_CHUNKS):
            position += skip
            if position + 8 > end:
                break
            kind, length = _WEBP_CHUNK.unpack((yield skip, 8))
            position += 8
            if position + length > end:
                self._fail("its structure is damaged (a chunk is longer than the file)")
                return
            has_pixels = has_pixels or kind in _WEBP_PIXELS
            skip = length + length % 2
            if kind == b"EXIF" and self.is_orientation_unknown:
                content = yield 0, min(length, EXIF_BYTES)
                self.orientation = read_orientation(content)
                self.is_orientation_unknown = False
                position += len(content)
                skip -= len(content)
        self.is_orientation_unknown = False
        if not has_pixels:
            self._fail("the image data is missing (no VP8 or VP8L chunk)")


def scan_for(media_type: str, *, thorough: bool = False) -> Scan:
    """Return a new scan of an image; `thorough`: search all of a JPEG for its end, not only its last bytes.

    Raises:
        KeyError: the type is not JPEG, PNG or WebP.
    """
    if media_type == "image/jpeg":
        return _JpegScan(is_thorough=thorough)
    return {"image/png": _PngScan, "image/webp": _WebpScan}[media_type]()
