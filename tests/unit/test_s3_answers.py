"""The table of S3's error answers: each row on both ways to S3, with S3's sentence and the right advice."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.fake_s3 import FakeS3, give, refuse, with_sessions
from tests.unit.s3 import CONTENT, IMAGE, SDK_IMAGE, fault, isolate
from vqa_worker.messages.error_codes import ErrorCode
from worker.errors import Dependency, DependencyDownError, JobError, TransientError
from worker.s3.answers import RULES, Category, rule_for
from worker.s3.aws import S3Object

MISSING, FORBIDDEN, INVALID = Category.MISSING, Category.FORBIDDEN, Category.INVALID
BUSY, FAILING = Category.BUSY, Category.FAILING
CREDENTIALS, CONFIGURATION = Category.CREDENTIALS, Category.CONFIGURATION
REGION, NOT_S3, UNKNOWN = Category.REGION, Category.NOT_S3, Category.UNKNOWN


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolate(monkeypatch, tmp_path)
    monkeypatch.setattr("worker.s3.client.MAX_RETRY_DELAY_S", 0.01)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)


@pytest.fixture
async def fake() -> AsyncIterator[FakeS3]:
    async with FakeS3.serving(CONTENT) as fake:
        yield fake


@dataclass(frozen=True)
class Row:
    """An answer, its category, and words of the message."""

    status: int
    code: str
    category: Category
    says: str = ""
    message: str = "Some words of S3."
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status} {self.code}"


ROWS = [
    # One object's
    Row(404, "NoSuchKey", MISSING, "S3 has no such object"),
    Row(404, "NoSuchVersion", MISSING),
    Row(404, "NoSuchBucket", MISSING, "no bucket of this name: check VQA_S3_ENDPOINT_URL"),
    Row(404, "BucketNotFound", MISSING, "no bucket of this name"),
    Row(403, "AccessDenied", FORBIDDEN, "s3:GetObject; without s3:ListBucket S3 also answers this"),
    Row(
        403,
        "AccessDenied",
        FORBIDDEN,
        "the object may not exist",
        "User: arn:aws:iam::123456789012:user/worker is not authorized to perform: s3:ListBucket on resource:"
        ' "arn:aws:s3:::photos" because no identity-based policy allows the s3:ListBucket action',
    ),
    Row(
        403,
        "AccessDenied",
        FORBIDDEN,
        "kms:Decrypt for the key",
        "User: arn:aws:sts::123456789012:assumed-role/worker/1 is not authorized to perform: kms:Decrypt on"
        " the resource associated with this ciphertext",
    ),
    Row(
        403,
        "AccessDenied",
        FORBIDDEN,
        "s3express:CreateSession",
        "User: arn:aws:iam::1:user/w is not authorized to perform: s3express:CreateSession on resource",
    ),
    Row(403, "KMS.AccessDeniedException", FORBIDDEN, "kms:Decrypt", "The ciphertext refers to a key"),
    Row(
        403,
        "InvalidObjectState",
        FORBIDDEN,
        "archived (Glacier or a similar storage class): restore it",
        "The operation is not valid for the object's storage class",
    ),
    Row(
        400,
        "InvalidRequest",
        FORBIDDEN,
        "SSE-C",
        "The object was stored using a form of Server Side Encryption. The correct parameters must be"
        " provided to retrieve the object.",
    ),
    Row(
        403, "AccessDenied", FORBIDDEN, "VQA_S3_REQUESTER_PAYS=true", "The bucket is a requester pays bucket"
    ),
    Row(
        400,
        "InvalidArgument",
        FORBIDDEN,
        "VQA_S3_UNSIGNED",
        "Requests specifying Server Side Encryption with AWS KMS managed keys require AWS Signature Version"
        " 4.",
    ),
    Row(400, "KeyTooLongError", INVALID),
    Row(400, "InvalidBucketName", INVALID),
    # Throttled or failing, with any status
    *[Row(503, code, BUSY, f"S3 answered 503 {code}") for code in ("SlowDown", "ServiceUnavailable", "Busy")],
    *[
        Row(400, code, BUSY, f"S3 answered 400 {code}")
        for code in (
            "SlowDown",
            "Throttling",
            "ThrottlingException",
            "RequestTimeout",
            "RequestLimitExceeded",
            "TooManyRequests",
            "KMS.ThrottlingException",
            "BandwidthLimitExceeded",
        )
    ],
    Row(500, "InternalError", FAILING),
    Row(500, "NeverHeardOf", FAILING),
    Row(501, "NotImplemented", FAILING),
    Row(409, "OperationAborted", BUSY),
    Row(409, "NeverHeardOf", BUSY),
    Row(429, "NeverHeardOf", BUSY),
    Row(403, "SlowDownRead", BUSY),
    *[Row(status, "", BUSY, str(status)) for status in (408, 409, 425, 429, 503, 509, 529)],
    *[Row(status, "", FAILING, str(status)) for status in (500, 502, 504, 520)],
    # Everybody's
    Row(403, "InvalidAccessKeyId", CREDENTIALS, "the access key does not exist"),
    Row(403, "SignatureDoesNotMatch", CREDENTIALS, "the secret key is wrong"),
    Row(400, "ExpiredToken", CREDENTIALS, "the credentials have expired"),
    Row(400, "InvalidToken", CREDENTIALS, "the session token is malformed"),
    Row(401, "Unauthorized", CREDENTIALS, "check the AWS credentials"),
    Row(403, "RequestTimeTooSkewed", CONFIGURATION, "clock is wrong"),
    Row(403, "AccountProblem", CONFIGURATION, "the account has a problem"),
    Row(403, "UserSuspended", CONFIGURATION, "the account has a problem"),
    Row(
        403,
        "AccessDenied",
        CONFIGURATION,
        "download cap",
        "Cannot download file, download bandwidth or transaction (Class B) cap exceeded. See the Caps &"
        " Alerts page to increase your cap.",
    ),
    Row(400, "InvalidRequest", CONFIGURATION, "Signature Version 4", "The authorization mechanism is not ok"),
    # One bucket's
    Row(301, "PermanentRedirect", REGION, "AWS_REGION or VQA_S3_ENDPOINT_URL"),
    Row(307, "TemporaryRedirect", REGION, "AWS_REGION or VQA_S3_ENDPOINT_URL"),
    Row(
        400,
        "AuthorizationHeaderMalformed",
        REGION,
        "the signature's region is wrong",
        "The authorization header is malformed; the region 'eu-west-1' is wrong; expecting 'eu-west-3'",
    ),
    Row(400, "IllegalLocationConstraintException", REGION, "AWS_REGION"),
    Row(400, "InvalidRegionName", REGION, "AWS_REGION"),
    Row(400, "InvalidArgument", REGION, "AWS_REGION", "Unexpected region 'eu-west-1'"),
    Row(302, "NeverHeardOf", REGION, "VQA_S3_ENDPOINT_URL"),
    # Not S3's words
    *[
        Row(status, "", NOT_S3, "without an S3 error code: check VQA_S3_ENDPOINT_URL")
        for status in (201, 301, 302, 308, 400, 401, 403, 404, 405, 410, 411, 415, 418, 451)
    ],
    Row(407, "", NOT_S3, "the proxy requires a user name"),
    # Unknown
    Row(403, "NeverHeardOf", UNKNOWN, "S3 answered 403 NeverHeardOf"),
    Row(400, "InvalidRequest", UNKNOWN),
    Row(405, "MethodNotAllowed", UNKNOWN),
    Row(400, "KMS.DisabledException", UNKNOWN, "is it disabled or deleted?"),
    Row(400, "KMS.NotFoundException", UNKNOWN, "is it disabled or deleted?"),
]
BOTH_WAYS = [IMAGE, SDK_IMAGE]
# The SDK is slow: one row of each category, with and without a code. It takes each 2xx for a success.
SDK_ROWS = {(row.category, bool(row.code)): row for row in ROWS if row.status >= 300}.values()
JOB_CODES = {
    MISSING: ErrorCode.IMAGE_NOT_FOUND,
    FORBIDDEN: ErrorCode.IMAGE_FORBIDDEN,
    INVALID: ErrorCode.INVALID_JOB,
}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_an_answer_has_its_category(row: Row) -> None:
    assert rule_for(row.status, row.code, row.message).category is row.category


@pytest.mark.parametrize(
    ("row", "source"),
    [*((row, IMAGE) for row in ROWS), *((row, SDK_IMAGE) for row in SDK_ROWS)],
    ids=lambda it: "SDK" if it is SDK_IMAGE else "aiohttp" if it is IMAGE else str(it),
)
async def test_an_answer_has_its_consequence_on_both_ways(fake: FakeS3, row: Row, source: S3Object) -> None:
    page = give(b"<html><title>A page</title></html>", row.status)
    fake.answer = with_sessions(refuse(row.status, row.code, message=row.message) if row.code else page)
    error = await fault(fake.url, source)
    assert isinstance(error, JobError | TransientError | DependencyDownError)
    assert row.says in error.message
    if row.category in JOB_CODES:
        assert isinstance(error, JobError)
        assert error.code is JOB_CODES[row.category]
    elif row.category is UNKNOWN:
        assert isinstance(error, TransientError)
        assert (error.dependency, error.reason, error.refused) == (Dependency.S3, "s3_refused", True)
    else:
        assert isinstance(error, DependencyDownError)
        assert error.dependency is Dependency.S3
        assert error.may_be_the_jobs
    # Only a busy S3 is asked again at once; a region is asked for once, and credentials are renewed once.
    assert len(fake.asked) <= (4 if row.category in (BUSY, FAILING, CREDENTIALS) else 3)


def test_every_answer_with_a_code_has_a_rule() -> None:
    assert RULES[-1].matches(400, "x", "")
    assert not RULES[-1].matches(400, "", "")


# S3's own sentence


SECRET_KEY = S3Object("photos", "patients/jane-doe/2030.png")
QUOTES = [
    "Access to patients/jane-doe/2030.png is not allowed",
    "Access to patients%2Fjane-doe%2F2030.png is not allowed",
    "The object jane-doe is locked",
    'No access to "arn:aws:s3:::photos/other"',
    "See https://docs.example/patients",
]


@pytest.mark.parametrize("sentence", QUOTES)
async def test_a_sentence_that_may_contain_the_key_is_in_the_result_and_not_in_the_log(
    fake: FakeS3, sentence: str
) -> None:
    for code in ("AccessDenied", "NeverHeardOf"):
        fake.answer = refuse(403, code, message=sentence)
        error = await fault(fake.url, SECRET_KEY)
        assert isinstance(error, JobError | TransientError)
        assert sentence.split(maxsplit=1)[0] in error.message
        assert sentence not in error.log_message
        assert "jane" not in error.log_message
    fake.answer = refuse(403, "AccountProblem", message=sentence)
    error = await fault(fake.url, SECRET_KEY)
    assert isinstance(error, DependencyDownError)
    assert sentence not in error.message
    assert "jane" not in error.message


async def test_other_sentences_reach_the_person_on_call(fake: FakeS3) -> None:
    sentence = "There is a problem with your account. Contact the support."
    fake.answer = refuse(403, "AccountProblem", message=sentence)
    error = await fault(fake.url, SECRET_KEY)
    assert isinstance(error, DependencyDownError)
    assert error.message.endswith(f"see the provider's console; it says: {sentence}")


async def test_a_sentence_is_redacted_and_bounded(fake: FakeS3) -> None:
    identity = "arn:aws:iam::123456789012:user/worker"
    sentence = f"User: {identity} with AKIAIOSFODNN7EXAMPLE\n and token=abcdefgh123 {'x' * 5000}"
    fake.answer = refuse(403, "AccessDenied", message=sentence)
    error = await fault(fake.url)
    assert isinstance(error, JobError)
    for secret in (identity, "123456789012", "AKIAIOSFODNN7EXAMPLE", "abcdefgh123", "\n"):
        assert secret not in error.message
    assert len(error.message) < 700
    assert "User" not in error.log_message


@pytest.mark.parametrize("key", ["cap exceeded.png", "kms:Decrypt/requester-pays.png", "a/cap_exceeded.png"])
async def test_a_key_does_not_decide_what_an_answer_means(fake: FakeS3, key: str) -> None:
    """A publisher that chooses such a key must not stop the worker."""
    said = f'No access to "arn:aws:s3:::photos/{key}" or {key} or {key.rpartition("/")[2]}'
    fake.answer = refuse(403, "AccessDenied", message=said)
    error = await fault(fake.url, S3Object("photos", key))
    assert isinstance(error, JobError)
    assert "check that the worker has the permission s3:GetObject" in error.message


async def test_the_title_of_a_page_that_is_not_s3_s_is_reported(fake: FakeS3) -> None:
    fake.answer = give(b"<html><head><TITLE>Corporate proxy: blocked</TITLE></head>", 403)
    error = await fault(fake.url)
    assert isinstance(error, DependencyDownError)
    assert "answered 403 without an S3 error code" in error.message
    assert "Corporate proxy: blocked" in error.message
