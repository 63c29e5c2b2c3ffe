import re
from pathlib import Path

import pytest

from docs import generate
from vqa_worker.messages.error_codes import DESCRIPTIONS, ErrorCode
from vqa_worker.messages.job import Job
from vqa_worker.messages.result import Result
from worker.settings import Settings, variable

ROOT = Path(__file__).parents[2]
CONTRACT = ROOT / "../shared/contract.md"


def test_the_generated_pages_are_up_to_date() -> None:
    assert generate.outdated(ROOT / "docs") == []


def test_the_pages_are_up_to_date_after_generation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--check"], tmp_path) == 1
    shown = capsys.readouterr().err
    assert all(page in shown for page in generate.PAGES)
    assert list(tmp_path.iterdir()) == []
    assert generate.main([], tmp_path) == 0
    assert generate.main(["--check"], tmp_path) == 0


def test_the_page_of_settings_has_a_row_of_three_cells_for_each() -> None:
    rows = re.findall(r"^\| `([A-Z]\w+)` \|[^|]+\|[^|]+\|$", generate.settings_page(), re.MULTILINE)
    assert rows == [variable(name) for name in Settings.model_fields]


def test_every_section_of_the_page_begins_at_a_setting() -> None:
    assert set(generate.SETTINGS_SECTIONS) <= set(Settings.model_fields)


def test_a_page_that_was_changed_by_hand_is_out_of_date(tmp_path: Path) -> None:
    generate.main([], tmp_path)
    page = tmp_path / "messages.md"
    page.write_text(page.read_text() + "by hand")
    assert generate.outdated(tmp_path) == ["messages.md"]


def test_every_described_default_belongs_to_a_setting() -> None:
    assert set(generate.DEFAULTS_IN_WORDS) <= set(Settings.model_fields)


def test_every_error_code_has_a_meaning() -> None:
    assert set(DESCRIPTIONS) == set(ErrorCode)


def test_the_page_of_messages_has_a_row_for_each_field_and_code() -> None:
    page = generate.messages_page()
    rows = set(re.findall(r"^\| `([\w.]+)` \|[^|]+\|", page, re.MULTILINE))
    assert set(Job.model_fields) | set(Result.model_fields) | set(ErrorCode) <= rows
    assert {"usage.cost_usd", "timings.model_s", "error.code"} <= rows


def test_every_field_of_a_message_has_a_type_and_a_meaning() -> None:
    for model in (Job, Result):
        for name, kind, meaning in generate._field_rows(model.model_json_schema(), "#", ""):  # noqa: SLF001
            assert kind, name
            assert meaning, name


@pytest.mark.skipif(not CONTRACT.is_file(), reason="the contract is kept outside of this repository")
def test_the_page_of_messages_lists_everything_in_the_contract() -> None:
    contract = CONTRACT.read_text().split("## Settings", 1)[0]
    codes = contract.split("### Error codes", 1)[1].split("**Transient", 1)[0]
    first_cells = re.findall(r"^\| (`[^|]+) \|", codes, re.MULTILINE)
    named = {code for cell in first_cells for code in re.findall(r"`(\w+)`", cell)}
    # The contract lists codes before they are implemented.
    assert named >= set(ErrorCode) - {ErrorCode.CANCELLED, ErrorCode.RESULT_TOO_LARGE}
    page = generate.messages_page()
    for name in re.findall(r"`(x-[a-z-]+|vqa-[a-z-]+|vqa\.[a-z.]+v1)\b", contract.split("## Queues", 1)[1]):
        assert name in page, name
