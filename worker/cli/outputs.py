"""Write results as JSONL, CSV, or output and error files of OpenAI's Batch API, in the order of the jobs.

Files are replaced atomically: a file exists completely or not.
"""

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TextIO

from vqa_worker.messages.decoding import parse_leniently
from worker.cli.shell import Screen
from worker.cli.submit import batch
from worker.cli.submit.inputs import Form
from worker.cli.submit.results import failure, parse
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
        if not self._as_text:
            self._screen.write(line_of(stored, self._form))
            return
        result = parse(stored.body)
        own = result["metadata"].get("image") or stored.custom_id or stored.id
        title = f"{own}: " if self._has_many else ""
        if stored.failed:
            code, message = failure(result)
            self._screen.note(encodable(f"{title}failed: {message} ({code})"))
        else:
            answer = result["answer"] or "the model called tools; use --json to see them"
            self._screen.write(encodable(f"{title}{answer}"))


def line_of(stored: StoredResult, form: Form) -> str:
    """Format a result as a line of JSONL or of a Batch API file."""
    if form == "batch":
        return _json(batch.line_of(stored.custom_id or stored.id, parse(stored.body), stored.at))
    return _json(parse_leniently(stored.body))


def _json(value: Any) -> str:
    line = json.dumps(value, ensure_ascii=False)
    # Half of a surrogate pair, which JSON can contain and UTF-8 cannot.
    return line if line == encodable(line) else json.dumps(value)


def encodable(text: str) -> str:
    """Return the text with `?` in place of characters that UTF-8 cannot encode."""
    return text.encode(errors="replace").decode()


def write(state: SubmissionState, form: Form, path: Path, errors: Path | None) -> list[str]:
    """Write the collected results; return the names of the written files.

    `errors`: the Batch API's error file; None: next to the output file. Written only if a request failed.
    """
    if form == "csv":
        with _atomic(path) as file:
            _write_csv(state, file)
    else:
        _write_lines(state.results(failed=False if form == "batch" else None), form, path)
    if form != "batch":
        return [str(path)]
    errors = errors or path.with_name(f"{path.stem}.errors{path.suffix}")
    if not state.counts().failed:
        # A file of an earlier run would list errors that no longer exist.
        errors.unlink(missing_ok=True)
        return [str(path)]
    _write_lines(state.results(failed=True), form, errors)
    return [str(path), str(errors)]


def write_csv_to_stdout(state: SubmissionState) -> None:
    """Print the collected results as CSV."""
    _write_csv(state, sys.stdout)


def _write_lines(results: Iterable[StoredResult], form: Form, path: Path) -> None:
    with _atomic(path) as file:
        file.writelines(f"{line_of(stored, form)}\n" for stored in results)


def _write_csv(state: SubmissionState, file: TextIO) -> None:
    names: dict[str, None] = {}
    for stored in state.results():
        names.update(dict.fromkeys(parse(stored.body)["metadata"]))
    columns = [*_COLUMNS, *(name for name in names if name not in _COLUMNS)]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(encodable, columns))
    for stored in state.results():
        result = parse(stored.body)
        flat = {**result, **result["usage"], "id": stored.custom_id or stored.id}
        if stored.failed:
            flat["error_code"], flat["error_message"] = failure(result)
        row = {**result["metadata"], **{name: flat.get(name) for name in _COLUMNS}}
        writer.writerow(_cell(row.get(name)) for name in columns)


def _cell(value: Any) -> str:
    return encodable(value or "") if value is None or isinstance(value, str) else _json(value)


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
