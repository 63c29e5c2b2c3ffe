"""`vqa-worker submit`: by hand, from local files, about a prefix in S3; what it costs, and who reads it."""

import asyncio
import hashlib
import json
from pathlib import Path

import pytest

from deploy.local.stack import Stack
from tests.conftest import BUCKET, PutImage, picture
from tests.integration.cli.running import Cli, depth, emptied
from tests.running import calls_with

ASSUMED = (
    "assumed: 500 tokens an image (--image-tokens), 4 characters of text a token,"
    " 200 tokens an answer (--answer-tokens) or what limits it"
)
PRICES = {"VQA_PRICES": json.dumps({"simulated/vision": [2.0, 10.0]})}


# By hand


async def test_a_question_asked_by_hand_is_answered_in_words_and_leaves_nothing(
    cli: Cli, stack: Stack, put_image: PutImage
) -> None:
    asked = await cli.run("submit", put_image(), "What is this?", "--wait")
    assert (asked.code, asked.err) == (0, "")
    (answer,) = asked.lines
    assert "PNG" in answer
    assert cli.manifests == []
    assert "vqa.results.ask-" not in stack.rabbitmq.ctl("list_queues", "name")


async def test_several_images_are_asked_about_together_or_each_by_itself(
    cli: Cli, put_image: PutImage
) -> None:
    first, second = put_image(), put_image(picture("JPEG"))
    together = await cli.run("submit", first, second, "What differs?", "--wait")
    assert "2 pictures" in together.out
    apart = await cli.run("submit", first, second, "What is this?", "--each", "--wait", "--json")
    assert {result["metadata"]["image"]: "JPEG" in result["answer"] for result in apart.objects} == {
        first: False,
        second: True,
    }


async def test_what_the_command_line_says_of_a_job_reaches_the_model(
    cli: Cli, stack: Stack, put_image: PutImage
) -> None:
    question = "Is it 17?"
    said = [
        "--system=Be brief.", "--model=simulated/vision-small", "--max-tokens=7",
        '--param=stop=["x"]', "--metadata=order=17", "--deadline=1h",
    ]  # fmt: skip
    asked = await cli.run("submit", put_image(), "-q", question, *said, "--wait", "--json")
    (result,) = asked.objects
    assert result["model"] == "simulated/vision-small"
    assert result["metadata"]["order"] == "17"
    (call,) = calls_with(stack, question)
    assert call.messages[0] == {"role": "system", "content": "Be brief."}
    assert call.params == {"max_tokens": 7, "stop": ["x"]}


async def test_a_job_that_fails_is_told_of_and_is_code_1(cli: Cli) -> None:
    asked = await cli.run("submit", f"s3://{BUCKET}/nothing.png", "What?", "--wait")
    assert asked.code == 1
    assert asked.out.startswith("failed: images[0] (s3://")
    assert asked.out.endswith("(image_not_found)\n")


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
    # One that is there is not put there again, whatever stands in it.
    s3.put_object(Bucket=BUCKET, Key=key, Body=b"was not put again")
    await cli.run(*asked)
    assert s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() == b"was not put again"


async def test_paths_in_a_file_of_jobs_start_from_its_folder(cli: Cli, stack: Stack) -> None:
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


async def test_what_is_no_image_is_refused_before_anything_is_sent(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "ok.png").write_bytes(picture())
    wrong: tuple[tuple[tuple[str, ...], str], ...] = (
        (("notes.png", "--bucket", BUCKET), "notes.png: is no JPEG, PNG or WebP image"),
        (("missing.png", "--bucket", BUCKET), "missing.png: No such file or directory"),
        (("ok.png",), "ok.png: is a local file: --bucket says where to upload it"),
        (("missing.png",), "missing.png: is neither a URL nor a file"),
        (("http://host/a.png",), "http://host/a.png: images are s3://bucket/key, https:// links"),
    )
    runs = (cli.run("submit", *arguments, "-q", "What?") for arguments, _ in wrong)
    for (_, told), refused in zip(wrong, await asyncio.gather(*runs), strict=True):
        assert refused.code == 2
        assert told in refused.err
    assert cli.manifests == []


async def test_an_s3_that_refuses_is_one_sentence(cli: Cli) -> None:
    (cli.folder / "it.png").write_bytes(picture())
    refused = await cli.run("submit", "it.png", "What?", "--bucket", BUCKET, AWS_SECRET_ACCESS_KEY="wrong")
    assert refused.code == 1
    (sentence,) = refused.err.splitlines()
    assert sentence.startswith(f"bucket {BUCKET}: S3 answered 403 ")
    assert "check the AWS credentials" in sentence
    nowhere = await cli.run("submit", "--prefix", "s3://no-such-bucket/", "What?")
    assert nowhere.code == 1
    assert "the bucket does not exist at this S3 (VQA_S3_ENDPOINT_URL)" in nowhere.err


# A whole prefix


async def test_a_prefix_is_asked_about_and_what_comes_later_is_new(
    cli: Cli, stack: Stack, put_image: PutImage
) -> None:
    keys = ["a b/1.png", "a b/ü&+%20.PNG", "a b/2.jpeg"]
    urls = [put_image(key=key) for key in keys]
    put_image(key="a b/notes.txt")
    put_image(key="elsewhere/3.png")
    asked = ("submit", "--prefix", f"s3://{BUCKET}/a b/", "Whose prefix?", "--wait", "--json")
    first = await cli.run(*asked)
    assert sorted(result["metadata"]["image"] for result in first.objects) == sorted(urls)
    assert {result["status"] for result in first.objects} == {"succeeded"}

    urls.append(put_image(key="a b/3.webp"))
    second = await cli.run(*asked)
    assert sorted(result["metadata"]["image"] for result in second.objects) == sorted(urls)
    assert len(calls_with(stack, "Whose prefix?")) == 4

    matched = await cli.run(*asked[:-2], "--match", "*.txt", "--dry-run", "--json")
    assert matched.summary["images"] == 1


# Costs


async def test_a_dry_run_sends_nothing_and_says_what_it_would_cost(lone_cli: Cli, stack: Stack) -> None:
    (lone_cli.folder / "it.png").write_bytes(picture())
    jobs: list[dict[str, object]] = [
        {"question": "x" * 400, "images": ["it.png", "it.png"], "params": {"max_tokens": 50}},
        {"question": "x" * 400, "images": ["s3://b/k"], "system": "x" * 40},
    ]
    lone_cli.write("jobs.jsonl", *jobs)
    asked = ("submit", "jobs.jsonl", "--bucket", BUCKET, "--dry-run", "--image-tokens=500")
    told = await lone_cli.run(*asked, **PRICES)
    assert told.code == 0, told.err
    assert told.lines == [
        "2 jobs about 3 images, for simulated/vision",
        "local files go to S3 first, unless they are there: 1",
        "about 1,710 prompt and 250 completion tokens",
        "about $0.005920",
        ASSUMED,
        "nothing was submitted (--dry-run)",
    ]
    estimate = (await lone_cli.run(*asked, "--json", **PRICES)).summary
    assert estimate["prompt_tokens"] == 3 * 500 + 100 + 110
    assert estimate["completion_tokens"] == 50 + 200
    assert estimate["cost_usd"] == pytest.approx((1710 * 2 + 250 * 10) / 1e6)
    unknown = await lone_cli.run(*asked)
    assert "cost: not known, because VQA_PRICES has no price for simulated/vision" in unknown.out
    given = await lone_cli.run(*asked, "--json", "--price", "1,1")
    assert given.summary["cost_usd"] == pytest.approx(1960 / 1e6)
    assert await depth(stack, lone_cli.jobs_queue) == 0
    assert lone_cli.manifests == []


# Who reads the results


async def test_results_may_go_to_a_queue_that_others_read(lone_cli: Cli, stack: Stack) -> None:
    queue = lone_cli.settings["VQA_RESULTS_QUEUE"]
    submitted = await lone_cli.run("submit", "s3://b/k", "What?", "--reply-to", queue, "--name", "mine")
    assert submitted.lines == ["1 job submitted as mine", f"their results come to {queue}"]
    (message,) = await emptied(stack, lone_cli.jobs_queue)
    assert message.reply_to == queue
    gathered = await lone_cli.run("results", "mine")
    assert gathered.code == 1
    assert "which others read: there is nothing to gather here" in gathered.err
