"""Image URLs: nothing bypasses the allow-lists, whichever library parses the URL afterwards."""

import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

import httpx2
import pytest
import yarl
from hypothesis import example, given
from hypothesis import strategies as st

from vqa_worker.messages.conversation import ImageRef
from vqa_worker.messages.error_codes import ErrorCode
from worker.errors import JobError
from worker.images.loader import display_name
from worker.images.source import (
    MAX_KEY_BYTES,
    Embedded,
    Link,
    Source,
    SourcePolicy,
    of_version,
    parse_source,
)
from worker.s3.aws import S3Object

NAME = "images[0] (…)"
ANYWHERE = SourcePolicy(allowed_buckets=["*"], allowed_link_hosts=["*"])
NOWHERE = SourcePolicy(allowed_buckets=[], allowed_link_hosts=[])
GOOD = SourcePolicy(
    allowed_buckets=["good", "good-*"], allowed_link_hosts=["good.example", "*.good.example", "2001:db8::*"]
)


def where(url: str, policy: SourcePolicy = GOOD, body: bytes | None = None) -> Source:
    """Return the source for a URL; the default message contains only the URL."""
    return parse_source(url, NAME, policy, json.dumps(url).encode() if body is None else body)


def refusal(url: str, policy: SourcePolicy = GOOD) -> ErrorCode:
    with pytest.raises(JobError) as caught:
        where(url, policy)
    assert caught.value.message.startswith(NAME)
    return caught.value.code


def where_or_why_not(url: str, policy: SourcePolicy) -> Source | ErrorCode:
    try:
        return where(url, policy)
    except JobError as error:
        return error.code


# S3


@pytest.mark.parametrize(
    "key",
    [
        "k", "a/b/c.png", "/k", "//", "a b", "a+b", "100%", "%2e%2e/%2F", "%41", "a?b=c", "a#b", "a\\b",
        "../k",
        "é 猫 😀", "a:b@c", "s3://good/k", "k/", " ", ".", "\u2028",
    ],
)  # fmt: skip
def test_an_s3_key_is_not_decoded(key: str) -> None:
    assert where(f"s3://good/{key}") == S3Object("good", key)
    assert where(f"S3://good/{key}") == S3Object("good", key)


@given(bucket=st.from_regex(r"[A-Za-z0-9._-]{1,63}", fullmatch=True), key=st.text(min_size=1, max_size=300))
def test_any_key_is_literal_or_rejected(bucket: str, key: str) -> None:
    is_odd = len(key.encode()) > MAX_KEY_BYTES or any(ord(c) < 32 or 127 <= ord(c) < 160 for c in key)
    expected = ErrorCode.INVALID_JOB if is_odd else S3Object(bucket, key)
    assert where_or_why_not(f"s3://{bucket}/{key}", ANYWHERE) == expected


@pytest.mark.parametrize("character", ["\x00", "\t", "\n", "\r", "\x1f", "\x7f", "\x85", "\x9f"])
def test_control_characters_in_a_key_make_the_job_invalid(character: str) -> None:
    assert refusal(f"s3://good/a{character}b") is ErrorCode.INVALID_JOB
    assert refusal(f"s3://good/k{character}") is ErrorCode.INVALID_JOB


def test_a_key_may_have_1024_bytes() -> None:
    assert where("s3://good/" + "é" * 512) == S3Object("good", "é" * 512)
    assert refusal("s3://good/" + "é" * 512 + "x") is ErrorCode.INVALID_JOB


@pytest.mark.parametrize(
    "url",
    [
        "s3://", "s3:///", "s3:///k", "s3://good", "s3://good/", "s3://go od/k", "s3://good:80/k",
        "s3://u@good/k",
        "s3://good\n/k", "s3://good\\k", "s3://gööd/k", "s3://good?/k", "s3://" + "g" * 256 + "/k",
        "s3://%67ood/k",
    ],
)  # fmt: skip
def test_an_s3_url_without_a_valid_bucket_and_key_makes_the_job_invalid(url: str) -> None:
    assert refusal(url, ANYWHERE) is ErrorCode.INVALID_JOB


@pytest.mark.parametrize("bucket", ["good", "good-", "good-photos", "good-.."])
def test_a_bucket_that_matches_a_glob_is_allowed(bucket: str) -> None:
    assert where(f"s3://{bucket}/k") == S3Object(bucket, "k")


@pytest.mark.parametrize(
    "bucket", ["evil", "goods", "Good", "GOOD", "agood", "good.evil", "evil-good-", "..", "*"]
)
def test_a_bucket_that_matches_no_glob_is_not_allowed(bucket: str) -> None:
    expected = ErrorCode.INVALID_JOB if bucket == "*" else ErrorCode.IMAGE_SOURCE_NOT_ALLOWED
    assert refusal(f"s3://{bucket}/k") is expected
    assert refusal("s3://good/k", NOWHERE) is ErrorCode.IMAGE_SOURCE_NOT_ALLOWED


# Access points

ACCESS_POINT = "arn:aws:s3:eu-central-1:123456789012:accesspoint/cats"


@pytest.mark.parametrize(
    "bucket",
    [
        ACCESS_POINT,
        "arn:aws:s3:eu-central-1:123456789012:accesspoint:cats",
        "arn:aws-cn:s3:cn-north-1:123456789012:accesspoint/cats",
        "arn:aws:s3-object-lambda:eu-central-1:123456789012:accesspoint/cats",
        "arn:aws:s3-outposts:eu-central-1:123456789012:outpost/op-01/accesspoint/cats",
    ],
)
@pytest.mark.parametrize("key", ["k", "a/b/c.png", "accesspoint/other/k"])
def test_an_access_point_is_named_by_its_arn(bucket: str, key: str) -> None:
    for globs in (["*"], ["arn:*"], [bucket], [f"{bucket.rpartition(':')[0]}:*"]):
        assert where(f"s3://{bucket}/{key}", SourcePolicy(globs, [])) == S3Object(bucket, key)


@pytest.mark.parametrize(
    "glob", ["*cats", "cats", "*accesspoint*", "a*", "arn:aws:s3:eu-west-1:*", ACCESS_POINT[:-1], "[a]*"]
)
def test_globs_of_buckets_do_not_allow_access_points(glob: str) -> None:
    assert refusal(f"s3://{ACCESS_POINT}/k", SourcePolicy([glob], [])) is ErrorCode.IMAGE_SOURCE_NOT_ALLOWED


@pytest.mark.parametrize(
    "url",
    [
        f"s3://{ACCESS_POINT}",
        f"s3://{ACCESS_POINT}/",
        f"s3://{ACCESS_POINT}{'s' * 50}/k",
        "s3://arn:aws:s3::123456789012:accesspoint/mfzwi23gnjvgw.mrap/k",
        "s3://arn:aws:iam::123456789012:user/cats/k",
        "s3://arn:aws:s3:::bucket/k",
    ],
)
def test_other_arns_make_the_job_invalid(url: str) -> None:
    assert refusal(url, ANYWHERE) is ErrorCode.INVALID_JOB


# Versions


def test_a_version_is_of_an_object_in_s3_only() -> None:
    assert of_version(where("s3://good/k"), "v1", NAME) == S3Object("good", "k", "v1")
    assert of_version(where("s3://good/k"), None, NAME) == S3Object("good", "k")
    for url in ("https://good.example/", "data:image/png;base64,AA=="):
        source = where(url)
        assert of_version(source, None, NAME) is source
        with pytest.raises(JobError, match="version_id is only for s3:// images") as caught:
            of_version(source, "v1", NAME)
        assert caught.value.code is ErrorCode.INVALID_JOB


# HTTPS URLs


@pytest.mark.parametrize(
    "url",
    [
        "https://good.example",
        "https://good.example/",
        "https://good.example/a.png?size=1&x=%20#part",
        "https://good.example?x",
        "https://good.example#x",
        "HTTPS://GOOD.EXAMPLE/A.png",
        "https://good.example./a.png",
        "https://good.example:8443/a.png",
        "https://user:pass@good.example/a.png",
        "https://evil.example@good.example/a.png",
        "https://a.b.good.example/é/猫.png",
        "https://good.example/https://evil.example/",
        "https://good.example/@evil.example/",
        "https://[2001:db8::1]/a.png",
        "https://[2001:DB8::1]:8443/a.png",
    ],
)
def test_a_link_to_an_allowed_host_is_passed_on_unchanged(url: str) -> None:
    assert where(url) == Link(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.example/",
        "https://evilgood.example/",
        "https://good.example.evil.example/",
        "https://good.example@evil.example/",
        "https://good.example:x@evil.example/",
        "https://good.example:443@evil.example:443/",
        "https://good.example%2f@evil.example/",
        "https://evil.example?@good.example/",
        "https://evil.example#@good.example/",
        "https://evil.example/@good.example/",
        "https://evil.example/.good.example",
        "https://evil.example?.good.example",
        "https://good-example/",
        "https://127.0.0.1/",
        "https://2130706433/",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://localhost/",
    ],
)
def test_a_link_to_any_other_host_is_not_allowed(url: str) -> None:
    assert refusal(url) is ErrorCode.IMAGE_SOURCE_NOT_ALLOWED
    assert where(url, ANYWHERE) == Link(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://", "https:///", "https:///good.example/", "https://?x", "https://#x", "https://@/",
        "https://:443/",
        "https://@good.example@evil.example/", "https://a@b@good.example/",
        "https://evil.example\\@good.example/", "https://evil.example\\.good.example/",
        "https:\\\\good.example/",
        "https://good.example/\\..\\", "https://good.example/a b", "https://good.example/a\n",
        "https://good.example\t/",
        "https://good.example/\x00", "https://evil.example\x00.good.example/",
        "https://evil.example\n.good.example/",
        "https://evil\x00@good.example/", "https://good.example /", " https://good.example/",
        "https://good.example/ ",
        "https://good.example:/", "https://good.example:x/", "https://good.example:443:443/",
        "https://good.example:123456/", "https://good.example:\u0664\u0664\u0663/",
        "https://ev%69l.good.example/", "https://\u017fafe.good.example/", "https://\u212a.good.example/",
        "https://bücher.good.example/", "https://猫.good.example/", "https://evil。good.example/",
        "https://evil.example\u2028.good.example/", "https://good.example/\u2028",
        "https://good.example/\xa0",
        "https://[2001:db8::1/", "https://2001:db8::1/", "https://[2001:db8::1]evil/",
        "https://[good.example]/",
        "https://good.example/" + "\x7f",
    ],
)  # fmt: skip
def test_a_url_that_parsers_read_differently_is_rejected(url: str) -> None:
    with pytest.raises(JobError) as caught:
        where(url, ANYWHERE)
    assert caught.value.code in {ErrorCode.INVALID_JOB, ErrorCode.IMAGE_SOURCE_NOT_ALLOWED}


HOST_OF: list[Callable[[str], str | None]] = [
    lambda url: urlsplit(url).hostname,
    lambda url: yarl.URL(url).host,
    lambda url: httpx2.URL(url).host,
]
PIECES = [
    "good.example", ".good.example", "evil.example", "evil", "@", ":", "//", "/", "\\", "?", "#", ".", "..",
    ":443", "https://", "%2f", "%40", "%00", "[", "]", "[::1]", "[2001:db8::1]", "2001:db8::1", "\t", "\n",
    " ", "\x00", "\x7f", "\u2028", "\u3002", "\uff0f", "\u017f", "\u212a", "\u0131", "K", "GOOD.EXAMPLE", ";",
    "&", "=", "é", "0", "\u0661",
]  # fmt: skip
URLS = st.lists(st.sampled_from(PIECES), max_size=7).map("".join) | st.text(max_size=20)
GLOBS = st.lists(
    st.sampled_from(
        ["good.example", "*.good.example", "*", "[!k]*", "*[!s]*", "?.good.example", "2001:db8::*"]
    ),
    min_size=1,
    max_size=2,
)


@given(rest=URLS, globs=GLOBS)
@example(rest="\u017fafe.good.example", globs=["[!s]*"])
@example(rest="evil.example\\@good.example", globs=["good.example"])
def test_an_allowed_url_has_an_allowed_host_for_every_url_parser(rest: str, globs: list[str]) -> None:
    url = f"https://{rest}"
    try:
        source = where(url, SourcePolicy(allowed_buckets=[], allowed_link_hosts=globs))
    except JobError:
        return
    assert source == Link(url)
    for host_of in HOST_OF:
        host = _or_none(host_of, url)
        if host is not None:
            assert any(fnmatchcase(host.lower().rstrip("."), glob) for glob in globs)


def _or_none(host_of: Callable[[str], str | None], url: str) -> str | None:
    """Return the host that this parser finds; None if it rejects the URL, which is safe."""
    try:
        return host_of(url)
    except (ValueError, httpx2.InvalidURL):
        return None


@pytest.mark.parametrize("glob", ["GOOD.example", "*.EXAMPLE", "g??d.example", "[g]ood.*"])
def test_host_globs_ignore_case(glob: str) -> None:
    policy = SourcePolicy(allowed_buckets=[], allowed_link_hosts=[glob])
    assert where("https://Good.Example/", policy) == Link("https://Good.Example/")


# Data URLs


@pytest.mark.parametrize(
    "head",
    [
        "data:image/png;base64,", "DATA:IMAGE/PNG;BASE64,", "data:image/png;charset=x;base64,",
        "data:;base64,",
        "data:image/svg+xml;base64,",
    ],
)  # fmt: skip
def test_embedded_data_begins_after_the_prefix(head: str) -> None:
    source = where(f"{head}AA,A=", NOWHERE)
    assert isinstance(source, Embedded)
    assert bytes(source.text) == b"AA,A="


@pytest.mark.parametrize(
    "url",
    [
        "data:", "data:,", "data:image/png", "data:image/png,AAAA", "data:image/png;base64",
        "data:image/png;base65,AA",
        "data:image/png;a,b;base64,AAAA", "data:" + "x" * 201 + ";base64,AAAA",
    ],
)  # fmt: skip
def test_other_data_urls_make_the_job_invalid(url: str) -> None:
    assert refusal(url, ANYWHERE) is ErrorCode.INVALID_JOB


# Other schemes


@pytest.mark.parametrize(
    "url",
    [
        "", " ", "a.png", "/etc/passwd", "file:///etc/passwd", "http://good.example/",
        "HTTP://good.example/",
        "ftp://good.example/", "//good.example/a.png", "s3:good/k", "s3:/good/k", "s3a://good/k",
        "https:good.example",
        "https:/good.example", "javascript:alert(1)", "blob:https://good.example/", "gs://good/k",
        "\u017f3://good/k",
        "http\u017f://good.example/", " s3://good/k", "\ns3://good/k", "data", "s3", "https",
    ],
)  # fmt: skip
def test_every_other_scheme_is_not_allowed(url: str) -> None:
    assert refusal(url, ANYWHERE) is ErrorCode.IMAGE_SOURCE_NOT_ALLOWED


BARE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.mark.parametrize(
    "text",
    [
        BARE,
        BARE[:12],
        f" {BARE}",
        "\n".join(BARE[start : start + 20] for start in range(0, len(BARE), 20)),
        f"image/png;base64,{BARE}",
        f"base64,{BARE}",
        f"dat:image/png;base64,{BARE}",
        f" data:image/png;base64,{BARE}",
        BARE[:88] * 400,
        f"image/png;base64,{BARE[:88] * 400}",
        "/9j/4AAQSkZJRgABAQ",
        "UklGRiIAAABXRUJQ",
        "Q29udGVudCBvZiBhbm90aGVyIGtpbmQsIGxvbmcgZW5vdWdo",
    ],
)
def test_base64_without_a_prefix_is_not_echoed(text: str) -> None:
    name = display_name(ImageRef("images[0]", text))
    with pytest.raises(JobError, match="base64 needs the prefix data:image/png;base64,") as caught:
        parse_source(text, name, ANYWHERE, b"")
    assert caught.value.code is ErrorCode.IMAGE_SOURCE_NOT_ALLOWED
    assert caught.value.message.startswith(f"images[0] (text of {len(text)} characters): ")
    assert not any(part in caught.value.message for part in ("iVBOR", "/9j", "UklGR", "Q29u", "RU5Erk"))


@given(url=st.text(max_size=40), policy=st.sampled_from([ANYWHERE, GOOD, NOWHERE]))
def test_any_text_is_a_source_or_a_job_error(url: str, policy: SourcePolicy) -> None:
    found = where_or_why_not(url, policy)
    if isinstance(found, ErrorCode):
        assert found in {ErrorCode.INVALID_JOB, ErrorCode.IMAGE_SOURCE_NOT_ALLOWED}
    else:
        assert policy is not NOWHERE or isinstance(found, Embedded)
