"""Draws the pictures that the demo and the tests ask questions about; the same bytes at every run."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

_INK = (38, 38, 44)


@dataclass(frozen=True)
class Picture:
    """A picture on disk."""

    name: str
    path: Path
    caption: str
    """What a person sees in it."""
    question: str
    """Something worth asking about it."""
    media_type: str


def create_sample_images(folder: Path) -> list[Picture]:
    """Draw all pictures into a folder, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_save(folder, *description) for description in _PICTURES]


def draw_receipt() -> Image.Image:
    """Draw a till receipt that lies on a wooden table."""
    paper = Image.new("RGB", (620, 960), (252, 251, 246))
    draw = ImageDraw.Draw(paper)
    draw.text((310, 40), "CAFE HARBOUR", font=_font(46), fill=_INK, anchor="mt")
    draw.text((310, 104), "12 Quay Street", font=_font(26), fill=_INK, anchor="mt")
    draw.text((310, 142), "14 March 2025   10:42", font=_font(26), fill=_INK, anchor="mt")
    top = 210
    _dashes(draw, top)
    for what, price in _ITEMS:
        top += 52
        draw.text((50, top), what, font=_font(30), fill=_INK, anchor="ls")
        draw.text((570, top), price, font=_font(30), fill=_INK, anchor="rs")
    _dashes(draw, top + 26)
    _total(draw, top + 90, "Subtotal", "31.70", 30)
    _total(draw, top + 140, "VAT 10%", "3.17", 30)
    _total(draw, top + 214, "TOTAL", "34.87", 46)
    _dashes(draw, top + 244)
    draw.text((310, top + 290), "Card **** 4821", font=_font(26), fill=_INK, anchor="mt")
    draw.text((310, top + 340), "Thank you!", font=_font(34), fill=_INK, anchor="mt")
    return _on_table(paper)


def draw_street_sign() -> Image.Image:
    """Draw a stop sign above the sign of a street, in front of a sky."""
    image = _vertical_gradient((900, 1100), (96, 158, 214), (214, 232, 244)).convert("RGBA")
    draw = ImageDraw.Draw(image)
    draw.rectangle((432, 300, 468, 1100), fill=(120, 124, 130))
    draw.rectangle((432, 300, 443, 1100), fill=(158, 162, 168))
    _octagon(draw, (450, 340), 270, (250, 250, 250))
    _octagon(draw, (450, 340), 250, (190, 22, 34))
    draw.text(
        (450, 340), "STOP", font=_font(152), fill="white", anchor="mm", stroke_width=4, stroke_fill="white"
    )
    draw.rounded_rectangle((110, 690, 790, 850), 22, fill=(250, 250, 250))
    draw.rounded_rectangle((120, 700, 780, 840), 16, fill=(14, 110, 70))
    draw.text((450, 770), "HARBOUR ST", font=_font(96), fill="white", anchor="mm")
    return image.convert("RGB")


def draw_bar_chart() -> Image.Image:
    """Draw a bar chart of orders by month."""
    image = Image.new("RGB", (1200, 800), "white")
    draw = ImageDraw.Draw(image)
    draw.text((600, 34), "Orders per month", font=_font(48), fill=_INK, anchor="mt")
    left, bottom, height, most = 130, 690, 540, 300
    for value in range(0, most + 1, 50):
        y = bottom - height * value // most
        draw.line((left, y, 1140, y), fill=(222, 224, 230), width=2)
        draw.text((left - 18, y), str(value), font=_font(26), fill=(96, 98, 108), anchor="rm")
    for number, (month, value) in enumerate(_ORDERS):
        x = left + 50 + number * 165
        y = bottom - height * value // most
        # The best month stands out.
        colour = (226, 116, 32) if value == max(dict(_ORDERS).values()) else (44, 102, 178)
        draw.rectangle((x, y, x + 105, bottom), fill=colour)
        draw.text((x + 52, y - 10), str(value), font=_font(32), fill=_INK, anchor="ms")
        draw.text((x + 52, bottom + 18), month, font=_font(32), fill=_INK, anchor="mt")
    draw.line((left, bottom, 1140, bottom), fill=_INK, width=4)
    return image


@cache
def draw_seascape() -> Image.Image:
    """Draw the sun going down over the sea, with hills and the grain of a photo."""
    width, height, horizon = 1600, 1067, 610
    image = _vertical_gradient((width, horizon), (62, 84, 150), (255, 176, 92))
    image = _add_glow(image, (1080, 520), 560)
    ImageDraw.Draw(image).ellipse((1010, 450, 1150, 590), fill=(255, 244, 206))
    scene = Image.new("RGB", (width, height))
    scene.paste(image, (0, 0))
    scene.paste(_sea((width, height - horizon), sun_at=1080), (0, horizon))
    _draw_hills(scene, horizon)
    return _with_grain(scene.filter(ImageFilter.GaussianBlur(0.8)), seed=4, strength=9)


def draw_plain(colour: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Draw a picture of one colour, for tests."""
    return Image.new("RGB", size, colour)


_ITEMS = (
    ("2 x Cappuccino", "7.80"),
    ("1 x Croissant", "2.90"),
    ("1 x Club sandwich", "9.50"),
    ("1 x Orange juice", "4.20"),
    ("2 x Cheesecake", "7.30"),
)
_ORDERS = (("Jan", 120), ("Feb", 95), ("Mar", 160), ("Apr", 210), ("May", 180), ("Jun", 240))

_Description = tuple[str, Callable[[], Image.Image], str, str]
_PICTURES: tuple[_Description, ...] = (
    (
        "receipt.jpg",
        draw_receipt,
        "A receipt of Cafe Harbour over 34.87",
        "What is the total on this receipt?",
    ),
    (
        "street-sign.png",
        draw_street_sign,
        "A stop sign and the sign of Harbour Street",
        "What do the signs say?",
    ),
    (
        "chart.png",
        draw_bar_chart,
        "A bar chart of orders from January to June",
        "What is the title of this chart?",
    ),
    ("seascape.jpg", draw_seascape, "The sun goes down over the sea", "Which colours dominate this picture?"),
    ("seascape.webp", draw_seascape, "The same scene as WebP", "Is this picture taken by day or by night?"),
)
_SAVE_OPTIONS: dict[str, dict[str, object]] = {
    "JPEG": {"quality": 88},
    "PNG": {"optimize": True},
    "WEBP": {"quality": 88},
}


def _save(folder: Path, name: str, draw: Callable[[], Image.Image], caption: str, question: str) -> Picture:
    path = folder / name
    kind = Image.registered_extensions()[path.suffix]
    draw().save(path, kind, **_SAVE_OPTIONS[kind])
    return Picture(name, path, caption, question, Image.MIME[kind])


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # Comes with Pillow, so that no font has to be installed.
    return ImageFont.load_default(size=size)


def _dashes(draw: ImageDraw.ImageDraw, y: int) -> None:
    for x in range(50, 570, 16):
        draw.line((x, y, x + 8, y), fill=_INK, width=2)


def _total(draw: ImageDraw.ImageDraw, y: int, what: str, amount: str, size: int) -> None:
    draw.text((50, y), what, font=_font(size), fill=_INK, anchor="ls")
    draw.text((570, y), amount, font=_font(size), fill=_INK, anchor="rs")


def _on_table(paper: Image.Image) -> Image.Image:
    """Lay a sheet on wood, a little askew, with its shadow."""
    table = Image.new("RGB", (900, 1200), (112, 74, 44))
    draw = ImageDraw.Draw(table)
    chance = random.Random(1)  # noqa: S311 - wood, not secrets
    for x in range(0, 900, 3):
        shade = chance.randint(-14, 14) + round(10 * math.sin(x / 40))
        draw.line(
            (x, 0, x + chance.randint(-6, 6), 1200), fill=(112 + shade, 74 + shade, 44 + shade), width=3
        )
    table = table.filter(ImageFilter.GaussianBlur(1.2))
    sheet = paper.convert("RGBA").rotate(-2.5, Image.Resampling.BICUBIC, expand=True)
    outline = sheet.getchannel("A")
    shadow = Image.new("L", table.size)
    shadow.paste(outline.point(lambda value: value * 0.55), (128, 108))
    table.paste((20, 12, 6), mask=shadow.filter(ImageFilter.GaussianBlur(14)))
    table.paste(sheet, (114, 92), outline)
    return _with_grain(table, seed=3, strength=6)


def _octagon(
    draw: ImageDraw.ImageDraw, centre: tuple[int, int], radius: int, colour: tuple[int, int, int]
) -> None:
    angles = [math.radians(22.5 + 45 * corner) for corner in range(8)]
    corners = [
        (centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)) for angle in angles
    ]
    draw.polygon(corners, fill=colour)


def _vertical_gradient(
    size: tuple[int, int], top: tuple[int, int, int], bottom: tuple[int, int, int]
) -> Image.Image:
    column = Image.new("RGB", (1, 2))
    column.putpixel((0, 0), top)
    column.putpixel((0, 1), bottom)
    # The middles of the two pixels are the ends of the gradient.
    return column.resize(size, Image.Resampling.BILINEAR, box=(0, 0.5, 1, 1.5))


def _add_glow(image: Image.Image, centre: tuple[int, int], radius: int) -> Image.Image:
    # Pillow's gradient is black in its middle and 180 where the circle touches the edges.
    gradient = Image.radial_gradient("L").resize((2 * radius, 2 * radius), Image.Resampling.BICUBIC)
    mask = Image.new("L", image.size)
    mask.paste(gradient.point(lambda value: max(0, 180 - value)), (centre[0] - radius, centre[1] - radius))
    warm = Image.new("RGB", image.size, (255, 206, 120))
    return Image.composite(warm, image, mask)


def _sea(size: tuple[int, int], *, sun_at: int) -> Image.Image:
    """Draw water that gets darker towards the viewer, with waves that mirror the sun."""
    width, height = size
    water = _vertical_gradient(size, (184, 134, 108), (18, 44, 84))
    draw = ImageDraw.Draw(water, "RGBA")
    chance = random.Random(5)  # noqa: S311 - waves, not secrets
    for _ in range(2600):
        # Perspective: further away the waves are shorter, thinner and closer together.
        depth = chance.random() ** 1.8
        y = round(depth * height)
        length = 12 + 130 * depth * chance.random()
        x = chance.uniform(-80, width)
        off_sun = abs(x + length / 2 - sun_at) / (60 + 320 * depth)
        mirrored = math.exp(-(off_sun**2))
        light = (
            (255, 222, 160, round(30 + 190 * mirrored)) if chance.random() < 0.35 + 0.5 * mirrored else None
        )
        colour = light or (8, 24, 58, 46)
        draw.line((x, y, x + length, y), fill=colour, width=1 + round(3 * depth))
    return water.filter(ImageFilter.GaussianBlur(0.7))


def _draw_hills(scene: Image.Image, horizon: int) -> None:
    draw = ImageDraw.Draw(scene)
    for height, start, end, colour in ((120, 0, 760, (70, 66, 96)), (74, 0, 520, (40, 40, 62))):
        ridge = [(x, horizon - _ridge(x, start, end, height)) for x in range(start, end + 1, 4)]
        draw.polygon([(start, horizon), *ridge, (end, horizon)], fill=colour)


def _ridge(x: int, start: int, end: int, height: int) -> float:
    fade = 1 - ((x - start) / (end - start)) ** 2
    return height * fade * (0.72 + 0.18 * math.sin(x / 61) + 0.1 * math.sin(x / 23 + height))


def _with_grain(image: Image.Image, *, seed: int, strength: int) -> Image.Image:
    """Add what a camera's sensor adds; `effect_noise` would differ from run to run."""
    noise = Image.frombytes("L", image.size, random.Random(seed).randbytes(image.width * image.height))  # noqa: S311
    soft = noise.filter(ImageFilter.GaussianBlur(0.6)).point(
        lambda value: (value - 128) * strength / 60 + 128
    )
    grain = Image.merge("RGB", (soft, soft, soft))
    return ImageChops.add(image, grain, scale=1, offset=-128)
