"""The policies of deploy/aws/, enforced by a real S3 server, allow what the worker needs and no more."""

import asyncio
import json
import urllib.request
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from deploy.local.model_simulator.behavior import Error, Hang
from deploy.local.stack import Stack
from tests.breaking import calls_begun, events, job, said
from tests.conftest import MakeClient, StartWorker, picture
from tests.running import ROOT, Client, Worker, calls_with, until
from tests.unit.s3 import isolate
from vqa_worker import AsyncClient, LargeResultError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

POLICIES = {path.stem: path.read_text() for path in (ROOT / "deploy" / "aws").glob("*.json")}
# Of those who read results.
READER = "read-large-results"


@dataclass(frozen=True)
class Buckets:
    """The buckets, with the test's own names instead of the examples'."""

    images: str = field(default_factory=lambda: f"images-{uuid.uuid4().hex}")
    results: str = field(default_factory=lambda: f"results-{uuid.uuid4().hex}")

    def policies(self, without: str = "") -> dict[str, str]:
        """Return the worker's policies for these buckets, without the action `without` if given."""
        texts = {
            name: text.replace("example-images", self.images).replace("example-results", self.results)
            for name, text in POLICIES.items()
            if name != READER
        }
        return {name: _without(text, without) for name, text in texts.items()}

    def reader_policies(self) -> dict[str, str]:
        """Return the policies of a reader of results."""
        return {READER: POLICIES[READER].replace("example-results", self.results)}


def _without(policy: str, sid_and_action: str) -> str:
    sid, _, action = sid_and_action.partition(" ")
    read = json.loads(policy)
    for statement in read["Statement"]:
        if statement["Sid"] == sid:
            statement["Action"].remove(action)
    read["Statement"] = [it for it in read["Statement"] if it["Action"]]
    return json.dumps(read)


@pytest.fixture(scope="module")
def buckets(stack: Stack) -> Buckets:
    buckets, s3 = Buckets(), stack.s3.client()
    for bucket in (buckets.images, buckets.results):
        s3.create_bucket(Bucket=bucket)
    for key in ("invoices/1.png", "scans/1.png", "private/1.png"):
        s3.put_object(Bucket=buckets.images, Key=key, Body=picture())
    s3.put_object(Bucket=buckets.results, Key="somebody/else", Body=b"x")
    s3.put_object(Bucket=buckets.results, Key="answers/mine", Body=b"x")
    s3.put_object(Bucket=buckets.results, Key="large/mine", Body=b"x")
    return buckets


@dataclass(frozen=True)
class Identity:
    """An S3 user with an access key."""

    key: str
    secret: str

    @classmethod
    @contextmanager
    def with_policies(cls, stack: Stack, policies: Mapping[str, str]) -> Iterator["Identity"]:
        """Create a user of the S3 server with these policies."""
        iam, name = _client(stack, "iam", stack.s3.access_key, stack.s3.secret_key), uuid.uuid4().hex
        iam.create_user(UserName=name)
        made = iam.create_access_key(UserName=name)["AccessKey"]
        try:
            for policy, document in policies.items():
                if json.loads(document)["Statement"]:
                    iam.put_user_policy(UserName=name, PolicyName=policy, PolicyDocument=document)
            yield cls(made["AccessKeyId"], made["SecretAccessKey"])
        finally:
            iam.delete_access_key(UserName=name, AccessKeyId=made["AccessKeyId"])
            iam.delete_user(UserName=name)

    @property
    def variables(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.key, "AWS_SECRET_ACCESS_KEY": self.secret}

    def s3(self, stack: Stack) -> "S3Client":
        client: S3Client = _client(stack, "s3", self.key, self.secret)
        return client


def _client(stack: Stack, service: Any, key: str, secret: str) -> Any:
    config = Config(s3={"addressing_style": "path"}, proxies={}, retries={"total_max_attempts": 1})
    return boto3.client(
        service,
        endpoint_url=stack.s3.endpoint_url,
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        region_name=stack.s3.region,
        config=config,
    )


@pytest.fixture(scope="module")
def identity(stack: Stack, buckets: Buckets) -> Iterator[Identity]:
    with Identity.with_policies(stack, buckets.policies()) as identity:
        yield identity


# The worker's operations


async def test_images_below_the_prefixes_are_read_and_others_are_not(
    buckets: Buckets, identity: Identity, start_worker: StartWorker, client_of: MakeClient
) -> None:
    client = await client_of(await start_worker(**identity.variables))

    async def code(key: str) -> str:
        reply = await client.ask(**job(image=f"s3://{buckets.images}/{key}"))
        return str((reply.body["error"] or {"code": reply.body["status"]})["code"])

    assert await code("invoices/1.png") == "succeeded"
    assert await code("scans/1.png") == "succeeded"
    assert await code("private/1.png") == "image_forbidden"
    # SeaweedFS answers 404 to everyone; S3 only to users with s3:ListBucket.
    assert await code("scans/none.png") == "image_not_found"


async def test_presigned_urls_work_only_for_images_that_the_worker_may_read(
    stack: Stack, buckets: Buckets, identity: Identity, start_worker: StartWorker, client_of: MakeClient
) -> None:
    # The simulator accepts https URLs only; the scheme is not part of the signature.
    endpoint = stack.s3.endpoint_url.replace("http://", "https://")
    settings = {"VQA_IMAGE_DELIVERY": "link", "VQA_S3_ENDPOINT_URL": endpoint, **identity.variables}
    client, marker = await client_of(await start_worker(**settings)), uuid.uuid4().hex
    asked = [f"s3://{buckets.images}/{key}" for key in ("scans/1.png", "private/1.png")]
    assert (await client.ask(**{**job(marker), "images": asked})).body["status"] == "succeeded"
    (call,) = calls_with(stack, marker)
    assert [await asyncio.to_thread(status_of, link) for link in call.links] == [200, 403]


def status_of(link: str) -> int:
    try:
        with urllib.request.urlopen(link.replace("https://", "http://"), timeout=10) as response:  # noqa: S310
            return int(response.status)
    except HTTPError as error:
        with error:
            return error.code


async def test_the_policy_is_enough_for_the_result_store(
    stack: Stack, buckets: Buckets, identity: Identity, start_worker: StartWorker, client_of: MakeClient
) -> None:
    marker, store = uuid.uuid4().hex, f"s3://{buckets.results}/answers"
    settings = {"VQA_RESULT_STORE": store, **identity.variables}
    early = await start_worker(**settings)
    client = await client_of(early)
    # An answer is stored and found again.
    asked = job(marker, f"s3://{buckets.images}/scans/1.png")
    await client.publish(asked)
    await client.result(asked["id"])
    await client.publish(asked)
    await until(
        lambda: early.metric("vqa_result_store_operations_total", result="reused") == 1, "the stored answer"
    )
    # A claim is created, and deleted because there is no answer.
    refused = f"refused {marker}"
    stack.model.play(Error(status=400), marker=refused)
    assert (await client.ask(**job(refused))).body["error"]["code"] == "model_rejected"
    # A cancellation is stored, and loaded by workers that start later.
    stack.model.play(Hang(), marker=f"cancelled {marker}")
    cancelled = job(f"cancelled {marker}")
    await client.publish(cancelled)
    await calls_begun(stack, f"cancelled {marker}", 1)
    await client.cancel(cancelled["id"])
    assert (await client.result(cancelled["id"])).body["error"]["code"] == "cancelled"
    await until(lambda: len(keys(stack, buckets, "cancelled/")) == 1, "the cancellation is stored")
    late = await start_worker(like=early, **settings)
    for worker in (early, late):
        assert await worker.stop() == 0
        assert not [line for line in worker.log() if line["level"] in ("warning", "error") and not done(line)]
    assert len(keys(stack, buckets, "jobs/")) == 1
    assert keys(stack, buckets, "workers/") == []


async def test_the_policies_are_enough_for_a_large_result_and_its_reader(
    stack: Stack,
    buckets: Buckets,
    identity: Identity,
    start_worker: StartWorker,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    settings = {"VQA_LARGE_RESULTS": f"s3://{buckets.results}/large", "VQA_MAX_RESULT_BYTES": "1"}
    worker = await start_worker(**settings, **identity.variables)
    isolate(monkeypatch, tmp_path)
    queue, url = worker.jobs_queue, stack.s3.endpoint_url
    with Identity.with_policies(stack, buckets.reader_policies()) as reader:
        for who in (reader, identity):
            for name, value in who.variables.items():
                monkeypatch.setenv(name, value)
            async with AsyncClient(stack.rabbitmq.url, jobs_queue=queue, s3_endpoint_url=url) as client:
                if who is reader:
                    assert (await client.ask_job(job())).raise_for_error().answer
                else:
                    # The worker reads no large results.
                    with pytest.raises(LargeResultError, match=r"AccessDenied|s3:GetObject"):
                        await client.ask_job(job())
        with pytest.raises(ClientError):
            reader.s3(stack).put_object(Bucket=buckets.results, Key="large/it", Body=b"")
    assert not events(worker, "large_results_unavailable")


def keys(stack: Stack, buckets: Buckets, folder: str) -> list[str]:
    """Return the keys in the store."""
    found = stack.s3.client().list_objects_v2(Bucket=buckets.results, Prefix=f"answers/{folder}")
    return [it["Key"] for it in found.get("Contents", [])]


def done(line: Mapping[str, Any]) -> bool:
    """Return whether a log line only reports a job's outcome."""
    return line["event"] in ("job_finished", "job_cancelled")


# Each permission is needed


async def claims_nothing(worker: Worker, client: Client, image: str) -> None:
    await client.publish(job(image=image))
    assert "VQA_RESULT_STORE" in str((await said(worker, "paused"))[1])


async def finds_nothing(worker: Worker, client: Client, image: str) -> None:
    twice = job(image=image)
    await client.publish(twice)
    await client.result(twice["id"])
    await client.publish(twice)
    assert "VQA_RESULT_STORE" in str((await said(worker, "paused"))[1])


async def misses_cancellations(worker: Worker, client: Client, image: str) -> None:
    await until(lambda: events(worker, "cancelled_jobs_unavailable"), "the log line")
    assert (await client.ask(**job(image=image))).body["status"] == "succeeded"


async def sees_no_image(worker: Worker, client: Client, image: str) -> None:
    assert (await client.ask(**job(image=image))).body["error"]["code"] == "image_forbidden"
    assert worker.ready()[1]["status"] == "ready"


async def writes_no_large_result(worker: Worker, client: Client, image: str) -> None:
    await until(lambda: events(worker, "large_results_unavailable"), "the log line")
    assert (await client.ask(**job(image=image))).body["status"] == "succeeded"


MISSED: dict[str, Callable[[Worker, Client, str], Awaitable[None]]] = {
    "ReadImages s3:GetObject": sees_no_image,
    "KeepAnswers s3:PutObject": claims_nothing,
    "KeepAnswers s3:GetObject": finds_nothing,
    "KeepAnswers s3:DeleteObject": claims_nothing,
    "TellMissingFromForbidden s3:ListBucket": misses_cancellations,
    "WriteLargeResults s3:PutObject": writes_no_large_result,
}


def test_every_action_of_the_policies_has_a_case() -> None:
    policies = [text for name, text in POLICIES.items() if name != READER]
    statements = [it for text in policies for it in json.loads(text)["Statement"]]
    assert {f"{it['Sid']} {action}" for it in statements for action in it["Action"]} == MISSED.keys()


async def test_each_missing_permission_has_the_documented_effect(
    stack: Stack, buckets: Buckets, start_worker: StartWorker, client_of: MakeClient
) -> None:
    image = f"s3://{buckets.images}/scans/1.png"

    async def miss(right: str, identity: Identity) -> None:
        worker = await start_worker(
            VQA_RESULT_STORE=f"s3://{buckets.results}/answers/without",
            VQA_LARGE_RESULTS=f"s3://{buckets.results}/large/without",
            **identity.variables,
        )
        await MISSED[right](worker, await client_of(worker), image)

    with ExitStack() as identities:
        lacking = {
            right: identities.enter_context(Identity.with_policies(stack, buckets.policies(without=right)))
            for right in MISSED
        }
        await asyncio.gather(*(miss(right, identity) for right, identity in lacking.items()))


# Operations that the policies allow, and all others


Act = Callable[["S3Client", Buckets], object]
ALLOWED: dict[str, Act] = {
    "read an image": lambda s3, at: s3.get_object(Bucket=at.images, Key="invoices/1.png"),
    "read its first bytes": lambda s3, at: s3.get_object(
        Bucket=at.images, Key="scans/1.png", Range="bytes=0-11"
    ),
    "keep": lambda s3, at: s3.put_object(Bucket=at.results, Key="answers/it", Body=b""),
    "create if it does not exist": lambda s3, at: s3.put_object(
        Bucket=at.results, Key=f"answers/{uuid.uuid4()}", Body=b"", IfNoneMatch="*"
    ),
    "find": lambda s3, at: s3.get_object(Bucket=at.results, Key="answers/mine"),
    "delete an answer": lambda s3, at: s3.delete_object(Bucket=at.results, Key="answers/it"),
    "list": lambda s3, at: s3.list_objects_v2(Bucket=at.results, Prefix="answers/cancelled/"),
}
FORBIDDEN: dict[str, Act] = {
    "read a large result": lambda s3, at: s3.get_object(Bucket=at.results, Key="large/mine"),
    "delete a large result": lambda s3, at: s3.delete_object(Bucket=at.results, Key="large/mine"),
    "read another image": lambda s3, at: s3.get_object(Bucket=at.images, Key="private/1.png"),
    "list the images": lambda s3, at: s3.list_objects_v2(Bucket=at.images),
    "list the images of a prefix": lambda s3, at: s3.list_objects_v2(Bucket=at.images, Prefix="scans/"),
    "write an image": lambda s3, at: s3.put_object(Bucket=at.images, Key="scans/1.png", Body=b""),
    "delete an image": lambda s3, at: s3.delete_object(Bucket=at.images, Key="scans/1.png"),
    "copy an image to itself": lambda s3, at: s3.copy_object(
        Bucket=at.images, Key="scans/2.png", CopySource=f"{at.images}/scans/1.png"
    ),
    "make an image public": lambda s3, at: s3.put_object_acl(
        Bucket=at.images, Key="scans/1.png", ACL="public-read"
    ),
    "read an image's tags": lambda s3, at: s3.get_object_tagging(Bucket=at.images, Key="scans/1.png"),
    "read another object of the store's bucket": lambda s3, at: s3.get_object(
        Bucket=at.results, Key="somebody/else"
    ),
    "write another object of the store's bucket": lambda s3, at: s3.put_object(
        Bucket=at.results, Key="somebody/else", Body=b""
    ),
    "delete another object of the store's bucket": lambda s3, at: s3.delete_object(
        Bucket=at.results, Key="somebody/else"
    ),
    "delete the bucket": lambda s3, at: s3.delete_bucket(Bucket=at.results),
    "make the bucket public": lambda s3, at: s3.put_bucket_policy(
        Bucket=at.images, Policy=json.dumps({"Version": "2012-10-17", "Statement": []})
    ),
    "create a bucket": lambda s3, _: s3.create_bucket(Bucket=f"new-{uuid.uuid4().hex}"),
}


def test_the_policies_allow_what_the_worker_does(stack: Stack, buckets: Buckets, identity: Identity) -> None:
    client = identity.s3(stack)
    for act in ALLOWED.values():
        act(client, buckets)


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_policies_forbid_everything_else(
    stack: Stack, buckets: Buckets, identity: Identity, what: str
) -> None:
    with pytest.raises(ClientError) as refused:
        FORBIDDEN[what](identity.s3(stack), buckets)
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
