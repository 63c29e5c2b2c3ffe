"""Convert pictures as a plain script does: `python -m tests.bench.conversion.plain`.

Reads a line of JSON for each picture (`path`, `media_type`, `max_edge`, `dpi`), and writes a line with the
sizes of the results in bytes.
"""

import json
import sys
from io import BytesIO
from typing import Any

from PIL import Image, ImageOps

QUALITY = 90

Image.MAX_IMAGE_PIXELS = None


def main() -> None:
    """Convert until the standard input ends."""
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_convert(json.loads(line))) + "\n")
        sys.stdout.flush()


def _convert(request: dict[str, Any]) -> list[int]:
    if request["media_type"] == "application/pdf":
        return _pages(request["path"], request["dpi"])
    if request["media_type"] == "image/heic":
        import pillow_heif  # noqa: PLC0415 - other formats do not need its memory

        pillow_heif.register_heif_opener()
    with Image.open(request["path"]) as opened:
        picture = ImageOps.exif_transpose(opened)
        if edge := request["max_edge"]:
            picture.thumbnail((edge, edge))
        return [_saved(picture)]


def _pages(path: str, dpi: int) -> list[int]:
    import pypdfium2  # noqa: PLC0415 - see above

    with pypdfium2.PdfDocument(path) as document:
        return [_saved(page.render(scale=dpi / 72).to_pil()) for page in document]


def _saved(picture: Image.Image) -> int:
    buffer = BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=QUALITY)
    return len(buffer.getvalue())


if __name__ == "__main__":
    main()
