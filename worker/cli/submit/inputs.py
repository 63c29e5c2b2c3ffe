"""Read jobs from the command line, from files (JSONL, CSV, Batch API), from a folder and from an S3 prefix.

Each source yields entries: a job as written, and its position for error messages.
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

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp")
IMAGE_SCHEMES: Final = ("s3://", "https://", "data:")

FORMS_BY_SUFFIX: Final[dict[str, Form]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
}
# CSV columns that are fields of a job, and those that are params; other columns are metadata.
_FIELDS: Final = ("id", "question", "system", "model", "deadline")
_PARAMS: Final = ("max_tokens", "temperature", "top_p", "seed")
_IMAGE_SEPARATOR: Final = ";"
# The part of an image's name in the id of its job.
MAX_KEY_CHARS: Final = 60
_HASH_CHUNK_BYTES: Final = 1024 * 1024
# Longer than any job, so that a file without line ends does not fill the memory.
_MAX_LINE_CHARS: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """A job as written, without the command line's additions.

    Attributes:
        where: its position, for error messages.
        key: the base of its id if it has none; None: its number.
        custom_id: set for a request of a batch.
    """

    where: str
    job: dict[str, Any]
    key: str | None = None
    custom_id: str | None = None


@dataclass(frozen=True, slots=True)
class InvalidEntry:
    """An entry that is not a job; `custom_id` if it is readable."""

    where: str
    reason: str
    custom_id: str | None = None


def looks_like_image(word: str) -> bool:
    """Return whether an argument is the URL or the file name of an image."""
    return word[:8].lower().startswith(IMAGE_SCHEMES) or word.lower().endswith(IMAGE_SUFFIXES)


class Source(Protocol):
    """A source of jobs.

    Attributes:
        title: becomes a part of the submission's name.
        form: the file format; None if it is not a file.
        folder: the base of relative paths of local images.
        is_ad_hoc: repeating the command makes a new submission instead of resuming the old one.
        may_grow: a later run can find more jobs.
    """

    title: str
    form: Form | None
    folder: Path
    is_ad_hoc: bool
    may_grow: bool

    def digest(self) -> str:
        """Identify the source."""

    def __aiter__(self) -> AsyncIterator[Entry | InvalidEntry]:
        """Yield the jobs in order."""


class Arguments:
    """Jobs from the command line: one job for all images, or one per image."""

    title = "ask"
    form: Form | None = None
    folder = Path()
    is_ad_hoc = True
    may_grow = False

    def __init__(self, images: Sequence[str], *, each: bool) -> None:
        self._images = images
        self._each = each

    def digest(self) -> str:
        """Hash the images' names."""
        return hashlib.sha256(json.dumps([*self._images, self._each]).encode()).hexdigest()

    async def __aiter__(self) -> AsyncIterator[Entry | InvalidEntry]:
        """Yield the jobs in order."""
        groups = [[image] for image in self._images] if self._each else [list(self._images)]
        for number, images in enumerate(groups, start=1):
            yield _entry_for(images, f"{number}-{_last_part(images[0])}")


class File:
    """A file of jobs: JSONL, CSV or Batch API requests."""

    is_ad_hoc = False
    may_grow = False

    def __init__(
        self, path: Path, form: Form | None, *, title: str | None = None, folder: Path | None = None
    ) -> None:
        self.path = path
        self.title = title or path.name.split(".")[0]
        self.folder = path.parent if folder is None else folder
        self.form: Form | None = form or FORMS_BY_SUFFIX.get(path.suffix.lower()) or self._detected_form()
        if self.form == "jsonl" and form is None and self._starts_with_batch_request():
            self.form = "batch"

    def digest(self) -> str:
        """Hash the file's content."""
        digest = hashlib.sha256(str(self.form).encode())
        with self.path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    async def __aiter__(self) -> AsyncIterator[Entry | InvalidEntry]:
        """Yield the jobs in order."""
        for entry in self._rows() if self.form == "csv" else self._lines():
            yield entry

    def _detected_form(self) -> Form:
        return "jsonl" if self._first_line().startswith("{") else "csv"

    def _starts_with_batch_request(self) -> bool:
        try:
            first = pydantic_core.from_json(self._first_line())
        except ValueError:
            return False
        return isinstance(first, dict) and batch.is_request(first)

    def _first_line(self) -> str:
        """Return the first line that is not blank."""
        return next((line.strip() for _, line in self._text_lines() if line.strip()), "")

    def _text_lines(self) -> Iterator[tuple[int, str]]:
        # No universal newlines: a lone CR or U+2028 does not end a line of JSON. Excel writes a BOM.
        with self.path.open(encoding="utf-8-sig", newline="\n") as file:
            number = 0
            try:
                while line := file.readline(_MAX_LINE_CHARS):
                    number += 1
                    yield number, line
            except UnicodeDecodeError:
                raise CommandError(f"{self.path} is not UTF-8 text (after line {number}).") from None

    def _lines(self) -> Iterator[Entry | InvalidEntry]:
        for number, line in self._text_lines():
            if line.strip():
                yield self._entry(f"{self.title} line {number}", line)

    def _entry(self, where: str, line: str) -> Entry | InvalidEntry:
        try:
            job = pydantic_core.from_json(line, allow_inf_nan=False)
        except ValueError as error:
            return InvalidEntry(where, f"not JSON: {error}")
        if not isinstance(job, dict):
            return InvalidEntry(where, "must be a JSON object")
        if self.form != "batch":
            if isinstance(image := job.pop("image", None), str | dict):
                job.setdefault("images", [image])
            return Entry(where, job)
        custom_id = job.get("custom_id")
        try:
            return Entry(where, batch.job_of(job), key=custom_id, custom_id=custom_id)
        except ValueError as error:
            return InvalidEntry(
                where, str(error), custom_id=custom_id if isinstance(custom_id, str) else None
            )

    def _rows(self) -> Iterator[Entry | InvalidEntry]:
        first_line = self._first_line()
        delimiter = max(",;\t", key=first_line.count)
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            # A data URL in a cell is longer than the library's limit.
            csv.field_size_limit(_MAX_LINE_CHARS)
            rows = csv.reader(file, delimiter=delimiter)
            try:
                columns = [name.strip() for name in next(rows, [])]
                self._check(columns)
                for row in rows:
                    if any(row):
                        yield self._row(f"{self.title} line {rows.line_num}", columns, row)
            except UnicodeDecodeError:
                raise CommandError(f"{self.path} is not UTF-8 text. Save it as CSV UTF-8.") from None
            except csv.Error as error:
                raise CommandError(f"{self.path} line {rows.line_num}: {error}") from None

    def _check(self, columns: Sequence[str]) -> None:
        if not any(map(_is_image_column, columns)):
            raise UsageError(
                f"{self.path}: the first line must contain the column names, including `image` or `images`."
            )
        if len(set(columns)) != len(columns):
            raise UsageError(f"{self.path}: two columns have the same name.")

    def _row(self, where: str, columns: Sequence[str], row: Sequence[str]) -> Entry | InvalidEntry:
        if len(row) > len(columns):
            return InvalidEntry(where, f"has {len(row)} cells but the first line has {len(columns)} columns")
        job: dict[str, Any] = {"images": [], "params": {}, "metadata": {}}
        for name, cell in zip(columns, row, strict=False):
            if not cell.strip():
                continue
            if _is_image_column(name):
                job["images"] += _images_in(cell, several=name == "images")
            elif name in _FIELDS:
                job[name] = cell.strip() if name == "id" else cell
            elif name in _PARAMS:
                try:
                    job["params"][name] = json.loads(cell)
                except ValueError:
                    return InvalidEntry(where, f"{name}: must be a number")
            else:
                job["metadata"][name] = cell
        return Entry(where, {name: value for name, value in job.items() if value not in ({}, [])})


def _is_image_column(column: str) -> bool:
    return column == "images" or (column.startswith("image") and (column[5:] or "0").isdecimal())


def _images_in(cell: str, *, several: bool) -> list[Any]:
    """Return the images in a cell; `several`: a JSON list, or separated by semicolons."""
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
    """One job per image in a folder or below an S3 prefix.

    The job ids are derived from the images' names, so that a later run submits only new images.
    """

    form: Form | None = None
    folder = Path()
    is_ad_hoc = False
    may_grow = True

    def __init__(self, identity: str, images: AsyncIterable[tuple[str, str]], *, title: str) -> None:
        """`identity`: folder or prefix, and pattern; `images`: each with the name that identifies it."""
        self._identity = identity
        self._images = images
        self.title = title.strip("/").rpartition("/")[2]

    def digest(self) -> str:
        """Hash the folder or prefix and the pattern, not the listed images."""
        return hashlib.sha256(self._identity.encode(errors="replace")).hexdigest()

    async def __aiter__(self) -> AsyncIterator[Entry | InvalidEntry]:
        """Yield the jobs in order."""
        async for image, name in self._images:
            digest = hashlib.sha256(name.encode(errors="replace")).hexdigest()[:12]
            yield _entry_for([image], f"{_last_part(image)}-{digest}")


def _entry_for(images: list[str], key: str) -> Entry:
    """Return a job without an id; its metadata names the images."""
    shown = ", ".join(images)
    # The metadata is echoed in the result; a data URL would only make it long.
    named = [image for image in images if not image.lower().startswith("data:")]
    metadata = {"metadata": {"image": ", ".join(named)}} if named else {}
    return Entry(shown if named else "the image", {"images": images, **metadata}, key=key)


def _last_part(image: str) -> str:
    """Return the last part of an image's URL or path."""
    return (
        "data" if image.lower().startswith("data:") else image.rstrip("/").rpartition("/")[2][-MAX_KEY_CHARS:]
    )
