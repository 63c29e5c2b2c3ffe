"""Write results as JSONL, CSV, or output and error files of OpenAI's Batch API, in the order of the jobs.

Files are replaced atomically: a file exists completely or not.
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
from worker.cli.submit.state import Received, StoredResult, SubmissionState

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
    """The destination of results.

    Attributes:
        path: the output file; None: stdout.
        errors: the Batch API's error file; None: next to the output file.
        form: None: chosen by the file name and the form of the input.
    """

    path: Path | None = None
    errors: Path | None = None
    form: Form | None = None

    def form_for(self, submitted: str) -> Form:
        """Return the output form for jobs submitted in the form `submitted`."""
        by_name = FORMS_BY_SUFFIX.get(self.path.suffix.lower()) if self.path is not None else None
        if self.form is not None or by_name == "csv":
            return self.form or "csv"
        return "batch" if submitted == "batch" else "jsonl"


class Stream:
    """Print results on stdout as they arrive: JSON lines, or short text."""

    def __init__(self, state: SubmissionState, form: Form, screen: Screen, *, as_text: bool) -> None:
        self._state = state
        self._form = form
        self._screen = screen
        self._as_text = as_text
        self._has_many = state.counts().total > 1

    def print_all(self) -> None:
        """Print the results collected so far."""
        for stored in self._state.results():
            self._print(stored)

    def print_new(self, new: Sequence[Received]) -> None:
        """Print results that have just arrived."""
        for received in new:
            self._print(self._state.result(received.id))

    def _print(self, stored: StoredResult) -> None:
        self._screen.write(self._text(stored) if self._as_text else line_of(stored, self._form))

    def _text(self, stored: StoredResult) -> str:
        result = json.loads(stored.body)
        error = result.get("error")
        text = f"failed: {error.get('message')} ({error.get('code')})" if error else result.get("answer")
        if text is None:
            text = "the model called tools; use --json to see them"
        if not self._has_many:
            return str(text)
        return f"{(result.get('metadata') or {}).get('image') or stored.custom_id or stored.id}: {text}"


def line_of(stored: StoredResult, form: Form) -> str:
    """Format a result as a line of JSONL or of a Batch API file."""
    result = json.loads(stored.body)
    if form == "batch":
        result = batch.line_of(stored.custom_id or stored.id, result, stored.at)
    return json.dumps(result, ensure_ascii=False)


def write(state: SubmissionState, form: Form, path: Path, errors: Path | None) -> list[Path]:
    """Write the collected results; return the written files.

    `errors`: the Batch API's error file; None: next to the output file. Written only if a request failed.
    """
    if form == "csv":
        with _atomic(path) as file:
            _write_csv(state, file)
        return [path]
    if form == "jsonl":
        with _atomic(path) as file:
            _write_lines(state.results(), form, file)
        return [path]
    with _atomic(path) as file:
        _write_lines((stored for stored in state.results() if not stored.failed), form, file)
    errors = errors or path.with_name(f"{path.stem}.errors{path.suffix}")
    if not any(stored.failed for stored in state.results()):
        # A file of an earlier run would list errors that no longer exist.
        errors.unlink(missing_ok=True)
        return [path]
    with _atomic(errors) as file:
        _write_lines((stored for stored in state.results() if stored.failed), form, file)
    return [path, errors]


def write_csv_to_stdout(state: SubmissionState) -> None:
    """Print the collected results as CSV."""
    _write_csv(state, sys.stdout)


def _write_lines(results: Iterable[StoredResult], form: Form, file: TextIO) -> None:
    file.writelines(f"{line_of(stored, form)}\n" for stored in results)


def _write_csv(state: SubmissionState, file: TextIO) -> None:
    metadata: dict[str, None] = {}
    for result in _results(state):
        metadata.update(dict.fromkeys(result.get("metadata") or {}))
    names = [name for name in metadata if name not in _COLUMNS]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*_COLUMNS, *names])
    for result in _results(state):
        own = result.get("metadata") or {}
        writer.writerow([*_cells(result), *(_cell(own.get(name)) for name in names)])


def _results(state: SubmissionState) -> Iterator[dict[str, Any]]:
    """Yield the results; those of a batch have the `custom_id` as id."""
    for stored in state.results():
        result = json.loads(stored.body)
        yield {**result, "id": stored.custom_id or result.get("id")}


def _cells(result: Mapping[str, Any]) -> Iterator[str]:
    usage, error = result.get("usage") or {}, result.get("error") or {}
    flat = {**result, **usage, "error_code": error.get("code"), "error_message": error.get("message")}
    return (_cell(flat.get(name)) for name in _COLUMNS)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


@contextmanager
def _atomic(path: Path) -> Iterator[TextIO]:
    """Open a file that replaces `path` when it is complete and on the disk."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("w", encoding="utf-8", errors="replace", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
