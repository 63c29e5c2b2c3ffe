"""Where jobs come from: arguments, files of jobs in several forms, and everything below a prefix in S3.

Each source gives entries: a job as it was written, and where it stands, for what may have to be said of it.
"""

import csv
import hashlib
import json
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeAlias

import pydantic_core

from worker.cli.shell import CommandError, UsageError
from worker.cli.submit import batch

Form: TypeAlias = Literal["jsonl", "csv", "batch"]

FORMS_BY_SUFFIX: Final[dict[str, Form]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
}
# Columns of a CSV file that are fields of a job, and those that are params; any other one is metadata.
_FIELDS: Final = ("id", "question", "system", "model", "deadline")
_PARAMS: Final = ("max_tokens", "temperature", "top_p", "seed")
_IMAGE_SEPARATOR: Final = ";"
# Of an image's name in the id of a job about it.
MAX_KEY_CHARS: Final = 60
_HASHED_AT_ONCE: Final = 1024 * 1024
# More than any job may have; a line without an end must not fill the memory.
_MAX_LINE_CHARS: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """A job as it was written, without what the command line adds.

    Attributes:
        where: where it stands, for a person.
        key: what its id is made of, if it has none and its number will not do.
        custom_id: if it is a batch's request.
    """

    where: str
    job: dict[str, Any]
    key: str | None = None
    custom_id: str | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that should be a job and is none; `custom_id` if that could be read."""

    where: str
    reason: str
    custom_id: str | None = None


class Source(Protocol):
    """Jobs from one place.

    Attributes:
        title: what a person calls it; it becomes a part of the submission's name.
        form: how it is written, if it is a file.
        folder: what paths of local images start from.
        is_ad_hoc: said again, it is another submission; any other source is the same one, to be gone on with.
        may_grow: there can be more of it later.
    """

    title: str
    form: Form | None
    folder: Path
    is_ad_hoc: bool
    may_grow: bool

    def digest(self) -> str:
        """What tells it from every other."""

    def __aiter__(self) -> AsyncIterator[Entry | Fault]:
        """The jobs in their order."""


class Arguments:
    """Jobs from the command line itself: one about all images, or one about each."""

    title = "ask"
    form: Form | None = None
    folder = Path()
    is_ad_hoc = True
    may_grow = False

    def __init__(self, images: Sequence[str], *, each: bool) -> None:
        self._images = images
        self._each = each

    def digest(self) -> str:
        """Of the images' names."""
        return hashlib.sha256(json.dumps([*self._images, self._each]).encode()).hexdigest()

    async def __aiter__(self) -> AsyncIterator[Entry | Fault]:
        """The jobs in their order."""
        groups = [[image] for image in self._images] if self._each else [list(self._images)]
        for number, images in enumerate(groups, start=1):
            yield _entry_about(images, f"{number}-{_name_in(images[0])}")


class File:
    """A file of jobs: JSONL, CSV, or the requests of a batch."""

    is_ad_hoc = False
    may_grow = False

    def __init__(
        self, path: Path, form: Form | None, *, title: str | None = None, folder: Path | None = None
    ) -> None:
        self.path = path
        self.title = title or path.name.split(".")[0]
        self.folder = path.parent if folder is None else folder
        self.form: Form | None = form or FORMS_BY_SUFFIX.get(path.suffix.lower()) or self._sniffed()
        if self.form == "jsonl" and form is None and self._begins_like_a_batch():
            self.form = "batch"

    def digest(self) -> str:
        """Of the file's content."""
        digest = hashlib.sha256(str(self.form).encode())
        with self.path.open("rb") as file:
            while piece := file.read(_HASHED_AT_ONCE):
                digest.update(piece)
        return digest.hexdigest()

    async def __aiter__(self) -> AsyncIterator[Entry | Fault]:
        """The jobs in their order."""
        for entry in self._rows() if self.form == "csv" else self._lines():
            yield entry

    def _sniffed(self) -> Form:
        return "jsonl" if self._beginning().startswith("{") else "csv"

    def _begins_like_a_batch(self) -> bool:
        try:
            first = pydantic_core.from_json(self._beginning())
        except ValueError:
            return False
        return isinstance(first, dict) and batch.is_request(first)

    def _beginning(self) -> str:
        """The first line that says something."""
        return next((line.strip() for _, line in self._text_lines() if line.strip()), "")

    def _text_lines(self) -> Iterator[tuple[int, str]]:
        # Without universal newlines: a lone CR or U+2028 ends no line of JSON. Excel puts a BOM in front.
        with self.path.open(encoding="utf-8-sig", newline="\n") as file:
            number = 0
            try:
                while line := file.readline(_MAX_LINE_CHARS):
                    number += 1
                    yield number, line
            except UnicodeDecodeError:
                raise CommandError(f"{self.path}: is not UTF-8 text (after line {number})") from None

    def _lines(self) -> Iterator[Entry | Fault]:
        for number, line in self._text_lines():
            if line.strip():
                yield self._entry(f"{self.title} line {number}", line)

    def _entry(self, where: str, line: str) -> Entry | Fault:
        try:
            job = pydantic_core.from_json(line, allow_inf_nan=False)
        except ValueError as error:
            return Fault(where, f"is not JSON: {error}")
        if not isinstance(job, dict):
            return Fault(where, "must be a JSON object")
        if self.form != "batch":
            if isinstance(image := job.pop("image", None), str | dict):
                job.setdefault("images", [image])
            return Entry(where, job)
        custom_id = job.get("custom_id")
        try:
            return Entry(where, batch.job_of(job), key=custom_id, custom_id=custom_id)
        except ValueError as error:
            return Fault(where, str(error), custom_id=custom_id if isinstance(custom_id, str) else None)

    def _rows(self) -> Iterator[Entry | Fault]:
        beginning = self._beginning()
        delimiter = max(",;\t", key=beginning.count)
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            # A picture within a cell is longer than the library expects.
            csv.field_size_limit(_MAX_LINE_CHARS)
            rows = csv.reader(file, delimiter=delimiter)
            try:
                columns = [name.strip() for name in next(rows, [])]
                self._check(columns)
                for row in rows:
                    if any(row):
                        yield self._row(f"{self.title} line {rows.line_num}", columns, row)
            except UnicodeDecodeError:
                raise CommandError(f"{self.path}: is not UTF-8 text: save it as CSV UTF-8") from None
            except csv.Error as error:
                raise CommandError(f"{self.path} line {rows.line_num}: {error}") from None

    def _check(self, columns: Sequence[str]) -> None:
        if not any(map(_is_of_images, columns)):
            raise UsageError(
                f"{self.path}: the first line must name the columns, `image` or `images` among them"
            )
        if len(set(columns)) != len(columns):
            raise UsageError(f"{self.path}: two columns have the same name")

    def _row(self, where: str, columns: Sequence[str], row: Sequence[str]) -> Entry | Fault:
        if len(row) > len(columns):
            return Fault(where, f"has {len(row)} cells; the first line names {len(columns)} columns")
        job: dict[str, Any] = {"images": [], "params": {}, "metadata": {}}
        for name, cell in zip(columns, row, strict=False):
            if not cell.strip():
                continue
            if _is_of_images(name):
                job["images"] += _images_in(cell, several=name == "images")
            elif name in _FIELDS:
                job[name] = cell.strip() if name == "id" else cell
            elif name in _PARAMS:
                try:
                    job["params"][name] = json.loads(cell)
                except ValueError:
                    return Fault(where, f"{name}: must be a number")
            else:
                job["metadata"][name] = cell
        return Entry(where, {name: value for name, value in job.items() if value not in ({}, [])})


def _is_of_images(column: str) -> bool:
    return column == "images" or (column.startswith("image") and (column[5:] or "0").isdecimal())


def _images_in(cell: str, *, several: bool) -> list[Any]:
    """The images in a cell; of several, a list in JSON or with semicolons between them."""
    if not several:
        return [cell.strip()]
    if cell.lstrip().startswith("["):
        try:
            listed = json.loads(cell)
        except ValueError:
            listed = None
        if isinstance(listed, list):
            return listed
    return [image.strip() for image in cell.split(_IMAGE_SEPARATOR) if image.strip()]


class Listing:
    """A job about each object below a prefix in S3, whose URLs are given.

    The ids follow from the URLs: what comes to the prefix later is new, and all the rest is not.
    """

    form: Form | None = None
    folder = Path()
    is_ad_hoc = False
    may_grow = True

    def __init__(self, identity: str, urls: AsyncIterable[str], *, title: str) -> None:
        """`identity`: what is listed, prefix and pattern."""
        self._identity = identity
        self._urls = urls
        self.title = title.strip("/").rpartition("/")[2]

    def digest(self) -> str:
        """Of the prefix, not of what is there."""
        return hashlib.sha256(self._identity.encode()).hexdigest()

    async def __aiter__(self) -> AsyncIterator[Entry | Fault]:
        """The jobs in their order."""
        async for url in self._urls:
            yield _entry_about([url], f"{_name_in(url)}-{hashlib.sha256(url.encode()).hexdigest()[:12]}")


def _entry_about(images: list[str], key: str) -> Entry:
    """A job about images that nobody has given an id: its result names them."""
    shown = ", ".join(images)
    # What is named here is echoed in the result; a data URL is nothing to be named by.
    named = [image for image in images if not image.lower().startswith("data:")]
    metadata = {"metadata": {"image": ", ".join(named)}} if named else {}
    return Entry(shown if named else "the image", {"images": images, **metadata}, key=key)


def _name_in(image: str) -> str:
    """The last part of an image's URL or path."""
    return (
        "data" if image.lower().startswith("data:") else image.rstrip("/").rpartition("/")[2][-MAX_KEY_CHARS:]
    )
