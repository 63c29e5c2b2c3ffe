"""docs/images.md is generated from the stored figures, and its examples are valid jobs."""

import json
import re
from typing import Final

import pytest

from tests.bench.conversion import report
from tests.bench.results import Results
from tests.running import ROOT
from vqa_worker.messages.job import Job
from worker.settings import Settings, variable

PAGE: Final = ROOT / "docs" / "images.md"
TEXT: Final = PAGE.read_text(encoding="utf-8")
PUBLISHING: Final = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")
EXAMPLES: Final = re.findall(r"^```json\n(.*?)^```", TEXT + PUBLISHING, re.MULTILINE | re.DOTALL)


def test_the_page_is_up_to_date() -> None:
    figures = Results.load(ROOT / "docs" / "images" / "figures.json")
    assert report.page(figures) == TEXT, "run `python -m tests.bench.conversion --redraw docs`"


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_is_a_valid_job(example: str) -> None:
    assert Job.model_validate(json.loads(example)).id


def test_the_page_names_every_setting_of_the_conversion() -> None:
    named = set(re.findall(r"VQA_[A-Z_]+", TEXT))
    known = {variable(name) for name in Settings.model_fields}
    conversion = {it for it in known if it.startswith(("VQA_IMAGE_", "VQA_PDF_"))} - {"VQA_IMAGE_DELIVERY"}
    assert conversion - named == set()
    assert named - known == set()
