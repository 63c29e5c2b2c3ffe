"""Translate errors of S3 and of the connection to it."""

import html
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProxyConnectionError,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
    UnsupportedS3AccesspointConfigurationError,
)

from vqa_worker.messages.error_codes import ErrorCode
from worker.errors import Dependency, DependencyDownError, Explanation, JobError, TransientError
from worker.http.client import describe_failure
from worker.observability.redaction import MARK, Redactor
from worker.s3.answers import CHECK_ENDPOINT, Category, Rule, rule_for
from worker.s3.aws import S3Object

MAX_SENTENCE_CHARS = 300
# Shorter parts of a key occur in any sentence.
_MIN_PART_CHARS = 4

_CODE = re.compile(rb"<Code>\s*([A-Za-z0-9._-]{1,100})\s*</Code>")
_MESSAGE = re.compile(rb"<Message>([^<]*)</Message>")
_TITLE = re.compile(rb"<title>([^<]*)</title>", re.IGNORECASE)
_REGION = re.compile(r"[a-z0-9-]{1,50}")
_REGION_ELEMENT = re.compile(rb"<Region>\s*([a-z0-9-]{1,50})\s*</Region>")
_ARN = re.compile(r"arn:\S+")
_ORIGIN = re.compile(r"(https?)://(?:[^/?#]*@)?([^/?#@\s]{1,255})", re.IGNORECASE)
# A publisher need not know who the worker is at AWS.
_IDENTITY = re.compile(r"arn:aws[\w-]*:(?:iam|sts):[^\s\"']+|\b(?:AKIA|ASIA)[A-Z0-9]{12,}")
_REDACT = Redactor((), MAX_SENTENCE_CHARS)

_TEMPORARY_REDIRECT = 307
_JOB_ERRORS = {
    Category.MISSING: (ErrorCode.IMAGE_NOT_FOUND, "S3 has no such object"),
    Category.FORBIDDEN: (ErrorCode.IMAGE_FORBIDDEN, "S3 denies access to this object"),
    Category.INVALID: (ErrorCode.INVALID_JOB, "S3 can have no such bucket or key"),
}

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
    """S3, or a server in its place, answered with an error.

    Attributes:
        status: HTTP status.
        code: S3's error code; empty if the response has none.
        region: of the bucket, if S3 reports it.
        sentence: S3's own sentence, or a page's title; redacted, for a result.
        log_sentence: the same for the log; empty if it may contain the key.
        location: the scheme and host of a redirect.
        rule: what the answer means.
    """

    def __init__(
        self,
        status: int,
        code: str,
        region: str | None = None,
        *,
        sentence: str = "",
        key: str = "",
        is_delete_marker: bool = False,
        location: str = "",
    ) -> None:
        """`sentence`: as S3 sent it; `key`: of the object."""
        super().__init__(f"{status} {code}")
        self.status = status
        self.code = code
        self.region = region
        self.location = location
        self.sentence = _REDACT(_IDENTITY.sub(MARK, " ".join(sentence.split())))
        self.log_sentence = "" if _may_contain(self.sentence, key) else self.sentence
        self.rule: Rule = rule_for(
            status,
            code,
            _without_key(sentence, key),
            has_region=region is not None,
            is_delete_marker=is_delete_marker,
        )

    @property
    def is_unavailable(self) -> bool:
        """Whether S3 fails or throttles, which is often transient."""
        return self.rule.category in (Category.BUSY, Category.FAILING)

    @property
    def is_wrong_endpoint(self) -> bool:
        """Whether the bucket is at another endpoint or in another region."""
        return self.rule.category is Category.REGION

    @property
    def rejects_credentials(self) -> bool:
        """Whether S3 rejects the credentials, so that newer ones may help."""
        return self.rule.category is Category.CREDENTIALS


# The exceptions that `translate` accepts.
FAILURES = (S3ResponseError, aiohttp.ClientError, BotoCoreError, OSError)


def read_response(status: int, headers: Mapping[str, str], page: bytes, source: S3Object) -> S3ResponseError:
    """Return the error for an HTTP response that is not a success; `page`: the beginning of its body."""
    origin = _ORIGIN.match(headers.get("Location", ""))
    code = _find(_CODE, page)
    return S3ResponseError(
        status,
        code,
        region_in(headers) or _find(_REGION_ELEMENT, page) or None,
        sentence=html.unescape(_find(_MESSAGE if code else _TITLE, page)),
        key=source.key,
        is_delete_marker=headers.get("x-amz-delete-marker", "").lower() == "true",
        location=f"{origin[1]}://{origin[2]}".lower() if origin else "",
    )


def read_sdk_error(error: ClientError, source: S3Object) -> S3ResponseError:
    """Return the same error for an answer that the SDK has parsed."""
    answer: Mapping[str, Any] = error.response
    metadata, parsed = answer.get("ResponseMetadata", {}), answer.get("Error", {})
    # Without a code in the answer, the SDK takes the status for the code.
    code = str(parsed.get("Code", ""))
    has_code = bool(code) and not code.isdecimal()
    headers = metadata.get("HTTPHeaders", {})
    return S3ResponseError(
        metadata.get("HTTPStatusCode", 0),
        code if has_code else "",
        region_in(headers),
        sentence=str(parsed.get("Message", "")) if has_code else "",
        key=source.key,
        is_delete_marker=headers.get("x-amz-delete-marker") == "true",
    )


def region_in(headers: Mapping[str, str]) -> str | None:
    """Return the region of the bucket that a response reports."""
    region = headers.get("x-amz-bucket-region", "")
    return region if _REGION.fullmatch(region) else None


def not_s3(what: str) -> DependencyDownError:
    """Return the error for a response that no S3 server would send."""
    text = f"{what}: {CHECK_ENDPOINT}"
    return DependencyDownError(Dependency.S3, text, may_be_the_jobs=True)


def translate(error: Exception, *, is_access_point: bool = False) -> Exception:
    """Return the worker's error for one of FAILURES; messages do not name the image.

    Args:
        error: to translate.
        is_access_point: whether it concerns an access point; a job may name one whose host does not exist.

    Returns:
        JobError: the object does not exist, access is denied, or its content has changed.
        TransientError: the connection was lost or timed out, or S3 refuses for an unknown reason.
        DependencyDownError: S3 is unreachable, failing, or rejects the credentials.
    """
    if isinstance(error, S3ResponseError):
        return _from_response(error)
    if is_access_point and isinstance(error, _UNREACHABLE):
        text = f"the access point cannot be reached: {describe_failure(error)}"
        return DependencyDownError(Dependency.S3, text, may_be_the_jobs=True)
    return _from_failure(error)


def _from_response(error: S3ResponseError) -> Exception:
    category, advice = error.rule.category, error.rule.advice
    if category in _JOB_ERRORS:
        code, what = _JOB_ERRORS[category]
        said = f"{error.code or error.status}{f': {error.sentence}' if error.sentence else ''}"
        tail = f"; {advice}" if advice else ""
        return JobError(
            code, f"{what} ({said}){tail}", log_message=f"{what} ({error.code or error.status}){tail}"
        )
    if category is Category.UNKNOWN:
        why = _explain_unknown(error)
        return TransientError(
            Dependency.S3, "s3_refused", why.message, log_message=why.log_message, refused=True
        )
    # Also an answer about the account or the keys: a bucket can belong to another account.
    return DependencyDownError(Dependency.S3, _explain_outage(error), may_be_the_jobs=True)


def _explain_unknown(error: S3ResponseError) -> Explanation:
    answered = f"S3 answered {error.status} {error.code}"
    tail = f"; {error.rule.advice}" if error.rule.advice else ""
    message, log_message = (
        f"{answered}{f': {said}' if said else ''}{tail}" for said in (error.sentence, error.log_sentence)
    )
    return Explanation(message, log_message)


def _explain_outage(error: S3ResponseError) -> str:
    """Return the reason of a pause: only words that may be logged."""
    if error.rule.category is Category.NOT_S3 or not (error.code or error.is_unavailable):
        answered = f"the server answered {error.status} without an S3 error code"
        if error.location:
            answered += f" (a redirect to {error.location})"
    else:
        answered = f"S3 answered {error.status} {error.code}".rstrip()
    advice = f": {error.rule.advice}" if error.rule.advice else ""
    if error.is_wrong_endpoint and error.region:
        advice += f" (its region is {error.region})"
    return f"{answered}{advice}{f'; it says: {error.log_sentence}' if error.log_sentence else ''}"


def _from_failure(error: Exception) -> Exception:  # noqa: PLR0911 - a table of cases
    kind = type(error).__name__
    match error:
        case ParamValidationError():
            return JobError(ErrorCode.INVALID_JOB, "is not a valid S3 bucket and key")
        case UnsupportedS3AccesspointConfigurationError():
            text = "is not an access point of this S3: check its ARN and VQA_S3_ENDPOINT_URL"
            return JobError(ErrorCode.INVALID_JOB, text)
        case FlexibleChecksumError():
            return checksum_mismatch()
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
        case aiohttp.ClientResponseError():
            # For example the alert of a TLS server to http://.
            return not_s3("the answer is not HTTP")
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


def checksum_mismatch() -> JobError:
    """Return the error for an object whose content differs from its checksum."""
    return JobError(
        ErrorCode.IMAGE_CORRUPT,
        "the content differs from the checksum that S3 has stored for it: upload the object again",
    )


def _without_key(sentence: str, key: str) -> str:
    """Return a sentence without parts of the key: a job chooses it, and it must not decide what is meant."""
    text = _ARN.sub("", sentence)
    for part in key.split("/"):
        if len(part) >= _MIN_PART_CHARS:
            text = text.replace(part, "").replace(quote(part), "")
    return text


def _may_contain(sentence: str, key: str) -> bool:
    """Return whether a sentence contains a part of the key, in some encoding, or any resource."""
    text = unquote(sentence).lower()
    parts = (
        part for part in re.split(r"[/\s]", f"{key}/{quote(key)}".lower()) if len(part) >= _MIN_PART_CHARS
    )
    return "arn:" in text or "://" in text or any(part in text or unquote(part) in text for part in parts)


def _find(pattern: re.Pattern[bytes], page: bytes) -> str:
    found = pattern.search(page)
    return found[1].decode(errors="replace") if found else ""
