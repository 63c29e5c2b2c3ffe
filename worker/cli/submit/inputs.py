"""Read jobs from the command line, from files (JSONL, CSV, Batch API), from a folder and from an S3 prefix.

Each source yields entries: a job as written, and its position for error messages.
"""

import csv
import hashlib
import json
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, TypeVar

import pydantic_core

from worker.cli.shell import CommandError, UsageError
from worker.cli.submit import batch

T = TypeVar("T")
Form: TypeAlias = Literal["jsonl", "csv", "batch"]

IMAGE_SUFFIXES: Final = (
    ".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif", ".avif", ".gif", ".tif", ".tiff", ".bmp", ".jp2",
)  # fmt: skip
# Each of their pages is an image: of a folder or prefix, they are submitted only if they are asked for.
DOCUMENT_SUFFIXES: Final = (".pdf",)
IMAGE_SCHEMES: Final = ("s3://", "https://", "data:")
FORMS_BY_SUFFIX: Final[dict[str, Form]] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv",
}  # fmt: skip
# CSV columns that are fields of a job, and those that are params; other columns are metadata.
_FIELDS: Final = ("id", "question", "system", "model", "deadline")
_PARAMS: Final = ("max_tokens", "temperature", "top_p", "seed")
# The part of an image's name in the id of its job.
MAX_KEY_CHARS: Final = 60
# Longer than any job, so that a file without line ends does not fill the memory.
_MAX_LINE_CHARS: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """A job as written, without the command line's additions.

    Attributes:
        where: its position, for error messages.
        key: the base of its id if it has none; None: its number.
        custom_id: of a request of a batch, if it is readable.
        error: why it is not a job; otherwise empty.
    """

    where: str
    job: dict[str, Any] = field(default_factory=dict)
    key: str | None = None
    custom_id: str | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A source of jobs.

    Attributes:
        title: becomes a part of the submission's name.
        digest: identifies the source.
        entries: the jobs in order.
        form: the file format; None if it is not a file.
        folder: the base of relative paths of local images.
        is_ad_hoc: repeating the command makes a new submission instead of resuming the old one.
    """

    title: str
    digest: str
    entries: AsyncIterable[Entry]
    form: Form | None = None
    folder: Path = Path()
    is_ad_hoc: bool = False


def looks_like_image(word: str) -> bool:
    """Return whether an argument is the URL or the file name of an image."""
    return word[:8].lower().startswith(IMAGE_SCHEMES) or word.lower().endswith(
        IMAGE_SUFFIXES + DOCUMENT_SUFFIXES
    )


def from_arguments(images: Sequence[str], *, each: bool) -> Source:
    """Return one job for all images, or one per image."""
    groups = [[image] for image in images] if each else [list(images)]
    entries = (_entry_for(group, f"{n}-{_last_part(group[0])}") for n, group in enumerate(groups, start=1))
    digest = hashlib.sha256(json.dumps(groups).encode()).hexdigest()
    return Source(title="ask", digest=digest, entries=as_async(entries), is_ad_hoc=True)


def from_listing(identity: str, images: AsyncIterable[str], *, title: str) -> Source:
    """Return one job per image in a folder or below an S3 prefix.

    `identity`: folder or prefix, and pattern; `title`: the name of the folder or prefix.
    """

    async def entries() -> AsyncIterator[Entry]:
        number = 0
        async for image in images:
            number += 1
            yield _entry_for([image], f"{number}-{_last_part(image)}")

    digest = hashlib.sha256(identity.encode(errors="replace")).hexdigest()
    title = title.strip("/").rpartition("/")[2]
    return Source(title=title, digest=digest, entries=entries())


def from_file(path: Path, form: Form | None, *, title: str = "", folder: Path | None = None) -> Source:
    """Return the jobs of a file: JSONL, CSV or Batch API requests; `form` None: detected.

    Raises:
        CommandError, UsageError: while the jobs are read, the file as a whole is wrong.
    """
    title = title or path.name.split(".")[0]
    first_line = next((line.strip() for _, line in _lines(path) if line.strip()), "")
    is_json = first_line.startswith("{")
    found = form or FORMS_BY_SUFFIX.get(path.suffix.lower()) or ("jsonl" if is_json else "csv")
    if found == "jsonl" and form is None and batch.is_request(first_line):
        found = "batch"
    if found == "csv":
        entries = _csv_entries(path, title, delimiter=max(",;\t", key=first_line.count))
    else:
        lines = ((f"{title} line {number}", line) for number, line in _lines(path) if line.strip())
        entries = (_json_entry(where, line, found) for where, line in lines)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.sha256(found.encode()))
    folder = path.parent if folder is None else folder
    return Source(
        title=title, digest=digest.hexdigest(), entries=as_async(entries), form=found, folder=folder
    )


async def as_async(items: Iterable[T]) -> AsyncIterator[T]:
    """Yield the items."""
    for item in items:
        yield item


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # No universal newlines: a lone CR or U+2028 does not end a line of JSON. Excel writes a BOM.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        number = 0
        try:
            while line := file.readline(_MAX_LINE_CHARS):
                number += 1
                yield number, line
        except UnicodeDecodeError:
            raise CommandError(f"{path} is not UTF-8 text (after line {number}).") from None


def _json_entry(where: str, line: str, form: Form) -> Entry:
    try:
        job = pydantic_core.from_json(line, allow_inf_nan=False)
    except ValueError as error:
        return Entry(where, error=f"not JSON: {error}")
    if not isinstance(job, dict):
        return Entry(where, error="must be a JSON object")
    if form != "batch":
        if isinstance(image := job.pop("image", None), str | dict):
            job.setdefault("images", [image])
        return Entry(where, job)
    custom_id = job["custom_id"] if isinstance(job.get("custom_id"), str) else None
    try:
        return Entry(where, batch.job_of(job), key=custom_id, custom_id=custom_id)
    except ValueError as error:
        return Entry(where, custom_id=custom_id, error=str(error))


def _csv_entries(path: Path, title: str, *, delimiter: str) -> Iterator[Entry]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        # A data URL in a cell is longer than the library's limit.
        csv.field_size_limit(_MAX_LINE_CHARS)
        rows = csv.reader(file, delimiter=delimiter)
        try:
            columns = [name.strip() for name in next(rows, [])]
            if not any(map(_is_image_column, columns)):
                text = "the first line must contain the column names, including `image`."
                raise UsageError(f"{path}: {text}")
            if len(set(columns)) != len(columns):
                raise UsageError(f"{path}: two columns have the same name.")
            for row in rows:
                if any(row):
                    yield _csv_entry(f"{title} line {rows.line_num}", columns, row)
        except UnicodeDecodeError:
            raise CommandError(f"{path} is not UTF-8 text. Save it as CSV UTF-8.") from None
        except csv.Error as error:
            raise CommandError(f"{path} line {rows.line_num}: {error}") from None


def _csv_entry(where: str, columns: Sequence[str], row: Sequence[str]) -> Entry:
    if len(row) > len(columns):
        return Entry(where, error=f"has {len(row)} cells but the first line has {len(columns)} columns")
    job: dict[str, Any] = {"images": [], "params": {}, "metadata": {}}
    for name, cell in zip(columns, row, strict=False):
        if not cell.strip():
            continue
        if _is_image_column(name):
            job["images"].append(cell.strip())
        elif name in _FIELDS:
            job[name] = cell.strip() if name == "id" else cell
        elif name in _PARAMS:
            try:
                job["params"][name] = json.loads(cell)
            except ValueError:
                return Entry(where, error=f"{name}: must be a number")
        else:
            job["metadata"][name] = cell
    return Entry(where, {name: value for name, value in job.items() if value not in ({}, [])})


def _is_image_column(column: str) -> bool:
    return column.startswith("image") and (column[5:] or "0").isdecimal()


def _entry_for(images: list[str], key: str) -> Entry:
    """Return a job without an id; its metadata names the images."""
    # The metadata is echoed in the result; a data URL would only make it long.
    named = ", ".join(image for image in images if not image.lower().startswith("data:"))
    metadata = {"metadata": {"image": named}} if named else {}
    return Entry(named or "the image", {"images": images, **metadata}, key=key)


def _last_part(image: str) -> str:
    """Return the last part of an image's URL or path."""
    if image.lower().startswith("data:"):
        return "data"
    return image.rstrip("/").rpartition("/")[2][-MAX_KEY_CHARS:]
