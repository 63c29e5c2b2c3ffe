"""`vqa-worker submit`: single questions, local files, S3 prefixes, cost estimates, reply queues."""

import asyncio
import contextlib
import hashlib
import json
import sqlite3
from pathlib import Path

import pytest

from deploy.local.stack import Stack
from tests.conftest import BUCKET, PutImage, picture
from tests.integration.cli.running import PATIENCE_S, Cli, depth, kill
from tests.running import calls_with

PRICES = {"VQA_PRICES": json.dumps({"simulated/vision": [2.0, 10.0]})}


# Single questions


async def test_a_single_question_prints_the_answer_and_leaves_no_state(
    cli: Cli, stack: Stack, put_image: PutImage
) -> None:
    asked = await cli.run("submit", put_image(), "What is this?", "--wait")
    assert (asked.code, asked.err) == (0, "")
    (answer,) = asked.lines
    assert "PNG" in answer
    assert cli.state_files == []
    assert "vqa.results.ask-" not in stack.rabbitmq.ctl("list_queues", "name")


async def test_several_images_are_one_job_or_one_job_each(cli: Cli, put_image: PutImage) -> None:
    first, second = put_image(), put_image(picture("JPEG"))
    together = await cli.run("submit", first, second, "What differs?", "--wait")
    assert "2 pictures" in together.out
    apart = await cli.run("submit", first, second, "What is this?", "--each", "--wait", "--json")
    assert {result["metadata"]["image"]: "JPEG" in result["answer"] for result in apart.objects} == {
        first: False,
        second: True,
    }


async def test_options_are_passed_to_the_model(cli: Cli, stack: Stack, put_image: PutImage) -> None:
    question = "Is it 17?"
    said = [
        "--system=Be brief.", "--model=simulated/vision-small", "--param=max_tokens=7",
        "--param=stop=END", "--metadata=order=17", "--deadline=1h",
    ]  # fmt: skip
    asked = await cli.run("submit", put_image(), "--question", question, *said, "--wait", "--json")
    (result,) = asked.objects
    assert result["model"] == "simulated/vision-small"
    assert result["metadata"]["order"] == "17"
    (call,) = calls_with(stack, question)
    assert call.messages[0] == {"role": "system", "content": "Be brief."}
    assert call.params.items() >= {"max_tokens": 7, "stop": "END"}.items()


async def test_a_failed_job_is_printed_and_exits_with_1(cli: Cli) -> None:
    asked = await cli.run("submit", f"s3://{BUCKET}/nothing.png", "What?", "--wait")
    assert asked.code == 1
    assert asked.out == ""
    assert asked.err.startswith("failed: images[0] (s3://")
    assert asked.err.endswith("(image_not_found)\n")


# Local files


async def test_a_local_image_is_uploaded_once_under_the_hash_of_its_content(cli: Cli, stack: Stack) -> None:
    content = picture()
    (cli.folder / "a picture.png").write_bytes(content)
    (cli.folder / "copy.jpg").write_bytes(content)
    asked = ("submit", "a picture.png", "copy.jpg", "What?", "--bucket", f"{BUCKET}/mine", "--wait", "--json")
    assert (await cli.run(*asked)).code == 0
    key = f"mine/{hashlib.sha256(content).hexdigest()}.png"
    s3 = stack.s3.client()
    first = s3.head_object(Bucket=BUCKET, Key=key)
    assert first["ContentType"] == "image/png"
    assert s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() == content
    # An existing object is not uploaded again.
    s3.put_object(Bucket=BUCKET, Key=key, Body=b"was not put again")
    await cli.run(*asked)
    assert s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() == b"was not put again"


async def test_paths_in_a_file_of_jobs_are_relative_to_its_folder(cli: Cli, stack: Stack) -> None:
    folder = cli.folder / "sub"
    folder.mkdir()
    (folder / "it.png").write_bytes(picture())
    question = "Which sub?"
    part = {"type": "image_url", "image_url": {"url": "it.png"}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": question}]}]
    cli.write("sub/jobs.jsonl", {"messages": messages}, {"question": question, "image": "it.png"})
    submitted = await cli.run("submit", "sub/jobs.jsonl", "--bucket", BUCKET, "--wait", "--json")
    assert [result["status"] for result in submitted.objects] == ["succeeded"] * 2, submitted
    assert len(calls_with(stack, question)) == 2


async def test_invalid_images_are_reported_before_any_job_is_sent(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "ok.png").write_bytes(picture())
    wrong: tuple[tuple[tuple[str, ...], str], ...] = (
        (("notes.png", "--bucket", BUCKET), "notes.png: the content is plain text: check the URL or the key"),
        (("missing.png", "--bucket", BUCKET), "missing.png: No such file or directory"),
        (("ok.png",), "ok.png: is a local file; use --bucket to upload it"),
        (("missing.png",), "missing.png: no such file (and not a URL)"),
        (("http://host/a.png",), "http://host/a.png: an image must be s3://bucket/key, https://…"),
    )
    runs = (cli.run("submit", *arguments, "--question", "What?") for arguments, _ in wrong)
    for (_, reported), refused in zip(wrong, await asyncio.gather(*runs), strict=True):
        assert refused.code == 2
        assert reported in refused.err
    assert cli.state_files == []


async def test_rejected_s3_credentials_are_one_message(cli: Cli) -> None:
    (cli.folder / "it.png").write_bytes(picture())
    refused = await cli.run("submit", "it.png", "What?", "--bucket", BUCKET, AWS_SECRET_ACCESS_KEY="wrong")
    assert refused.code == 1
    (sentence,) = refused.err.splitlines()
    assert sentence.startswith(f"Error: bucket {BUCKET}: S3 answered 403 ")
    assert "check the AWS credentials" in sentence
    nowhere = await cli.run("submit", "--prefix", "s3://no-such-bucket/", "What?")
    assert nowhere.code == 1
    assert "the bucket does not exist at this S3 (VQA_S3_ENDPOINT_URL)" in nowhere.err


# A whole prefix


async def test_all_images_below_a_prefix_are_submitted(cli: Cli, stack: Stack, put_image: PutImage) -> None:
    keys = ["a b/1.png", "a b/ü&+%20.PNG", "a b/2.jpeg"]
    urls = [put_image(key=key) for key in keys]
    put_image(key="a b/notes.txt")
    put_image(key="elsewhere/3.png")
    asked = ("submit", "--prefix", f"s3://{BUCKET}/a b/", "Whose prefix?", "--wait", "--json")
    first = await cli.run(*asked)
    assert sorted(result["metadata"]["image"] for result in first.objects) == sorted(urls)
    assert {result["status"] for result in first.objects} == {"succeeded"}

    # The same command resumes the submission; it does not list the prefix again.
    put_image(key="a b/3.webp")
    assert sorted((await cli.run(*asked)).lines) == sorted(first.lines)
    assert len(calls_with(stack, "Whose prefix?")) == 3
    again = await cli.run(*asked, "--name", "again")
    assert len(again.objects) == 4

    matched = await cli.run(*asked[:-2], "--match", "*.txt", "--dry-run", "--json")
    assert matched.summary["images"] == 1


async def test_a_listing_holds_no_lock_on_the_state_of_the_submission(cli: Cli, put_image: PutImage) -> None:
    """S3 does not answer the listing of the prefix; another command works meanwhile."""
    put_image(key="slow/1.png")
    asked = ("submit", "--prefix", f"s3://{BUCKET}/slow/", "Slow?", "--name", "slow")
    assert (await cli.run("submit", f"s3://{BUCKET}/slow/1.png", "?", "--name", "other")).code == 0
    async with await asyncio.start_server(lambda *_: listing.set(), "127.0.0.1", 0) as silent:
        listing = asyncio.Event()
        port = silent.sockets[0].getsockname()[1]
        stuck = cli.with_settings(VQA_S3_ENDPOINT_URL=f"http://127.0.0.1:{port}").start(*asked)
        await asyncio.wait_for(listing.wait(), PATIENCE_S)
        (state,) = cli.state_files
        with contextlib.closing(sqlite3.connect(state, timeout=0)) as file, file:
            file.execute("BEGIN IMMEDIATE")
        shown = await cli.run_json("submissions", "list")
        await kill(stuck)
    assert [it["jobs"] for it in shown] == [1]
    # An interrupted listing is repeated.
    done = await cli.run(*asked, "--wait", "--json")
    assert len(done.objects) == 1, done


async def test_all_images_in_a_folder_are_submitted(cli: Cli, stack: Stack) -> None:
    folder = cli.folder / "photos"
    (folder / "a b").mkdir(parents=True)
    for name in ("1.png", "a b/2.PNG", "notes.txt"):
        (folder / name).write_bytes(picture())
    asked = ("submit", "photos/", "Whose folder?", "--bucket", BUCKET, "--wait", "--json")
    first = await cli.run(*asked)
    assert sorted(it["metadata"]["image"] for it in first.objects) == ["photos/1.png", "photos/a b/2.PNG"]
    assert len(calls_with(stack, "Whose folder?")) == 2
    matched = await cli.run(*asked[:-2], "--match", "a b/*", "--dry-run", "--json")
    assert matched.summary["images"] == 1
    for arguments, reported in (
        (("photos/", "--bucket", BUCKET), "the question is missing"),
        (("photos/", "a.png", "What?", "--bucket", BUCKET), "photos/ is a folder. Submit it without other"),
        (("a.png", "b.png", "--bucket", BUCKET), "the question is missing"),
        (("--prefix", "s3://photos/"), "--prefix takes one question and no images."),
        (("--prefix", "s3://photos/", "a.png", "What?"), "--prefix takes one question and no images."),
    ):
        refused = await cli.run("submit", *arguments)
        assert refused.code == 2
        assert refused.err.count(reported) == 1, refused.err
        assert len(refused.err.splitlines()) == 1


async def test_a_model_that_is_not_allowed_is_refused(no_worker_cli: Cli, stack: Stack) -> None:
    allowed = {"VQA_MODEL": "a", "VQA_ALLOWED_MODELS": "a,b"}
    a, b, c = [
        await no_worker_cli.run("submit", "s3://b/k", "What?", "--model", model, **allowed) for model in "abc"
    ]
    assert (a.code, b.code, c.code) == (0, 0, 2)
    assert "model: c is not among VQA_ALLOWED_MODELS" in c.err
    assert await depth(stack, no_worker_cli.jobs_queue) == 2


@pytest.mark.parametrize(
    "deadline",
    ["99999999999d", "9999-12-31T23:59:59-01:00", "2030-01-31T12:00:00", "soon", "2020-01-31T12:00:00Z"],
)
async def test_an_invalid_deadline_is_wrong_usage(no_worker_cli: Cli, deadline: str) -> None:
    no_worker_cli.write("jobs.jsonl", {"question": "What?", "images": ["s3://b/k"]})
    refused = await no_worker_cli.run("submit", "jobs.jsonl", "--skip-invalid", "--deadline", deadline)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith(f"Error: --deadline: '{deadline}' ")
    assert len(refused.err.splitlines()) == 1
    no_worker_cli.write("own.jsonl", {"question": "What?", "images": ["s3://b/k"], "deadline": deadline})
    own = await no_worker_cli.run("submit", "own.jsonl", "--skip-invalid")
    assert own.code == (0 if deadline.startswith("2020") else 2)


# Costs


async def test_a_dry_run_prints_the_cost_and_sends_nothing(no_worker_cli: Cli, stack: Stack) -> None:
    (no_worker_cli.folder / "it.png").write_bytes(picture())
    jobs: list[dict[str, object]] = [
        {"question": "What?", "images": ["it.png", "it.png"]},
        {"question": "What?", "images": ["s3://b/k"]},
    ]
    no_worker_cli.write("jobs.jsonl", *jobs)
    asked = ("submit", "jobs.jsonl", "--bucket", BUCKET, "--dry-run")
    reported = await no_worker_cli.run(*asked, **PRICES)
    assert reported.code == 0, reported.err
    assert reported.lines == [
        "2 jobs with 3 images for simulated/vision",
        "about $0.01, for 1,000 prompt tokens per image and 200 completion tokens per job",
        "Nothing submitted (dry run).",
    ]
    estimate = (await no_worker_cli.run(*asked, "--json", **PRICES)).summary
    assert estimate == {
        "jobs": 2,
        "images": 3,
        "models": ["simulated/vision"],
        "cost_usd": pytest.approx((3 * 1000 * 2 + 2 * 200 * 10) / 1e6),
        "uploads": 1,
    }
    unknown = await no_worker_cli.run(*asked)
    assert "cost unknown: VQA_PRICES has no price for simulated/vision" in unknown.out
    assert await depth(stack, no_worker_cli.jobs_queue) == 0
    assert no_worker_cli.state_files == []
