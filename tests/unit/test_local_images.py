"""Files and bytes become data URLs inside the job."""

import base64
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import picture
from vqa_worker import InvalidJobError
from vqa_worker.local_images import MAX_BYTES, embed_local_images, has_local_images

PNG = picture()


@pytest.mark.parametrize(("kind", "media_type"), [("JPEG", "jpeg"), ("PNG", "png"), ("WEBP", "webp")])
def test_the_type_is_detected_from_the_content(tmp_path: Path, kind: str, media_type: str) -> None:
    content = picture(kind)
    path = tmp_path / "photo.gif"
    path.write_bytes(content)
    data_url = f"data:image/{media_type};base64,{base64.b64encode(content).decode()}"
    job = {"question": "?", "images": [path, str(path), content]}
    assert has_local_images(job)
    assert embed_local_images(job) == {"question": "?", "images": [data_url] * 3}


@pytest.mark.parametrize(
    "image",
    [
        "s3://bucket/key",
        "https://host/a.jpg",
        "http://host/a.jpg",
        "data:image/png;base64,",
        {"url": "s3://b/k"},
    ],
)
def test_urls_stay_as_they_are(image: Any) -> None:
    assert not has_local_images({"images": [image]})
    assert embed_local_images({"images": [image, PNG]})["images"][0] == image


@pytest.mark.parametrize("job", [{}, {"images": None}, {"images": "s3://b/k"}, {"messages": []}])
def test_other_jobs_have_no_local_images(job: dict[str, Any]) -> None:
    assert not has_local_images(job)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "the content is empty"),
        (picture("ICO"), "the content is an icon"),
        (PNG + bytes(MAX_BYTES), "may have 11000000 bytes together; upload larger ones to S3"),
    ],
)
def test_what_cannot_be_sent_is_named(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(InvalidJobError, match=rf"^images\[1\] \(.*photo\.png\): .*{text}"):
        embed_local_images({"images": [PNG, tmp_path / "photo.png"]})
    with pytest.raises(InvalidJobError, match=rf"^images\[1\]: .*{text}"):
        embed_local_images({"images": [PNG, content]})


def test_the_limit_holds_for_all_images_together() -> None:
    half = PNG + bytes(MAX_BYTES // 2 - len(PNG))
    assert len(embed_local_images({"images": [half, half]})["images"]) == 2
    with pytest.raises(InvalidJobError, match=r"^images\[2\]: the local images"):
        embed_local_images({"images": [half, half, PNG]})


def test_a_missing_file_is_python_s_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        embed_local_images({"images": [str(tmp_path / "nowhere.png")]})
