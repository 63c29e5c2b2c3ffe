"""Requests to S3, addressed and signed as Amazon's own SDK does it, without its blocking client.

The SDK's parts do the work: its rules find the bucket's endpoint, its chain finds the credentials, its signer
signs. Only the bytes go another way.
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

# Jobs choose bucket names, as far as VQA_ALLOWED_BUCKETS lets them.
REMEMBERED_BUCKETS = 1000
# What S3 takes a request without a region to be signed for.
DEFAULT_REGION = "us-east-1"
# What the signer itself leaves alone in a path; anything else it would sign differently than it is sent.
_SAFE_IN_KEYS = "/-._~"


@dataclass(frozen=True, slots=True)
class S3Object:
    """An object in S3; the key is literal, never percent-decoded."""

    bucket: str
    key: str


class S3ConfigurationError(Exception):
    """There can be no client with this endpoint or this AWS configuration; the message says why."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a bucket's objects are: what stands before a key in their URLs, and the region to sign for."""

    prefix: str
    region: str


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """A request that S3 believes; the headers are good for some minutes."""

    url: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Which S3 is meant, as the settings say it: no URL means Amazon's own."""

    url: str | None
    addressing_style: AddressingStyle

    @property
    def is_path_of_url(self) -> bool:
        """Whether a bucket's address is simply the URL with the bucket behind it: no rules are needed."""
        return self.url is not None and self.addressing_style in ("auto", "path")

    def client_config(self, **more: Any) -> Config:
        """How the SDK's client is set up: `auto` is path for a URL."""
        # With its own `auto` the SDK signs for the worldwide address, which redirects for hours where a
        # bucket is new; names that no host can have are in the path with `virtual` too.
        by_path = self.is_path_of_url or self.addressing_style == "path"
        style: Literal["path", "virtual"] = "path" if by_path else "virtual"
        return Config(
            s3={"addressing_style": style},
            user_agent_extra="vqa-worker",
            **more,
        )


class Aws:
    """Signs requests for the objects of one S3.

    Raises:
        S3ConfigurationError: the endpoint or the AWS configuration makes no sense.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._session = botocore.session.get_session()
        self._credentials = CredentialsCache(self._session)
        self._addresses: dict[str, Address] = {}
        try:
            self.endpoint = replace(endpoint, url=endpoint.url or self._configured_url())
            # Amazon's other SDKs and its platforms have the second name, which this one does not know.
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
        """A request for the object, or with an empty key and a `query` one to the bucket.

        Further headers may be added to it unsigned.

        Raises:
            BotoCoreError: there are no credentials, they cannot be renewed, or the names make no URL.
        """
        credentials, address = await self._credentials.current(), await self._address(source.bucket)
        url = address.prefix + percent_encode(source.key, safe=_SAFE_IN_KEYS)
        if query:
            url = f"{url}?{percent_encode_sequence(query)}"
        request = AWSRequest(method, url, data=body)
        S3SigV4Auth(credentials, "s3", address.region).add_auth(request)
        return SignedRequest(str(request.url), dict(request.headers.items()))

    async def link(self, source: S3Object, expires_s: int) -> str:
        """A presigned URL of the object, good for `expires_s` seconds; S3 is not asked for it.

        Raises:
            BotoCoreError: as `sign`.
        """
        credentials, address = await self._credentials.current(), await self._address(source.bucket)
        request = AWSRequest("GET", address.prefix + percent_encode(source.key, safe=_SAFE_IN_KEYS))
        S3SigV4QueryAuth(credentials, "s3", address.region, expires=expires_s).add_auth(request)
        return str(request.url)

    async def _address(self, bucket: str) -> Address:
        if (address := self._addresses.get(bucket)) is None:
            if len(self._addresses) >= REMEMBERED_BUCKETS:
                self._addresses.clear()
            address = self._addresses[bucket] = await asyncio.to_thread(self._find_address, bucket)
        return address

    def _find_address(self, bucket: str) -> Address:
        """The SDK's rules for hosts, styles and regions are long: a presigned URL shows what follows."""
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
        """The S3 that `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL` or the profile name."""
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
        """A client of the SDK, a tenth of a second's work; None where nothing needs its rules."""
        url = self.endpoint.url
        if url is None or not self.endpoint.is_path_of_url:
            config = self.endpoint.client_config(region_name=self.region, signature_version="s3v4")
            # It is only asked for addresses: who signs must not decide what it knows.
            return self._session.create_client(
                "s3",
                endpoint_url=url,
                config=config,
                aws_access_key_id="nobody",
                aws_secret_access_key="nobody",  # noqa: S106 - it signs nothing that is sent
            )
        if not is_valid_endpoint_url(url):
            raise ValueError(f"Invalid endpoint: {url}")
        return None


def ca_bundle() -> str | None:
    """The file of trusted authorities: botocore knows the first two variables, and not the usual third."""
    names = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
    return next((path for name in names if (path := os.environ.get(name))), None)
