"""Print results, or write them as JSONL, CSV, or output and error files of OpenAI's Batch API.

Files have the order of the jobs, and are replaced atomically: a file exists completely or not.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TextIO

from vqa_worker.messages.decoding import parse_leniently
from worker.cli.shell import Screen
from worker.cli.submit import batch
from worker.cli.submit.inputs import Form
from worker.cli.submit.results import failure, parse
from worker.cli.submit.state import JobResult, SubmissionState

_COLUMNS: Final = (
    "id", "status", "answer", "error_code", "error_message", "model", "finish_reason",
    "prompt_tokens", "completion_tokens", "cost_usd", "attempts",
)  # fmt: skip


def print_text(it: JobResult, screen: Screen, *, has_title: bool) -> None:
    """Print the answer on stdout, or the error on stderr."""
    result = parse(it.body)
    title = f"{result['metadata'].get('image') or it.custom_id or it.id}: " if has_title else ""
    if it.failed:
        code, message = failure(result)
        screen.note(f"{title}failed: {message} ({code})")
    else:
        screen.write(f"{title}{result['answer'] or 'the model called tools; use --json to see them'}")


def line_of(it: JobResult, form: Form) -> str:
    """Format a result as a line of JSONL or of a Batch API file."""
    if form == "batch":
        return _json(batch.line_of(it.custom_id or it.id, parse(it.body), it.at))
    return _json(parse_leniently(it.body))


def _json(value: Any) -> str:
    line = json.dumps(value, ensure_ascii=False)
    # JSON can contain half of a surrogate pair, and UTF-8 cannot.
    return line if line.isascii() or line == line.encode(errors="replace").decode() else json.dumps(value)


def write(state: SubmissionState, form: Form, path: Path, errors: Path | None) -> list[str]:
    """Write the collected results; return the names of the written files.

    `errors`: the Batch API's error file; None: next to the output file. Written only if a request failed.
    """
    if form == "csv":
        with _atomic(path) as file:
            write_csv(state, file)
        return [str(path)]
    if form == "jsonl":
        _write_lines(state.results(), form, path)
        return [str(path)]
    _write_lines(state.results(failed=False), form, path)
    errors = errors or path.with_name(f"{path.stem}.errors{path.suffix}")
    if not state.counts().failed:
        # A file of an earlier run would list errors that no longer exist.
        errors.unlink(missing_ok=True)
        return [str(path)]
    _write_lines(state.results(failed=True), form, errors)
    return [str(path), str(errors)]


def _write_lines(results: Iterable[JobResult], form: Form, path: Path) -> None:
    with _atomic(path) as file:
        file.writelines(f"{line_of(it, form)}\n" for it in results)


def write_csv(state: SubmissionState, file: TextIO) -> None:
    """Write the collected results as CSV, with a column for each field of `parsed` and of `metadata`."""
    metadata, fields = dict[str, None](), dict[str, None]()
    for it in state.results():
        result = parse(it.body)
        metadata |= dict.fromkeys(result["metadata"])
        fields |= dict.fromkeys(_fields(result))
    # The columns of the result and of the answer come first; a metadata field of the same name is left out.
    names = dict.fromkeys((*_COLUMNS, *fields, *metadata))
    writer = csv.DictWriter(file, [*names], lineterminator="\n")
    writer.writeheader()
    for it in state.results():
        result = parse(it.body)
        values = {**result, **result["usage"], "id": it.custom_id or it.id}
        if it.failed:
            values["error_code"], values["error_message"] = failure(result)
        columns = {name: values.get(name) for name in _COLUMNS}
        row = {**result["metadata"], **dict.fromkeys(fields), **_fields(result), **columns}
        writer.writerow({name: _cell(value) for name, value in row.items()})


def _fields(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of an answer to a JSON schema; one with the name of another column gets a prefix."""
    parsed = result["parsed"]
    if not isinstance(parsed, dict):
        return {}
    return {f"parsed.{name}" if name in _COLUMNS else name: value for name, value in parsed.items()}


def _cell(value: Any) -> str:
    return value or "" if value is None or isinstance(value, str) else _json(value)


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
