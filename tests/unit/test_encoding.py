"""Streaming changes no byte: base64 of chunks, and the request body around it."""

import asyncio
import base64
import json
import random
import re
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import Dependency, DependencyDownError, TransientError
from worker.images.encoding import EncodedStream, decode_slices, encode, encoded_length, iterate_async
from worker.images.preparation import SMALL_BYTES
from worker.images.urls import BufferedUrl, StreamedUrl
from worker.model.request import PLACEHOLDER, ImageUrl, RequestBody, body_parts
from worker.model.request import SMALL_BYTES as SMALL_BODY_BYTES

PREFIX = b"data:image/png;base64,"
CONTENT = random.Random(3).randbytes(3 * SMALL_BYTES + 3 * SMALL_BODY_BYTES)  # noqa: S311 - no secret
BOUNDARIES = [
    0,
    3,
    1024,
    SMALL_BYTES,
    SMALL_BYTES * 3 // 4,
    SMALL_BODY_BYTES,
    SMALL_BODY_BYTES * 3 // 4,
    2 * SMALL_BYTES,
]
SIZES = sorted({max(0, size + more) for size in BOUNDARIES for more in range(-3, 4)})
# The size of a read from S3, and sizes with every remainder modulo 3.
CUTS = [1, 2, 3, 4, 5, 7, 1000, 16_384, 65_535, 65_536, 65_537, 262_144]


def cut(content: bytes, chance: random.Random) -> Iterator[bytes]:
    """Yield the content in chunks of random sizes, some of them empty."""
    most = max(chance.choice(CUTS), len(content) // 50)
    start = 0
    while start < len(content):
        size = chance.choice([0, 1, most, chance.randint(0, most)]) if most > 100 else chance.randint(0, most)
        yield content[start : start + size]
        start += size


async def joined(pieces: AsyncIterator[bytes]) -> bytes:
    return b"".join([bytes(piece) async for piece in pieces])


async def collect(pieces: AsyncIterable[bytes], got: list[bytes]) -> None:
    """Collect the chunks in `got`, also those before an error."""
    async for piece in pieces:
        got.append(bytes(piece))  # noqa: PERF401


def body_of(urls: Sequence[ImageUrl], **params: Any) -> RequestBody:
    """Return a body with text before, between and after the images."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": "before, 猫"}]
    for n, _ in enumerate(urls):
        parts.append({"type": "image_url", "image_url": {"url": PLACEHOLDER}})
        parts.append({"type": "text", "text": f'after {n} "\\'})
    return RequestBody(body_parts("m", [{"role": "user", "content": parts}], params), urls)


def urls_in(raw: bytes) -> list[str]:
    parts = json.loads(raw)["messages"][0]["content"]
    return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


def url_of(content: bytes) -> str:
    return (PREFIX + base64.b64encode(content)).decode()


# Encoding


async def test_random_chunks_of_thousands_of_sizes_give_the_base64_of_the_whole() -> None:
    chance = random.Random(11)  # noqa: S311 - no secret
    for size in chain(range(200), (chance.randint(0, 3000) for _ in range(3000))):
        content = CONTENT[:size]
        encoded = await joined(EncodedStream(iterate_async(cut(content, chance))))
        assert encoded == base64.b64encode(content) == encode(content)
        assert encoded_length(size) == len(encoded)


@pytest.mark.parametrize("size", SIZES)
async def test_sizes_around_every_boundary_give_the_base64_of_the_whole(size: int) -> None:
    chance = random.Random(size)  # noqa: S311 - no secret
    content = CONTENT[:size]
    for _ in range(3):
        assert await joined(EncodedStream(iterate_async(cut(content, chance)))) == base64.b64encode(content)


@given(pieces=st.lists(st.binary(max_size=8), max_size=20))
async def test_only_the_end_is_padded_for_all_chunk_sizes(pieces: list[bytes]) -> None:
    encoded = [piece async for piece in EncodedStream(iterate_async(pieces))]
    assert b"".join(encoded) == base64.b64encode(b"".join(pieces))
    assert not any(piece.endswith(b"=") for piece in encoded[:-1])


async def test_an_error_of_the_source_is_raised_unchanged() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"12345"
        raise TransientError(Dependency.S3, "connection_error", "it was interrupted")

    got: list[bytes] = []
    with pytest.raises(TransientError, match="it was interrupted"):
        await collect(EncodedStream(broken()), got)
    # The remainder is not padded, so a truncated image does not look complete.
    assert b"".join(got) == base64.b64encode(b"123")


# Decoding


@pytest.mark.parametrize("size", SIZES)
def test_an_embedded_image_is_decoded_to_the_same_bytes(size: int) -> None:
    content = CONTENT[:size]
    encoded = base64.b64encode(content)
    assert b"".join(decode_slices(memoryview(encoded))) == content
    assert b"".join(decode_slices(memoryview(encoded.rstrip(b"=")))) == content
    lines = b"\r\n".join(encoded[start : start + 76] for start in range(0, len(encoded), 76))
    assert b"".join(decode_slices(memoryview(b" " + lines + b"\n"))) == content


def test_an_embedded_image_is_decoded_in_slices() -> None:
    encoded = base64.b64encode(CONTENT)
    pieces = [len(piece) for piece in decode_slices(memoryview(encoded))]
    assert max(pieces) < len(CONTENT) / 4


@pytest.mark.parametrize(
    "text",
    [
        b"A", b"AAAAA", b"AA=A", b"AAAA=", b"====", b"AA==AA==", b"A===", b"AAA==", b"AA%A", b"AA*A",
        b"\xc3\xa9AA", b"AAAA\x00AAA", b"AA==AA", b"AA== A",
    ],
)  # fmt: skip
@pytest.mark.parametrize("blanks", [b"", b"  "], ids=["whole groups", "shifted"])
@pytest.mark.parametrize("before", [0, 256 * 1024 - 4, 256 * 1024])
def test_invalid_base64_is_rejected_at_every_position(text: bytes, before: int, blanks: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        b"".join(decode_slices(memoryview(blanks + b"A" * before + text)))


@pytest.mark.parametrize("more", [b"AAAA", b"AA==", b"A", b"="])
@pytest.mark.parametrize("blanks", [256 * 1024 - 4, 256 * 1024, 600_000])
@pytest.mark.parametrize("padded", [b"AA==", b"AAA="])
def test_data_after_the_padding_is_rejected_with_any_white_space_between(
    padded: bytes, blanks: int, more: bytes
) -> None:
    with pytest.raises(ValueError, match=r".+"):
        b"".join(decode_slices(memoryview(padded + b" " * blanks + more)))
    assert b"".join(decode_slices(memoryview(padded + b"\n" * blanks))) == base64.b64decode(padded)


@pytest.mark.parametrize("size", range(100, 130))
def test_json_escapes_across_slices_are_decoded(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.images.encoding._SLICE_CHARS", 32)
    content = (b"\xff\xfb\xef\xbe" * 40)[:size]
    text = base64.b64encode(content)
    lines = rb"\r\n".join(text[start : start + 60] for start in range(0, len(text), 60))
    escaped = [
        text.replace(b"/", rb"\/"),
        text.replace(b"+", rb"\u002B"),
        text.replace(b"+", rb"\u002b").replace(b"/", rb"\u002F"),
        lines + rb"\t\n",
    ]
    assert [b"".join(decode_slices(memoryview(it))) for it in escaped] == [content] * len(escaped)


@pytest.mark.parametrize(
    "escape", [rb"\\", rb"\"", rb"\x", rb"\u00", rb"\u00e9", rb"\ud83d", b"\\", rb"\u0041" * 2000]
)
def test_escapes_that_are_not_base64_are_rejected(escape: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        b"".join(decode_slices(memoryview(b"AAAA" + escape + b"AAAA")))


@pytest.mark.parametrize("size", range(100, 130))
def test_the_url_safe_alphabet_and_percent_encoding_are_decoded(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.images.encoding._SLICE_CHARS", 32)
    content = (b"\xff\xfb\xef\xbe" * 40)[:size]
    text = base64.b64encode(content)
    lines = b"\r\n".join(text[start : start + 60] for start in range(0, len(text), 60))
    encoded = [
        base64.urlsafe_b64encode(content),
        base64.urlsafe_b64encode(content).rstrip(b"="),
        quote(text, safe="").encode(),
        re.sub(rb"%..", lambda found: found[0].lower(), quote(text, safe="").encode()),
        quote(lines, safe="").encode(),
    ]
    assert [b"".join(decode_slices(memoryview(it))) for it in encoded] == [content] * len(encoded)


@pytest.mark.parametrize("before", [0, 256 * 1024 - 4, 256 * 1024, 600_000])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"AA*A", "character {2} is '*'"),
        (b"AAAA\x00AAA", "character {4} is '\\x00'"),
        (b"\xc3\xa9AA", "character {0} is 'é'"),
        (b"AA%41", "character {2} is '%'"),
        (rb"A\"AA", "character {1} is '\"'"),
        (b"AA==AA==", "character {4} comes after the padding"),
        (b"AA= =\nAA", "character {6} comes after the padding"),
        (b"AA%3D%3DAA", "character {8} comes after the padding"),
        (b"AA%3D%3D%40", "character {8} is '%'"),
        (b"A", "its end is missing or its padding is wrong"),
    ],
)
def test_the_first_wrong_character_is_named(text: bytes, says: str, before: int) -> None:
    expected = re.sub(r"\{(\d)\}", lambda found: str(before + int(found[1]) + 1), says)
    with pytest.raises(ValueError, match=r".+") as caught:
        b"".join(decode_slices(memoryview(b"A" * before + text)))
    assert str(caught.value) == expected


@given(text=st.text(alphabet="AB/+= \n-*", max_size=30).map(str.encode))
def test_slices_are_as_strict_as_the_whole(text: bytes) -> None:
    bare = bytes(byte for byte in text if byte not in b" \n").replace(b"-", b"+")
    # Python's decoder accepts more padding than is valid.
    is_whole = re.fullmatch(rb"([AB/+]{4})*([AB/+]{2}={0,2}|[AB/+]{3}=?)?", bare)
    expected = base64.b64decode(bare + b"=" * (-len(bare) % 4), validate=True) if is_whole else None
    try:
        found = b"".join(decode_slices(memoryview(text)))
    except ValueError:
        found = None
    assert found == expected


# The body


async def test_a_thousand_bodies_are_complete_and_match_their_content_length() -> None:
    chance = random.Random(5)  # noqa: S311 - no secret
    for _ in range(1000):
        contents = [CONTENT[: chance.randint(0, 3000)] for _ in range(chance.randint(0, 4))]
        urls: list[ImageUrl] = [
            BufferedUrl(url_of(content).encode())
            if chance.random() < 0.3
            else StreamedUrl(PREFIX, len(content), iterate_async(cut(content, chance)))
            for content in contents
        ]
        body = body_of(urls, seed=1)
        raw = await joined(aiter(body))
        assert len(raw) == body.length
        assert urls_in(raw) == [url_of(content) for content in contents]
        assert json.loads(raw)["seed"] == 1
        assert body.is_sent


@pytest.mark.parametrize(("one", "other"), [*pairwise(SIZES)])
async def test_bodies_with_images_around_every_boundary_are_complete(one: int, other: int) -> None:
    chance = random.Random(one)  # noqa: S311 - no secret
    contents = [CONTENT[:one], CONTENT[:other], CONTENT[:one]]
    link = "https://images.example/a.png?x=1&y=%2F"
    urls: list[ImageUrl] = [
        StreamedUrl(PREFIX, one, iterate_async(cut(contents[0], chance))),
        BufferedUrl(link.encode()),
        BufferedUrl(url_of(contents[1]).encode()),
        StreamedUrl(PREFIX, one, iterate_async(cut(contents[2], chance))),
    ]
    body = body_of(urls)
    raw = await joined(aiter(body))
    assert len(raw) == body.length
    assert urls_in(raw) == [url_of(contents[0]), link, url_of(contents[1]), url_of(contents[2])]


async def test_small_bodies_are_sent_in_one_chunk_and_large_ones_in_chunks_smaller_than_images() -> None:
    small = body_of([BufferedUrl(url_of(CONTENT[:1000]).encode())])
    assert len([piece async for piece in small]) == 1
    large = body_of([StreamedUrl(PREFIX, len(CONTENT), iterate_async(cut(CONTENT, random.Random(0))))])  # noqa: S311
    pieces = [len(piece) async for piece in large]
    assert sum(pieces) == large.length
    assert max(pieces) < large.length / 4


async def test_a_body_records_when_it_was_sent() -> None:
    reported: list[int] = []
    got = 0
    text = BufferedUrl(b"x" * 2 * SMALL_BODY_BYTES)
    body = RequestBody([b"<", b">"], [text], on_sent=lambda: reported.append(got))
    async for piece in body:
        assert not reported
        assert not body.is_sent
        got += len(piece)
    assert reported == [body.length]
    assert body.is_sent


@pytest.mark.parametrize(
    "fault",
    [
        TransientError(Dependency.S3, "connection_error", "it was interrupted"),
        DependencyDownError(Dependency.S3, "it is missing"),
    ],
)
async def test_an_interrupted_body_raises_the_cause_and_never_counts_as_sent(fault: Exception) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield CONTENT[:1000]
        raise fault

    reported: list[bool] = []
    url = StreamedUrl(PREFIX, 2000, broken())
    body = RequestBody([b'"', b'"'], [url], on_sent=lambda: reported.append(True))
    got: list[bytes] = []
    with pytest.raises(type(fault)) as caught:
        await collect(body, got)
    assert caught.value is fault
    assert body.failure is fault
    assert sum(map(len, got)) < body.length
    assert (reported, body.is_sent) == ([], False)


async def test_at_a_timeout_the_late_dependency_is_known() -> None:
    waits, arrived = asyncio.Event(), asyncio.Event()

    async def late() -> AsyncIterator[bytes]:
        waits.set()
        await arrived.wait()
        yield CONTENT[:1000]

    link = BufferedUrl(b"https://images.example/a.png")
    url = StreamedUrl(PREFIX, 1000, late())
    names = ["images[0] (https://…)", "images[1] (s3://…)"]
    body = RequestBody([b"<", b",", b">"], [link, url], names=names)
    assert body.late_image_error is None
    reading = asyncio.create_task(joined(aiter(body)))
    await waits.wait()
    late_image = body.late_image_error
    assert late_image is not None
    assert (late_image.dependency, late_image.reason) == (Dependency.S3, "timeout")
    assert late_image.message.startswith("images[1] (s3://…): ")
    arrived.set()
    assert len(await reading) == body.length
    # From here on the worker waits for the API.
    assert body.late_image_error is None


async def test_the_time_for_images_is_measured_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("worker.model.request.time.monotonic", lambda: now)

    async def slow() -> AsyncIterator[bytes]:
        nonlocal now
        for _ in range(4):
            now += 2.0  # S3
            yield CONTENT[:SMALL_BODY_BYTES]

    body = RequestBody([b"<", b">"], [StreamedUrl(PREFIX, 4 * SMALL_BODY_BYTES, slow())])
    async for _ in body:
        now += 100.0  # the API
    assert body.waited_s == pytest.approx(8.0)
