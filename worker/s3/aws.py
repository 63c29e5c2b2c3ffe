"""Address and sign requests to S3 with parts of the AWS SDK, without its blocking client.

botocore finds the endpoint of a bucket and the credentials, and signs requests; aiohttp sends them.
"""

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import botocore.session
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.configprovider import ConfiguredEndpointProvider
from botocore.exceptions import BotoCoreError
from botocore.utils import is_valid_endpoint_url, percent_encode, percent_encode_sequence

from worker.s3.credentials import CredentialsCache

AddressingStyle = Literal["auto", "path", "virtual"]

# Jobs choose bucket names, within VQA_ALLOWED_BUCKETS.
MAX_CACHED_BUCKETS = 1000
# S3 assumes this region if none is configured.
DEFAULT_REGION = "us-east-1"
# The characters of a path that the signer does not percent-encode.
_SAFE_IN_KEYS = "/-._~"


@dataclass(frozen=True, slots=True)
class S3Object:
    """An object in S3; the key is literal, never percent-decoded."""

    bucket: str
    key: str


class S3ConfigurationError(Exception):
    """The endpoint or the AWS configuration is invalid; the message says why."""


@dataclass(frozen=True, slots=True)
class Address:
    """The address of a bucket.

    Attributes:
        prefix: the URL of its objects up to the key.
        region: to sign for.
    """

    prefix: str
    region: str


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """A signed request; its headers are valid for some minutes."""

    url: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The S3 endpoint of the settings; without a URL it is AWS."""

    url: str | None
    addressing_style: AddressingStyle

    @property
    def is_path_style_url(self) -> bool:
        """Whether a bucket's address is the URL and the bucket's name; then botocore is not needed for it."""
        return self.url is not None and self.addressing_style in ("auto", "path")

    def client_config(self, **more: Any) -> Config:
        """Return the configuration of a botocore client; `auto` means path style if there is a URL."""
        # botocore's own `auto` uses the global endpoint, which redirects for hours after a bucket is created.
        # With `virtual`, botocore still puts bucket names that are not valid host names into the path.
        is_path_style = self.is_path_style_url or self.addressing_style == "path"
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
        self._credentials = CredentialsCache(self._session)
        self._addresses: dict[str, Address] = {}
        try:
            self.endpoint = replace(endpoint, url=endpoint.url or self._configured_url())
            # Other AWS SDKs and AWS services use AWS_REGION, which botocore does not read.
            self.region = self._session.get_config_variable("region") or os.environ.get("AWS_REGION")
            if self.region:
                self._session.set_config_variable("region", self.region)
            self._client = self._client_with_rules()
        except (BotoCoreError, ValueError) as error:
            raise S3ConfigurationError(f"VQA_S3_ENDPOINT_URL or the AWS configuration: {error}") from None

    async def sign(
        self,
        source: S3Object,
        method: str = "GET",
        *,
        query: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> SignedRequest:
        """Return a signed request for an object, or for a bucket if the key is empty and there is a `query`.

        Further unsigned headers may be added.

        Raises:
            BotoCoreError: there are no credentials, they cannot be renewed, or the bucket name is invalid.
        """
        credentials, address = await self._credentials.current(), await self._address(source.bucket)
        url = address.prefix + percent_encode(source.key, safe=_SAFE_IN_KEYS)
        if query:
            url = f"{url}?{percent_encode_sequence(query)}"
        request = AWSRequest(method, url, data=body)
        S3SigV4Auth(credentials, "s3", address.region).add_auth(request)
        return SignedRequest(str(request.url), dict(request.headers.items()))

    async def link(self, source: S3Object, expires_s: int) -> str:
        """Return a presigned URL of the object, valid for `expires_s` seconds, without a request to S3.

        Raises:
            BotoCoreError: as `sign`.
        """
        credentials, address = await self._credentials.current(), await self._address(source.bucket)
        request = AWSRequest("GET", address.prefix + percent_encode(source.key, safe=_SAFE_IN_KEYS))
        S3SigV4QueryAuth(credentials, "s3", address.region, expires=expires_s).add_auth(request)
        return str(request.url)

    async def _address(self, bucket: str) -> Address:
        if (address := self._addresses.get(bucket)) is None:
            if len(self._addresses) >= MAX_CACHED_BUCKETS:
                self._addresses.clear()
            address = self._addresses[bucket] = await asyncio.to_thread(self._find_address, bucket)
        return address

    def _find_address(self, bucket: str) -> Address:
        """Return the address that botocore's endpoint rules give, taken from a presigned URL."""
        if self._client is None:
            return Address(
                f"{(self.endpoint.url or '').rstrip('/')}/{bucket}/", self.region or DEFAULT_REGION
            )
        url = urlsplit(
            self._client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"})
        )
        region = parse_qs(url.query)["X-Amz-Credential"][0].split("/")[2]
        return Address(f"{url.scheme}://{url.netloc}{url.path.removesuffix('k')}", region)

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

    def _client_with_rules(self) -> Any:
        """Return a botocore client for its endpoint rules, or None if they are not needed; takes 0.1 s."""
        url = self.endpoint.url
        if url is None or not self.endpoint.is_path_style_url:
            config = self.endpoint.client_config(region_name=self.region, signature_version="s3v4")
            # It is only used for addresses, so that it needs no real credentials.
            return self._session.create_client(
                "s3",
                endpoint_url=url,
                config=config,
                aws_access_key_id="nobody",
                aws_secret_access_key="nobody",  # noqa: S106 - not used for a request
            )
        if not is_valid_endpoint_url(url):
            raise ValueError(f"Invalid endpoint: {url}")
        return None


def ca_bundle() -> str | None:
    """Return the path of the CA bundle; botocore reads only the first two of these variables."""
    names = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
    return next((path for name in names if (path := os.environ.get(name))), None)
