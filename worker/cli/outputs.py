"""Results as files: JSONL as they came, CSV for tables, or the output and error files of OpenAI's Batch API.

A file is there with all of it or not at all; its lines are in the order of the jobs.
"""

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

from worker.cli.shell import Screen
from worker.cli.submit import batch
from worker.cli.submit.inputs import FORMS_BY_SUFFIX, Form
from worker.cli.submit.manifest import Kept, Manifest, Received

_COLUMNS: Final = (
    "id",
    "status",
    "answer",
    "error_code",
    "error_message",
    "model",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "cost_usd",
    "attempts",
)


@dataclass(frozen=True)
class Output:
    """Where results go: to files, or to stdout where there is no path.

    Attributes:
        errors: where failed requests of a batch go, if there are any; by default beside the output.
        form: None: that of the path's name, and of what was submitted.
    """

    path: Path | None = None
    errors: Path | None = None
    form: Form | None = None

    def form_for(self, submitted: str) -> Form:
        """The form for what was submitted in another."""
        by_name = FORMS_BY_SUFFIX.get(self.path.suffix.lower()) if self.path is not None else None
        if self.form is not None or by_name == "csv":
            return self.form or "csv"
        return "batch" if submitted == "batch" else "jsonl"


class Stream:
    """Tells results on stdout as they come: lines of JSON for a program, or a few words for a person."""

    def __init__(self, manifest: Manifest, form: Form, screen: Screen, *, in_words: bool) -> None:
        self._manifest = manifest
        self._form = form
        self._screen = screen
        self._in_words = in_words
        self._names = manifest.counts().total > 1

    def tell_all(self) -> None:
        """Tell what has come before."""
        for kept in self._manifest.results():
            self._tell(kept)

    def tell(self, new: Sequence[Received]) -> None:
        """Tell what has just come."""
        for received in new:
            self._tell(self._manifest.result(received.id))

    def _tell(self, kept: Kept) -> None:
        self._screen.write(self._words(kept) if self._in_words else line_of(kept, self._form))

    def _words(self, kept: Kept) -> str:
        result = json.loads(kept.body)
        error = result.get("error")
        words = f"failed: {error.get('message')} ({error.get('code')})" if error else result.get("answer")
        if words is None:
            words = "called tools: --json shows them"
        if not self._names:
            return str(words)
        return f"{(result.get('metadata') or {}).get('image') or kept.custom_id or kept.id}: {words}"


def line_of(kept: Kept, form: Form) -> str:
    """A result as a line of JSON, in JSONL's or the Batch API's form."""
    result = json.loads(kept.body)
    if form == "batch":
        result = batch.line_of(kept.custom_id or kept.id, result, kept.at)
    return json.dumps(result, ensure_ascii=False)


def write(manifest: Manifest, form: Form, path: Path, errors: Path | None) -> list[Path]:
    """Write what there is; returns the files that were written.

    `errors`: where failed requests of a batch go, if there are any; by default beside the output.
    """
    if form == "csv":
        with _whole(path) as file:
            _write_csv(manifest, file)
        return [path]
    if form == "jsonl":
        with _whole(path) as file:
            _write_lines(manifest.results(), form, file)
        return [path]
    with _whole(path) as file:
        _write_lines((kept for kept in manifest.results() if not kept.failed), form, file)
    errors = errors or path.with_name(f"{path.stem}.errors{path.suffix}")
    if not any(kept.failed for kept in manifest.results()):
        # One from before would tell of errors that are no more.
        errors.unlink(missing_ok=True)
        return [path]
    with _whole(errors) as file:
        _write_lines((kept for kept in manifest.results() if kept.failed), form, file)
    return [path, errors]


def write_csv_to_stdout(manifest: Manifest) -> None:
    """The same as a CSV file, on stdout."""
    _write_csv(manifest, sys.stdout)


def _write_lines(results: Iterable[Kept], form: Form, file: TextIO) -> None:
    file.writelines(f"{line_of(kept, form)}\n" for kept in results)


def _write_csv(manifest: Manifest, file: TextIO) -> None:
    metadata: dict[str, None] = {}
    for result in _results(manifest):
        metadata.update(dict.fromkeys(result.get("metadata") or {}))
    names = [name for name in metadata if name not in _COLUMNS]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*_COLUMNS, *names])
    for result in _results(manifest):
        own = result.get("metadata") or {}
        writer.writerow([*_cells(result), *(_cell(own.get(name)) for name in names)])


def _results(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """The results, those of a batch's requests under the ids that they have there."""
    for kept in manifest.results():
        result = json.loads(kept.body)
        yield {**result, "id": kept.custom_id or result.get("id")}


def _cells(result: Mapping[str, Any]) -> Iterator[str]:
    usage, error = result.get("usage") or {}, result.get("error") or {}
    flat = {**result, **usage, "error_code": error.get("code"), "error_message": error.get("message")}
    return (_cell(flat.get(name)) for name in _COLUMNS)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


@contextmanager
def _whole(path: Path) -> Iterator[TextIO]:
    """A file that takes its place when it is complete and on the disk."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("w", encoding="utf-8", errors="replace", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
