"""Hook of `mkdocs.yml`: make links out of `docs/` work on the site as they do on GitHub.

A link to one of `PAGES` leads to that page of the site, a link to another file to the file's source.
"""
# ruff: noqa: INP001  # a script next to the pages, not a package

import posixpath
import re
from pathlib import Path
from typing import Any, Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).parents[1]
# Pages of the site that are not in docs/.
PAGES: Final = ("CHANGELOG.md", "CONTRIBUTING.md", "deploy/aws/README.md", "helm/vqa-worker/README.md")
HOME: Final = {"README.md": "index.md"}

# [text](target#anchor), without links to other sites and within the page.
LINK: Final = re.compile(r"\[([^\[\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for page in PAGES:
        files.append(File.generated(config, page, abs_src_path=str(ROOT / page)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Rewrite the links of a page."""
    return LINK.sub(lambda link: _rewritten(link, page.file.src_uri, config.repo_url), markdown)


def _rewritten(link: re.Match[str], page: str, repository: str | None) -> str:
    text, target, anchor = link[1], link[2], link[3] or ""
    here = page if page in PAGES else f"docs/{page}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    if not (ROOT / path).exists():
        raise PluginError(f"{here}: the link to {target} is broken")
    on_site = _on_site(path)
    if on_site is not None:
        return f"[{text}]({posixpath.relpath(on_site, posixpath.dirname(page) or '.')}{anchor})"
    return f"[{text}]({repository.rstrip('/')}/blob/HEAD/{path}{anchor})" if repository else text


def _on_site(path: str) -> str | None:
    """Return the path on the site of a path in the repository, or None if it is not on the site."""
    page = f"{path}/README.md" if (ROOT / path).is_dir() else path
    if page in PAGES:
        return page
    if (ROOT / path).is_file() and path.startswith("docs/"):
        return path.removeprefix("docs/")
    return HOME.get(path)
