from pathlib import Path

import pytest
from PIL import Image

from deploy.local.sample_images import Picture, create_sample_images


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Picture]:
    return create_sample_images(tmp_path_factory.mktemp("pictures"))


def test_every_picture_is_what_its_name_and_its_media_type_say(pictures: list[Picture]) -> None:
    for picture in pictures:
        with Image.open(picture.path) as image:
            image.load()
            assert Image.MIME[image.format or ""] == picture.media_type
    assert {picture.media_type for picture in pictures} == {"image/jpeg", "image/png", "image/webp"}


def test_pictures_have_the_sizes_of_real_ones(pictures: list[Picture]) -> None:
    sizes = {picture.name: picture.path.stat().st_size for picture in pictures}
    assert all(20_000 < size < 500_000 for size in sizes.values()), sizes


def test_the_same_bytes_come_out_every_time(pictures: list[Picture], tmp_path: Path) -> None:
    for first, second in zip(pictures, create_sample_images(tmp_path), strict=True):
        assert first.path.read_bytes() == second.path.read_bytes()
