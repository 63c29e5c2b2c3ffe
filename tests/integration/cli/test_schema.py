"""`vqa-worker schema`."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from docs import generate
from tests.integration.cli.running import Cli
from worker.rabbitmq.schemas import job_schema, result_schema


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path, {})


async def test_each_document_is_printed_as_json(cli: Cli) -> None:
    expected = {
        "job": job_schema(),
        "result": result_schema(),
        "asyncapi": json.loads(generate.asyncapi_document()),
    }
    for name, document in expected.items():
        ended = await cli.run("schema", name)
        assert (ended.code, ended.err_lines, json.loads(ended.out)) == (0, [], document)
    (everything,) = await cli.run_json("schema")
    assert everything == expected
    Draft202012Validator.check_schema(everything["job"])


async def test_invalid_settings_are_reported(cli: Cli) -> None:
    ended = await cli.with_settings(VQA_RETRY_DELAYS="soon", VQA_MAX_ATTEMPTS="many").run("schema")
    assert (ended.code, ended.out) == (78, "")
    (line,) = ended.err_lines
    assert line.startswith("Error: VQA_RETRY_DELAYS")
    ended = await cli.run("schema", "answer")
    assert ended.code == 2
    assert "'answer' is not one of" in " ".join(ended.err_lines)
