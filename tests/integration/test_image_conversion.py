"""Images of every kind reach a model that decodes them: upright, in the right colours, within the limits."""

import asyncio
import gzip
import io
import os
import signal
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pillow_heif
import pytest
from PIL import Image

from deploy.local.model_simulator.calls import Picture
from deploy.local.stack import Stack
from tests.conftest import BUCKET, MakeClient, PutImage, StartWorker
from tests.running import Client, Worker, calls_with, until
from tests.unit.conversions import LYING

pillow_heif.register_heif_opener()

CORNERS = ("#d02020", "#20b040", "#2040d0", "#f0f0f0")
"""Of the test picture: top left, top right, bottom left, bottom right."""
SIZE = (640, 400)
ORIENTATION = 0x0112
TOLERANCE = 12


def draw(size: tuple[int, int] = SIZE) -> Image.Image:
    """Draw four rectangles in the colours of CORNERS."""
    image, (width, height) = Image.new("RGB", size), size
    for number, colour in enumerate(CORNERS):
        left, top = (number % 2) * width // 2, (number // 2) * height // 2
        image.paste(colour, (left, top, left + width // 2, top + height // 2))
    return image


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def lying(orientation: int, form: str) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(draw().transpose(LYING[orientation]), form, exif=exif)


def sixteen_bit_grey() -> bytes:
    ramp = Image.new("I;16", SIZE)
    ramp.paste(0xC0C0, (0, 0, *SIZE))
    return encoded(ramp, "PNG")


def two_frames(form: str) -> bytes:
    return encoded(draw(), form, save_all=True, append_images=[Image.new("RGB", SIZE)], duration=100)


@dataclass(frozen=True)
class Case:
    """A file, and what is sent of it."""

    make: Callable[[], bytes]
    source_type: str
    sent_types: tuple[str, ...] = ("image/jpeg", "image/png")
    size: tuple[int, int] = SIZE
    corners: tuple[str, ...] = CORNERS


CASES = {
    **{
        f"{form} with orientation {number}": Case(partial(lying, number, form), f"image/{form.lower()}")
        for form in ("JPEG", "PNG", "WebP")
        for number in LYING
    },
    "HEIC": Case(lambda: encoded(draw(), "HEIF"), "image/heic"),
    "AVIF": Case(lambda: encoded(draw(), "AVIF"), "image/avif"),
    "GIF": Case(lambda: encoded(draw(), "GIF"), "image/gif"),
    "animated GIF": Case(lambda: two_frames("GIF"), "image/gif"),
    "animated WebP": Case(lambda: two_frames("WebP"), "image/webp"),
    "TIFF": Case(lambda: encoded(draw(), "TIFF", compression="tiff_lzw"), "image/tiff"),
    "BMP": Case(lambda: encoded(draw(), "BMP"), "image/bmp"),
    "JPEG 2000": Case(lambda: encoded(draw(), "JPEG2000"), "image/jp2"),
    "CMYK JPEG": Case(lambda: encoded(draw().convert("CMYK"), "JPEG", quality=95), "image/jpeg"),
    "16-bit PNG": Case(sixteen_bit_grey, "image/png", corners=("#c0c0c0",) * 4),
    "PDF": Case(lambda: encoded(draw(), "PDF", resolution=150), "application/pdf", size=(SIZE[0], SIZE[1])),
}


@pytest.fixture(scope="module")
async def worker(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Worker]:
    async with Worker.running(stack, tmp_path_factory.mktemp("worker")) as worker:
        yield worker


@pytest.fixture
async def client(client_of: MakeClient, worker: Worker) -> Client:
    return await client_of(worker)


async def asked(client: Client, stack: Stack, **job: Any) -> tuple[list[dict[str, Any]], list[Picture]]:
    """Return what the result says was sent, and what the model received."""
    question = f"What is {uuid.uuid4().hex}?"
    reply = await client.ask(question=question, **job)
    assert reply.body["status"] == "succeeded", reply.body
    (call,) = calls_with(stack, question)
    return reply.body["images"], call.images


def are_alike(found: str, expected: str) -> bool:
    pairs = zip(bytes.fromhex(found[1:]), bytes.fromhex(expected[1:]), strict=True)
    return all(abs(a - b) <= TOLERANCE for a, b in pairs)


@pytest.mark.parametrize("name", CASES)
async def test_every_picture_arrives_upright_in_the_right_colours(
    client: Client, stack: Stack, put_image: PutImage, worker: Worker, name: str
) -> None:
    case, content = CASES[name], CASES[name].make()
    url = put_image(content, f"{uuid.uuid4().hex}.jpg")
    (said,), (seen,) = await asked(client, stack, images=[url])
    assert (seen.width, seen.height) == case.size
    assert all(map(are_alike, seen.corners, case.corners)), seen.corners
    assert f"image/{seen.format.lower()}" == seen.declared_type == said["sent_type"]
    assert said["sent_type"] in case.sent_types
    assert said == {
        "url": url,
        "page": None if name != "PDF" else 1,
        "source_type": case.source_type,
        "source_bytes": len(content),
        "sent_type": seen.declared_type,
        "sent_bytes": seen.bytes,
        "width": seen.width,
        "height": seen.height,
    }
    labels = {"source_type": case.source_type, "sent_type": said["sent_type"]}
    assert worker.metric("vqa_images_converted_total", **labels) >= 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WebP"])
@pytest.mark.parametrize("size", [SIZE, (2000, 1500)])
async def test_what_the_api_takes_arrives_byte_for_byte(
    client: Client, stack: Stack, put_image: PutImage, form: str, size: tuple[int, int]
) -> None:
    noise = Image.effect_noise(size, 90).convert("RGB")
    content = encoded(noise, form, quality=95) + b"something after the end"
    (said,), (seen,) = await asked(client, stack, images=[put_image(content)])
    assert seen.bytes == len(content) == said["sent_bytes"] == said["source_bytes"]
    assert (said["width"], said["height"], said["sent_type"]) == (*size, f"image/{form.lower()}")
    assert said["source_type"] == said["sent_type"]


async def test_an_image_is_scaled_down_to_the_smallest_edge_that_anybody_wants(
    start_worker: StartWorker, client_of: MakeClient, stack: Stack, put_image: PutImage
) -> None:
    client = await client_of(await start_worker(VQA_IMAGE_MAX_EDGE="500"))
    url = put_image(encoded(draw((1600, 1024)), "JPEG"))
    images = [url, {"url": url, "max_edge": 128}, {"url": url, "max_edge": 4000}]
    _, seen = await asked(client, stack, images=images)
    assert [(it.width, it.height) for it in seen] == [(500, 320), (128, 82), (500, 320)]
    _, seen = await asked(client, stack, images=images, image_max_edge=320)
    assert [(it.width, it.height) for it in seen] == [(320, 205), (128, 82), (320, 205)]
    assert all(are_alike(*pair) for it in seen for pair in zip(it.corners, CORNERS, strict=True))


async def test_an_image_over_the_limit_of_bytes_is_shrunk_to_fit(
    start_worker: StartWorker, client_of: MakeClient, stack: Stack, put_image: PutImage
) -> None:
    worker = await start_worker(VQA_MAX_IMAGE_BYTES="100000", VQA_MAX_SOURCE_BYTES="3000000")
    client = await client_of(worker)
    large = encoded(Image.effect_noise((1200, 900), 90).convert("RGB"), "PNG")
    assert len(large) > 1_000_000
    (said,), (seen,) = await asked(client, stack, images=[put_image(large)])
    assert seen.bytes == said["sent_bytes"] <= 100_000
    reply = await client.ask(question="?", images=[put_image(bytes(3_000_001))])
    assert reply.body["error"]["code"] == "image_too_large"
    assert "VQA_MAX_SOURCE_BYTES allows 3000000" in reply.body["error"]["message"]


def three_pages(form: str) -> bytes:
    pages = [Image.new("RGB", (150, 100 * number), colour) for number, colour in enumerate(CORNERS[:3], 1)]
    return encoded(pages[0], form, save_all=True, append_images=pages[1:])


@pytest.mark.parametrize(("form", "kind"), [("PDF", "application/pdf"), ("TIFF", "image/tiff")])
async def test_each_page_is_an_image_in_order(
    client: Client, stack: Stack, put_image: PutImage, form: str, kind: str
) -> None:
    url, photo = put_image(three_pages(form)), put_image()
    for pages, numbers in ((None, [1, 2, 3]), ("2-3", [2, 3]), ("3,1", [3, 1])):
        image = {"url": url} if pages is None else {"url": url, "pages": pages}
        said, seen = await asked(client, stack, images=[photo, image, photo])
        assert [it["page"] for it in said] == [None, *numbers, None]
        assert [it["source_type"] for it in said[1:-1]] == [kind] * len(numbers)
        shown = [it.corners[0] for it in seen[1:-1]]
        assert all(are_alike(a, CORNERS[n - 1]) for a, n in zip(shown, numbers, strict=True))


async def test_pages_keep_their_place_in_a_conversation(
    client: Client, stack: Stack, put_image: PutImage
) -> None:
    question = f"What is {uuid.uuid4().hex}?"
    document = {"url": put_image(three_pages("PDF")), "pages": "1-2", "detail": "low", "max_edge": 99}
    content = [
        {"type": "text", "text": "First"},
        {"type": "image_url", "image_url": document},
        {"type": "text", "text": question},
    ]
    reply = await client.ask(messages=[{"role": "user", "content": content}])
    assert reply.body["status"] == "succeeded", reply.body
    (call,) = calls_with(stack, question)
    parts = call.messages[0]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "image_url", "text"]
    assert [set(part["image_url"]) for part in parts[1:3]] == [{"url"}] * 2
    assert [max(it.width, it.height) for it in call.images] == [99, 99]


REFUSALS: dict[str, tuple[Callable[[], bytes], dict[str, Any], str, str]] = {
    "three bytes": (lambda: b"\xff\xd8\xff", {}, "image_corrupt", "end"),
    "a truncated JPEG": (lambda: encoded(draw(), "JPEG")[:-700], {}, "image_corrupt", "end"),
    "a truncated PNG": (lambda: encoded(draw(), "PNG")[:-20], {}, "image_corrupt", "end"),
    "a truncated WebP": (lambda: encoded(draw(), "WebP")[:-20], {}, "image_corrupt", ""),
    "a truncated HEIC": (lambda: encoded(draw(), "HEIF")[:-300], {}, "image_corrupt", ""),
    "a truncated PDF": (lambda: three_pages("PDF")[:200], {}, "image_corrupt", "PDF"),
    "a page that is not there": (
        lambda: three_pages("PDF"), {"pages": "7"}, "invalid_job", "has 3 pages; `pages` asks for 7",
    ),
    "pages of a photo": (lambda: encoded(draw(), "JPEG"), {"pages": "1"}, "invalid_job", "`pages`"),
    "a web page": (lambda: b"<!DOCTYPE html><html>", {}, "image_unsupported_type", "an HTML page"),
    "too many pixels": (
        lambda: encoded(Image.new("1", (20_000, 11_000)), "PNG"), {}, "image_too_large",
        "20000 × 11000 pixels; VQA_IMAGE_MAX_PIXELS allows 200000000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
async def test_what_cannot_be_sent_fails_before_the_call_with_the_reason(
    client: Client, stack: Stack, put_image: PutImage, name: str
) -> None:
    make, options, code, says = REFUSALS[name]
    url, question = put_image(make()), uuid.uuid4().hex
    reply = await client.ask(question=question, images=[{"url": url, **options}])
    error = reply.body["error"]
    assert error["code"] == code, error
    assert error["message"].startswith(f"images[0] ({url}): ")
    assert says in error["message"]
    assert calls_with(stack, question) == []


async def test_a_large_image_without_its_end_is_never_answered(
    client: Client, stack: Stack, put_image: PutImage
) -> None:
    """It is streamed, so that the end is missed only then: the request is aborted."""
    noise = Image.effect_noise((2500, 2000), 90).convert("RGB")
    for form in ("JPEG", "PNG", "WebP"):
        content = encoded(noise, form, quality=90)
        assert len(content) > 1_000_000
        question = uuid.uuid4().hex
        reply = await client.ask(question=question, images=[put_image(content[:-5000])])
        assert reply.body["error"]["code"] == "image_corrupt", reply.body
        assert [call for call in calls_with(stack, question) if call.status == 200] == []


async def test_an_object_that_is_stored_compressed_is_decompressed(client: Client, stack: Stack) -> None:
    content = encoded(Image.effect_noise((900, 700), 90).convert("RGB"), "PNG")
    for body, sent in ((gzip.compress(content), content), (content, content)):
        key = f"{uuid.uuid4().hex}.png"
        stack.s3.client().put_object(Bucket=BUCKET, Key=key, Body=body, ContentEncoding="gzip")
        _, (seen,) = await asked(client, stack, images=[f"s3://{BUCKET}/{key}"])
        assert seen.bytes == len(sent)
    for body, code in (
        (gzip.compress(content)[:-1000], "image_corrupt"),
        (gzip.compress(bytes(10**9)), "image_too_large"),
    ):
        key = f"{uuid.uuid4().hex}.png"
        stack.s3.client().put_object(Bucket=BUCKET, Key=key, Body=body, ContentEncoding="gzip")
        reply = await client.ask(question="?", images=[f"s3://{BUCKET}/{key}"])
        assert reply.body["error"]["code"] == code, reply.body


async def test_a_linked_image_is_read_and_converted_only_if_it_must_be(
    start_worker: StartWorker, client_of: MakeClient, stack: Stack, put_image: PutImage
) -> None:
    photo, document = put_image(), put_image(three_pages("PDF"))
    for check, others in (("false", []), ("true", [document])):
        worker = await start_worker(VQA_IMAGE_DELIVERY="link", VQA_CHECK_LINKED_IMAGES=check)
        client = await client_of(worker)
        question = f"What is {uuid.uuid4().hex}?"
        images = [{"url": document, "pages": "2"}, {"url": photo, "max_edge": 64}, *others]
        reply = await client.ask(question=question, images=images)
        assert reply.body["status"] == "succeeded", reply.body
        (call,) = calls_with(stack, question)
        assert len(call.images) == 2 + 3 * len(others)
        assert call.links == []


async def test_without_conversion_everything_is_sent_or_refused_as_it_is(
    start_worker: StartWorker, client_of: MakeClient, stack: Stack, put_image: PutImage
) -> None:
    client = await client_of(await start_worker(VQA_IMAGE_CONVERT="never"))
    content = lying(6, "JPEG")
    (said,), (seen,) = await asked(client, stack, images=[put_image(content)])
    assert (seen.bytes, said["sent_bytes"]) == (len(content), len(content))
    reply = await client.ask(question="?", images=[put_image(encoded(draw(), "HEIF"))])
    assert reply.body["error"]["code"] == "image_unsupported_type"
    assert "image/heic" in reply.body["error"]["message"]
    assert "VQA_IMAGE_CONVERT is never" in reply.body["error"]["message"]


async def test_without_the_extra_everything_works_as_without_conversion_and_refusals_name_it(
    start_worker: StartWorker, client_of: MakeClient, stack: Stack, put_image: PutImage
) -> None:
    worker = await start_worker(wait=False, VQA_MAX_IMAGE_BYTES="100000")
    worker.patch = "import sys; sys.modules['PIL'] = None"
    await worker.start()
    client = await client_of(worker)
    content = lying(6, "JPEG")
    _, (seen,) = await asked(client, stack, images=[put_image(content)])
    assert seen.bytes == len(content)
    for it, code in (
        (put_image(encoded(draw(), "HEIF")), "image_unsupported_type"),
        (put_image(bytes(100_001)), "image_too_large"),
        ({"url": put_image(encoded(draw(), "PNG")), "max_edge": 64}, "image_too_large"),
    ):
        error = (await client.ask(question="?", images=[it])).body["error"]
        assert error["code"] == code, error
        assert "the extra `images` is not installed (vqa-worker[images])" in error["message"]


def environment_of(process_id: int) -> bytes:
    return Path(f"/proc/{process_id}/environ").read_bytes()


def is_running(process_id: int) -> bool:
    return Path(f"/proc/{process_id}").exists()


def children_of(process_id: int) -> list[int]:
    """Return the processes that convert images."""
    tasks = Path(f"/proc/{process_id}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def has_loaded_heif(process_id: int) -> bool:
    return "heif" in Path(f"/proc/{process_id}/maps").read_text()


async def test_an_image_whose_processes_die_fails_alone(
    start_worker: StartWorker, client_of: MakeClient, put_image: PutImage
) -> None:
    worker = await start_worker(VQA_IMAGE_PROCESSES="1")
    client = await client_of(worker)
    photo = put_image(encoded(draw(), "HEIF"))
    assert (await client.ask(question="?", images=[photo])).body["status"] == "succeeded"
    assert worker.process is not None
    process_id = worker.process.pid

    async def kill_children() -> None:
        while True:
            with suppress(OSError):  # it ends by itself
                for child in children_of(process_id):
                    # The image makes it load the decoder; one that dies before has nothing to do with it.
                    if has_loaded_heif(child):
                        os.kill(child, signal.SIGKILL)
            await asyncio.sleep(0.002)

    killing = asyncio.create_task(kill_children())
    reply = await client.ask(question="?", images=[photo])
    killing.cancel()
    assert reply.body["error"]["code"] == "image_corrupt", reply.body
    assert (await client.ask(question="?", images=[photo])).body["status"] == "succeeded"
    assert worker.metric("vqa_retries_total") == 0


async def test_the_processes_end_with_the_worker_and_know_no_secret(
    start_worker: StartWorker, client_of: MakeClient, put_image: PutImage
) -> None:
    worker = await start_worker()
    client = await client_of(worker)
    await client.ask(question="?", images=[put_image(encoded(draw(), "HEIF"))])
    assert worker.process is not None
    (child,) = children_of(worker.process.pid)
    environment = environment_of(child)
    assert b"VQA_" not in environment
    assert b"AWS_" not in environment
    await worker.stop()
    await until(lambda: not is_running(child), "the process has ended")
