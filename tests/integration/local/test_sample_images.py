import io

from PIL import Image

from deploy.local.sample_images import sample_images


def test_every_image_has_the_format_of_its_name() -> None:
    formats = {}
    for sample in sample_images():
        with Image.open(io.BytesIO(sample.content)) as image:
            image.load()
            formats[sample.name] = image.format
    assert formats == {
        "receipt.jpg": "JPEG",
        "street-sign.png": "PNG",
        "chart.png": "PNG",
        "seascape.jpg": "JPEG",
        "seascape.webp": "WEBP",
    }


def test_every_run_draws_the_same_bytes() -> None:
    assert sample_images() == sample_images()
