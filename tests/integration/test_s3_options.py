"""A real S3 server: versions of an object, public buckets, stored checksums, replaced keys."""

import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deploy.local.stack import Stack
from tests.breaking import publish, results, said
from tests.conftest import MakeClient, StartWorker, picture
from tests.running import calls_with

if TYPE_CHECKING:
    from mypy_boto3_s3.literals import ChecksumAlgorithmType

NO_KEYS = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture
def bucket(stack: Stack) -> str:
    name = f"options-{uuid.uuid4().hex}"
    stack.s3.client().create_bucket(Bucket=name)
    return name


async def test_a_version_of_an_object_is_read(
    stack: Stack, bucket: str, start_worker: StartWorker, client_of: MakeClient
) -> None:
    s3, marker = stack.s3.client(), uuid.uuid4().hex
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    versions = [
        s3.put_object(Bucket=bucket, Key="a.png", Body=picture(kind))["VersionId"] for kind in ("PNG", "WEBP")
    ]
    client = await client_of(await start_worker())
    url = f"s3://{bucket}/a.png"
    images = [{"url": url, "version_id": versions[0]}, {"url": url, "version_id": versions[1]}, url]
    reply = await client.ask(question=marker, images=images)
    assert reply.body["status"] == "succeeded", reply.body
    (call,) = calls_with(stack, marker)
    assert [image.declared_type for image in call.images] == ["image/png", "image/webp", "image/webp"]

    part = {"type": "image_url", "image_url": {"url": url, "version_id": versions[0]}}
    text = {"type": "text", "text": f"again {marker}"}
    reply = await client.ask(messages=[{"role": "user", "content": [part, text]}])
    assert reply.body["status"] == "succeeded", reply.body

    reply = await client.ask(question="What is it?", images=[{"url": url, "version_id": "0" * 32}])
    assert reply.body["error"]["code"] == "image_not_found"
    assert "no such" in reply.body["error"]["message"]


async def test_a_public_bucket_is_read_without_credentials(
    stack: Stack, bucket: str, start_worker: StartWorker, client_of: MakeClient
) -> None:
    s3 = stack.s3.client()
    s3.put_object(Bucket=bucket, Key="a b.png", Body=picture())
    statement = {
        "Effect": "Allow",
        "Principal": "*",
        "Action": "s3:GetObject",
        "Resource": f"arn:aws:s3:::{bucket}/*",
    }
    s3.put_bucket_policy(
        Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    )
    client = await client_of(await start_worker(**NO_KEYS, VQA_S3_UNSIGNED="options-*"))
    reply = await client.ask(question="What is it?", images=[f"s3://{bucket}/a b.png"])
    assert reply.body["status"] == "succeeded", reply.body


@pytest.mark.parametrize("algorithm", ["CRC32", "SHA1", "SHA256"])
async def test_an_object_with_a_stored_checksum_is_read(
    stack: Stack,
    bucket: str,
    start_worker: StartWorker,
    client_of: MakeClient,
    algorithm: "ChecksumAlgorithmType",
) -> None:
    stack.s3.client().put_object(Bucket=bucket, Key="a.png", Body=picture(), ChecksumAlgorithm=algorithm)
    client = await client_of(await start_worker(VQA_S3_REQUESTER_PAYS="true"))
    reply = await client.ask(question="What is it?", images=[f"s3://{bucket}/a.png"])
    assert reply.body["status"] == "succeeded", reply.body


async def test_keys_that_are_replaced_in_the_shared_file_are_used_without_a_restart(
    stack: Stack, bucket: str, start_worker: StartWorker, client_of: MakeClient, tmp_path: Path
) -> None:
    stack.s3.client().put_object(Bucket=bucket, Key="a.png", Body=picture())
    file = tmp_path / "credentials"

    def write(secret: str) -> None:
        file.write_text(
            f"[default]\naws_access_key_id = {stack.s3.access_key}\naws_secret_access_key = {secret}\n"
        )

    write("not-the-secret-key")
    worker = await start_worker(**NO_KEYS, AWS_SHARED_CREDENTIALS_FILE=str(file))
    client = await client_of(worker)
    ids = await publish(client, 1, "What is it?", image=f"s3://{bucket}/a.png")
    _, (reason,) = await said(worker, "paused")
    assert "SignatureDoesNotMatch" in reason
    write(stack.s3.secret_key)
    (reply,) = await results(client, ids)
    assert (reply.body["status"], reply.body["attempts"]) == ("succeeded", 1)
