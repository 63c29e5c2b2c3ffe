"""Reading objects from S3; what S3 answers is sorted by whose fault it is."""

import os
from typing import Literal

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
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
from worker.images.source import S3Object

AddressingStyle = Literal["auto", "path", "virtual"]

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30
# The SDK's own quick retries; beyond them the worker decides.
ATTEMPTS = 3

_NOT_FOUND = frozenset({"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "NotFound", "404"})
# S3 answers these to everybody with these credentials or this clock, whatever the object
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
_SERVER_ERROR = 500
_BUSY_CODES = frozenset({"SlowDown", "RequestTimeout", "Throttling", "ServiceUnavailable", "InternalError"})


class S3ConfigurationError(Exception):
    """There can be no client with this endpoint or this AWS configuration; the message says why."""


def _ca_bundle() -> str | None:
    """The file of trusted authorities: botocore knows the first two variables, and not the usual third."""
    names = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
    return next((path for name in names if (path := os.environ.get(name))), None)


class S3:
    """Objects of one S3 endpoint, read by blocking calls that are safe from several threads.

    Raises:
        S3ConfigurationError: the endpoint or the AWS configuration makes no sense.
    """

    def __init__(
        self, *, endpoint_url: str | None, addressing_style: AddressingStyle, max_connections: int
    ) -> None:
        style: AddressingStyle = "path" if endpoint_url and addressing_style == "auto" else addressing_style
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": style},
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            max_pool_connections=max_connections,
            user_agent_extra="vqa-worker",
        )
        try:
            self._client = boto3.client("s3", endpoint_url=endpoint_url, config=config, verify=_ca_bundle())
        except (BotoCoreError, ValueError) as error:
            raise S3ConfigurationError(f"VQA_S3_ENDPOINT_URL or the AWS configuration: {error}") from None

    def read(self, source: S3Object, name: str, max_bytes: int) -> bytes:
        """The object's bytes; `name` is how messages call it.

        Raises:
            JobError: there is no such object, it may not be read, or it is over `max_bytes`,
                which is known before its bytes are read.
            TransientError: the read broke off or took too long.
            DependencyDownError: S3 is out of reach, failing, or refuses these credentials.
        """
        try:
            response = self._client.get_object(Bucket=source.bucket, Key=source.key)
            size, body = response["ContentLength"], response["Body"]
            with body:
                if size > max_bytes:
                    message = f"{name}: has {size} bytes; VQA_MAX_IMAGE_BYTES allows {max_bytes}"
                    raise JobError(ErrorCode.IMAGE_TOO_LARGE, message)
                return body.read()
        except ClientError as error:
            raise _translate_refusal(error, name) from None
        except (BotoCoreError, OSError) as error:
            raise _translate_failure(error, name) from None

    def link(self, source: S3Object, expires_s: int) -> str:
        """A presigned URL of the object, good for `expires_s` seconds; S3 is not asked for it.

        Raises:
            DependencyDownError: there are no credentials to sign with.
        """
        params = {"Bucket": source.bucket, "Key": source.key}
        try:
            return self._client.generate_presigned_url("get_object", Params=params, ExpiresIn=expires_s)
        except BotoCoreError as error:
            raise _translate_failure(error, source.bucket) from None

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def _translate_refusal(error: ClientError, name: str) -> Exception:
    """What follows from an error that S3 answered with."""
    code = error.response.get("Error", {}).get("Code", "")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in _NOT_FOUND:
        return JobError(ErrorCode.IMAGE_NOT_FOUND, f"{name}: S3 has no such object ({code})")
    if code in _REFUSES_EVERYBODY:
        return DependencyDownError(Dependency.S3, f"S3 answered {code}: {_REFUSES_EVERYBODY[code]}")
    if status >= _SERVER_ERROR or code in _BUSY_CODES:
        return DependencyDownError(Dependency.S3, f"S3 answered {status} {code}")
    return JobError(
        ErrorCode.IMAGE_FORBIDDEN,
        f"{name}: S3 does not give this object out ({code}); check the worker's right to s3:GetObject on it",
    )


def _translate_failure(error: Exception, name: str) -> Exception:
    """What follows from a request that S3 did not answer, or not to its end."""
    kind = type(error).__name__
    match error:
        case ParamValidationError():
            return JobError(ErrorCode.INVALID_JOB, f"{name}: is not a bucket and key that S3 can have")
        case NoCredentialsError() | PartialCredentialsError() | CredentialRetrievalError():
            text = "there are no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role"
            return DependencyDownError(Dependency.S3, text)
        case EndpointConnectionError() | ConnectTimeoutError() | ProxyConnectionError() | SSLError():
            return DependencyDownError(Dependency.S3, f"S3 cannot be reached ({kind})")
        case ReadTimeoutError():
            return TransientError(Dependency.S3, "timeout", f"{name}: S3 took too long ({kind})")
        case IncompleteReadError() | ResponseStreamingError() | ConnectionClosedError() | HTTPClientError():
            return TransientError(Dependency.S3, "connection", f"{name}: reading from S3 broke off ({kind})")
        case OSError():
            return TransientError(Dependency.S3, "connection", f"{name}: reading from S3 failed ({kind})")
        case _:
            return DependencyDownError(
                Dependency.S3, f"S3 cannot be asked ({kind}): check the AWS configuration"
            )
