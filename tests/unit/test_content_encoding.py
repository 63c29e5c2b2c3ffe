"""Compressed bodies are decompressed within a limit; other encodings are named in the error message."""

import asyncio
import base64
import gzip
import json
import tracemalloc
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cpu_time import is_within
from tests.unit.fakes import JOB, a_delivery
from vqa_worker.messages.content_encoding import ContentEncodingError, decompress, is_encoded
from vqa_worker.messages.conversation import Conversation
from vqa_worker.messages.decoding import InvalidJobError, decode, decompressed, parse_leniently
from worker.images.loader import display_name
from worker.images.source import Embedded, ImageSource, SourcePolicy, parse_source
from worker.jobs import request
from worker.jobs.attempt import Attempt
from worker.jobs.delivery import Delivery

BODY = json.dumps(JOB).encode()
LIMIT = 16_000_000
MAX_LOOP_S = 0.05


def gzipped(body: bytes) -> bytes:
    """Compress without a time, so that each process has the same test ids."""
    return gzip.compress(body, mtime=0)


def raw_deflate(body: bytes) -> bytes:
    return zlib.compress(body, wbits=-zlib.MAX_WBITS)


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzipped(BODY)),
        ("GZIP", gzipped(BODY)),
        (" gzip ", gzipped(BODY)),
        ("x-gzip", gzipped(BODY)),
        ("gzip", gzipped(BODY[:7]) + gzipped(BODY[7:])),
        ("gzip", b"".join(gzipped(bytes([byte])) for byte in b" " * 15) + gzipped(BODY)),
        ("deflate", zlib.compress(BODY)),
        ("deflate", raw_deflate(BODY)),
        ("Deflate", zlib.compress(BODY, level=0)),
        # A publisher that names a compression and does not compress.
        ("gzip", BODY),
        ("deflate", BODY),
        ("gzip", BODY.decode().encode("utf-8-sig")),
    ],
)
def test_an_accepted_encoding_gives_the_job(encoding: str, body: bytes) -> None:
    assert is_encoded(encoding)
    assert decode(decompress(body, encoding, LIMIT), None, LIMIT).id == JOB["id"]


@pytest.mark.parametrize(
    "encoding", [None, "utf-8", "UTF-8", "utf8", "identity", "binary", "8bit", "us-ascii", " utf-8"]
)
def test_the_name_of_a_character_set_is_not_an_encoding(encoding: str | None) -> None:
    assert not is_encoded(encoding)


@pytest.mark.parametrize(
    ("encoding", "body", "reason"),
    [
        ("br", BODY, r"^content_encoding br is not supported: gzip, deflate, identity and utf-8 are$"),
        ("zstd", b"\x28\xb5\x2f\xfd", "content_encoding zstd is not supported"),
        ("gzip, deflate", BODY, "content_encoding gzip, deflate is not supported"),
        ("base64", base64.b64encode(BODY), "base64 is not supported"),
        ("utf-16", BODY.decode().encode("utf-16"), "utf-16 is not supported"),
        ("", BODY, "is not supported"),
        ("a\nb", BODY, "content_encoding unprintable is not supported"),
        ("x" * 250, BODY, rf"content_encoding {'x' * 40} is not supported"),
        ("gzip", b"no JSON", "not valid gzip"),
        ("gzip", zlib.compress(BODY), "not valid gzip"),
        ("gzip", gzipped(BODY)[:-4], "incomplete"),
        ("gzip", gzipped(BODY)[:-4] + bytes(4), "not valid gzip"),
        ("gzip", gzipped(BODY) + b"more", "not valid gzip"),
        ("gzip", gzipped(b" ") * 17, "more than 16 gzip members"),
        ("gzip", b"", "incomplete"),
        ("deflate", zlib.compress(BODY)[:-1], "incomplete"),
        ("deflate", zlib.compress(BODY) + b"more", "more data after the end"),
        ("deflate", gzipped(BODY), "not valid deflate"),
    ],
)
def test_another_body_is_an_invalid_job_with_the_reason(encoding: str, body: bytes, reason: str) -> None:
    with pytest.raises(InvalidJobError, match=reason) as caught:
        decompressed(body, encoding, "the message", LIMIT)
    assert caught.value.job_id == "the message"
    assert not caught.value.id_in_body


@given(body=st.binary(max_size=200), encoding=st.sampled_from(["gzip", "deflate"]))
def test_any_bytes_are_decompressed_or_rejected(body: bytes, encoding: str) -> None:
    try:
        text = decompress(body, encoding, 1000)
    except ContentEncodingError as error:
        text = error.beginning
    assert len(text) <= 1000


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress, raw_deflate])
@pytest.mark.parametrize("size", [1000, 1001])
def test_the_limit_is_that_of_the_decompressed_body(compress: Any, size: int) -> None:
    body = compress(BODY.ljust(size))
    encoding = "gzip" if compress is gzip.compress else "deflate"
    if size == 1000:
        assert len(decompressed(body, encoding, None, 1000)) == 1000
        return
    with pytest.raises(InvalidJobError, match="more than 1000 bytes, which VQA_MAX_JOB_BYTES") as caught:
        decompressed(body, encoding, None, 1000)
    # The id is read from the part within the limit.
    assert (caught.value.job_id, caught.value.id_in_body) == (JOB["id"], True)


def test_a_compressed_body_over_the_limit_is_not_decompressed() -> None:
    body = gzip.compress(BODY)
    with pytest.raises(InvalidJobError, match=f"the body has {len(body)} bytes; VQA_MAX_JOB_BYTES"):
        decode(decompressed(body, "gzip", None, 10), None, 10)


def bomb(size: int) -> bytes:
    """Return about `size` bytes that decompress to a thousand times as many."""
    stream = zlib.compressobj(wbits=16 + zlib.MAX_WBITS)
    block = bytes(1 << 20)
    return b"".join(stream.compress(block) for _ in range(size * 1000 >> 20)) + stream.flush()


def test_a_bomb_takes_no_more_memory_than_a_job() -> None:
    body = bomb(500_000)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidJobError, match="more than 16000000 bytes"):
            decompressed(body, "gzip", None, LIMIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * LIMIT


# In the worker

RULES = request.RequestRules(
    default_model="m", allowed_models=["m"], max_job_bytes=LIMIT, delivery_limit=20, send_image_detail=False
)


async def requested(delivery: Delivery) -> request.Request:
    """Process a delivery as the worker does until it is admitted."""
    attempt = Attempt.from_delivery(delivery)
    policy = SourcePolicy(["*"], ["*"])
    plain = await request.decompress(delivery, attempt, RULES)
    return request.check_job(
        request.read_job(plain, attempt, RULES),
        plain,
        attempt,
        RULES,
        lambda refs, body: [
            ImageSource(ref.location, parse_source(ref.url, display_name(ref), policy, body)) for ref in refs
        ],
    )


def test_an_image_inside_a_compressed_body_is_found_without_blocking_the_event_loop() -> None:
    payload = b"QUJDRA==QUJD" * 1_000_000
    body = b'{"id": "a", "question": "?", "images": ["data:image/png;base64,%s"]}' % payload
    delivery = a_delivery(gzip.compress(body, compresslevel=1), content_encoding="gzip")
    assert is_within(MAX_LOOP_S, lambda: asyncio.run(requested(delivery)))
    (image,) = asyncio.run(requested(delivery)).images
    assert isinstance(image.source, Embedded)
    assert image.source.text == payload


async def test_a_plain_body_is_not_copied_and_needs_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio, "to_thread", None)
    for encoding in (None, "utf-8"):
        delivery = a_delivery(JOB, content_encoding=encoding)
        assert await request.decompress(delivery, Attempt.from_delivery(delivery), RULES) is delivery


async def test_a_compressed_job_that_was_delivered_too_often_is_not_decompressed() -> None:
    delivery = a_delivery(b"damaged", content_encoding="gzip", deliveries=24)
    with pytest.raises(request.DeliveredTooOftenError):
        await requested(delivery)


# Character sets


def test_a_byte_order_mark_is_dropped() -> None:
    assert decode(BODY.decode().encode("utf-8-sig"), None, LIMIT).id == JOB["id"]
    assert parse_leniently(BODY.decode().encode("utf-8-sig")) == JOB


def test_a_byte_order_mark_does_not_move_the_images() -> None:
    payload = "QUJD" * 1000
    body = json.dumps({**JOB, "images": [f"data:image/png;base64,{payload}"]}).encode("utf-8-sig")
    (ref,) = Conversation(decode(body, None, LIMIT)).images()
    source = parse_source(ref.url, "image", SourcePolicy(["*"], ["*"]), body)
    assert isinstance(source, Embedded)
    assert source.text == payload.encode()


def test_text_that_looks_like_an_image_is_read_after_a_byte_order_mark() -> None:
    url = "data:image/png;base64," + "QUJD" * 1000
    body = json.dumps({**JOB, "question": url}).encode("utf-8-sig")
    assert decode(body, None, LIMIT).question == url


@pytest.mark.parametrize("pad", [0, LIMIT - 10_000], ids=["short", "long"])
@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16"),
        ("utf-16-be", "UTF-16"),
        ("utf-32", "UTF-32"),
        ("utf-32-le", "UTF-32"),
        ("utf-32-be", "UTF-32"),
    ],
)
def test_utf_16_and_utf_32_are_named(encoding: str, name: str, pad: int) -> None:
    body = json.dumps(JOB).encode(encoding)
    body += " ".encode(encoding)[-2:] * (pad // 2)
    with pytest.raises(InvalidJobError, match=rf"^the body is {name}: publish it in UTF-8 \(RFC 8259\)$"):
        decode(body, "m", LIMIT)


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(json.dumps(JOB)).encode(),
        json.dumps(json.dumps(json.dumps(JOB))).encode(),
        json.dumps(json.dumps(JOB, indent=2)).encode(),
        json.dumps("\n" + json.dumps(JOB)).encode(),
        b" \n" + json.dumps(json.dumps(JOB)).encode(),
        json.dumps(json.dumps(JOB)).encode("utf-8-sig"),
        json.dumps(json.dumps({**JOB, "question": "?" * 2_000_000})).encode(),
    ],
)
def test_json_in_a_json_string_is_named(body: bytes) -> None:
    with pytest.raises(InvalidJobError, match="encode the job only once") as caught:
        decode(body, "m", LIMIT)
    assert caught.value.job_id == "m"


@pytest.mark.parametrize(
    "body",
    [b"", b" ", b"\0", bytes(100), bytes(range(256)), b'"id"', b'"{', b"\xff\xfe", b"{\0", b'"a{"', b"7"],
)
def test_other_bodies_are_invalid_too(body: bytes) -> None:
    with pytest.raises(InvalidJobError):
        decode(body, None, LIMIT)
    assert parse_leniently(body) is None
