import pytest
from PIL import Image

from deploy.local.model_simulator.image_analysis import look_at, main_colours
from deploy.local.model_simulator.request import InlinePicture
from deploy.local.sample_images import draw_bar_chart, draw_receipt, draw_seascape, draw_street_sign
from tests.integration.local.fixture_types import encoded


@pytest.mark.parametrize(
    ("pixel", "name"),
    [
        ((255, 0, 0), "red"),
        ((0, 128, 0), "green"),
        ((0, 0, 255), "blue"),
        ((255, 255, 255), "white"),
        ((10, 10, 10), "black"),
        ((128, 128, 128), "grey"),
        ((255, 230, 0), "yellow"),
        ((255, 140, 0), "orange"),
        ((128, 0, 128), "purple"),
        ((139, 69, 19), "brown"),
        ((255, 160, 190), "pink"),
        ((0, 200, 210), "cyan"),
    ],
)
def test_colours_have_plain_names(pixel: tuple[int, int, int], name: str) -> None:
    assert main_colours(Image.new("RGB", (8, 8), pixel)) == [name]


def test_the_sample_images_have_the_colours_that_a_person_would_name() -> None:
    assert main_colours(draw_receipt()) == ["white", "brown"]
    assert main_colours(draw_street_sign()) == ["blue", "red", "green"]
    assert main_colours(draw_bar_chart())[0] == "white"
    assert set(main_colours(draw_seascape())) >= {"blue", "orange"}


def test_transparent_pixels_count_as_white() -> None:
    picture = InlinePicture(encoded(Image.new("RGBA", (10, 10), (255, 0, 0, 0)), "PNG"), "image/png", None)
    assert look_at(picture, "image 1", decode=True).colours == ["white"]
