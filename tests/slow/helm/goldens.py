"""The golden files of the chart's `ci/` files, so that reviews show changes; `make golden` updates them."""

import sys
from pathlib import Path
from typing import Final

from tests.slow.helm.rendering import CHART, CI_FILES, ci_values, render

FOLDER: Final = Path(__file__).parent / "golden"


def of(name: str) -> dict[Path, str]:
    """Return the golden files of a `ci/` file, with their content."""
    values = ci_values(name)
    rendered, queue = render(values), values.get("settings", {}).get("jobsQueue", "vqa.jobs")
    manifests = (
        f"---\n# Source: {template}\n{_kept(text, queue)}\n"
        for template, text in rendered.texts.items()
        if template != "NOTES.txt" and text.strip()
    )
    return {
        FOLDER / f"{name}.yaml": "".join(manifests),
        FOLDER / f"{name}.txt": f"{_kept(rendered.notes, queue)}\n",
    }


def _kept(text: str, queue: str) -> str:
    """Strip trailing blanks, and replace copies of `files/` by their names."""
    for path in sorted((CHART / "files").iterdir()):
        for indent in (2, 4):
            file = path.read_text().replace('queue="vqa.jobs"', f'queue="{queue}"')
            copied = "\n".join(f"{' ' * indent}{line}" for line in file.split("\n"))
            text = text.replace(copied, f"{' ' * indent}# … files/{path.name} …")
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def main() -> int:
    """Write all golden files."""
    FOLDER.mkdir(exist_ok=True)
    wanted = {
        path: text
        for ci_file in CI_FILES
        for path, text in of(ci_file.name.removesuffix("-values.yaml")).items()
    }
    for path in set(FOLDER.iterdir()) - set(wanted):
        path.unlink()
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"wrote {path.name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
