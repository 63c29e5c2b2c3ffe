"""Pictures that real encoders made: what is sent of each; see tests/corpus/make.sh."""

import base64
import tomllib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Final, cast

import pytest
from PIL import Image

from tests.unit.conversions import pool_of
from vqa_worker.messages.image_types import COMMON_TYPES, SIGNATURE_BYTES, SUFFIXES, media_type
from vqa_worker.messages.result import SentImage
from worker.errors import JobError
from worker.images.content import Content
from worker.images.conversion_pool import ConversionPool
from worker.images.memory_budget import MemoryBudget
from worker.images.open_images import OpenImages
from worker.images.preparation import ImageRules, Preparation
from worker.images.scan import scan_for
from worker.images.source import ImageSource, Link

CORPUS: Final = Path(__file__).parents[1] / "corpus"
TABLE: Final = tomllib.loads((CORPUS / "expected.toml").read_text())
# In the four corners and the middle, as shares of width and height.
POINTS: Final = ((0.12, 0.15), (0.88, 0.15), (0.12, 0.85), (0.88, 0.85), (0.55, 0.55))
TRANSPARENT: Final = "none"
TOLERANCE: Final = 14
# The grey rectangle is small then, and its surroundings are near in a JPEG.
SCALED_TOLERANCE: Final = 20
TYPES: Final = {suffix: kind for kind, suffix in SUFFIXES.items()} | {"j2k": "image/jp2", "dng": "image/tiff"}


def colours_of(name: str) -> tuple[str, ...]:
    return tuple(TABLE["colours"][name].split())


@dataclass(frozen=True)
class Page:
    """A picture that is sent."""

    size: tuple[int, int]
    colours: tuple[str, ...]


@dataclass(frozen=True)
class Expected:
    """What is sent of a file; see expected.toml."""

    made: str
    sent: str
    size: tuple[int, int] = (120, 80)
    colours: str = "picture"
    scaled_colours: str = ""
    pages: tuple[dict[str, Any], ...] = ()
    tolerance: int = TOLERANCE
    orientation: int = 1
    mode: str = ""
    message: str = ""
    type: str = ""
    pictures: list[Page] = field(init=False)

    def __post_init__(self) -> None:
        pages = self.pages or ({},)
        pictures = [
            Page(tuple(page.get("size", self.size)), colours_of(page.get("colours", self.colours)))
            for page in pages
        ]
        object.__setattr__(self, "pictures", pictures)

    @property
    def is_sent(self) -> bool:
        return self.sent in {"unchanged", "converted"}


FILES: Final = {name: Expected(**values) for name, values in TABLE["files"].items()}
SENT: Final = [name for name, expected in FILES.items() if expected.is_sent]
REFUSED: Final = [name for name in FILES if name not in SENT]


@pytest.fixture(scope="module")
async def pool() -> AsyncIterator[ConversionPool]:
    async with pool_of() as pool:
        yield pool


def read(name: str) -> bytes:
    return (CORPUS / "files" / name).read_bytes()


def type_of(name: str) -> str:
    return FILES[name].type or TYPES[name.rpartition(".")[2]]


async def prepare(
    pool: ConversionPool,
    content: bytes,
    max_edge: int | None = None,
    types: tuple[str, ...] = COMMON_TYPES,
) -> list[tuple[SentImage, bytes]]:
    """Return what is sent."""

    async def pieces() -> AsyncIterator[bytes]:
        yield content

    async def again() -> AsyncIterator[bytes]:
        return pieces()

    rules = ImageRules(max_image_bytes=1_000_000, max_source_bytes=1_000_000, types=types)
    preparation = Preparation(rules, pool)
    image = ImageSource("image", Link(""), max_edge=max_edge, separator=b"\n")
    async with MemoryBudget(10_000_000).reserve(1) as reservation:
        opened = OpenImages(reservation)
        prepared = await preparation.prepare(image, Content(len(content), pieces(), again), opened)
        text = b"".join([piece async for piece in prepared.url.pieces()])
    contents = []
    for url, sent in zip(text.split(b"\n"), prepared.sent, strict=True):
        prefix, _, data = url.partition(b",")
        assert prefix == f"data:{sent.sent_type};base64".encode()
        contents.append(base64.b64decode(data))
    return list(zip(prepared.sent, contents, strict=True))


def decoded(sent: SentImage, content: bytes) -> Image.Image:
    """Decode what is sent as its receiver does."""
    image = Image.open(BytesIO(content))
    image.load()
    # Pillow names forms of JPEG and PNG with several images.
    assert image.get_format_mimetype() in {sent.sent_type, "image/mpo", "image/apng"}
    assert image.size == (sent.width, sent.height)
    return image


def assert_colours(image: Image.Image, expected: tuple[str, ...], tolerance: int) -> None:
    has_alpha = image.mode in {"LA", "PA"} or "transparency" in image.info
    shown = image.convert("RGBA" if has_alpha else image.mode).convert("RGBA")
    points = [(int(image.width * x), int(image.height * y)) for x, y in POINTS]
    found = [cast("tuple[int, ...]", shown.getpixel(point)) for point in points]
    assert all(are_alike(*pair, tolerance) for pair in zip(found, expected, strict=True)), (found, expected)


def are_alike(found: tuple[int, ...], expected: str, tolerance: int) -> bool:
    *colour, alpha = found
    if expected == TRANSPARENT:
        return alpha == 0
    differences = (abs(a - b) for a, b in zip(colour, bytes.fromhex(expected), strict=True))
    return alpha > 250 and max(differences) <= tolerance


def test_the_table_has_all_files() -> None:
    assert sorted(FILES) == sorted(path.name for path in (CORPUS / "files").iterdir())


@pytest.mark.parametrize("name", FILES)
def test_the_type_is_found(name: str) -> None:
    content = read(name)
    assert media_type(content[:SIGNATURE_BYTES]) == (type_of(name) if type_of(name) != "unknown" else None)


@pytest.mark.parametrize("name", SENT)
async def test_a_picture_is_sent_upright_in_its_colours(name: str, pool: ConversionPool) -> None:
    content, expected = read(name), FILES[name]
    images = await prepare(pool, content)
    assert len(images) == len(expected.pictures)
    for number, ((sent, sent_content), picture) in enumerate(zip(images, expected.pictures, strict=True), 1):
        image = decoded(sent, sent_content)
        assert image.size == picture.size
        assert_colours(image, picture.colours, expected.tolerance)
        assert sent.source_type == type_of(name)
        is_pdf = sent.source_type == "application/pdf"
        assert sent.page == (number if is_pdf or len(images) > 1 else None)
        assert (sent_content == content) == (expected.sent == "unchanged")
        assert not expected.mode or image.mode == expected.mode
        if expected.sent == "converted":
            assert not {"exif", "icc_profile", "xmp", "comment", "gamma", "chromaticity"} & set(image.info)


@pytest.mark.parametrize("name", SENT)
async def test_a_picture_is_scaled_down(name: str, pool: ConversionPool) -> None:
    expected = FILES[name]
    edge = max(max(picture.size) for picture in expected.pictures) // 2
    images = await prepare(pool, read(name), edge)
    for (sent, content), picture in zip(images, expected.pictures, strict=True):
        image = decoded(sent, content)
        factor = min(1, edge / max(picture.size))
        for side, whole in zip(image.size, picture.size, strict=True):
            assert abs(side - whole * factor) <= 1
        assert max(image.size) <= edge
        colours = colours_of(expected.scaled_colours) if expected.scaled_colours else picture.colours
        assert_colours(image, colours, max(expected.tolerance, SCALED_TOLERANCE))


@pytest.mark.parametrize("name", [name for name in SENT if TRANSPARENT in FILES[name].pictures[0].colours])
async def test_transparency_becomes_white_in_a_jpeg(name: str, pool: ConversionPool) -> None:
    ((sent, content),) = await prepare(pool, read(name), types=("image/jpeg",))
    picture = FILES[name].pictures[0]
    colours = colours_of(FILES[name].scaled_colours) if FILES[name].scaled_colours else picture.colours
    white = tuple("ffffff" if colour == TRANSPARENT else colour for colour in colours)
    assert sent.sent_type == "image/jpeg"
    assert_colours(decoded(sent, content), white, SCALED_TOLERANCE)


@pytest.mark.parametrize("name", REFUSED)
async def test_a_file_is_refused_as_what_it_is(name: str, pool: ConversionPool) -> None:
    with pytest.raises(JobError) as caught:
        await prepare(pool, read(name))
    assert caught.value.code == FILES[name].sent
    assert FILES[name].message in caught.value.explanation.message


@pytest.mark.parametrize("name", [name for name in SENT if type_of(name) in COMMON_TYPES])
@pytest.mark.parametrize("piece_bytes", [1, 500, 1_000_000])
def test_the_scan_reads_the_header(name: str, piece_bytes: int) -> None:
    content, expected = read(name), FILES[name]
    scan = scan_for(type_of(name))
    for start in range(0, len(content), piece_bytes):
        scan.feed(content[start : start + piece_bytes])
    assert scan.finish() is None or scan.needs_search
    image = Image.open(BytesIO(content))
    assert (scan.width, scan.height, scan.orientation) == (*image.size, expected.orientation)
    assert scan.is_cmyk == (image.mode == "CMYK")
    assert scan.is_16_bit == ("-16" in name)
