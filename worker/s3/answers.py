"""What each error answer of S3 means: one table, for the answers to aiohttp and to the SDK alike.

To teach the worker another answer, add a row. Unless a row names another source: Amazon S3 API reference,
"Error responses". Rows about other stores are from their documentation or from reports; nobody has tried them
against these stores.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final


class Category(Enum):
    """Whose fault an error answer is; each has one consequence."""

    MISSING = auto()
    """The object does not exist: the job fails with `image_not_found`."""
    FORBIDDEN = auto()
    """S3 refuses this object: the job fails with `image_forbidden`."""
    INVALID = auto()
    """S3 cannot have such an object: the job fails with `invalid_job`."""
    BUSY = auto()
    """S3 throttles: retried at once; then the worker pauses, or only the job waits if others are read."""
    FAILING = auto()
    """S3 fails: the same."""
    CREDENTIALS = auto()
    """The keys are wrong or expired: read again; then as BUSY, without quick retries."""
    CONFIGURATION = auto()
    """The account, the clock or a setting is wrong: as BUSY, without quick retries."""
    REGION = auto()
    """The bucket is elsewhere: read there if S3 says where; then as BUSY, without quick retries."""
    NOT_S3 = auto()
    """Not the answer of an S3 server: as BUSY, without quick retries."""
    UNKNOWN = auto()
    """Maybe one object's, maybe everybody's: the job fails if others succeed; else the worker pauses."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A row of the table.

    Attributes:
        category: whose fault it is.
        advice: what it means and what to do, in the worker's own words.
        codes: a pattern for S3's whole `<Code>`; empty: every answer with a code.
        words: a pattern to find in the code and S3's sentence, in any case; empty: every sentence.
        statuses: HTTP statuses; empty: every status.
    """

    category: Category
    advice: str = ""
    codes: str = ""
    words: str = ""
    statuses: Collection[int] = ()

    def matches(self, status: int, code: str, sentence: str) -> bool:
        """Return whether the rule is about this answer."""
        return (
            bool(code)
            and (not self.codes or re.fullmatch(self.codes, code) is not None)
            and (not self.statuses or status in self.statuses)
            and (not self.words or re.search(self.words, f"{code} {sentence}", re.IGNORECASE) is not None)
        )


CHECK_ENDPOINT: Final = "check VQA_S3_ENDPOINT_URL (is it an S3 server, does the port need https?)"
_MAYBE_MISSING: Final = (
    "check that the worker has the permission s3:GetObject; without s3:ListBucket S3 also answers this for an"
    " object that does not exist"
)
_REDIRECTS: Final = range(300, 400)
# 408, 425, 429, 503, 509 and 529 say so by their definition. 409: another operation is in progress.
_BUSY_STATUSES: Final = (408, 409, 425, 429, 503, 509, 529)
_SERVER_ERRORS: Final = range(500, 600)
_PROXY_AUTHENTICATION: Final = 407

# The first row that matches decides.
RULES: Final = (
    # Rows that depend on S3's words.
    Rule(
        # Reported for Backblaze: 403 with "Transaction cap exceeded" or "Download cap exceeded".
        Category.CONFIGURATION,
        "the account's download cap is reached: raise it in the provider's console",
        words=r"cap[ _]exceeded|bandwidth.{0,40}\bcap\b",
    ),
    Rule(
        Category.FORBIDDEN,
        "an object encrypted with AWS KMS cannot be read unsigned: take the bucket out of VQA_S3_UNSIGNED",
        codes="InvalidArgument|InvalidRequest",
        words=r"KMS.{0,60}Signature",
    ),
    Rule(
        Category.FORBIDDEN,
        "the object is encrypted with a key that its owner supplies (SSE-C), which the worker does not have:"
        " store it with SSE-S3 or SSE-KMS",
        codes="InvalidRequest|InvalidArgument|.*Customer.*Key.*",
        words=r"server.side.encryption|customer.{0,20}key|SSE-C",
    ),
    Rule(
        Category.FORBIDDEN,
        "the worker needs the permission kms:Decrypt for the key of the object",
        codes=r"AccessDenied.*|KMS\.AccessDenied.*",
        words=r"\bkms:\w|KMS key|ciphertext|customer master key",
    ),
    Rule(
        Category.FORBIDDEN,
        "the reader pays for this bucket: set VQA_S3_REQUESTER_PAYS=true",
        codes="AccessDenied|UserProjectMissing|InvalidRequest",
        words=r"requester.?pays|UserProjectMissing",
    ),
    Rule(
        Category.FORBIDDEN,
        "the worker needs the permission s3express:CreateSession for the directory bucket",
        codes="AccessDenied",
        words=r"CreateSession",
    ),
    Rule(
        Category.FORBIDDEN,
        "the object may not exist: without the permission s3:ListBucket S3 does not say so",
        codes="AccessDenied",
        words=r"s3:ListBucket",
    ),
    Rule(
        Category.MISSING,
        "no such version",
        codes="InvalidArgument|InvalidRequest|NoSuchVersion",
        words=r"version",
    ),
    Rule(
        # Some stores say only in words that the region is wrong.
        Category.REGION,
        "the signature's region is wrong: set AWS_REGION",
        codes="InvalidArgument|InvalidRequest|BadRequest",
        words=r"\bregion\b",
    ),
    Rule(
        Category.CONFIGURATION,
        "the server does not accept Signature Version 4",
        codes="InvalidRequest",
        words=r"authorization mechanism",
    ),
    # One object's.
    Rule(Category.MISSING, codes="NoSuchKey|NotFound|NoSuchObject|ObjectNotFound"),
    Rule(
        # BucketNotFound: Oracle Object Storage.
        Category.MISSING,
        "no bucket of this name: check VQA_S3_ENDPOINT_URL and the image's URL",
        codes="NoSuchBucket|BucketNotFound|NoSuchAccessPoint",
    ),
    Rule(
        Category.FORBIDDEN,
        "the object is archived (Glacier or a similar storage class): restore it first",
        codes="InvalidObjectState",
    ),
    Rule(Category.FORBIDDEN, _MAYBE_MISSING, codes="AccessDenied"),
    Rule(
        # XMinio…: MinIO.
        Category.INVALID,
        codes="KeyTooLongError|InvalidURI|InvalidBucketName|InvalidObjectName|XMinioInvalid(Object|Resource)Name",
    ),
    # Everybody's: the credentials.
    Rule(
        Category.CREDENTIALS,
        "the access key does not exist: check the AWS credentials",
        codes="InvalidAccessKeyId|InvalidClientTokenId|UnrecognizedClient.*",
    ),
    Rule(
        Category.CREDENTIALS,
        "the secret key is wrong: check the AWS credentials",
        codes="SignatureDoesNotMatch|InvalidSignature.*",
    ),
    Rule(Category.CREDENTIALS, "the credentials have expired", codes="ExpiredToken.*|TokenExpired.*"),
    Rule(Category.CREDENTIALS, "the session token is malformed", codes="InvalidToken"),
    Rule(Category.CREDENTIALS, "the session token must be renewed", codes="TokenRefreshRequired"),
    Rule(Category.CREDENTIALS, "the credentials are not valid", codes="InvalidSecurity"),
    Rule(
        # Unauthorized: Cloudflare R2 and Backblaze for a wrong access key. NotAuthenticated: Oracle.
        Category.CREDENTIALS,
        "check the AWS credentials",
        codes="(?i:unauthorized)|NotAuthenticated|AuthFailure|AuthenticationFailed|MissingSecurityHeader"
        "|MissingAuthenticationToken",
    ),
    # Everybody's: the account, the clock, the settings.
    Rule(
        # UserSuspended: Ceph. UserDisable: Alibaba OSS, account in arrears. UserProject…: Google's billing.
        Category.CONFIGURATION,
        "the account has a problem: see the provider's console",
        codes="AccountProblem|UserSuspended|UserDisabled?|UserProjectAccountProblem|InArrears",
    ),
    Rule(Category.CONFIGURATION, "access to this S3 has been disabled", codes="AllAccessDisabled"),
    Rule(Category.CONFIGURATION, "the account is not signed up for S3", codes="NotSignedUp"),
    Rule(
        Category.CONFIGURATION, "this machine's clock is wrong", codes="RequestTimeTooSkewed|RequestExpired"
    ),
    # One bucket's.
    Rule(
        Category.REGION,
        "the signature's region is wrong: set AWS_REGION",
        codes="AuthorizationHeaderMalformed|InvalidRegion(Name)?",
    ),
    Rule(
        Category.REGION,
        "the bucket is in another region: set AWS_REGION or VQA_S3_ENDPOINT_URL",
        codes="PermanentRedirect|TemporaryRedirect|Redirect|IllegalLocationConstraintException",
    ),
    # Errors of AWS KMS that S3 passes on (KMS API reference, "Decrypt"); all objects with this key have them.
    Rule(
        Category.UNKNOWN,
        "the KMS key of the object cannot be used: is it disabled or deleted?",
        codes=r"KMS\.(Disabled|NotFound|KMSInvalidState|InvalidState|KeyUnavailable|InvalidKeyUsage).*",
    ),
    # Throttling has many names (botocore's `retries/standard.py`, MinIO, Alibaba), and may come with 400.
    Rule(
        Category.BUSY,
        codes=r".*(SlowDown|Throttl|Throughput|TooManyRequests|TransactionInProgress|QpsLimit).*"
        r"|Request(Timeout|LimitExceeded)(Exception)?|(Bandwidth|Rate)?LimitExceeded|PriorRequestNotComplete"
        r"|ServiceUnavailable|OperationAborted|ConditionalRequestConflict|(Server)?Busy"
        r"|XMinioServerNotInitialized|XMinioBackendDown",
    ),
    Rule(Category.BUSY, statuses=_BUSY_STATUSES),
    Rule(Category.FAILING, codes="Internal(Server)?Error"),
    Rule(Category.FAILING, statuses=_SERVER_ERRORS),
    Rule(
        Category.REGION,
        "a redirect to another endpoint: check VQA_S3_ENDPOINT_URL and AWS_REGION",
        statuses=_REDIRECTS,
    ),
    Rule(Category.UNKNOWN),
)

_DELETE_MARKER: Final = Rule(Category.MISSING, "this version is a delete marker")
_BUSY_WITHOUT_CODE: Final = Rule(Category.BUSY)
_FAILING_WITHOUT_CODE: Final = Rule(Category.FAILING)
_ELSEWHERE: Final = Rule(
    Category.REGION, "the bucket is in another region: set AWS_REGION or VQA_S3_ENDPOINT_URL"
)
_PROXY: Final = Rule(Category.NOT_S3, "the proxy requires a user name: check HTTP_PROXY and NO_PROXY")
_NOT_S3: Final = Rule(Category.NOT_S3, CHECK_ENDPOINT)


def rule_for(
    status: int, code: str, sentence: str, *, has_region: bool = False, is_delete_marker: bool = False
) -> Rule:
    """Return the rule for an error answer.

    Args:
        status: HTTP status.
        code: S3's `<Code>`; empty if the answer has none, so that it need not be S3's.
        sentence: S3's `<Message>`.
        has_region: whether the answer names the bucket's region.
        is_delete_marker: whether S3 says that the version is a delete marker.
    """
    if is_delete_marker:
        return _DELETE_MARKER
    if code:
        return next(rule for rule in RULES if rule.matches(status, code, sentence))
    if status in _BUSY_STATUSES:
        return _BUSY_WITHOUT_CODE
    if status in _SERVER_ERRORS:
        return _FAILING_WITHOUT_CODE
    if has_region and status in (400, *_REDIRECTS):
        return _ELSEWHERE
    return _PROXY if status == _PROXY_AUTHENTICATION else _NOT_S3
