"""Find commands and settings in the pages of the documentation."""

import contextlib
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

from markdown_it import MarkdownIt

from deploy.local.stack import Stack
from tests.conftest import picture
from tests.running import ROOT
from worker.settings import Settings, load_settings

HOW_TO = ROOT / "docs" / "how-to"
# The images in S3 that the examples use.
EXAMPLE_IMAGE = "s3://invoices/2025/4711.jpg"
EXAMPLE_IMAGES = (EXAMPLE_IMAGE, "s3://photos/2030/table.png")
NOT_WRITTEN_HERE = {"templates", "decisions"}

SHELL = {"sh", "bash", "shell"}
PROMPT = "$ "


@dataclass(frozen=True)
class Section:
    """The part of a page below one heading of the second level."""

    title: str
    text: str

    @property
    def shell_blocks(self) -> list[str]:
        """Return the blocks of commands."""
        return [text for kind, text in _blocks(self.text) if kind in SHELL]

    @property
    def settings(self) -> dict[str, str]:
        """Return the variables that the section exports."""
        (block,) = [block for block in self.shell_blocks if block.startswith("export ")]
        return exported(block)

    def documented_url(self, introduction: str) -> str:
        """Return the URL in the sentence that begins with `introduction`."""
        (url,) = re.findall(rf"{introduction} `(\S+)`", self.text)
        assert isinstance(url, str)
        return url


def put_example_images(stack: Stack) -> None:
    """Upload the images of the examples."""
    s3 = stack.s3.client()
    for url in EXAMPLE_IMAGES:
        bucket, key = url.removeprefix("s3://").split("/", 1)
        with contextlib.suppress(s3.exceptions.BucketAlreadyOwnedByYou):
            s3.create_bucket(Bucket=bucket)
        s3.put_object(Bucket=bucket, Key=key, Body=picture("PNG" if key.endswith(".png") else "JPEG"))


def pages() -> list[Path]:
    """Return all pages for users."""
    docs = (page for page in (ROOT / "docs").rglob("*.md") if not NOT_WRITTEN_HERE & set(page.parts))
    return [ROOT / "README.md", ROOT / "helm/vqa-worker/README.md", ROOT / "deploy/aws/README.md", *docs]


def sections(page: Path) -> list[Section]:
    """Return the sections of a page, without its introduction."""
    parts = re.split(r"^## (.*)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [Section(title, text) for title, text in zip(parts[1::2], parts[2::2], strict=True)]


def shell_blocks(page: Path) -> list[list[str]]:
    """Return the commands of each shell block of a page.

    A shell block is a fence with its language, an indented block, or a console: then its lines with a prompt.
    """
    found = []
    for kind, block in _blocks(page.read_text(encoding="utf-8")):
        lines = _lines(block)
        if kind in {*SHELL, "indented"}:
            found.append(lines)
        elif lines and lines[0].startswith(PROMPT):
            found.append([line.removeprefix(PROMPT) for line in lines if line.startswith(PROMPT)])
    return found


def calls(page: Path, program: str) -> list[list[str]]:
    """Return the arguments of every command of a program in a page's blocks and in its text."""
    commands = [command for block in shell_blocks(page) for command in block]
    commands += re.findall(r"(?<!`)`([^`\n]+)`", page.read_text(encoding="utf-8"))
    found = (re.search(rf"^(?:[A-Z_]+=\S* )*(?:.* -- )?{program}( .*|$)", command) for command in commands)
    return [_arguments(match[1]) for match in found if match]


def exported(block: str) -> dict[str, str]:
    """Return the variables that a block of shell commands exports."""
    script = f"{block}\nenv -0"
    done = subprocess.run(  # noqa: S603 - from our own pages
        ["/bin/bash", "-ec", script], env={"PATH": os.environ["PATH"]}, capture_output=True, check=True
    )
    variables = dict(pair.split("=", 1) for pair in done.stdout.decode().split("\0") if pair)
    return {name: value for name, value in variables.items() if f"export {name}=" in block}


def settings_with(variables: Mapping[str, str]) -> Settings:
    """Load the worker's settings from these variables only."""
    with patch.dict(os.environ, variables, clear=True):
        return load_settings(env_file=None)


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield language (or `indented`) and text of each code block."""
    for token in _markdown().parse(text):
        if token.type == "code_block":
            yield "indented", token.content
        elif token.type == "fence":
            yield token.info, token.content


@cache
def _markdown() -> MarkdownIt:
    return MarkdownIt("commonmark")


def _lines(block: str) -> list[str]:
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def _arguments(text: str) -> list[str]:
    """Return the arguments up to a comment, a pipe or a redirection."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split = True
    arguments: list[str] = []
    for word in lexer:
        if set(word) <= set("|&;<>()"):
            break
        arguments.append(word)
    return arguments
