"""Convert images in a separate process: `python -m worker.images.converter`.

A decoder's crash, hang or appetite for memory ends this process and not the worker. It reads images from
its standard input and writes results to its standard output; see `conversion_pool`.
"""

import json
import os
import re
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict
from io import BytesIO
from typing import Any, BinaryIO
from warnings import catch_warnings

from worker.images.conversion import PDF, ConversionError, ConversionOptions, ConvertedImage
from worker.images.pdf_source import convert_pdf
from worker.images.raster_source import convert_raster

# Of the interpreter, the libraries, and reading a header.
_BASE_BYTES = 160 * 1024 * 1024
# Lower than the worker's, so that its event loop does not wait for a decoder.
_NICENESS = 5
# What the decoders say of a file that is valid, as far as it was read, in a form that they do not decode; the
# last: a HEIF sequence without a still picture.
_UNSUPPORTED = re.compile(
    r"^(cannot handle|unknown (pixel mode|data organization)|unsupported bmp|.*no or invalid primary item)"
)


class _CancelledError(Exception):
    """The worker does not want this image any more."""


def convert(
    content: bytes,
    media_type: str,
    options: ConversionOptions,
    reserve: Callable[[int], None],
    progress: Callable[[], None] = lambda: None,
) -> list[ConvertedImage]:
    """Return the image in a form that may be sent, or its pages.

    Args:
        content: the source.
        media_type: of the source, by its content.
        options: what may be sent.
        reserve: called once before decoding, with the estimated memory of it in bytes; not if the source
            needs no change.
        progress: called after each page.

    Raises:
        ConversionError: the source cannot be converted.
    """
    try:
        with catch_warnings(action="ignore"):
            if media_type == PDF:
                return convert_pdf(content, options, reserve, progress)
            return convert_raster(content, media_type, options, reserve, progress)
    except (ConversionError, _CancelledError):
        raise
    except Exception as error:  # noqa: BLE001 - the decoders raise nearly every kind for damaged content
        raise _explained(error, media_type) from None


def _explained(error: Exception, media_type: str) -> ConversionError:
    text = str(error).lower()
    if _UNSUPPORTED.search(text):
        text = f"is a rare form of {media_type} that cannot be decoded: convert it to JPEG or PNG"
        return ConversionError("image_unsupported_type", text)
    if isinstance(error, MemoryError) or "memory" in text:
        text = "decoding it needs more memory than its dimensions explain"
        return ConversionError("image_too_large", text)
    if "truncated" in text or isinstance(error, EOFError):
        return ConversionError("image_corrupt", "the image is incomplete")
    return ConversionError("image_corrupt", "the image is damaged: it cannot be decoded")


def main() -> None:
    """Convert images until the standard input ends."""
    source, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # What a library prints must not reach the worker.
    os.dup2(2, 1)
    os.nice(_NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    _write_frame(results, {"ready": True})
    while (request := _read_frame(source)) is not None:
        _limit_memory(None)
        content = _read_content(source)
        try:
            _answer(request, content, source, results)
        except _CancelledError:
            continue


def _answer(request: dict[str, Any], content: bytes, source: BinaryIO, results: BinaryIO) -> None:
    def reserve(need: int) -> None:
        _write_frame(results, {"need": need})
        if not (_read_frame(source) or {}).get("go"):
            raise _CancelledError
        _limit_memory(_BASE_BYTES + need * 3 // 2 + len(content))

    options = _options(request["options"])
    _limit_memory(_BASE_BYTES + len(content))
    try:
        images = convert(
            content,
            request["media_type"],
            options,
            reserve,
            lambda: _write_frame(results, {"progress": True}),
        )
    except ConversionError as error:
        _write_frame(results, {"error": error.raw_code, "message": error.message})
        return
    heads = [{**asdict(image), "content": None, "size": len(image.content)} for image in images]
    _write_frame(results, {"images": heads})
    results.writelines(image.content for image in images)
    results.flush()


def _options(values: dict[str, Any]) -> ConversionOptions:
    pages = values["pages"]
    values["types"] = tuple(values["types"])
    values["pages"] = None if pages is None else tuple((first, last) for first, last in pages)
    return ConversionOptions(**values)


def _limit_memory(limit: int | None) -> None:
    """Limit the memory of this process, in bytes; None: no limit. Allocations over it fail."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = hard if limit is None else limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _read_frame(source: BinaryIO) -> dict[str, Any] | None:
    """Return the next JSON object; None: the worker has closed the pipe."""
    head = source.read(4)
    if len(head) < 4:  # noqa: PLR2004 - the length itself
        return None
    frame: dict[str, Any] = json.loads(source.read(int.from_bytes(head)))
    return frame


def _read_content(source: BinaryIO) -> bytes:
    content = BytesIO()
    while length := int.from_bytes(source.read(4)):
        content.write(source.read(length))
    return content.getvalue()


def _write_frame(results: BinaryIO, frame: dict[str, Any]) -> None:
    text = json.dumps(frame).encode()
    results.write(len(text).to_bytes(4) + text)
    results.flush()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        # The worker has ended.
        os._exit(0)
