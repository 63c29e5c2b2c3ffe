"""How many prompt tokens an image costs, for models whose rule is published."""

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Final


def image_tokens(model: str, width: int, height: int) -> int | None:
    """Return the prompt tokens of an image of this size in pixels; None if the model's rule is not known."""
    name = model.lower().rpartition("/")[2]
    rule = next((rule for glob, rule in _RULES.items() if fnmatchcase(name, glob)), None)
    return None if rule is None else rule(width, height)


def _by_patches(width: int, height: int, *, patch: int, min_pixels: int, max_pixels: int) -> int:
    """Qwen-VL: the image is scaled to whole patches, within limits; each patch is a token.

    `smart_resize` of Qwen's image processor, with the limits in `preprocessor_config.json` of the models. Two
    tokens are the beginning and the end of the image.
    """
    columns, rows = max(1, round(width / patch)), max(1, round(height / patch))
    pixels = columns * rows * patch**2
    if pixels > max_pixels:
        scale = math.sqrt(width * height / max_pixels)
        columns, rows = (max(1, math.floor(side / scale / patch)) for side in (width, height))
    elif pixels < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        columns, rows = (math.ceil(side * scale / patch) for side in (width, height))
    return columns * rows + 2


def _by_tiles(width: int, height: int, *, base: int, tile: int) -> int:
    """OpenAI, "Images and vision", `detail: high`: within 2048 pixels, shortest side 768, tiles of 512."""
    scale = min(1.0, 2048 / max(width, height))
    scale *= min(1.0, 768 / (min(width, height) * scale))
    columns, rows = (math.ceil(round(side * scale, 6) / 512) for side in (width, height))
    return base + tile * columns * rows


_Rule = Callable[[int, int], int]
# Globs for names without the part before the last slash; the first match counts.
_RULES: Final[dict[str, _Rule]] = {
    "qwen2-vl*": partial(_by_patches, patch=28, min_pixels=3136, max_pixels=12_845_056),
    "qwen2.5-vl*": partial(_by_patches, patch=28, min_pixels=3136, max_pixels=12_845_056),
    "qwen3-vl*": partial(_by_patches, patch=32, min_pixels=65_536, max_pixels=16_777_216),
    "gpt-4o-mini*": partial(_by_tiles, base=2833, tile=5667),
    "gpt-4o*": partial(_by_tiles, base=85, tile=170),
    "gpt-4.1": partial(_by_tiles, base=85, tile=170),
}
