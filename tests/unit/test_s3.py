"""The S3 client's requests to a fake server, and its handling of responses."""

import asyncio
import base64
import gzip
import hashlib
import os
import sys
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from botocore.exceptions import NoCredentialsError

from tests.authority import Authority
from tests.fake_s3 import Answer, FakeS3, give, head, refuse, say, with_sessions
from tests.running import until
from tests.unit.s3 import CONTENT, CREDENTIALS, FAR, HOME, IMAGE, SDK_IMAGE, an_s3, fault, isolate, read
from vqa_worker.messages.error_codes import ErrorCode
from worker.errors import Dependency, DependencyDownError, JobError, TransientError
from worker.http.client import proxy_options
from worker.s3 import credentials
from worker.s3.aws import AddressingStyle, Aws, Endpoint, S3ConfigurationError, S3Object, ca_bundle
from worker.s3.client import S3
from worker.s3.conditional_store import ConditionalStore


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolate(monkeypatch, tmp_path)


@pytest.fixture
async def fake() -> AsyncIterator[FakeS3]:
    async with FakeS3.serving(CONTENT) as fake:
        yield fake


def moved(status: int) -> Answer:
    """Return a redirect to the other region."""
    code = "PermanentRedirect" if status == 301 else "TemporaryRedirect"
    return refuse(status, code, f"<Region>{FAR}</Region>", x_amz_bucket_region=FAR)


# Settings


def test_an_invalid_endpoint_is_reported_with_its_setting() -> None:
    with pytest.raises(S3ConfigurationError, match=r"VQA_S3_ENDPOINT_URL.*my_s3"):
        Aws(Endpoint("http://my_s3:9000", "auto"))


def test_the_ca_bundle_comes_from_the_usual_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ca_bundle() is None
    monkeypatch.setenv("SSL_CERT_FILE", "/ca.pem")
    assert ca_bundle() == "/ca.pem"
    monkeypatch.setenv("AWS_CA_BUNDLE", "/aws.pem")
    assert ca_bundle() == "/aws.pem"


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "SSL_CERT_FILE"])
async def test_an_unreadable_ca_bundle_is_reported_with_its_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    invalid = tmp_path / "invalid.pem"
    invalid.write_text("no certificate")
    for path in (tmp_path / "missing.pem", invalid, tmp_path):
        monkeypatch.setenv(name, str(path))
        with pytest.raises(S3ConfigurationError, match=rf"{name}.*{path.name}"):
            S3(Aws(Endpoint("https://127.0.0.1:9", "auto")))


# Addresses


@pytest.mark.parametrize(
    ("endpoint", "style", "bucket", "url"),
    [
        ("http://s3.example:9000", "auto", "photos", "http://s3.example:9000/photos/cat.png"),
        ("http://s3.example:9000", "path", "photos", "http://s3.example:9000/photos/cat.png"),
        ("http://s3.example:9000", "virtual", "photos", "http://photos.s3.example:9000/cat.png"),
        ("https://s3.example/base", "auto", "photos", "https://s3.example/base/photos/cat.png"),
        (None, "auto", "photos", f"https://photos.s3.{HOME}.amazonaws.com/cat.png"),
        (None, "virtual", "photos", f"https://photos.s3.{HOME}.amazonaws.com/cat.png"),
        (None, "path", "photos", f"https://s3.{HOME}.amazonaws.com/photos/cat.png"),
        # A wildcard certificate for *.s3… does not cover names with another dot.
        (None, "auto", "my.photos", f"https://s3.{HOME}.amazonaws.com/my.photos/cat.png"),
    ],
)
async def test_the_address_of_a_bucket_follows_the_addressing_style(
    endpoint: str | None, style: AddressingStyle, bucket: str, url: str
) -> None:
    aws = Aws(Endpoint(endpoint, style))
    signed = await aws.sign(S3Object(bucket, "cat.png"))
    assert signed.url == url
    link = await aws.link(S3Object(bucket, "cat.png"), 60)
    assert link.partition("?")[0] == url


@pytest.mark.parametrize(
    ("variables", "own", "prefix"),
    [
        ({"_S3": "http://s3.example:9000"}, None, "http://s3.example:9000/photos"),
        ({"": "http://all.example:9000/base"}, None, "http://all.example:9000/base/photos"),
        ({"_S3": "http://s3.example", "": "http://all.example"}, None, "http://s3.example/photos"),
        ({"_S3": "http://s3.example"}, "http://own.example", "http://own.example/photos"),
        ({"_STS": "http://sts.example"}, None, f"https://photos.s3.{HOME}.amazonaws.com"),
    ],
)
async def test_without_the_setting_the_sdks_own_variables_name_the_endpoint(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], own: str | None, prefix: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"AWS_ENDPOINT_URL{name}", value)
    aws = Aws(Endpoint(own, "auto"))
    assert (await aws.sign(S3Object("photos", "cat.png"))).url == f"{prefix}/cat.png"
    assert (await aws.link(S3Object("photos", "cat.png"), 60)).startswith(f"{prefix}/cat.png?")


async def test_the_sdks_own_variables_can_be_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3.example:9000")
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    signed = await Aws(Endpoint(None, "auto")).sign(S3Object("photos", "cat.png"))
    assert signed.url == f"https://photos.s3.{HOME}.amazonaws.com/cat.png"


def test_an_invalid_endpoint_in_a_variable_of_the_sdk_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://my_s3:9000")
    with pytest.raises(S3ConfigurationError, match="my_s3"):
        Aws(Endpoint(None, "auto"))


@pytest.mark.parametrize("endpoint", ["environment", "setting"])
async def test_the_endpoint_in_the_sdks_own_variable_is_read(
    fake: FakeS3, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    """Buckets of another region are there too."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if "/far/" in request.raw_path and fake.asked[-1].signed_by[1] != FAR:
            return await moved(301)(request)
        return await give(CONTENT)(request)

    fake.answer = answer
    if endpoint == "environment":
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", fake.url)
    async with an_s3(fake.url if endpoint == "setting" else None) as s3:
        assert await read(s3) == CONTENT
        assert await read(s3, S3Object("far", "cat.png")) == CONTENT
    assert fake.targets[0] == "/photos/cats/cat.png"
    assert set(fake.targets[1:]) == {"/far/cat.png"}


# Requests


async def test_a_read_is_one_signed_get_without_range_or_compression(fake: FakeS3) -> None:
    async with an_s3(fake.url) as s3:
        assert await read(s3) == CONTENT
    (asked,) = fake.asked
    assert (asked.method, asked.target) == ("GET", "/photos/cats/cat.png")
    assert asked.signed_by == ("AKIDUSUAL", HOME)
    assert "x-amz-security-token" not in asked.headers
    assert asked.headers.get("accept-encoding", "identity") == "identity"
    assert "range" not in asked.headers


async def test_a_session_token_is_sent(fake: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "the-session's-token")
    async with an_s3(fake.url) as s3:
        await read(s3)
        assert "X-Amz-Security-Token=the-session" in await s3.link(IMAGE, 60)
    assert fake.asked[0].headers["x-amz-security-token"] == "the-session's-token"
    assert "x-amz-security-token" in fake.asked[0].headers["authorization"]


async def test_connections_are_reused(fake: FakeS3) -> None:
    peers = set()

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        assert request.transport is not None
        peers.add(request.transport.get_extra_info("peername"))
        return await give(CONTENT)(request)

    fake.answer = answer
    async with an_s3(fake.url) as s3:
        for _ in range(5):
            await read(s3)
    assert len(peers) == 1


@pytest.mark.parametrize("length", [1, 12])
async def test_a_check_requests_only_the_first_bytes(fake: FakeS3, length: int) -> None:
    fake.answer = give(CONTENT[:length], 206, Content_Range=f"bytes 0-{length - 1}/{len(CONTENT)}")
    async with an_s3(fake.url) as s3:
        assert await s3.read_beginning(IMAGE, length) == (len(CONTENT), CONTENT[:length])
    assert fake.asked[0].headers["range"] == f"bytes=0-{length - 1}"


async def test_a_check_works_without_ranges_and_with_short_empty_or_missing_objects(fake: FakeS3) -> None:
    async with an_s3(fake.url) as s3:
        assert await s3.read_beginning(IMAGE, 12) == (len(CONTENT), CONTENT[:12])
        fake.answer = give(CONTENT[:5], 206, Content_Range="bytes 0-4/5")
        assert await s3.read_beginning(IMAGE, 12) == (5, CONTENT[:5])
        fake.answer = refuse(416, "InvalidRange", Content_Range="bytes */0")
        assert await s3.read_beginning(IMAGE, 12) == (0, b"")
        fake.answer = refuse(404, "NoSuchKey")
        with pytest.raises(JobError) as caught:
            await s3.read_beginning(IMAGE, 12)
    assert caught.value.code is ErrorCode.IMAGE_NOT_FOUND


# Versions, public and requester-pays buckets, access points


VERSION = S3Object("photos", "cats/cat.png", "3HL4kqtJlcpXroDTDmJ+rmSpXd3d/IbrHY")


async def test_one_version_is_read_and_linked(fake: FakeS3) -> None:
    encoded = "versionId=3HL4kqtJlcpXroDTDmJ%2BrmSpXd3d%2FIbrHY"
    async with an_s3(fake.url) as s3:
        assert await read(s3, VERSION) == CONTENT
        await s3.read_beginning(VERSION, 12)
        assert encoded in await s3.link(VERSION, 60)
    assert fake.targets == [f"/photos/cats/cat.png?{encoded}"] * 2


@pytest.mark.parametrize(
    "answer",
    [
        refuse(404, "NoSuchVersion"),
        refuse(400, "InvalidArgument", message="Invalid version id specified"),
        refuse(405, "MethodNotAllowed", x_amz_delete_marker="true"),
        refuse(404, "NoSuchKey", x_amz_delete_marker="true"),
    ],
)
async def test_a_missing_or_deleted_version_is_missing(fake: FakeS3, answer: Answer) -> None:
    fake.answer = answer
    error = await fault(fake.url, VERSION)
    assert isinstance(error, JobError)
    assert error.code is ErrorCode.IMAGE_NOT_FOUND


async def test_requester_pays_is_signed_and_in_links(fake: FakeS3) -> None:
    async with an_s3(fake.url, requester_pays=True) as s3:
        assert await read(s3) == CONTENT
        assert "x-amz-request-payer=requester" in await s3.link(IMAGE, 60)
    assert fake.asked[0].headers["x-amz-request-payer"] == "requester"
    assert "x-amz-request-payer" in fake.asked[0].headers["authorization"]


async def test_public_buckets_are_read_without_a_signature_or_credentials(
    fake: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    async with an_s3(fake.url, unsigned=["photos", "public-*"]) as s3:
        assert await read(s3) == CONTENT
        assert await s3.read_beginning(VERSION, 12) == (len(CONTENT), CONTENT[:12])
        assert await s3.link(IMAGE, 60) == f"{fake.url}/photos/cats/cat.png"
        with pytest.raises(DependencyDownError, match="credentials"):
            await read(s3, S3Object("private", "cat.png"))
    assert all("authorization" not in asked.headers for asked in fake.asked)
    assert len(fake.asked) == 2


async def test_other_buckets_are_signed_all_the_same(fake: FakeS3) -> None:
    async with an_s3(fake.url, unsigned=["public"]) as s3:
        await read(s3)
    assert fake.asked[0].signed_by == ("AKIDUSUAL", HOME)


@pytest.mark.parametrize(
    ("bucket", "url", "signed_for"),
    [
        (
            "arn:aws:s3:eu-west-3:123456789012:accesspoint/cats",
            "https://cats-123456789012.s3-accesspoint.eu-west-3.amazonaws.com/cat.png",
            "eu-west-3/s3",
        ),
        (
            "arn:aws:s3:eu-central-1:123456789012:accesspoint:cats",
            "https://cats-123456789012.s3-accesspoint.eu-central-1.amazonaws.com/cat.png",
            "eu-central-1/s3",
        ),
        (
            "arn:aws:s3-object-lambda:eu-west-3:123456789012:accesspoint/cats",
            "https://cats-123456789012.s3-object-lambda.eu-west-3.amazonaws.com/cat.png",
            "eu-west-3/s3-object-lambda",
        ),
    ],
)
@pytest.mark.parametrize("style", ["auto", "path", "virtual"])
async def test_access_points_are_addressed_and_signed_in_their_region(
    style: AddressingStyle, bucket: str, url: str, signed_for: str
) -> None:
    aws = Aws(Endpoint(None, style))
    signed = await aws.sign(S3Object(bucket, "cat.png"))
    assert signed.url == url
    assert f"/{signed_for}/aws4_request" in signed.headers["Authorization"]
    assert (await aws.link(S3Object(bucket, "cat.png"), 60)).startswith(f"{url}?")


@pytest.mark.parametrize(
    ("url", "style", "arn"),
    [
        ("http://127.0.0.1:9", "auto", "arn:aws:s3:eu-west-3:123456789012:accesspoint/cats"),
        ("http://127.0.0.1:9", "path", "arn:aws:s3:eu-west-3:123456789012:accesspoint/cats"),
        (None, "auto", "arn:aws-cn:s3:cn-north-1:123456789012:accesspoint/cats"),
    ],
)
async def test_an_access_point_that_this_s3_cannot_have_is_the_job_s_error(
    url: str | None, style: AddressingStyle, arn: str
) -> None:
    """A publisher that names one must not stop the worker."""
    async with an_s3(url, style) as s3:
        for read_it in (s3.open(S3Object(arn, "k")), s3.link(S3Object(arn, "k"), 60)):
            with pytest.raises(JobError) as caught:
                await read_it
            assert caught.value.code is ErrorCode.INVALID_JOB


async def test_an_access_point_whose_host_does_not_exist_does_not_stop_the_worker() -> None:
    arn = "arn:aws:s3:eu-nowhere-9:123456789012:accesspoint/cats"
    async with an_s3("http://s3.invalid", "virtual") as s3:
        with pytest.raises(DependencyDownError, match="access point cannot be reached") as caught:
            await s3.open(S3Object(arn, "k"))
    assert caught.value.may_be_the_jobs


# Changing credentials


def write_keys(tmp_path: Path, name: str) -> None:
    (tmp_path / "credentials").write_text(
        f"[default]\naws_access_key_id = {name}\naws_secret_access_key = secret\n"
    )


@pytest.fixture
def shared_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Keys in the shared credentials file only."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    write_keys(tmp_path, "AKIDOLD")
    return tmp_path


@pytest.mark.parametrize("source", [IMAGE, SDK_IMAGE], ids=["aiohttp", "SDK"])
@pytest.mark.parametrize(
    ("status", "code"),
    [(403, "InvalidAccessKeyId"), (403, "SignatureDoesNotMatch"), (400, "ExpiredToken")],
)
async def test_keys_renewed_in_the_shared_file_are_read_when_s3_rejects_the_old_ones(
    fake: FakeS3, shared_file: Path, status: int, code: str, source: S3Object
) -> None:
    valid = "AKIDOLD"

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        is_valid = fake.asked[-1].signed_by[0] in (valid, "AKIDSESSION")
        return await (with_sessions(give(CONTENT)) if is_valid else refuse(status, code))(request)

    fake.answer = answer
    async with an_s3(fake.url) as s3:
        assert await read(s3, source) == CONTENT
        valid = "AKIDNEW"
        if source is IMAGE:
            # The session of a directory bucket would stay valid for minutes.
            with pytest.raises(DependencyDownError, match=code):
                await read(s3, source)
        write_keys(shared_file, "AKIDNEW")
        assert await asyncio.gather(*[read(s3, source) for _ in range(4)]) == [CONTENT] * 4


async def test_links_are_signed_with_renewed_keys_after_a_minute(
    shared_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [time.monotonic()]
    monkeypatch.setattr(credentials, "time", type("Clock", (), {"monotonic": lambda: clock[0]}))
    async with an_s3("http://127.0.0.1:9") as s3:
        assert "AKIDOLD" in await s3.link(IMAGE, 60)
        write_keys(shared_file, "AKIDNEW")
        assert "AKIDOLD" in await s3.link(IMAGE, 60)
        clock[0] += 61

        async def is_new() -> bool:
            return "AKIDNEW" in await s3.link(IMAGE, 60)

        await until(is_new, "the new keys are used")


SCRIPT = """
import datetime, json, os, pathlib, sys, time, uuid
folder = pathlib.Path(sys.argv[1])
name = uuid.uuid4().hex
(folder / f"asked-{name}").touch()
ends = time.monotonic() + 10
while not (folder / f"go-{name}").exists():
    if time.monotonic() > ends:
        sys.exit("nobody let it go on")
    time.sleep(0.01)
until = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=60)
print(json.dumps({"Version": 1, "AccessKeyId": name, "SecretAccessKey": "s", "SessionToken": f"t-{name}",
    "Expiration": until.isoformat()}))
"""


@pytest.fixture
def granted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A credential process that returns new credentials for a minute and waits until released."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "grant.py").write_text(SCRIPT)
    (tmp_path / "config").write_text(
        f"[default]\ncredential_process = {sys.executable} {tmp_path}/grant.py {tmp_path}\n"
    )
    return tmp_path


async def test_expiring_credentials_are_renewed_without_blocking_the_event_loop(
    fake: FakeS3, granted: Path
) -> None:
    async def let_go() -> None:
        """Release the process only while the event loop runs."""
        while True:
            for name in os.listdir(granted):  # noqa: PTH208 - quick enough for an event loop
                if name.startswith("asked-"):
                    (granted / name.replace("asked", "go")).touch()
            await asyncio.sleep(0.01)

    letting_go = asyncio.create_task(let_go())
    try:
        async with an_s3(fake.url) as s3:
            for _ in range(2):
                await asyncio.gather(read(s3), read(s3))
    finally:
        letting_go.cancel()
    keys = [asked.signed_by[0] for asked in fake.asked]
    assert [asked.headers["x-amz-security-token"] for asked in fake.asked] == [f"t-{key}" for key in keys]
    assert not set(keys[:2]) & set(keys[2:])


async def test_missing_credentials_are_an_outage(fake: FakeS3, granted: Path) -> None:
    (granted / "grant.py").write_text("import sys; sys.exit('no')")
    error = await fault(fake.url)
    assert isinstance(error, DependencyDownError)
    assert error.dependency is Dependency.S3
    assert "credentials" in error.message
    assert fake.asked == []


async def test_credentials_that_are_added_after_the_start_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    async with an_s3(None) as s3:
        with pytest.raises(DependencyDownError, match="credentials"):
            await s3.link(IMAGE, 60)
        aws = Aws(Endpoint(None, "auto"))
        with pytest.raises(NoCredentialsError):
            await aws.sign(IMAGE)
        for name, value in CREDENTIALS.items():
            monkeypatch.setenv(name, value)
        signed = await aws.sign(IMAGE)
        assert signed.url == f"https://photos.s3.{HOME}.amazonaws.com/cats/cat.png"
        assert "Credential=AKIDUSUAL/" in signed.headers["Authorization"]
        assert "X-Amz-Credential=AKIDUSUAL" in await s3.link(IMAGE, 60)


async def test_credentials_that_are_added_after_the_start_read_buckets_of_other_regions_too(
    fake: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    directory = S3Object("photos--use1-az4--x-s3", "cat.png")
    async with an_s3(fake.url) as s3:
        with pytest.raises(DependencyDownError, match="credentials"):
            await read(s3, directory)
        assert fake.asked == []
        for name, value in CREDENTIALS.items():
            monkeypatch.setenv(name, value)
        fake.answer = directory_bucket(fake)
        assert await read(s3, directory) == CONTENT


ROLE = "arn:aws:iam::123456789012:role/reader"


@pytest.fixture
async def sts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[FakeS3]:
    """A fake STS that returns the credentials of a role."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(
        f"[default]\nrole_arn = {ROLE}\nsource_profile = base\n"
        "[profile base]\naws_access_key_id = AKIDBASE\naws_secret_access_key = secret\n"
    )
    monkeypatch.setenv("AWS_DEFAULT_REGION", HOME)
    async with FakeS3.serving(b"") as sts:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.url)
        yield sts


def refuse_role(status: int, code: str) -> Answer:
    words = f"User AKIDBASE may not assume {ROLE}"
    body = f"<ErrorResponse><Error><Code>{code}</Code><Message>{words}</Message></Error></ErrorResponse>"
    return give(body.encode(), status, Content_Type="text/xml")


@pytest.mark.parametrize("way", ["open", "read_beginning", "link", "open elsewhere", "link elsewhere"])
@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (403, "ExpiredToken")])
async def test_a_rejected_role_is_an_outage_and_reported_by_its_code_only(
    fake: FakeS3, sts: FakeS3, way: str, status: int, code: str
) -> None:
    sts.answer = refuse_role(status, code)
    source = S3Object("photos--use1-az4--x-s3", "cat.png") if "elsewhere" in way else IMAGE
    async with an_s3(fake.url) as s3:
        ways: dict[str, Callable[[], Awaitable[Any]]] = {
            "open": lambda: s3.open(source),
            "read_beginning": lambda: s3.read_beginning(source, 12),
            "link": lambda: s3.link(source, 60),
        }
        with pytest.raises(DependencyDownError) as caught:
            await ways[way.split(maxsplit=1)[0]]()
    assert sts.asked
    assert fake.asked == []
    assert caught.value.dependency is Dependency.S3
    assert code in caught.value.message
    assert "AKIDBASE" not in caught.value.message
    assert "arn:" not in caught.value.message


ROLE_GRANTED = (
    "<AssumeRoleResponse><AssumeRoleResult><Credentials><AccessKeyId>AKIDROLE</AccessKeyId>"
    "<SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>"
    "<Expiration>2999-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>"
)


@pytest.mark.parametrize("name", ["AWS_DEFAULT_REGION", "AWS_REGION"])
async def test_sts_is_called_in_the_region_of_either_variable(
    fake: FakeS3, sts: FakeS3, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for other in ("AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, FAR)
    sts.answer = give(ROLE_GRANTED.encode(), Content_Type="text/xml")
    async with an_s3(fake.url) as s3:
        assert await read(s3) == CONTENT
    assert [asked.signed_by for asked in sts.asked] == [("AKIDBASE", FAR)]
    assert [asked.signed_by for asked in fake.asked] == [("AKIDROLE", FAR)]


async def test_renewed_keys_of_a_role_s_source_are_read_when_sts_rejects_the_old_ones(
    fake: FakeS3, sts: FakeS3, tmp_path: Path
) -> None:
    valid = "AKIDBASE"

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if sts.asked[-1].signed_by[0] != valid:
            return await refuse_role(403, "InvalidClientTokenId")(request)
        # Renewed before each use.
        soon = (datetime.now(UTC) + timedelta(seconds=60)).isoformat()
        body = ROLE_GRANTED.replace("2999-01-01T00:00:00Z", soon)
        return await give(body.encode(), Content_Type="text/xml")(request)

    sts.answer = answer
    async with an_s3(fake.url) as s3:
        assert await read(s3) == CONTENT
        valid = "AKIDNEW"
        with pytest.raises(DependencyDownError, match="InvalidClientTokenId"):
            await read(s3)
        config = tmp_path / "config"
        config.write_text(config.read_text().replace("AKIDBASE", "AKIDNEW"))
        assert await read(s3) == CONTENT


# Buckets of other regions


def directory_bucket(fake: FakeS3) -> Answer:
    """A fake S3 that requires CreateSession first."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if fake.asked[-1].headers.get("x-amz-s3session-token") != "the-session":
            return await refuse(400, "InvalidRequest")(request)
        return await give(CONTENT)(request)

    return with_sessions(answer)


async def test_a_directory_bucket_is_read_and_presigned_with_a_session(fake: FakeS3) -> None:
    fake.answer = directory_bucket(fake)
    source = S3Object("photos--use1-az4--x-s3", "cat.png")
    async with an_s3(fake.url) as s3:
        link = await s3.link(source, 60)
        assert "X-Amz-S3session-Token=the-session" in link
        assert "X-Amz-Expires=60" in link
        assert await read(s3, source) == CONTENT


async def test_a_presigned_url_is_signed_for_the_bucket_s_region_once_it_is_known(fake: FakeS3) -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return await (give(CONTENT) if fake.asked[-1].signed_by[1] == FAR else moved(301))(request)

    fake.answer = answer
    async with an_s3(fake.url) as s3:
        assert f"%2F{HOME}%2Fs3%2F" in await s3.link(IMAGE, 60)
        await read(s3)
        link = await s3.link(IMAGE, 60)
    assert link.startswith(f"{fake.url}/photos/cats/cat.png?")
    assert f"%2F{FAR}%2Fs3%2F" in link
    assert "X-Amz-Expires=60" in link


@pytest.mark.parametrize("status", [301, 307])
async def test_the_region_of_a_redirect_is_remembered(fake: FakeS3, status: int) -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return await (give(CONTENT) if fake.asked[-1].signed_by[1] == FAR else moved(status))(request)

    fake.answer = answer
    async with an_s3(fake.url) as s3:
        assert await read(s3) == CONTENT
        assert await read(s3) == CONTENT
    assert [asked.signed_by[1] for asked in fake.asked] == [HOME, FAR, FAR]


async def test_a_bucket_that_moves_is_found_again(fake: FakeS3) -> None:
    home = FAR

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if fake.asked[-1].signed_by[1] == home:
            return await give(CONTENT)(request)
        return await refuse(301, "PermanentRedirect", x_amz_bucket_region=home)(request)

    fake.answer = answer
    async with an_s3(fake.url) as s3:
        assert await read(s3) == CONTENT
        home = HOME
        assert await read(s3) == CONTENT


@pytest.mark.parametrize(
    ("status", "code"), [(301, "PermanentRedirect"), (400, "IllegalLocationConstraintException")]
)
async def test_a_region_that_the_answer_does_not_name_is_asked_for(
    fake: FakeS3, status: int, code: str
) -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "HEAD":
            return await give(b"", 403, x_amz_bucket_region=FAR)(request)
        return await (give(CONTENT) if fake.asked[-1].signed_by[1] == FAR else refuse(status, code))(request)

    fake.answer = answer
    async with an_s3(fake.url) as s3:
        assert await asyncio.gather(*[read(s3) for _ in range(5)]) == [CONTENT] * 5
        assert await s3.read_beginning(IMAGE, 12) == (len(CONTENT), CONTENT[:12])


@pytest.mark.parametrize("source", [IMAGE, SDK_IMAGE], ids=["aiohttp", "SDK"])
@pytest.mark.parametrize(
    "answer",
    [
        give(b"", 301, Location="https://s3.example/photos/cats/cat.png"),
        give(b"", 308, Location="https://s3.example/photos/cats/cat.png"),
        refuse(301, "PermanentRedirect"),
        moved(301),
        moved(307),
        refuse(400, "AuthorizationHeaderMalformed", f"<Region>{FAR}</Region>"),
        refuse(400, "IllegalLocationConstraintException"),
    ],
    ids=["http to https", "308", "no region", "301 for ever", "307 for ever", "malformed", "location"],
)
async def test_redirects_that_lead_nowhere_are_followed_once(
    fake: FakeS3, answer: Answer, source: S3Object
) -> None:
    """An earlier version sent requests until the stack overflowed."""
    fake.answer = with_sessions(answer)
    error = await fault(fake.url, source)
    assert isinstance(error, DependencyDownError)
    assert "VQA_S3_ENDPOINT_URL" in error.message or "AWS_REGION" in error.message
    assert error.may_be_the_jobs
    assert len(fake.asked) <= 3


@pytest.mark.parametrize("location", ["", "/elsewhere", "https://", "https://[x", "http://a b", "\u00e9"])
async def test_any_location_of_a_redirect_is_reported_as_not_s3(fake: FakeS3, location: str) -> None:
    fake.answer = give(b"", 302, Location=location)
    error = await fault(fake.url)
    assert isinstance(error, DependencyDownError)
    assert "answered 302 without an S3 error code" in error.message


async def test_a_redirect_to_https_names_the_address(fake: FakeS3) -> None:
    fake.answer = give(b"", 301, Location="https://user:pass@s3.example/photos/cats/cat.png?a=b")
    error = await fault(fake.url)
    assert isinstance(error, DependencyDownError)
    assert "(a redirect to https://s3.example)" in error.message


@pytest.mark.parametrize("s3_is_closed", [False, True], ids=["while S3 is open", "after S3 is closed"])
async def test_a_stalled_read_of_the_sdk_can_be_closed_without_blocking(
    fake: FakeS3, s3_is_closed: bool
) -> None:
    """A thread waits for the body; the thread that closes it waits for its reads, not the event loop."""

    fake.answer = with_sessions(say(head(10**6), CONTENT, closes=False))
    async with an_s3(fake.url) as s3:
        reading = await s3.open(SDK_IMAGE)

        async def read_on() -> None:
            await anext(aiter(reading))

        reader = asyncio.create_task(read_on())
        # There is no event that shows when the thread waits.
        await asyncio.sleep(0.2)
        assert not reader.done()
        if s3_is_closed:
            reader.cancel()
            await s3.close()
        started = time.monotonic()
        reading.close()
        reading.close()
        # The SDK's own timeout would end the read after 30 s.
        assert time.monotonic() - started < 25
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        assert time.monotonic() - started < 25


@pytest.mark.parametrize(
    ("status", "code"), [(301, "PermanentRedirect"), (400, "AuthorizationHeaderMalformed")]
)
async def test_a_bucket_of_another_region_is_read(fake: FakeS3, status: int, code: str) -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        region = fake.asked[-1].signed_by[1]
        if region == "eu-west-3":
            return await give(CONTENT)(request)
        return await refuse(status, code, "<Region>eu-west-3</Region>", x_amz_bucket_region="eu-west-3")(
            request
        )

    fake.answer = answer
    async with an_s3(fake.url) as s3:
        assert await read(s3) == CONTENT
        so_far = len(fake.asked)
        # The bucket's region is remembered.
        assert await asyncio.gather(*[read(s3) for _ in range(3)]) == [CONTENT] * 3
        assert len(fake.asked) == so_far + 3
        assert await s3.read_beginning(IMAGE, 12) == (len(CONTENT), CONTENT[:12])


async def test_a_missing_object_in_another_region_is_missing(fake: FakeS3) -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if fake.asked[-1].signed_by[1] == "eu-west-3":
            return await refuse(404, "NoSuchKey")(request)
        return await refuse(301, "PermanentRedirect", x_amz_bucket_region="eu-west-3")(request)

    fake.answer = answer
    error = await fault(fake.url)
    assert isinstance(error, JobError)
    assert error.code is ErrorCode.IMAGE_NOT_FOUND


# Responses


@pytest.mark.parametrize("encoding", ["gzip", "br", "aws-chunked", "identity"])
async def test_an_object_is_returned_as_stored_with_every_content_encoding(
    fake: FakeS3, encoding: str
) -> None:
    stored = gzip.compress(CONTENT)
    fake.answer = give(stored, Content_Encoding=encoding)
    async with an_s3(fake.url) as s3:
        assert await read(s3) == stored


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "RequestTimeTooSkewed", "clock"),
        (403, "ExpiredToken", "expired"),
        (400, "ExpiredToken", "expired"),
        (403, "SignatureDoesNotMatch", "credentials"),
        (403, "InvalidAccessKeyId", "credentials"),
    ],
)
async def test_an_error_that_concerns_all_requests_does_not_fail_the_image(
    fake: FakeS3, status: int, code: str, expected: str
) -> None:
    fake.answer = refuse(status, code)
    error = await fault(fake.url)
    assert isinstance(error, DependencyDownError)
    assert error.dependency is Dependency.S3
    assert expected in error.message
    assert len(fake.asked) == 1


@pytest.mark.parametrize("status", [500, 502, 503])
@pytest.mark.parametrize("code", ["SlowDown", "InternalError", ""])
async def test_a_request_to_a_busy_s3_is_retried(fake: FakeS3, status: int, code: str) -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        # An error page that begins like an image is not an image.
        if len(fake.asked) == 1:
            return await (refuse(status, code) if code else give(CONTENT, status))(request)
        return await give(CONTENT)(request)

    fake.answer = answer
    async with an_s3(fake.url) as s3:
        assert await read(s3) == CONTENT
    assert len(fake.asked) == 2


@pytest.mark.parametrize("status", [201, 203, 204, 206, 301, 304, 400, 403, 404, 410, 418])
async def test_another_status_without_an_s3_error_code_is_not_s3(fake: FakeS3, status: int) -> None:
    fake.answer = give(b"" if status in (204, 304) else CONTENT, status)
    error = await fault(fake.url)
    assert isinstance(error, DependencyDownError)
    assert f"answered {status} without an S3 error code" in error.message
    assert error.may_be_the_jobs


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (say(head(len(CONTENT)), CONTENT[:-1]), "connection to S3 was lost"),
        (say(head(len(CONTENT))), "connection to S3 was lost"),
        (say(head(None, "Transfer-Encoding: chunked"), b"4\r\nabcd\r\n"), "connection to S3 was lost"),
        (say(), ""),
    ],
    ids=["short", "nothing", "chunked and short", "closed"],
)
async def test_an_incomplete_object_is_a_transient_error(fake: FakeS3, answer: Any, words: str) -> None:
    fake.answer = answer
    error = await fault(fake.url)
    assert isinstance(error, TransientError)
    assert (error.dependency, error.reason) == (Dependency.S3, "connection_error")
    assert words in error.message


# Bytes that are not HTTP; the second are a TLS server's alert to http://.
@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH\r\n", b"\x15\x03\x01\x00\x02\x02F"])
async def test_a_server_of_another_protocol_is_not_s3(fake: FakeS3, answer: bytes) -> None:
    fake.answer = say(answer)
    error = await fault(fake.url)
    assert isinstance(error, DependencyDownError)
    assert "not HTTP: check VQA_S3_ENDPOINT_URL" in error.message
    assert error.may_be_the_jobs


async def test_a_web_page_instead_of_an_object_is_not_s3(fake: FakeS3) -> None:
    """The console of a store answers so at every path."""
    fake.answer = give(b"<!doctype html><title>Console</title>", Content_Type="text/html; charset=utf-8")
    error = await fault(fake.url)
    assert isinstance(error, DependencyDownError)
    assert "web page instead of an object: check VQA_S3_ENDPOINT_URL" in error.message
    fake.answer = give(CONTENT, Content_Type="text/html", x_amz_request_id="1")
    async with an_s3(fake.url) as s3:
        assert await read(s3) == CONTENT


LONG = CONTENT * 40  # more than an object without a size that is kept in memory


def chunked(content: bytes) -> Answer:
    """Respond with Transfer-Encoding: chunked."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        for start in range(0, len(content), 100_000):
            await response.write(content[start : start + 100_000])
        await response.write_eof()
        return response

    return answer


@pytest.mark.parametrize("source", [IMAGE, SDK_IMAGE], ids=["aiohttp", "SDK"])
@pytest.mark.parametrize("content", [b"", CONTENT, LONG], ids=["empty", "small", "large"])
@pytest.mark.parametrize("way", ["chunked", "HTTP/1.0", "closed at the end"])
async def test_an_object_without_content_length_is_read(
    fake: FakeS3, way: str, content: bytes, source: S3Object
) -> None:
    answer = {
        "chunked": chunked(content),
        "HTTP/1.0": say(b"HTTP/1.0 200 OK\r\n\r\n", content),
        "closed at the end": say(head(None, "Connection: close"), content),
    }[way]
    fake.answer = with_sessions(answer)
    async with an_s3(fake.url) as s3:
        assert await read(s3, source) == content
        assert await s3.read_beginning(source, 12) == (len(content), content[:12])


@pytest.mark.parametrize("source", [IMAGE, SDK_IMAGE], ids=["aiohttp", "SDK"])
async def test_an_object_without_content_length_is_read_up_to_the_limit(
    fake: FakeS3, source: S3Object
) -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        while True:
            await response.write(CONTENT)

    fake.answer = with_sessions(answer)
    s3 = S3(Aws(Endpoint(fake.url, "auto")), max_unsized_bytes=len(LONG))
    try:
        async with asyncio.timeout(30):
            assert (await s3.open(source)).size > len(LONG)
    finally:
        await s3.close()


@pytest.mark.parametrize("source", [IMAGE, SDK_IMAGE], ids=["aiohttp", "SDK"])
async def test_long_and_many_response_headers_are_accepted(fake: FakeS3, source: S3Object) -> None:
    long = {"x_amz_meta_long": "v" * 20_000}
    # The SDK's HTTP library accepts a hundred.
    many = {f"x_amz_meta_{n}": "v" for n in range(50 if source is SDK_IMAGE else 400)}
    fake.answer = with_sessions(give(CONTENT, **long, **many))
    async with an_s3(fake.url) as s3:
        assert await read(s3, source) == CONTENT


CHECKSUMS = {
    "crc32": zlib.crc32(LONG).to_bytes(4, "big"),
    "sha1": hashlib.sha1(LONG).digest(),  # noqa: S324 - S3's algorithm
    "sha256": hashlib.sha256(LONG).digest(),
}


@pytest.mark.parametrize("source", [IMAGE, SDK_IMAGE], ids=["aiohttp", "SDK"])
@pytest.mark.parametrize("has_size", [True, False], ids=["with its size", "chunked"])
@pytest.mark.parametrize("algorithm", CHECKSUMS)
async def test_a_checksum_is_verified(fake: FakeS3, algorithm: str, has_size: bool, source: S3Object) -> None:
    right = base64.b64encode(CHECKSUMS[algorithm]).decode()
    header = f"x-amz-checksum-{algorithm}"

    def respond(content: bytes) -> Answer:
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            response = web.StreamResponse(headers={header: right})
            if has_size:
                response.content_length = len(content)
            else:
                response.enable_chunked_encoding()
            await response.prepare(request)
            await response.write(content)
            await response.write_eof()
            return response

        return with_sessions(answer)

    fake.answer = respond(LONG)
    async with an_s3(fake.url) as s3:
        assert await read(s3, source) == LONG
    assert fake.asked[-1].headers["x-amz-checksum-mode"] == "ENABLED"
    fake.answer = respond(LONG[:-1] + b"x")
    error = await fault(fake.url, source)
    assert isinstance(error, JobError)
    assert error.code is ErrorCode.IMAGE_CORRUPT
    assert "checksum" in error.message


@pytest.mark.parametrize(
    "headers",
    [
        {"x_amz_checksum_crc32": "AAAAAA==-2"},
        {"x_amz_checksum_crc32": "AAAAAA==", "x_amz_checksum_type": "COMPOSITE"},
        {"x_amz_checksum_crc64nvme": "AAAAAAAAAAA="},
        {"x_amz_checksum_crc32": "not base64"},
    ],
    ids=["of parts", "composite", "another algorithm", "malformed"],
)
async def test_a_checksum_that_cannot_be_verified_is_ignored(fake: FakeS3, headers: dict[str, str]) -> None:
    fake.answer = give(CONTENT, **headers)
    async with an_s3(fake.url) as s3:
        assert await read(s3) == CONTENT


async def test_bytes_after_the_object_are_ignored(fake: FakeS3) -> None:
    fake.answer = say(head(len(CONTENT)), CONTENT, b"more", closes=False, pause_s=0.01)
    async with an_s3(fake.url) as s3:
        assert await read(s3) == CONTENT
        await until(lambda: fake.at_once == 0, "the connection is closed")
        fake.answer = give(CONTENT)
        assert await read(s3) == CONTENT


async def test_an_object_in_small_chunks_is_read_completely(fake: FakeS3) -> None:
    pieces = [CONTENT[start : start + 7] for start in range(0, 2100, 7)]
    fake.answer = say(head(2100), *pieces, pause_s=0.0005)
    async with an_s3(fake.url) as s3:
        assert await read(s3) == CONTENT[:2100]


async def test_a_closed_read_closes_its_connection(fake: FakeS3) -> None:
    fake.answer = say(head(10**12), CONTENT, closes=False)
    async with an_s3(fake.url) as s3:
        reading = await s3.open(IMAGE)
        async for piece in reading:
            assert CONTENT.startswith(piece)
            break
        assert fake.at_once == 1
        reading.close()
        await until(lambda: fake.at_once == 0, "the connection is closed")


# Conditional writes of small objects


@pytest.mark.parametrize(
    ("status", "code"),
    [(409, "ConditionalRequestConflict"), (412, "PreconditionFailed"), (404, "NoSuchKey"), (404, "")],
    ids=["concurrent write", "changed", "deleted, as AWS reports it", "deleted"],
)
async def test_a_changed_or_deleted_object_is_not_replaced(fake: FakeS3, status: int, code: str) -> None:
    fake.answer = refuse(status, code)
    async with an_s3(fake.url) as s3:
        objects = ConditionalStore(s3, "answers", "", setting="VQA_RESULT_STORE")
        assert await objects.replace("jobs/1", b"answer", '"etag"') is None
        await objects.delete("jobs/1", '"etag"')


@pytest.mark.parametrize(("status", "code"), [(404, "NoSuchBucket"), (403, "AccessDenied")])
async def test_a_missing_bucket_or_denied_access_is_not_a_failed_precondition(
    fake: FakeS3, status: int, code: str
) -> None:
    fake.answer = refuse(status, code)
    async with an_s3(fake.url) as s3:
        objects = ConditionalStore(s3, "answers", "", setting="VQA_RESULT_STORE")
        with pytest.raises(
            DependencyDownError, match=f"VQA_RESULT_STORE: .*{code}.*get, put, delete and list"
        ):
            await objects.replace("jobs/1", b"answer", '"etag"')
        # NoSuchKey is an error when the object is created.
        with pytest.raises(DependencyDownError):
            await objects.create("jobs/1", b"answer")


# Proxies and certificate authorities


async def test_hosts_that_only_the_proxy_can_resolve_are_reached_through_it(
    fake: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", fake.url.replace("://", "://user:p%40ss@"))
    async with an_s3("http://s3.invalid", "virtual") as s3:
        assert await read(s3) == CONTENT
    (asked,) = fake.asked
    assert asked.target == "http://photos.s3.invalid/cats/cat.png"
    assert asked.headers["host"] == "photos.s3.invalid"
    assert asked.headers["proxy-authorization"] == f"Basic {base64.b64encode(b'user:p@ss').decode()}"


@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
async def test_hosts_in_no_proxy_are_reached_directly(
    fake: FakeS3, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    error = await fault(fake.url)
    assert isinstance(error, DependencyDownError)
    assert "cannot be reached" in error.message
    proxy_options.cache_clear()
    monkeypatch.setenv(name, "elsewhere.example,127.0.0.1")
    async with an_s3(fake.url) as s3:
        assert await read(s3) == CONTENT


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.made_in(tmp_path_factory.mktemp("tls") / "right")


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "SSL_CERT_FILE"])
async def test_the_certificate_of_s3_is_verified_with_the_configured_ca_bundle(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    async with FakeS3.serving(CONTENT, tls=authority.server_context()) as fake:
        error = await fault(fake.url)
        assert isinstance(error, DependencyDownError)
        assert "cannot be reached" in error.message
        monkeypatch.setenv(name, authority.certificate)
        async with an_s3(fake.url) as s3:
            assert await read(s3) == CONTENT


async def test_tls_uses_a_tunnel_through_a_proxy(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode().partition("\r\n")[0])
        host, _, port = asked[-1].split()[1].partition(":")
        server, to_server = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(pass_on(reader, to_server), pass_on(server, writer))

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(1 << 16):
                writer.write(piece)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    monkeypatch.setenv("SSL_CERT_FILE", authority.certificate)
    async with (
        FakeS3.serving(CONTENT, tls=authority.server_context()) as fake,
        await asyncio.start_server(tunnel, "127.0.0.1", 0) as proxy,
    ):
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}")
        async with an_s3(fake.url) as s3:
            assert await read(s3) == CONTENT
        assert asked == [f"CONNECT {fake.url.removeprefix('https://')} HTTP/1.1"]
