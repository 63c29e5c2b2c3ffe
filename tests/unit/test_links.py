"""Links between pages of the docs have a target."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def pages() -> list[Path]:
    tracked = ["git", "ls-files", "-z", "*.md"]
    listed = subprocess.run(tracked, cwd=ROOT, capture_output=True, check=True)  # noqa: S603 - a constant
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    # Links in templates are checked in the generated pages.
    templates = {path for path in paths if path.name.endswith("page.md") or "templates" in path.parts}
    return [path for path in paths if path.is_file() and path not in templates]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub forms them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{page.relative_to(ROOT)}: {link}")
    return broken


def test_every_link_between_pages_has_its_target() -> None:
    assert [link for page in pages() for link in broken_links(page)] == []
