"""Draw the images that the demo asks questions about; the same bytes in every run."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_INK = "#26262c"


@dataclass(frozen=True)
class Sample:
    """An image file and a question about it."""

    name: str
    content: bytes
    question: str


def sample_images() -> list[Sample]:
    """Draw all images."""
    return [_sample(name, draw(), question) for name, draw, question in _SAMPLES]


def draw_receipt() -> Image.Image:
    """Draw a receipt on a wooden table."""
    image = Image.new("RGB", (900, 1200), "#704a2c")
    draw = ImageDraw.Draw(image)
    draw.rectangle((140, 110, 760, 1090), fill="#fcfbf6")
    for y, size, text in ((160, 46, "CAFE HARBOUR"), (224, 26, "12 Quay Street"), (1020, 34, "Thank you!")):
        draw.text((450, y), text, font=_font(size), fill=_INK, anchor="mt")
    for row, (item, price) in enumerate(_RECEIPT):
        y, size = 360 + 70 * row, 46 if item == "TOTAL" else 30
        draw.text((190, y), item, font=_font(size), fill=_INK, anchor="ls")
        draw.text((710, y), price, font=_font(size), fill=_INK, anchor="rs")
    return image


def draw_street_sign() -> Image.Image:
    """Draw a stop sign and a street sign in front of a blue sky."""
    image = _gradient((900, 1100), "#609ed6", "#a8cdea")
    draw = ImageDraw.Draw(image)
    draw.rectangle((432, 300, 468, 1100), fill="#787c82")
    for radius, colour in ((270, "white"), (250, "#be1622")):
        draw.regular_polygon((450, 340, radius), 8, rotation=22, fill=colour)
    draw.text((450, 340), "STOP", font=_font(152), fill="white", anchor="mm")
    draw.rounded_rectangle((110, 690, 790, 850), 22, fill="#0e6e46", outline="white", width=10)
    draw.text((450, 770), "HARBOUR ST", font=_font(96), fill="white", anchor="mm")
    return image


def draw_bar_chart() -> Image.Image:
    """Draw a bar chart of orders by month."""
    image = Image.new("RGB", (1200, 800), "white")
    draw = ImageDraw.Draw(image)
    draw.text((600, 34), "Orders per month", font=_font(48), fill=_INK, anchor="mt")
    for number, (month, value) in enumerate(_ORDERS):
        left, top = 130 + number * 165, 690 - 2 * value
        draw.rectangle((left, top, left + 105, 690), fill="#e27420" if value == _MOST_ORDERS else "#2c66b2")
        draw.text((left + 52, top - 10), str(value), font=_font(32), fill=_INK, anchor="ms")
        draw.text((left + 52, 708), month, font=_font(32), fill=_INK, anchor="mt")
    draw.line((100, 690, 1140, 690), fill=_INK, width=4)
    return image


def draw_seascape() -> Image.Image:
    """Draw a sunset over the sea."""
    image = _gradient((1600, 1067), "#e27420", "#ffb05c")
    draw = ImageDraw.Draw(image)
    draw.ellipse((1010, 450, 1150, 590), fill="#fff4ce")
    image.paste(_gradient((1600, 457), "#2c66b2", "#122c54"), (0, 610))
    for row in range(60):
        y, half = 614 + row * 7, 70 + row * 4 + round(30 * math.sin(row))
        draw.line((1080 - half, y, 1080 + half, y), fill="#ffb05c", width=2)
    return image


_RECEIPT = (
    ("2 x Cappuccino", "7.80"),
    ("1 x Croissant", "2.90"),
    ("1 x Club sandwich", "9.50"),
    ("1 x Orange juice", "4.20"),
    ("2 x Cheesecake", "7.30"),
    ("VAT 10%", "3.17"),
    ("TOTAL", "34.87"),
)
_ORDERS = (("Jan", 120), ("Feb", 95), ("Mar", 160), ("Apr", 210), ("May", 180), ("Jun", 240))
_MOST_ORDERS = max(value for _, value in _ORDERS)
_SAMPLES: tuple[tuple[str, Callable[[], Image.Image], str], ...] = (
    ("receipt.jpg", draw_receipt, "What is the total on this receipt?"),
    ("street-sign.png", draw_street_sign, "What do the signs say?"),
    ("chart.png", draw_bar_chart, "What is the title of this chart?"),
    ("seascape.jpg", draw_seascape, "Which colours dominate this image?"),
    ("seascape.webp", draw_seascape, "Is this image taken by day or by night?"),
)


def _sample(name: str, image: Image.Image, question: str) -> Sample:
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[f".{name.rpartition('.')[2]}"])
    return Sample(name, buffer.getvalue(), question)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # Pillow's own font: none has to be installed.
    return ImageFont.load_default(size=size)


def _gradient(size: tuple[int, int], top: str, bottom: str) -> Image.Image:
    mask = Image.linear_gradient("L").resize(size)
    return Image.composite(Image.new("RGB", size, bottom), Image.new("RGB", size, top), mask)
