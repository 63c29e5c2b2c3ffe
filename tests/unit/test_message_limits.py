"""No message within VQA_MAX_JOB_BYTES holds the event loop for long or takes much memory."""

import json
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cpu_time import is_within
from vqa_worker.messages.conversation import Conversation
from vqa_worker.messages.decoding import InvalidJobError, decode
from worker.errors import JobError
from worker.images.loader import display_name
from worker.images.source import Embedded, SourcePolicy, parse_source
from worker.model.request import PLACEHOLDER, body_parts, fingerprint

MAX_JOB_BYTES = 16_000_000
MAX_CPU_S = 0.05
MAX_TIMES_ITS_SIZE = 4
# Every message may have `MAX_VALUES` values, and `MAX_TEXT_BYTES` in a string with a wide
# character: Python needs eight times its size to decode it.
FIXED_BYTES = 6 * 1024 * 1024
MAX_IMAGES = 16
ANYWHERE = SourcePolicy(["*"], ["*"])

SHORT = b'{"id": "a", "question": "x", "images": '
WITH_IMAGE = b'{"id": "a", "images": ["s3://b/k"], '


def repeated(beginning: bytes, item: bytes, end: bytes) -> Callable[[int], bytes]:
    """Return a function that builds a body of about `size` bytes from repetitions of `item`."""
    return lambda size: beginning + item * ((size - len(beginning) - len(end)) // len(item)) + end


def numbered(beginning: bytes, end: bytes) -> Callable[[int], bytes]:
    """Return a function that builds a body of distinct unknown fields."""
    return lambda size: beginning + b",".join(b'"x%d": 1' % n for n in range(size // 16)) + end


BODIES: dict[str, Callable[[int], bytes]] = {
    "numbers as images": repeated(SHORT + b"[", b"1,", b"1]}"),
    "empty strings as images": repeated(SHORT + b"[", b'"",', b'""]}'),
    "valid images": repeated(SHORT + b"[", b'"s3://b/k",', b'"s3://b/k"]}'),
    "line breaks in the URL of an image": repeated(SHORT + b'["', rb"\n", b'"]}'),
    "objects as images": repeated(SHORT + b"[", b'{"url":"s3://b/k"},', b'"s3://b/k"]}'),
    "images with unknown fields": repeated(SHORT + b"[", b'{"x":1},', b"1]}"),
    "one image with many unknown fields": numbered(SHORT + b"[{", b"}]}"),
    "wrong messages": repeated(b'{"id": "a", "messages": [', b'{"role":1},', b"{}]}"),
    "wrong parts": repeated(b'{"id":"a","messages":[{"role":"user","content":[', b"{},", b"{}]}]}"),
    "unknown fields": numbered(b'{"id": "a",', b"}"),
    "metadata": repeated(WITH_IMAGE + b'"question": "x", "metadata": {"a": [', b"[],", b"1]}}"),
    "long metadata": repeated(WITH_IMAGE + b'"question": "x", "metadata": {"a": "', b"a", b'"}}'),
    "a long deadline": repeated(WITH_IMAGE + b'"deadline": "2030-01-01T00:00:00.', b"1", b'"}'),
    "a long field name": repeated(b'{"id": "a", "', b"x", b'": 1}'),
    "a long number": repeated(WITH_IMAGE + b'"question": ', b"1", b"}"),
    "blanks": repeated(WITH_IMAGE + b'"question": "', b" ", b'"}'),
    "nested lists": repeated(b"", b"[", b""),
    "nested objects": repeated(b"", b'{"a":', b""),
    "quotes": repeated(SHORT, b'"', b"}"),
    "escaped quotes": repeated(SHORT + b'["', rb"\"", b'"]}'),
    "backslashes": repeated(SHORT + b'["', rb"\\", b'"]}'),
    "not UTF-8": repeated(b"", b"\xff", b""),
    "a data URL": repeated(SHORT + b'["data:image/png;base64,', b"QUJD", b'"]}'),
    "a long link": repeated(SHORT + b'["https://', b"a", b'"]}'),
    "a long link with a user name": repeated(SHORT + b'["https://', b"a:", b'@"]}'),
    "a long key": repeated(SHORT + b'["s3://b/', b"k", b'"]}'),
}


# Positions where publishers can put something long: the text before and after it.
PLACES = [
    (b'{"id": "a", "question": "', b'", "images": ["s3://b/k"]}'),
    (SHORT + b'["', b'"]}'),
    (SHORT + b'["data:image/png;base64,', b'"]}'),
    (SHORT + b"[", b"1]}"),
    (SHORT + b'[{"url": "', b'"}]}'),
    (b'{"id": "a", "messages": [{"role": "user", "content": "', b'"}]}'),
    (b'{"id": "a", "messages": [{"role": "user", "content": [', b"1]}]}"),
    (WITH_IMAGE + b'"question": "x", "params": {"url": "', b'"}}'),
    (WITH_IMAGE + b'"question": "x", "params": {"a": [', b"1]}}"),
    (WITH_IMAGE + b'"question": "x", "params": {"', b'": 1}}'),
    (WITH_IMAGE + b'"question": "x", "metadata": {"a": "', b'"}}'),
    (b'{"id": "', b'"}'),
    (b'{"', b'": 1}'),
    (b"", b""),
]
ITEMS = [
    b"a", b"QUJD", b" ", b'"', b"\\", rb"\n", rb"\/", rb"\"", rb"\u0041", rb"\ud83d\ude00", "é".encode(),
    "猫".encode(), "😀".encode(), b"9", b"9" * 300 + b",", b"9" * 4300 + b",", b"0." + b"9" * 400 + b",",
    b"1e9,", b"[", b"{", b'{"a":', b'"data:', b'"data:,', b'"data:,' + b"A" * 2000 + b'",', b'"",', b"[],",
    b"{},", b"\xff",
    b'"s3://b/k",', b'{"role":"user","content":"x"},', b'{"type":"text","text":"x"},',
]  # fmt: skip
# A wide character makes each character of a string four bytes long; a line break is an escape.
ENDS = [b"", "😀".encode(), rb"\ud83d\ude00", rb"\n"]


def read(body: bytes) -> object:
    """Process a message as the worker does before its first await."""
    try:
        job = decode(body, None, MAX_JOB_BYTES)
        conversation = Conversation(job)
        refs = conversation.images()
        if len(refs) > MAX_IMAGES:
            return "too many images"
        sources = [parse_source(ref.url, display_name(ref), ANYWHERE, body) for ref in refs]
        messages = conversation.render(PLACEHOLDER, send_detail=False)
        body_parts("m", messages, job.params or {})
        urls = [source.text if isinstance(source, Embedded) else b"" for source in sources]
        fingerprint(job.id or "", "m", messages, job.params or {}, urls)
    except (InvalidJobError, JobError) as error:
        return error.message
    return sources


def peak_bytes(body: bytes) -> int:
    tracemalloc.start()
    try:
        read(body)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def check(body: bytes) -> None:
    assert len(body) <= MAX_JOB_BYTES
    assert is_within(MAX_CPU_S, lambda: read(body))
    assert peak_bytes(body) < MAX_TIMES_ITS_SIZE * len(body) + FIXED_BYTES


@pytest.mark.parametrize("size", [200_000, 1_000_000, MAX_JOB_BYTES])
@pytest.mark.parametrize("kind", BODIES)
def test_a_message_is_read_quickly_and_with_little_memory(kind: str, size: int) -> None:
    check(BODIES[kind](size))


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    place=st.sampled_from(PLACES),
    beginning=st.sampled_from(ENDS),
    item=st.sampled_from(ITEMS) | st.binary(min_size=1, max_size=8),
    end=st.sampled_from(ENDS),
    size=st.sampled_from([100_000, 999_000, MAX_JOB_BYTES]) | st.integers(1_000, MAX_JOB_BYTES),
)
def test_a_message_with_repetitions_is_parsed_quickly_and_with_little_memory(
    place: tuple[bytes, bytes], beginning: bytes, item: bytes, end: bytes, size: int
) -> None:
    check(repeated(place[0] + beginning, item, end + place[1])(size))


def test_an_error_message_is_short_for_any_number_of_errors() -> None:
    for build in BODIES.values():
        answer = read(build(50_000))
        assert not isinstance(answer, str) or len(answer) < 4_000


def test_text_with_many_commas_and_quotes_is_not_counted_as_values() -> None:
    question = 'a "quoted", [bracketed] text\\, ' * 10_000
    body = b'{"images": ["s3://b/k"], "id": "a", "question": %s}' % json.dumps(question).encode()
    assert decode(body, None, MAX_JOB_BYTES).question == question


@pytest.mark.parametrize("id_comes_first", [True, False])
def test_the_id_of_a_message_with_too_many_values_is_read_near_its_beginning(*, id_comes_first: bool) -> None:
    values = b'"metadata": {"a": [' + b"1," * 100_000 + b"1]}"
    body = b'{"id": "a", %s}' % values if id_comes_first else b'{%s, "id": "a"}' % values
    with pytest.raises(InvalidJobError, match="JSON values") as caught:
        decode(body, "fallback", MAX_JOB_BYTES)
    assert caught.value.job_id == ("a" if id_comes_first else "fallback")


def test_a_data_url_whose_beginning_repeats_is_found_in_linear_time() -> None:
    # The message repeats the beginning of the URL, but not the URL itself.
    block = b"data:image/png;base64," + b"A" * 1_002
    escaped = block * 7_000 + rb"\u0041"
    body = SHORT + b'["' + escaped + b'"]}'
    assert is_within(MAX_CPU_S, lambda: read(body))
    assert isinstance(read(body), list)


def test_many_data_urls_are_found_in_one_pass() -> None:
    images = b",".join(b'"data:image/png;base64,%s"' % (b"%04d" % n * 60_000) for n in range(16))
    body = SHORT + b"[" + images + b"]}"
    sources = read(body)
    assert isinstance(sources, list)
    assert all(isinstance(source, Embedded) and source.text.obj is body for source in sources)
    assert is_within(MAX_CPU_S, lambda: read(body))


@pytest.mark.parametrize("escaped", [rb"\/", rb"\u002B", rb"\u002b", rb"\r\n", "é".encode()])
def test_a_data_url_is_not_copied_out_of_the_message(escaped: bytes) -> None:
    body = SHORT + b'["s3://b/k", "data:image/png;base64,%s"]}' % (b"QUJD" * 1000 + escaped)
    sources = read(body)
    assert isinstance(sources, list)
    assert sources[1].text.obj is body
    assert bytes(sources[1].text) == b"QUJD" * 1000 + escaped


def test_data_urls_that_are_not_images_are_read_as_text() -> None:
    url = "data:image/png;base64," + "QUJD" * 1000
    fields = {"system": url, "question": f'"{url}"', "params": {"url": url}, "metadata": {"images": [url]}}
    body = json.dumps({"id": "a", "images": ["s3://b/k", url], **fields}).encode()
    job = decode(body, None, MAX_JOB_BYTES)
    assert job.model_dump(include=set(fields)) == fields
    assert job.images == ["s3://b/k", url]


def test_a_large_message_with_a_data_url_that_is_not_an_image_is_rejected() -> None:
    body = WITH_IMAGE + b'"question": "data:image/png;base64,%s"}' % (b"QUJD" * 500_000)
    with pytest.raises(InvalidJobError, match="1000000 bytes without the data URLs of its images") as caught:
        decode(body, None, MAX_JOB_BYTES)
    assert caught.value.job_id == "a"


def test_an_id_after_a_large_data_url_is_read_from_an_invalid_message() -> None:
    body = b'{"images": ["data:image/png;base64,%s"], "x": 1, "id": "a"}' % (b"QUJD" * 500_000)
    with pytest.raises(InvalidJobError, match="x: unknown field") as caught:
        decode(body, None, MAX_JOB_BYTES)
    assert caught.value.job_id == "a"
