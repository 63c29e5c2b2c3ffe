"""Checksums that S3 has stored for an object (Amazon S3 user guide, "Checking object integrity").

The algorithms are those that the SDK verifies without its C library. CRC32C and CRC64NVME would need one.
"""

import base64
import binascii
import hashlib
import zlib
from collections.abc import Callable, Mapping
from typing import Final, Protocol

CHECKSUM_MODE: Final = {"x-amz-checksum-mode": "ENABLED"}


class _Hash(Protocol):
    def update(self, piece: bytes, /) -> None: ...

    def digest(self) -> bytes: ...


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, piece: bytes, /) -> None:
        self._value = zlib.crc32(piece, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


# The fastest first: some stores send several.
_ALGORITHMS: Final[Mapping[str, Callable[[], _Hash]]] = {
    "crc32": _Crc32,
    "sha1": hashlib.sha1,
    "sha256": hashlib.sha256,
    "sha512": hashlib.sha512,
}


class Checksum:
    """The checksum of an object that is being read."""

    def __init__(self, hash_: _Hash, expected: bytes) -> None:
        self._hash = hash_
        self._expected = expected

    def update(self, piece: bytes) -> None:
        """Add a piece of the content."""
        self._hash.update(piece)

    @property
    def is_right(self) -> bool:
        """Whether the content so far has the expected checksum."""
        return self._hash.digest() == self._expected


def checksum_of(headers: Mapping[str, str]) -> Checksum | None:
    """Return the checksum of a whole object in a response, if there is one that can be verified."""
    for name, create in _ALGORITHMS.items():
        # `-` and a number: a checksum of the parts' checksums.
        value = headers.get(f"x-amz-checksum-{name}", "")
        if value and "-" not in value and headers.get("x-amz-checksum-type", "").upper() != "COMPOSITE":
            try:
                return Checksum(create(), base64.b64decode(value, validate=True))
            except binascii.Error:
                continue
    return None
