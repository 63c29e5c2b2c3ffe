"""Address and sign requests to S3 with parts of the AWS SDK, without its blocking client.

botocore finds the endpoint of a bucket and the credentials, and signs requests; aiohttp sends them.
"""

import asyncio
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import botocore.session
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.configprovider import ConfiguredEndpointProvider
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import BotoCoreError, UnsupportedS3AccesspointConfigurationError
from botocore.utils import is_valid_endpoint_url, percent_encode, percent_encode_sequence

from worker.s3.credentials import CredentialsCache

AddressingStyle = Literal["auto", "path", "virtual"]

# Jobs choose bucket names, within VQA_ALLOWED_BUCKETS.
MAX_CACHED_BUCKETS = 1000
# AWS has fewer than 50 regions.
MAX_CACHED_REGIONS = 50
# S3 assumes this region if none is configured.
DEFAULT_REGION = "us-east-1"
# The characters of a path that the signer does not percent-encode.
_SAFE_IN_KEYS = "/-._~"
_SIGNED_PREFIX = "x-amz-"
_REQUEST_PAYER = "x-amz-request-payer"


@dataclass(frozen=True, slots=True)
class S3Object:
    """An object in S3.

    Attributes:
        bucket: its name, or the ARN of an access point.
        key: literal, never percent-decoded.
        version_id: of one version; None: the current one.
    """

    bucket: str
    key: str
    version_id: str | None = None


class S3ConfigurationError(Exception):
    """The endpoint or the AWS configuration is invalid; the message says why."""


@dataclass(frozen=True, slots=True)
class Address:
    """The address of a bucket.

    Attributes:
        prefix: the URL of its objects up to the key.
        region: to sign for.
        service: to sign for: `s3`, or that of an access point.
    """

    prefix: str
    region: str
    service: str = "s3"


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """A signed request; its headers are valid for some minutes.

    Attributes:
        credentials: that signed it; None: it is not signed.
    """

    url: str
    headers: Mapping[str, str]
    credentials: ReadOnlyCredentials | None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The S3 endpoint of the settings.

    Attributes:
        url: None: AWS.
        addressing_style: where the bucket is in URLs.
        requester_pays: whether reads of images say that the reader pays for them.
        unsigned: globs of the buckets whose images are read without a signature.
    """

    url: str | None
    addressing_style: AddressingStyle
    requester_pays: bool = False
    unsigned: Sequence[str] = ()

    @property
    def is_path_style_url(self) -> bool:
        """Whether a bucket's address is the URL and the bucket's name; then botocore is not needed for it."""
        return self.url is not None and self.addressing_style in ("auto", "path")

    def is_unsigned(self, bucket: str) -> bool:
        """Return whether a bucket's images are read without a signature."""
        return any(fnmatchcase(bucket, glob) for glob in self.unsigned)

    @property
    def payer_header(self) -> Mapping[str, str]:
        """The header of a read that says that the reader pays."""
        return {_REQUEST_PAYER: "requester"} if self.requester_pays else {}

    def client_config(self, *, is_arn: bool = False, **more: Any) -> Config:
        """Return the configuration of a botocore client; `auto` means path style if there is a URL."""
        # botocore's own `auto` uses the global endpoint, which redirects for hours after a bucket is created.
        # With `virtual`, botocore still puts bucket names that are not valid host names into the path.
        # An access point is always in the host name.
        is_path_style = not is_arn and (self.is_path_style_url or self.addressing_style == "path")
        style: Literal["path", "virtual"] = "path" if is_path_style else "virtual"
        return Config(
            s3={"addressing_style": style},
            user_agent_extra="vqa-worker",
            **more,
        )


class Aws:
    """Signs requests to one S3 endpoint.

    Raises:
        S3ConfigurationError: the endpoint or the AWS configuration is invalid.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._session = botocore.session.get_session()
        # By bucket; with the region that S3 has reported, if any.
        self._addresses: dict[str, Address] = {}
        # By region, and whether they are for access points.
        self._clients: dict[tuple[str | None, bool], Any] = {}
        self._lock = threading.Lock()
        try:
            self.endpoint = replace(endpoint, url=endpoint.url or self._configured_url())
            # Other AWS SDKs and AWS services use AWS_REGION, which botocore does not read.
            self.region = self._session.get_config_variable("region") or os.environ.get("AWS_REGION")
            self._check()
        except (BotoCoreError, ValueError) as error:
            raise S3ConfigurationError(f"VQA_S3_ENDPOINT_URL or the AWS configuration: {error}") from None
        self._credentials = CredentialsCache(self._open_session)

    async def sign(
        self,
        source: S3Object,
        method: str = "GET",
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        unsigned: bool = False,
    ) -> SignedRequest:
        """Return a signed request for an object, or for a bucket if the key is empty and there is a `query`.

        Args:
            source: the object or bucket.
            method: of HTTP.
            query: further parameters.
            headers: further headers; those of S3 are signed.
            body: of the request.
            unsigned: return a request without a signature.

        Raises:
            BotoCoreError: there are no credentials, they cannot be renewed, or the bucket name is invalid.
        """
        credentials = None if unsigned else await self._credentials.current()
        address = await self.address(source.bucket)
        headers = headers or {}
        signed = {name: value for name, value in headers.items() if name.startswith(_SIGNED_PREFIX)}
        request = AWSRequest(method, _url(address, source, query or {}), data=body, headers=signed)
        if credentials is not None:
            S3SigV4Auth(credentials, address.service, address.region).add_auth(request)
        return SignedRequest(str(request.url), {**headers, **dict(request.headers.items())}, credentials)

    async def link(self, source: S3Object, expires_s: int) -> str:
        """Return a presigned URL of the object, valid for `expires_s` seconds, without a request to S3.

        Raises:
            BotoCoreError: as `sign`.
        """
        address = await self.address(source.bucket)
        url = _url(address, source, dict(self.endpoint.payer_header))
        if self.endpoint.is_unsigned(source.bucket):
            return url
        request = AWSRequest("GET", url)
        credentials = await self._credentials.current()
        S3SigV4QueryAuth(credentials, address.service, address.region, expires=expires_s).add_auth(request)
        return str(request.url)

    async def renew(self, rejected: ReadOnlyCredentials | None) -> bool:
        """Read the credentials again, which S3 has rejected; return whether there are others now."""
        return rejected is not None and await self._credentials.renew(rejected)

    async def address(self, bucket: str) -> Address:
        """Return the address of a bucket.

        Raises:
            BotoCoreError: the bucket name is invalid.
        """
        if (address := self._addresses.get(bucket)) is None:
            address = await asyncio.to_thread(self._find_address, bucket, self.region)
            self._remember(bucket, address)
        return address

    async def move(self, bucket: str, region: str) -> None:
        """Remember the region of a bucket that S3 has reported."""
        if region != (await self.address(bucket)).region:
            self._remember(bucket, await asyncio.to_thread(self._find_address, bucket, region))

    def _remember(self, bucket: str, address: Address) -> None:
        if len(self._addresses) >= MAX_CACHED_BUCKETS:
            self._addresses.clear()
        self._addresses[bucket] = address

    def _find_address(self, bucket: str, region: str | None) -> Address:
        """Return the address that botocore's endpoint rules give, taken from a presigned URL."""
        if is_access_point(bucket):
            return self._find_access_point(bucket, region)
        if self.endpoint.is_path_style_url:
            return Address(f"{(self.endpoint.url or '').rstrip('/')}/{bucket}/", region or DEFAULT_REGION)
        return self._resolve(bucket, self._client_with_rules(region))

    def _find_access_point(self, arn: str, region: str | None) -> Address:
        """Return the address of an access point, which jobs may choose.

        Raises:
            UnsupportedS3AccesspointConfigurationError: it does not exist at this endpoint.
        """
        if self.endpoint.is_path_style_url and "amazonaws" not in (self.endpoint.url or ""):
            raise UnsupportedS3AccesspointConfigurationError(msg="not at AWS")
        try:
            return self._resolve(arn, self._client_with_rules(region, is_arn=True))
        except BotoCoreError as error:
            raise UnsupportedS3AccesspointConfigurationError(msg=str(error)) from None

    def _resolve(self, bucket: str, client: Any) -> Address:
        url = urlsplit(client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"}))
        _, _, region, service, _ = parse_qs(url.query)["X-Amz-Credential"][0].split("/")
        return Address(f"{url.scheme}://{url.netloc}{url.path.removesuffix('k')}", region, service)

    def _open_session(self) -> botocore.session.Session:
        """Return a session that reads the files of the AWS configuration again."""
        session = botocore.session.get_session()
        if self.region:
            session.set_config_variable("region", self.region)
        return session

    def _check(self) -> None:
        """Check the endpoint and the configuration."""
        url = self.endpoint.url
        if url is None or not self.endpoint.is_path_style_url:
            self._client_with_rules(self.region)
        elif not is_valid_endpoint_url(url):
            raise ValueError(f"Invalid endpoint: {url}")

    def _configured_url(self) -> str | None:
        """Return the endpoint in `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL` or the profile."""
        if self._session.get_config_variable("ignore_configured_endpoint_urls"):
            return None
        provider = ConfiguredEndpointProvider(
            full_config=self._session.full_config,
            scoped_config=self._session.get_scoped_config(),
            client_name="s3",
        )
        url: str | None = provider.provide()
        return url

    def _client_with_rules(self, region: str | None, *, is_arn: bool = False) -> Any:
        """Return a botocore client for its endpoint rules; creating one takes 0.1 s."""
        with self._lock:
            kind = region, is_arn
            if kind not in self._clients:
                if len(self._clients) >= MAX_CACHED_REGIONS:
                    self._clients.clear()
                self._clients[kind] = self._create_client(region, is_arn=is_arn)
            return self._clients[kind]

    def _create_client(self, region: str | None, *, is_arn: bool) -> Any:
        config = self.endpoint.client_config(is_arn=is_arn, region_name=region, signature_version="s3v4")
        # It is only used for addresses, so that it needs no real credentials.
        return self._session.create_client(
            "s3",
            endpoint_url=self.endpoint.url,
            config=config,
            aws_access_key_id="nobody",
            aws_secret_access_key="nobody",  # noqa: S106 - not used for a request
        )


def is_access_point(bucket: str) -> bool:
    """Return whether a bucket is the ARN of an access point."""
    return bucket.startswith("arn:")


def _url(address: Address, source: S3Object, query: Mapping[str, str]) -> str:
    url = address.prefix + percent_encode(source.key, safe=_SAFE_IN_KEYS)
    if source.version_id is not None:
        query = {**query, "versionId": source.version_id}
    return f"{url}?{percent_encode_sequence(query)}" if query else url


def ca_bundle() -> str | None:
    """Return the path of the CA bundle; botocore reads only the first two of these variables."""
    names = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
    return next((path for name in names if (path := os.environ.get(name))), None)
