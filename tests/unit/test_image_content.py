"""Image types are detected from the first bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import picture
from vqa_worker.messages.image_types import media_type


@pytest.mark.parametrize(
    ("kind", "expected"), [("JPEG", "image/jpeg"), ("PNG", "image/png"), ("WEBP", "image/webp")]
)
def test_supported_types_are_detected_from_the_content(kind: str, expected: str) -> None:
    assert media_type(picture(kind)) == expected


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO", "PPM"])
def test_other_types_are_not_supported(kind: str) -> None:
    assert media_type(picture(kind)) is None


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff", b"\xff\xd8", b"\x89PNG", b"\x89PNG\r\n\x1a", b"\x89PNG\n\x1a\n12345678",
        b"RIFF", b"WEBP",
        b"RIFF\x00\x00\x00\x00", b"RIFF\x00\x00\x00\x00WEB", b"RIFF\x24\x00\x00\x00WAVEfmt ", b"RIFFWEBP",
        b"RIFX\x00\x00\x00\x00WEBP", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", b"\x00" * 64,
        b" \xff\xd8\xff", b"<Error><Code>NoSuchKey</Code></Error>",
    ],
)  # fmt: skip
def test_an_incomplete_signature_is_not_supported(content: bytes) -> None:
    assert media_type(content) is None


@given(content=st.binary(max_size=64))
def test_any_bytes_are_accepted(content: bytes) -> None:
    kind = media_type(content)
    assert kind is None or len(content) >= 3
