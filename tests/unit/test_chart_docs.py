"""docs/chart.py generates a table, descriptions and copies from the chart's values."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs import chart
from tests.running import ROOT

VALUES = (ROOT / chart.VALUES).read_text()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Copy the files that it reads and writes."""
    for folder in (chart.CHART, Path("deploy/prometheus"), Path("deploy/grafana")):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


def test_the_generated_files_are_up_to_date() -> None:
    assert chart.outdated(ROOT) == []


def test_the_files_are_up_to_date_after_writing(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = copy / chart.VALUES
    values.write_text(VALUES.replace("# -- Labels for all objects.", "# -- In other words."))
    for rules in (copy / "deploy/prometheus").glob("*.rules.yaml"):
        rules.write_text("groups: []\n")
    (copy / chart.CHART / "files/vqa-worker.json").unlink()
    assert chart.main(["--check"], copy) == 1
    shown = capsys.readouterr().err
    assert all(f"{path} is out of date" in shown for path in chart.FILES)
    assert chart.main([], copy) == 0
    assert chart.main(["--check"], copy) == 0
    assert "| `commonLabels` | `{}` | In other words. |" in (copy / chart.CHART / "README.md").read_text()
    schema = json.loads((copy / chart.CHART / "values.schema.json").read_text())
    assert schema["properties"]["commonLabels"]["description"] == "In other words."


def test_a_readme_without_the_markers_is_an_error(copy: Path) -> None:
    (copy / chart.CHART / "README.md").write_text("# Nothing\n")
    with pytest.raises(ValueError, match="must have the lines"):
        chart.main([], copy)


def _leaves(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _leaves(value, (*path, key))
    else:
        yield path


def test_every_value_has_a_comment_itself_or_one_level_up() -> None:
    described = {value.path for value in chart.documented_values(VALUES)}
    for leaf in _leaves(yaml.safe_load(VALUES)):
        assert any(leaf[:length] in described for length in range(1, len(leaf) + 1)), leaf


def test_every_row_of_the_table_has_three_cells() -> None:
    values = chart.documented_values(VALUES)
    rows = chart.table(values).splitlines()[2:]
    assert len(rows) == len(values) > 100
    assert all(row.replace("&#124;", "").count("|") == 4 for row in rows)


def test_comments_of_several_lines_become_one() -> None:
    (value,) = chart.documented_values("# About all.\nouter:\n  # -- One\n  # and two.\n  inner: [1, 2]\n")
    assert value == chart.Value(("outer", "inner"), [1, 2], "One and two.")


def test_the_schema_has_a_property_for_every_value_and_no_others() -> None:
    schema = json.loads((ROOT / chart.CHART / "values.schema.json").read_text())
    described = {value.path for value in chart.documented_values(VALUES)}
    # A part of a described value is not listed separately.
    of_schema = {path for path in _properties(schema, schema) if not described & set(_above(path)[:-1])}
    assert of_schema - {("global",)} == {above for path in described for above in _above(path)}


def _above(path: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [path[:length] for length in range(1, len(path) + 1)]


def _properties(
    whole: dict[str, Any], part: dict[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    if "$ref" in part:
        part = whole["definitions"][part["$ref"].rsplit("/", 1)[1]]
    for name, inner in part.get("properties", {}).items():
        yield (*path, name)
        yield from _properties(whole, inner, (*path, name))


def test_the_schema_rejects_unknown_keys() -> None:
    """Values that are passed on to Kubernetes are excepted: Kubernetes checks them."""
    schema = json.loads((ROOT / chart.CHART / "values.schema.json").read_text())
    for part in _objects(schema):
        if "properties" in part and part.get("required") != ["name"]:
            assert part.get("additionalProperties") is False, part


def _objects(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        if part.get("type") in ("object", ["object", "null"]):
            yield part
        for inner in part.values():
            yield from _objects(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _objects(inner)
