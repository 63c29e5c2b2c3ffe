"""What S3 and the way to it can answer instead of an object, sorted by whose fault it is."""

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProxyConnectionError,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)

from worker.errors import Dependency, DependencyDownError, ErrorCode, JobError, TransientError

_NOT_FOUND = frozenset({"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "NotFound", "404"})
# S3 answers these to everybody with these credentials or this clock, for any object
# (Amazon S3 API reference, "List of error codes").
_REFUSES_EVERYBODY = {
    "InvalidAccessKeyId": "the access key does not exist: check the AWS credentials",
    "SignatureDoesNotMatch": "the secret key is wrong: check the AWS credentials",
    "ExpiredToken": "the credentials have expired",
    "InvalidToken": "the session token is malformed",
    "TokenRefreshRequired": "the session token must be renewed",
    "InvalidSecurity": "the credentials are not valid",
    "AccountProblem": "the AWS account has a problem",
    "AllAccessDisabled": "access to this S3 has been disabled",
    "NotSignedUp": "the account is not signed up for S3",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
    "AuthorizationHeaderMalformed": "the signature's region is wrong: set AWS_REGION",
    "PermanentRedirect": "the bucket is in another region: set AWS_REGION or VQA_S3_ENDPOINT_URL",
}
_BUSY_CODES = frozenset({"SlowDown", "RequestTimeout", "Throttling", "ServiceUnavailable", "InternalError"})
# The bucket is not where the request went.
_ELSEWHERE = frozenset(
    {
        "PermanentRedirect",
        "TemporaryRedirect",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
    }
)
_REDIRECTS = range(300, 400)
_TEMPORARY_REDIRECT = 307
_SERVER_ERROR = 500

_UNREACHABLE = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.ClientHttpProxyError,
    EndpointConnectionError,
    ConnectTimeoutError,
    ProxyConnectionError,
    SSLError,
)
_BROKE_OFF = (
    aiohttp.ClientError,
    OSError,
    IncompleteReadError,
    ResponseStreamingError,
    HTTPClientError,
)


class S3ResponseError(Exception):
    """S3 answered with an error.

    Attributes:
        status: HTTP status.
        code: S3's own word for it; empty where it gave none.
        region: where the bucket is, if S3 says so.
    """

    def __init__(self, status: int, code: str, region: str | None = None) -> None:
        super().__init__(f"{status} {code}")
        self.status = status
        self.code = code
        self.region = region

    @property
    def is_busy(self) -> bool:
        """Whether S3 is failing or asks for less, which may pass at once."""
        return self.status >= _SERVER_ERROR or self.code in _BUSY_CODES

    @property
    def is_elsewhere(self) -> bool:
        """Whether the bucket has to be asked for at another address or for another region."""
        return self.status in _REDIRECTS or self.code in _ELSEWHERE

    @property
    def is_passing(self) -> bool:
        """Whether that is so for the time being: the bucket is new, and not known everywhere yet."""
        return self.status == _TEMPORARY_REDIRECT


# What `translate` knows.
FAILURES = (S3ResponseError, aiohttp.ClientError, BotoCoreError, OSError)


def translate(error: Exception) -> Exception:
    """The worker's own error for what went wrong with S3 (one of FAILURES); messages don't name the image.

    Returns:
        JobError: there is no such object, or it may not be read.
        TransientError: the read was interrupted or took too long.
        DependencyDownError: S3 is unreachable, failing, or refuses these credentials.
    """
    return _from_answer(error) if isinstance(error, S3ResponseError) else _from_failure(error)


def _from_answer(error: S3ResponseError) -> Exception:
    code = error.code
    if code in _NOT_FOUND:
        return JobError(ErrorCode.IMAGE_NOT_FOUND, f"S3 has no such object ({code})")
    if code in _REFUSES_EVERYBODY:
        text = f"S3 answered {code}: {_REFUSES_EVERYBODY[code]}"
        return DependencyDownError(Dependency.S3, text, may_be_partial=error.is_elsewhere)
    if error.is_busy or error.status in _REDIRECTS:
        # A bucket, or a part of one, can be asked for too often while the others are well.
        text = f"S3 answered {error.status} {code}".rstrip()
        return DependencyDownError(Dependency.S3, text, may_be_partial=True)
    return JobError(
        ErrorCode.IMAGE_FORBIDDEN,
        f"S3 does not give this object out ({code or error.status}); "
        "check the worker's right to s3:GetObject on it",
    )


def _from_failure(error: Exception) -> Exception:
    kind = type(error).__name__
    match error:
        case ParamValidationError():
            return JobError(ErrorCode.INVALID_JOB, "is not a bucket and key that S3 can have")
        case CredentialRetrievalError():
            from_sts = error.kwargs.get("provider") == "STS"
            said = error.kwargs.get("error_msg") if from_sts else "check the AWS configuration"
            return DependencyDownError(Dependency.S3, f"the AWS credentials cannot be had ({said})")
        case NoCredentialsError() | PartialCredentialsError():
            text = "there are no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role"
            return DependencyDownError(Dependency.S3, text)
        case _ if isinstance(error, _UNREACHABLE):
            return DependencyDownError(Dependency.S3, f"S3 cannot be reached ({kind})")
        case TimeoutError() | ReadTimeoutError():
            return TransientError(Dependency.S3, "timeout", f"S3 took too long ({kind})")
        case _ if isinstance(error, _BROKE_OFF):
            return TransientError(
                Dependency.S3, "connection_error", f"reading from S3 was interrupted ({kind})"
            )
        case _:
            return DependencyDownError(
                Dependency.S3, f"S3 cannot be asked ({kind}): check the AWS configuration"
            )
