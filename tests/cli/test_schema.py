"""`vqa-worker schema`, with the extra `cli` and without."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from docs import generate
from tests.cli.typing_in import Terminal
from worker.cli.schema import job_schema, result_schema

BARE = "import sys, worker.__main__ as it; it._has_shell = lambda: False; sys.exit(it.main(sys.argv[1:]))"


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    return Terminal(tmp_path)


async def test_each_document_is_printed_for_programs(terminal: Terminal) -> None:
    expected = {
        "job": job_schema(),
        "result": result_schema(),
        "asyncapi": json.loads(generate.asyncapi_document()),
    }
    for name, document in expected.items():
        ended = await terminal.run("schema", name)
        assert (ended.code, ended.errors, json.loads(ended.output)) == (0, [], document)
    (everything,) = await terminal.told("schema")
    assert everything == expected
    Draft202012Validator.check_schema(everything["job"])


async def test_settings_that_it_needs_are_checked(terminal: Terminal) -> None:
    ended = await terminal.having(VQA_RETRY_DELAYS="soon", VQA_MAX_ATTEMPTS="many").run("schema")
    assert (ended.code, ended.output) == (78, "")
    (line,) = ended.errors
    assert line.startswith("VQA_RETRY_DELAYS")
    ended = await terminal.run("schema", "answer")
    assert ended.code == 2
    assert "'answer' is not one of" in " ".join(ended.errors)


def test_it_needs_nothing_but_what_the_worker_needs(terminal: Terminal) -> None:
    def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # noqa: S603 - a test's own
            [sys.executable, "-c", BARE, *arguments],
            env=terminal.whole_environment,
            cwd=terminal.folder,
            capture_output=True,
            text=True,
            check=False,
        )

    done = bare("schema", "asyncapi")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == generate.asyncapi_document()
    done = bare("schema", "job", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, job_schema())
    assert len(done.stdout.splitlines()) == 1
    assert bare("schema", "answer").returncode == 2
