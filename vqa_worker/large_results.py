"""Results that are too large for a message: read them from S3, where the workers wrote them.

boto3 is needed for these only: the extra `s3` of the client.
"""

import os
import re
import threading
from collections.abc import Callable
from typing import Any, Final, Literal

from pydantic import ValidationError

from vqa_worker.results import Result

CONNECT_TIMEOUT_S: Final = 5.0
READ_TIMEOUT_S: Final = 30.0
ATTEMPTS: Final = 3

# What workers write; S3's keys have at most 1,024 bytes.
_URL: Final = re.compile(r"s3://([A-Za-z0-9._-]{3,255})/([!-~]{1,1024})")
_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
# As the workers; botocore reads only the first two.
_CA_BUNDLES: Final = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
_REASONS: Final = {
    "NoSuchKey": "the object does not exist: it was deleted, or it has expired",
    "NoSuchBucket": "the bucket does not exist at this S3: check the endpoint",
    "AccessDenied": "S3 denies access: the permission s3:GetObject is missing, or the object does not exist",
}


class LargeResultError(Exception):
    """A result is in S3, and it could not be read there. The job is done: do not submit it again.

    The object can still be read: its URL is `result.result_url`.

    Attributes:
        result: the result without `answer`, `parsed` and `response`.
    """

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result


class UnreadableObjectError(Exception):
    """S3 does not return the object, which may change; the message names the object and the reason."""


class NotTheResultError(Exception):
    """The URL is not one of an object in S3, or the object is not the result of the job."""


class LargeResults:
    """Reads results from S3, with the credentials that boto3 finds. Thread-safe.

    Args:
        endpoint_url: of an S3-compatible server; None: AWS, or what boto3's configuration says.
        addressing_style: where the bucket is in URLs; `auto`: in the path, if there is an endpoint URL.
    """

    def __init__(
        self, endpoint_url: str | None = None, addressing_style: Literal["auto", "path", "virtual"] = "auto"
    ) -> None:
        self._endpoint_url = endpoint_url
        self._addressing_style = addressing_style
        self._lock = threading.Lock()
        self._client: Any = None

    def read(self, url: object, *, job_id: str | None, status: str) -> dict[str, Any]:
        """Return the fields `answer`, `parsed` and `response` of a result in S3. Blocks: call it in a thread.

        Args:
            url: the `result_url` of the result message.
            job_id: the `id` of the message.
            status: of the message.

        Raises:
            UnreadableObjectError: S3 does not return the object, or boto3 is not installed.
            NotTheResultError: the URL is not one of S3, or the object is not the result of this job.
        """
        found = _URL.fullmatch(url) if isinstance(url, str) else None
        if found is None:
            raise NotTheResultError("result_url is not of the form s3://bucket/key")
        content = self._content(found[0], found[1], found[2])
        try:
            result = Result.model_validate_json(content, extra="ignore")
        except ValidationError:
            raise NotTheResultError(f"{url} is not a result") from None
        if (result.id, result.status) != (job_id, status):
            raise NotTheResultError(f"{url} is the result of another job")
        return {"answer": result.answer, "parsed": result.parsed, "response": result.response}

    def _content(self, url: str, bucket: str, key: str) -> bytes:
        try:
            import boto3  # noqa: PLC0415 - optional
            from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - optional
        except ImportError:
            text = f"{url} cannot be read: boto3 is missing; install vqa-worker-client[s3]"
            raise UnreadableObjectError(text) from None
        try:
            body = self._current_client(boto3.Session).get_object(Bucket=bucket, Key=key)["Body"]
            return bytes(body.read())
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            reason = _REASONS.get(code, f"S3 answered {code}")
        except (BotoCoreError, OSError, ValueError) as error:
            reason = str(error)
        raise UnreadableObjectError(f"{url} cannot be read: {reason}")

    def _current_client(self, open_session: Callable[..., Any]) -> Any:
        with self._lock:
            if self._client is None:
                self._client = self._create(open_session)
            return self._client

    def _create(self, open_session: Callable[..., Any]) -> Any:
        from botocore.config import Config  # noqa: PLC0415 - optional

        style = self._addressing_style
        if style == "auto":
            has_url = self._endpoint_url or any(map(os.environ.get, _ENDPOINTS))
            style = "path" if has_url else "virtual"
        config = Config(
            s3={"addressing_style": style},
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
        )
        # boto3 does not read AWS_REGION, which other AWS SDKs read.
        session = open_session(region_name=os.environ.get("AWS_REGION") or None)
        bundle = next(filter(None, map(os.environ.get, _CA_BUNDLES)), None)
        return session.client("s3", endpoint_url=self._endpoint_url, config=config, verify=bundle)
