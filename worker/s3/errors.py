"""Translate errors of S3 and of the connection to it."""

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

from vqa_worker.messages.error_codes import ErrorCode
from worker.errors import Dependency, DependencyDownError, JobError, TransientError
from worker.http.client import describe_failure

_NOT_FOUND = frozenset({"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "NotFound", "404"})
# These concern the credentials, clock or configuration, so every request fails
# (Amazon S3 API reference, "List of error codes").
_CONFIGURATION_ERRORS = {
    "InvalidAccessKeyId": "the access key does not exist: check the AWS credentials",
    "SignatureDoesNotMatch": "the secret key is wrong: check the AWS credentials",
    "ExpiredToken": "the credentials have expired",
    "InvalidToken": "the session token is malformed",
    "TokenRefreshRequired": "the session token must be renewed",
    "InvalidSecurity": "the credentials are not valid",
    "AccountProblem": "the AWS account has a problem",
    "AllAccessDisabled": "access to this S3 has been disabled",
    # Cloudflare R2's code for a wrong access key.
    "Unauthorized": "check the AWS credentials",
    "NotSignedUp": "the account is not signed up for S3",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
    "AuthorizationHeaderMalformed": "the signature's region is wrong: set AWS_REGION",
    "PermanentRedirect": "the bucket is in another region: set AWS_REGION or VQA_S3_ENDPOINT_URL",
}
_UNAVAILABLE_CODES = frozenset(
    {"SlowDown", "RequestTimeout", "Throttling", "ServiceUnavailable", "InternalError"}
)
# The bucket is at another endpoint or in another region.
_WRONG_ENDPOINT_CODES = frozenset(
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
_CONNECTION_LOST = (
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
        code: S3's error code; empty if the response has none.
        region: of the bucket, if S3 reports it.
    """

    def __init__(self, status: int, code: str, region: str | None = None) -> None:
        super().__init__(f"{status} {code}")
        self.status = status
        self.code = code
        self.region = region

    @property
    def is_unavailable(self) -> bool:
        """Whether S3 fails or throttles, which is often transient."""
        return self.status >= _SERVER_ERROR or self.code in _UNAVAILABLE_CODES

    @property
    def is_wrong_endpoint(self) -> bool:
        """Whether the bucket is at another endpoint or in another region."""
        is_redirect = self.status in _REDIRECTS and bool(self.code or self.region)
        return is_redirect or self.code in _WRONG_ENDPOINT_CODES

    @property
    def is_temporary_redirect(self) -> bool:
        """Whether the redirect is temporary, as for a new bucket."""
        return self.status == _TEMPORARY_REDIRECT


# The exceptions that `translate` accepts.
FAILURES = (S3ResponseError, aiohttp.ClientError, BotoCoreError, OSError)


def translate(error: Exception) -> Exception:
    """Return the worker's error for one of FAILURES; messages do not name the image.

    Returns:
        JobError: the object does not exist or access is denied.
        TransientError: the connection was lost or timed out.
        DependencyDownError: S3 is unreachable, failing, or rejects the credentials.
    """
    return _from_response(error) if isinstance(error, S3ResponseError) else _from_failure(error)


def _from_response(error: S3ResponseError) -> Exception:
    code = error.code
    if code in _NOT_FOUND:
        return JobError(ErrorCode.IMAGE_NOT_FOUND, f"S3 has no such object ({code})")
    if code in _CONFIGURATION_ERRORS:
        text = f"S3 answered {code}: {_CONFIGURATION_ERRORS[code]}"
        return DependencyDownError(Dependency.S3, text, may_be_partial=error.is_wrong_endpoint)
    if not code and not error.is_unavailable:
        # A proxy in front of S3 may answer like this for one object.
        hint = "is VQA_S3_ENDPOINT_URL an S3 server and does it need https://?"
        text = f"the server answered {error.status} without an S3 error code: {hint}"
        return DependencyDownError(Dependency.S3, text, may_be_partial=True)
    if error.is_unavailable or error.status in _REDIRECTS:
        # S3 throttles single buckets and prefixes.
        text = f"S3 answered {error.status} {code}".rstrip()
        return DependencyDownError(Dependency.S3, text, may_be_partial=True)
    return JobError(
        ErrorCode.IMAGE_FORBIDDEN,
        f"S3 denies access to this object ({code or error.status}); "
        "check that the worker has the permission s3:GetObject",
    )


def _from_failure(error: Exception) -> Exception:
    kind = type(error).__name__
    match error:
        case ParamValidationError():
            return JobError(ErrorCode.INVALID_JOB, "is not a valid S3 bucket and key")
        case CredentialRetrievalError():
            from_sts = error.kwargs.get("provider") == "STS"
            reason = error.kwargs.get("error_msg") if from_sts else "check the AWS configuration"
            return DependencyDownError(Dependency.S3, f"the AWS credentials cannot be retrieved ({reason})")
        case NoCredentialsError() | PartialCredentialsError():
            text = "there are no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role"
            return DependencyDownError(Dependency.S3, text)
        case _ if isinstance(error, _UNREACHABLE):
            text = f"S3 cannot be reached: {describe_failure(error)}"
            return DependencyDownError(Dependency.S3, text)
        case TimeoutError() | ReadTimeoutError():
            return TransientError(Dependency.S3, "timeout", f"S3 timed out ({kind})")
        case _ if isinstance(error, _CONNECTION_LOST):
            return TransientError(
                Dependency.S3, "connection_error", f"the connection to S3 was lost: {describe_failure(error)}"
            )
        case _:
            return DependencyDownError(
                Dependency.S3, f"the S3 request failed ({kind}): check the AWS configuration"
            )
