"""`vqa-worker check`: reports each problem with a fix, and changes nothing."""

import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.stack import Stack
from tests.breaking import administer, own_vhost, url_as
from tests.conftest import BUCKET, PutImage, StartWorker
from tests.integration.cli.running import Cli
from tests.integration.cli.terminal import Terminal
from worker.cli.check.api import QUESTION
from worker.cli.shell import counted

UNKNOWN = "in the environment, is not a setting and is ignored"
MISSING = (
    "VQA_ALLOWED_BUCKETS: is not set: list the buckets that jobs may read from, comma-separated, or * for any"
)
Findings = dict[str, tuple[str, str]]


@pytest.fixture
def vhost(stack: Stack) -> Iterator[str]:
    with own_vhost(stack) as name:
        yield name


@pytest.fixture
def cli(stack: Stack, vhost: str, tmp_path: Path) -> Cli:
    """Return commands in an empty virtual host."""
    settings = {
        **stack.environment(),
        "VQA_RABBITMQ_URL": url_as(stack, "guest", "guest", vhost),
        "VQA_JOBS_QUEUE": "jobs",
        "VQA_RESULTS_QUEUE": "results",
        "VQA_RETRY_DELAYS": "1",
        "VQA_ALLOWED_BUCKETS": BUCKET,
    }
    return Cli(tmp_path, settings)


async def found(cli: Cli, *arguments: str, code: int) -> Findings:
    """Return status and message by check."""
    reported = await cli.run_json("check", *arguments, code=code)
    assert all(it.keys() == {"check", "status", "message"} for it in reported)
    return {it["check"]: (it["status"], it["message"]) for it in reported}


def failures(findings: Findings) -> list[str]:
    return [check for check, (status, _) in findings.items() if status == "failed"]


def there(stack: Stack, vhost: str) -> object:
    """Return the definitions of a virtual host."""
    return administer(stack, "GET", f"/api/definitions/{vhost}")


async def test_a_working_configuration_passes_every_check(
    stack: Stack, cli: Cli, start_worker: StartWorker, put_image: PutImage, vhost: str
) -> None:
    names = ("VQA_RABBITMQ_URL", "VQA_JOBS_QUEUE", "VQA_RESULTS_QUEUE")
    await start_worker(**{name: cli.settings[name] for name in names})
    image, prefix = put_image(), uuid.uuid4().hex
    store = f"s3://{BUCKET}/{prefix}"
    before, calls = there(stack, vhost), len(stack.model.calls())
    settings = {"VQA_RESULT_STORE": store, "VQA_LARGE_RESULTS": f"s3://{BUCKET}/large/{prefix}"}
    findings = await found(cli.with_settings(**settings), "--ask", "--image", image, code=0)
    assert {status for status, _ in findings.values()} == {"ok"}
    assert findings["broker"][1].startswith("RabbitMQ ")
    assert vhost in findings["broker"][1]
    assert findings["broker"][1].endswith("as user guest")
    assert findings["queue jobs"][1] == "0 ready, 1 consumer; arguments OK"
    assert findings["permission to receive cancellations"] == ("ok", "granted")
    assert findings["permission to submit jobs"] == ("ok", "granted")
    assert findings[f"bucket {BUCKET}"] == ("ok", "readable")
    assert findings[f"image {image}"][1].startswith("image/png, ")
    assert findings["result store"][0] == findings["large results"][0] == "ok"
    model = stack.model_api.models[0]
    assert findings[f"model {model}"] == ("ok", "available")
    assert " tokens, $0.0000" in findings[f"question to {model}"][1]
    # The check changed nothing, and sent one model request and one without messages, which is refused.
    assert there(stack, vhost) == before
    refused, asked = stack.model.calls()[calls:]
    assert refused.status == 400
    assert asked.question == QUESTION
    listed = stack.s3.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    assert "Contents" not in listed


async def test_text_output_has_a_mark_per_check_and_a_summary(cli: Cli) -> None:
    ended = await cli.with_settings(VQA_SHUTDOWN_GRACE="3").run("check")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0] == "✓ settings: valid"
    assert lines[1].startswith("! settings: VQA_SHUTDOWN_GRACE: 3 s are less than")
    count = Counter(line[0] for line in lines)
    assert ended.err_lines == [f"{count['✓']} ok, {counted(count['!'], 'warning')}"]
    seen = Terminal(cli, "check")
    assert await seen.ended() == 0
    assert "✓ settings: valid" in seen.shown


async def test_invalid_settings_exit_with_78_and_the_broker_is_still_checked(cli: Cli) -> None:
    far = {"VQA_RABBITMQ_URL": "amqp://me:s3cr3t@127.0.0.1:1/"}
    misspelt = {"VQA_MAX_ATTEMPTS": "many", "VQA_ALLOWED_BUCKETS": "", "VQA_ALLOWED_BUCKET": "photos"}
    for changed, broker in ((misspelt, "ok"), (misspelt | far, "failed")):
        ended = await cli.with_settings(**changed).run("check", "--json", "--timeout=0.5")
        assert ended.code == 78
        faults = [it["message"] for it in ended.objects if it["check"] == "settings"]
        assert faults == [
            "VQA_MAX_ATTEMPTS: must be a whole number, not 'many'",
            MISSING,
            f"VQA_ALLOWED_BUCKET: {UNKNOWN}; did you mean VQA_ALLOWED_BUCKETS?",
        ]
        assert [it["status"] for it in ended.objects if it["check"] == "broker"] == [broker]
        assert not any(it["check"] == "model API" for it in ended.objects)
        assert "s3cr3t" not in ended.out
        # The misspelt variable is reported once.
        assert "VQA_ALLOWED_BUCKET" not in ended.err
    reported = await cli.with_settings(VQA_RETRY_DELAYS="soon").run_json("check", code=78)
    assert [it["check"] for it in reported] == ["settings"]


async def test_a_misspelt_optional_variable_is_a_warning(cli: Cli) -> None:
    ended = await cli.with_settings(VQA_PRICE="{}").run("check", "--json")
    warnings = [
        it["message"] for it in ended.objects if (it["check"], it["status"]) == ("settings", "warning")
    ]
    assert warnings == [f"VQA_PRICE: {UNKNOWN}; did you mean VQA_PRICES?"]
    assert "VQA_PRICE" not in ended.err
