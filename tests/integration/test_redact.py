import json
import re
from urllib.parse import quote

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.cpu_time import is_within
from worker.observability.redaction import DEFAULT_LIMIT, MARK, MAX_DISPLAY_CHARS, Redactor, display_url

KEY = "sk-abcdefghijklmnop"
PASSWORD = "p%40ss/w+rd-of-the-broker"

redact = Redactor([KEY, PASSWORD])


def test_ordinary_text_is_unchanged() -> None:
    text = "image 2 (s3://photos/cat.jpg) is not a JPEG, PNG or WebP: schöne Grüße, 猫 & 100 % = all?"
    assert redact(text) == text


def test_without_secrets_other_patterns_are_still_redacted() -> None:
    assert Redactor([])("https://h/p?sig=1\n") == f"https://h/p?{MARK} "


@pytest.mark.parametrize(
    "form",
    [
        KEY,
        PASSWORD,
        "p@ss/w+rd-of-the-broker",
        quote("p@ss/w+rd-of-the-broker", safe=""),
        quote(PASSWORD, safe=""),
    ],
)
def test_a_secret_is_redacted_in_every_encoding(form: str) -> None:
    assert redact(f"refused <{form}>, said the API") == f"refused <{MARK}>, said the API"


def test_an_escaped_secret_is_redacted() -> None:
    secret = 'a"b\\c\t1-ü'
    blank = Redactor([secret])
    for form in (repr(secret), json.dumps(secret), json.dumps(secret, ensure_ascii=False)):
        assert blank(form)[1:-1] == MARK


def test_the_longer_of_two_secrets_with_a_common_prefix_is_redacted_completely() -> None:
    assert Redactor(["abcd", "abcdefgh"])("abcdefgh abcd") == f"{MARK} {MARK}"


def test_short_values_are_not_redacted() -> None:
    assert Redactor(["", "a", "abc", "%41bc"])("abc a banana") == "abc a banana"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET https://h/p?X-Amz-Signature=ab12&x=1 failed", f"GET https://h/p?{MARK} failed"),
        ("'https://h/p?a=1' and \"https://h/p?b=2\"", f"'https://h/p?{MARK}' and \"https://h/p?{MARK}\""),
        ("<https://h/p?a=1>", f"<https://h/p?{MARK}>"),
        ('{"url":"https://h/p?a=1","code":"x"}', f'{{"url":"https://h/p?{MARK}","code":"x"}}'),
        ("https://h/p?a=1#https://i/q?b=2", f"https://h/p?{MARK}"),
        ("https://h?a=1", f"https://h?{MARK}"),
        ("did you see https://h/p?", "did you see https://h/p?"),
        ("see https://h/p? or not", "see https://h/p? or not"),
        ("amqp://user:pa@ss@host/v", f"amqp://{MARK}@host/v"),
        ("https://token@host/p", f"https://{MARK}@host/p"),
        ("https://cdn/@user/p.png", "https://cdn/@user/p.png"),
        ("HTTPS://U:P@H/?A=1", f"HTTPS://{MARK}@H/?{MARK}"),
        ("s3://bucket/what?.png", "s3://bucket/what?.png"),
        ("s3://b/k https://h/p?a=1", f"s3://b/k https://h/p?{MARK}"),
        ("s3://b/k,https://h/p?a=1", f"s3://b/k,https://h/p?{MARK}"),
        ("s3://b/k?X-Amz-Security-Token=abc", f"s3://b/k?X-Amz-Security-Token={MARK}"),
    ],
)
def test_urls_lose_their_credentials_and_queries(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    "name",
    [
        "X-Amz-Signature", "x-amz-credential", "X-AMZ-SECURITY-TOKEN", "Signature", "AWSAccessKeyId", "sig",
        "token", "access_token", "api_key", "api-key", "apikey", "password", "X-Goog-Signature",
        "X-Goog-Credential", "GoogleAccessId", "Policy", "Key-Pair-Id",
    ],
)  # fmt: skip
def test_signatures_and_tokens_outside_of_urls_are_redacted(name: str) -> None:
    assert redact(f"expires=1&{name}=Zm9v%2B&x=1 {name}=b") == f"expires=1&{name}={MARK}&x=1 {name}={MARK}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://h/k%3FX-Amz-Signature%3Dab%26X-Amz-Credential%3Dcd no", f"X-Amz-Signature%3D{MARK} no"),
        ("https%3A%2F%2Fh%2Fk%3fa%3d1%26x-goog-signature%3dab, no", f"x-goog-signature%3d{MARK} no"),
        ("k%253Fa%253D1%2526Signature%253Dab no", f"Signature%253D{MARK} no"),
        ("h/k?a=1\\u0026X-Amz-Signature=ab' no", f"X-Amz-Signature={MARK}' no"),
        ("h/k?a\\u003d1\\u0026sig\\u003dab no", f"sig\\u003d{MARK} no"),
        ("storage.googleapis.com/k?X-Goog-Signature=ab no", f"X-Goog-Signature={MARK} no"),
        ("d1.cloudfront.net/k?Policy=ab&Key-Pair-Id=cd&Signature=ef no",
         f"?Policy={MARK}&Key-Pair-Id={MARK}&Signature={MARK} no"),
    ],
)  # fmt: skip
def test_a_signature_is_redacted_in_every_form_of_a_url(text: str, expected: str) -> None:
    shown = redact(text)
    assert shown.endswith(expected)
    assert not re.search(r"(=|%3d|%253d|u003d)(ab|cd|ef)", shown, re.IGNORECASE)


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=5", "design=1", "key=photos/cat.jpg", "prompt_token=3", "cache-policy=a", "100%=token",
        "refused by the content policy: a signature = bad token, 50%3D", "the x-amz-date header = missing",
        "max_tokens%3D5", "key%3Dphotos", "a policy%20of = ours",
    ],
)  # fmt: skip
def test_other_parameters_are_unchanged(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Bearer abc12345", f"Bearer {MARK}"),
        ("b'bearer abcdefghijklmnopqrstuvwx'", f"b'bearer {MARK}'"),
        ("Authorization: Basic dXNlcjpwYXNz, x", f"Authorization: {MARK}, x"),
        ('"authorization": "abc"', f'"authorization": "{MARK}"'),
        ("Bearer authentication is required", "Bearer authentication is required"),
        ("the bearer of this", "the bearer of this"),
        ("authorization failed", "authorization failed"),
    ],
)
def test_credentials_in_headers_are_redacted_and_phrases_are_not(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data:image/png;base64,AAAABBBB== is bad", "data:image/png;base64,[10 characters] is bad"),
        ("DATA:image/jpeg;BASE64,abc_-", "DATA:image/jpeg;BASE64,[5 characters]"),
        ("data:;base64,%2B", "data:;base64,[3 characters]"),
        ("data:text/plain,hello", "data:text/plain,hello"),
        ("some data: a, b", "some data: a, b"),
        ("data:image/png;base64, of 12 bytes", "data:image/png;base64, of 12 bytes"),
    ],
)
def test_image_data_is_replaced_by_its_size(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_an_image_of_many_megabytes_becomes_a_short_line() -> None:
    assert redact("bad image data:image/png;base64," + "A" * 5_000_000) == (
        "bad image data:image/png;base64,[5000000 characters]"
    )


def test_the_result_is_one_printable_line() -> None:
    shown = redact("a\r\nb\x00c\x1b[31md\x85e\u2028f\u202eg\ud800h")
    assert shown == "a  b c [31md e f g\ufffdh"


def test_a_long_text_is_truncated_with_an_ellipsis() -> None:
    assert redact("é" * DEFAULT_LIMIT) == "é" * DEFAULT_LIMIT
    assert redact("é" * (DEFAULT_LIMIT + 1)) == "é" * (DEFAULT_LIMIT - 1) + "…"
    assert Redactor([], limit=5)("abcdef") == "abcd…"


def test_no_part_of_a_secret_remains_at_the_limit() -> None:
    assert Redactor([KEY], limit=30)("x" * 25 + KEY) == "x" * 25 + MARK[:4] + "…"


@pytest.mark.parametrize(
    "unit",
    [
        "://", "a://", "https://a@", "x://a?", "s3://?", "https://", "@", "?", "data:", "data:,",
        "data:a;base64,", "data:image/png;base64", "bearer ", "bearer aaaaaaaa", "authorization:",
        "authorization: a", "token=", "x-amz-", "a", "=", "%", " ", "\x00", "\ud800",
        "sk-abcdefghijklmno", "'", '"', "x-amz-a", "x-goog-%3d", "%3fx-amz-", "%253Fx-amz-a", "token%3",
        "%25", "\\u0026sig", "x-amz-a=",
    ],
)  # fmt: skip
def test_redaction_is_fast_for_a_megabyte_of_adversarial_text(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    assert is_within(2, lambda: redact(text))  # about 0.1 s; a quadratic algorithm takes hours


# These characters are in no mark or pattern, so that redaction cannot produce a secret.
SECRET = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="[]…\ufffd"), min_size=4, max_size=20
)
AROUND = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="[]…\ufffd"), max_size=30)
WRAPPINGS = [
    "{}", "https://h/{}?{}", "https://u:{}@h/{}", "Bearer {}", "data:image/png;base64,{}", "token={}", "{}{}",
    "authorization: {}", "a\x00{}\n",
]  # fmt: skip


@given(secret=SECRET, before=AROUND, after=AROUND, wrapping=st.sampled_from(WRAPPINGS))
def test_no_known_secret_remains(secret: str, before: str, after: str, wrapping: str) -> None:
    assume(not any(secret in fixed for fixed in (MARK, *WRAPPINGS)))
    # The marks of redaction are not a leak.
    assume(not re.search("redacted|characters", secret))
    shown = Redactor([secret], limit=10**6)(before + wrapping.format(secret, secret) + after)
    assert secret not in shown


@given(text=st.text(max_size=200))
def test_the_result_is_printable_and_short_for_every_text(text: str) -> None:
    shown = Redactor([KEY], limit=50)(text)
    assert len(shown) <= 50
    assert len(f"x{shown}x".splitlines()) == 1
    shown.encode()


@given(text=st.text(max_size=200))
def test_redaction_is_idempotent(text: str) -> None:
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/a key?with%20query#and.png", "s3://bucket/a key?with%20query#and.png"),
        ("s3://bucket/a\nb\x00\u2028", "s3://bucket/a\\nb\\x00\\u2028"),
        ("https://user:pass@host:8443/p/a.png?sig=1#f", "https://host:8443/p/a.png"),
        ("https://host/p#f?x", "https://host/p"),
        ("https://host?sig=1", "https://host"),
        ("https://u:p@host/https://v:w@other/", "https://host/https://v:w@other/"),
        ("https://host/@user/a.png", "https://host/@user/a.png"),
        ("HTTPS:\\\\u:p@host\\a", "HTTPS:\\\\host\\a"),
        ("https:u:p@host", "https:host"),
        ("ftp://u:p@host/x", "ftp://host/x"),
        ("data:image/png;base64,AAAA", "data: URL"),
        ("DATA:,", "data: URL"),
        ("", ""),
        ("?", ""),
        ("://", "://"),
        ("no url\ud800", "no url\\ud800"),
    ],
)
def test_an_image_is_named_by_its_url_without_secrets(url: str, shown: str) -> None:
    assert display_url(url) == shown


def test_a_long_name_is_truncated() -> None:
    assert display_url("s3://b/" + "k" * 1000) == "s3://b/" + "k" * (MAX_DISPLAY_CHARS - 8) + "…"


@given(url=st.text(max_size=400))
def test_every_url_has_a_name_of_one_short_line(url: str) -> None:
    shown = display_url(url)
    assert len(shown) <= MAX_DISPLAY_CHARS
    assert len(f"x{shown}x".splitlines()) == 1
    shown.encode()
