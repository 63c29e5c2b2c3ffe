"""The pool of converting processes: what happens to it, and to the worker, with images of any kind."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from tests.unit.conversions import Conversion, is_running, picture, pool_of, saved
from vqa_worker.messages.error_codes import ErrorCode
from worker.images import conversion_pool
from worker.images.conversion import PDF, ConvertedImage
from worker.images.conversion_pool import ConversionPool


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(100):
        while not condition():  # noqa: ASYNC110 - about processes
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def large() -> bytes:
    """A JPEG of 50 megapixels, which takes a second to convert without scaling."""
    tile = Image.merge("RGB", [Image.effect_noise((816, 612), 40) for _ in "RGB"])
    return saved(tile.resize((8160, 6120), Image.Resampling.NEAREST), "JPEG", quality=80)


async def test_images_are_converted_by_one_process() -> None:
    async with pool_of() as pool:
        for kind, media_type in (
            ("GIF", "image/gif"),
            ("HEIF", "image/heic"),
            ("PDF", PDF),
            ("BMP", "image/bmp"),
        ):
            conversion = Conversion(pool, picture(kind, (1200, 800)), media_type)
            (image,) = await conversion.run()
            assert (image.width, image.height) in {(512, 341), (512, 342)}
            assert Image.open(BytesIO(image.content)).size == (image.width, image.height)
            assert conversion.reserved == [len(image.content)]
            assert conversion.openings == 1
        assert len(pool.process_ids) == 1


async def test_an_image_that_needs_no_change_comes_back() -> None:
    content = saved(Image.effect_noise((500, 500), 50), "PNG")
    async with pool_of(memory_bytes=1) as pool:
        (image,) = await Conversion(pool, content, "image/png").run()
    assert image == ConvertedImage("image/png", content, 500, 500, None)


async def test_pages_come_in_order() -> None:
    pages = [Image.new("RGB", (60 + page, 40)) for page in range(3)]
    content = saved(pages[0], "PDF", save_all=True, append_images=pages[1:], resolution=72)
    async with pool_of() as pool:
        images = await Conversion(pool, content, PDF, pages=((3, 3), (1, 2))).run()
    assert [(image.page, image.width) for image in images] == [(3, 62), (1, 60), (2, 61)]


async def test_a_refusal_keeps_the_process() -> None:
    async with pool_of() as pool:
        assert (await Conversion(pool, b"GIF89a").refusal())[0] == ErrorCode.IMAGE_CORRUPT
        (pid,) = pool.process_ids
        await Conversion(pool, picture()).run()
        assert pool.process_ids == [pid]


async def test_a_killed_process_is_replaced_once(large: bytes) -> None:
    async with pool_of() as pool:
        conversion = Conversion(pool, large, "image/jpeg", max_edge=4000)
        running = asyncio.create_task(conversion.run())
        await conversion.sent.wait()
        await asyncio.sleep(0.1)
        os.kill(pool.process_ids[0], signal.SIGKILL)
        (image,) = await running
        assert image.width == 4000
        assert conversion.openings == 2


async def test_an_image_whose_process_is_killed_twice_is_corrupt(large: bytes) -> None:
    async with pool_of() as pool:
        conversion = Conversion(pool, large, "image/jpeg", max_edge=4000)
        running = asyncio.create_task(conversion.refusal())
        for _ in range(2):
            await conversion.sent.wait()
            await asyncio.sleep(0.1)
            conversion.sent.clear()
            os.kill(pool.process_ids[0], signal.SIGKILL)
        assert await running == (ErrorCode.IMAGE_CORRUPT, "decoding it crashes")
        await Conversion(pool, picture()).run()


async def test_a_process_that_dies_while_it_receives_an_image_is_replaced(large: bytes) -> None:
    async with pool_of() as pool:
        conversion = Conversion(pool, large, "image/jpeg")

        def kill() -> None:
            conversion.on_piece = lambda: None
            os.kill(pool.process_ids[0], signal.SIGKILL)

        conversion.on_piece = kill
        assert await conversion.run()
        assert conversion.openings == 2


async def test_a_process_that_dies_while_it_is_idle_is_replaced() -> None:
    async with pool_of() as pool:
        await Conversion(pool, picture()).run()
        (pid,) = pool.process_ids
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not is_running(pid))
        assert await Conversion(pool, picture()).run()
        assert pool.process_ids != [pid]


@pytest.mark.parametrize("source", ["small", "large"])
async def test_a_process_that_hangs_ends_after_the_time_limit(
    source: str, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A large source fills the pipe to a process that does not read. The time is also that of its start.
    monkeypatch.setattr(conversion_pool, "TIMEOUT_S", 2.5)
    async with pool_of() as pool:
        content = large if source == "large" else picture("JPEG", (900, 900))
        conversion = Conversion(pool, content, "image/jpeg")
        conversion.on_piece = lambda: os.kill(pool.process_ids[0], signal.SIGSTOP)
        assert await conversion.refusal() == (ErrorCode.IMAGE_CORRUPT, "decoding it takes more than 2.5 s")
        assert conversion.openings == 2


async def test_a_cancelled_image_ends_its_process(large: bytes) -> None:
    async with pool_of() as pool:
        conversion = Conversion(pool, large, "image/jpeg", max_edge=None)
        running = asyncio.create_task(conversion.run())
        await conversion.sent.wait()
        (pid,) = pool.process_ids
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await until(lambda: not is_running(pid))
        assert await Conversion(pool, picture()).run()


async def test_an_error_of_the_source_passes_through() -> None:
    async with pool_of() as pool:
        conversion = Conversion(pool, picture())

        def fail() -> None:
            raise LookupError("S3")

        conversion.on_piece = fail
        with pytest.raises(LookupError, match="S3"):
            await conversion.run()
        assert await Conversion(pool, picture()).run()


async def test_an_image_that_needs_more_than_the_memory_is_refused() -> None:
    async with pool_of(memory_bytes=10_000_000) as pool:
        code, message = await Conversion(pool, picture(size=(4000, 3000))).refusal()
        assert code == ErrorCode.IMAGE_TOO_LARGE
        assert message.endswith(" bytes; VQA_IMAGE_DECODE_BYTES allows 10000000")
        (pid,) = pool.process_ids
        assert await Conversion(pool, picture()).run()
        assert pool.process_ids == [pid]


async def test_two_images_are_converted_at_the_same_time() -> None:
    both, third_reserves = asyncio.Barrier(2), asyncio.Event()
    async with pool_of(processes=2) as pool, asyncio.TaskGroup() as tasks:
        for _ in range(2):
            conversion = Conversion(pool, picture())
            conversion.on_reserve = both.wait
            tasks.create_task(conversion.run())
        await until(lambda: len(pool.process_ids) == 2)
        third = Conversion(pool, picture())

        async def reserve() -> None:
            third_reserves.set()

        third.on_reserve = reserve
        await third.run()
        assert len(pool.process_ids) == 2


async def test_images_wait_for_memory() -> None:
    release = asyncio.Event()
    async with pool_of(processes=2, memory_bytes=300_000) as pool, asyncio.TaskGroup() as tasks:
        first, second = (Conversion(pool, picture(size=(140, 140))) for _ in range(2))
        first.on_reserve = release.wait
        tasks.create_task(first.run())
        await until(lambda: bool(first.reserved))
        waiting = tasks.create_task(second.run())
        await second.sent.wait()
        await asyncio.sleep(0.5)
        assert not second.reserved
        release.set()
        await waiting


async def test_a_process_ends_after_a_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion_pool, "IMAGES_PER_PROCESS", 2)
    async with pool_of() as pool:
        seen = []
        for _ in range(4):
            conversion = Conversion(pool, picture())
            conversion.on_piece = lambda: seen.append(pool.process_ids[0])
            await conversion.run()
    assert seen[0] == seen[1] != seen[2] == seen[3]


async def test_an_idle_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion_pool, "IDLE_S", 0.1)
    async with pool_of() as pool:
        await Conversion(pool, picture()).run()
        (pid,) = pool.process_ids
        await until(lambda: not pool.process_ids and not is_running(pid))


async def test_closing_ends_idle_and_busy_processes(large: bytes) -> None:
    pool = ConversionPool(processes=2, memory_bytes=10**9)
    conversion = Conversion(pool, large, "image/jpeg", max_edge=None)
    running = asyncio.create_task(conversion.run())
    await conversion.sent.wait()
    await Conversion(pool, picture()).run()
    pids = pool.process_ids
    assert len(pids) == 2
    await pool.close()
    assert not any(map(is_running, pids))
    for task in (running, Conversion(pool, picture()).run()):
        with pytest.raises(RuntimeError, match="the pool is closed"):
            await task


async def test_closing_ends_a_process_whose_result_is_not_read(large: bytes) -> None:
    pool = ConversionPool(processes=1, memory_bytes=10**9)
    conversion = Conversion(pool, large, "image/jpeg", max_edge=3000)
    conversion.on_reserve = asyncio.Event().wait
    running = asyncio.create_task(conversion.run())
    await until(lambda: bool(conversion.reserved))
    async with asyncio.timeout(60):
        await pool.close()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_no_file_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.chdir("/proc")
    async with pool_of() as pool:
        for kind, media_type in (
            ("GIF", "image/gif"),
            ("HEIF", "image/heic"),
            ("PDF", PDF),
            ("TIFF", "image/tiff"),
        ):
            assert await Conversion(pool, picture(kind), media_type).run()


async def test_a_process_knows_no_secrets_and_cannot_write_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQA_API_KEY", "secret-key")
    async with pool_of() as pool:
        await Conversion(pool, picture()).run()
        folder = Path(f"/proc/{pool.process_ids[0]}")
        assert b"secret-key" not in (folder / "environ").read_bytes()
        limits = (folder / "limits").read_text()
        assert [line.split()[3:5] for line in limits.splitlines() if line.startswith("Max file size")] == [
            ["0", "0"]
        ]


def test_a_process_ends_with_its_worker() -> None:
    command = [sys.executable, "-m", "worker.images.converter"]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False)  # noqa: S603
    assert (ended.returncode, ended.stdout[4:]) == (0, b'{"ready": true}')


async def test_the_event_loop_does_not_wait_for_a_conversion(large: bytes) -> None:
    lags = []

    async def measure() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            lags.append(time.perf_counter() - start - 0.001)

    async with pool_of() as pool:
        await Conversion(pool, picture()).run()
        measuring = asyncio.create_task(measure())
        start = time.perf_counter()
        (image,) = await Conversion(pool, large, "image/jpeg", max_edge=None, max_bytes=2_000_000).run()
        duration = time.perf_counter() - start
        measuring.cancel()
    text = f"{len(large)} to {len(image.content)} bytes in {duration:.2f} s, lag {max(lags) * 1000:.1f} ms"
    print(text)  # noqa: T201 - shown by `pytest -s`
    # Not a measurement, which a busy machine would fail: a loop that waits does so for all of the time.
    assert max(lags) < max(0.25, duration / 2)


async def test_a_process_that_cannot_start_says_nothing_about_the_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pool_of() as pool:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "/bin/false")
            with pytest.raises(OSError, match="cannot be started"):
                await Conversion(pool, picture()).run()
        assert await Conversion(pool, picture()).run()


async def test_a_job_that_is_cancelled_while_its_process_starts_ends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "slow"
    script.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    async with pool_of() as pool:
        running = asyncio.create_task(Conversion(pool, picture()).run())
        await until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not is_running(int((tmp_path / "pid").read_text()))
