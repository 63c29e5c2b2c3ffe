"""Generate files of the chart: `python docs/chart.py [--check]`.

The README's table and the schema's descriptions come from the comments in `values.yaml`. Rules and dashboard
are copies, because Helm cannot read files outside the chart.
"""
# ruff: noqa: INP001  # a script next to the pages, not a package

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parent.parent
CHART: Final = Path("helm/vqa-worker")
VALUES: Final = CHART / "values.yaml"
BEGIN: Final = (
    "<!-- Generated from values.yaml by docs/chart.py: change the comments there, run `make docs`. -->\n"
)
END: Final = "<!-- End of the generated part. -->"

# Longer defaults do not fit into a table cell.
LONGEST_DEFAULT: Final = 50

_KEY = re.compile(r"(?P<indent> *)(?P<key>[A-Za-z0-9]+):")


@dataclass(frozen=True)
class Value:
    """A value of the chart: its path, default and description."""

    path: tuple[str, ...]
    default: Any
    meaning: str


def documented_values(text: str) -> list[Value]:
    """Return the values that a comment beginning with `# --` describes, in order."""
    loaded = yaml.safe_load(text)
    return [Value(path, _at(loaded, path), meaning) for path, meaning in _comments(text) if meaning]


def _at(loaded: Any, path: Sequence[str]) -> Any:
    for key in path:
        loaded = loaded[key]
    return loaded


def _comments(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the path of each key, and its description or an empty string."""
    path: list[str] = []
    words: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith("# -- "):
            words = [line.lstrip().removeprefix("# -- ")]
        elif line.lstrip().startswith("# ") and words:
            words.append(line.lstrip().removeprefix("# "))
        elif key := _KEY.match(line):
            path = [*path[: len(key["indent"]) // 2], key["key"]]
            yield tuple(path), " ".join(words)
            words = []


def table(values: Sequence[Value]) -> str:
    """Return the table of the README."""
    rows = (
        f"| `{'.'.join(value.path)}` | {_shown(value.default)} | {value.meaning.replace('|', '&#124;')} |\n"
        for value in values
    )
    return "| Value | Default | Meaning |\n|---|---|---|\n" + "".join(rows)


def _shown(default: Any) -> str:
    written = json.dumps(default, ensure_ascii=False)
    return f"`{written}`" if len(written) <= LONGEST_DEFAULT else "see [values.yaml](values.yaml)"


def readme(folder: Path) -> str:
    """Return the README with a current table.

    Raises:
        ValueError: the lines before and after the table are missing.
    """
    before, _, rest = _read(folder / CHART / "README.md").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{CHART}/README.md must have the lines\n{BEGIN}{END}\nfor the table between them")
    return f"{before}{BEGIN}\n{table(documented_values(_read(folder / VALUES)))}\n{END}{after}"


def schema(folder: Path) -> str:
    """Return the schema with the descriptions of all values."""
    written: dict[str, Any] = json.loads(_read(folder / CHART / "values.schema.json"))
    for value in documented_values(_read(folder / VALUES)):
        where = written
        for key in value.path[:-1]:
            where = _resolved(written, where["properties"][key])
        name = value.path[-1]
        where["properties"][name] = {"description": value.meaning, **_undescribed(where["properties"][name])}
    return json.dumps(written, indent=2, ensure_ascii=False) + "\n"


def _resolved(whole: Mapping[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in part:
        return part
    found: dict[str, Any] = whole["definitions"][part["$ref"].rsplit("/", 1)[1]]
    return found


def _undescribed(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != "description"}


def _copy_of(path: str) -> Callable[[Path], str]:
    return lambda folder: _read(folder / path)


FILES: Final[Mapping[Path, Callable[[Path], str]]] = {
    CHART / "README.md": readme,
    CHART / "values.schema.json": schema,
    CHART / "files/vqa-worker.rules.yaml": _copy_of("deploy/prometheus/vqa-worker.rules.yaml"),
    CHART / "files/vqa-worker.json": _copy_of("deploy/grafana/vqa-worker.json"),
}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def outdated(folder: Path) -> list[Path]:
    """Return the files that are missing from a copy of the repository or out of date."""
    return [
        path
        for path, make in FILES.items()
        if not (folder / path).is_file() or _read(folder / path) != make(folder)
    ]


def main(arguments: list[str] | None = None, folder: Path = ROOT) -> int:
    """Write the files, or with `--check` only compare them; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    paths = outdated(folder)
    if parser.parse_args(arguments).check:
        sys.stderr.writelines(f"{path} is out of date: run `make docs`\n" for path in paths)
        return 1 if paths else 0
    for path in paths:
        (folder / path).write_text(FILES[path](folder), encoding="utf-8")
        sys.stdout.write(f"wrote {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
