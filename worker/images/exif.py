"""Read the orientation of an image from its EXIF metadata."""

from typing import Final, Literal

# A segment of a JPEG is not longer; other formats may have more, after the orientation.
EXIF_BYTES: Final = 64 * 1024
# Before the metadata: always in JPEG, sometimes by mistake in PNG and WebP.
PREFIX: Final = b"Exif\0\0"
_BYTE_ORDERS: Final[dict[bytes, Literal["little", "big"]]] = {b"II*\0": "little", b"MM\0*": "big"}
_ORIENTATION: Final = 0x0112
_MAX_ORIENTATION: Final = 8
_ENTRY_BYTES: Final = 12
# Lengths of the types SHORT and LONG.
_LENGTHS: Final = {3: 2, 4: 4}


def read_orientation(exif: bytes) -> int:
    """Return the orientation, 1 to 8, in IFD0 (TIFF 6.0, section 2); 1 if there is none or it is damaged."""
    exif = exif[: EXIF_BYTES + len(PREFIX)].removeprefix(PREFIX)
    order = _BYTE_ORDERS.get(exif[:4])
    if order is None:
        return 1
    # A slice past the end is shorter: the number is smaller, and no exception is raised.
    first = int.from_bytes(exif[4:8], order)
    end = first + 2 + _ENTRY_BYTES * int.from_bytes(exif[first : first + 2], order)
    for entry in range(first + 2, min(end, len(exif) - _ENTRY_BYTES + 1), _ENTRY_BYTES):
        if int.from_bytes(exif[entry : entry + 2], order) == _ORIENTATION:
            length = _LENGTHS.get(int.from_bytes(exif[entry + 2 : entry + 4], order), 0)
            value = int.from_bytes(exif[entry + 8 : entry + 8 + length], order)
            return value if 1 <= value <= _MAX_ORIENTATION else 1
    return 1
