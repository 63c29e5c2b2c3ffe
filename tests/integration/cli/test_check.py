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

Findings = dict[str, tuple[str, str]]
EXCHANGES = {"VQA_REPLY_EXCHANGE": "vqa.replies", "VQA_JOBS_EXCHANGE": "vqa.back"}
FAR = "http://127.0.0.1:1"


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
    findings = await found(cli.with_settings(VQA_RESULT_STORE=store), "--ask", "--image", image, code=0)
    assert {status for status, _ in findings.values()} == {"ok"}
    assert findings["broker"][1].startswith("RabbitMQ ")
    assert vhost in findings["broker"][1]
    assert findings["broker"][1].endswith("as user guest")
    assert findings["queue jobs"][1] == "0 ready, 1 consumer; arguments OK"
    assert findings["cancellations"] == ("ok", "permission granted")
    assert findings[f"bucket {BUCKET}"] == ("ok", "readable")
    assert findings[f"image {image}"][1].startswith("image/png, ")
    assert findings["result store"][0] == "ok"
    model = stack.model_api.models[0]
    assert findings[f"model {model}"] == ("ok", "available")
    assert " tokens, $0.0000" in findings[f"question to {model}"][1]
    # The check changed nothing and sent one model request.
    assert there(stack, vhost) == before
    (call,) = stack.model.calls()[calls:]
    assert call.question == QUESTION
    listed = stack.s3.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    assert "Contents" not in listed


async def test_text_output_has_a_mark_per_check_and_a_summary(cli: Cli) -> None:
    ended = await cli.with_settings(VQA_SHUTDOWN_GRACE="3").run("check")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0] == "✓ settings: valid"
    assert lines[1].startswith("! settings: VQA_SHUTDOWN_GRACE: 3 s are less than")
    count = Counter(line[0] for line in lines)
    assert ended.err_lines == [f"{count['✓']} ok, {count['!']} warning"]
    plain = await cli.with_settings(PYTHONIOENCODING="ascii", VQA_SHUTDOWN_GRACE="3").run("check")
    assert plain.out.startswith("[ok] settings: valid\n! settings: ")
    seen = Terminal(cli, "check")
    assert await seen.ended() == 0
    assert "✓ settings: valid" in seen.shown


async def test_an_unreachable_broker_does_not_stop_the_other_checks(cli: Cli) -> None:
    far = cli.with_settings(VQA_RABBITMQ_URL="amqp://me:s3cr3t@127.0.0.1:1/")
    findings = await found(far, "--timeout", "0.5", code=1)
    assert failures(findings) == ["broker"]
    assert "unreachable for 0.5 s" in findings["broker"][1]
    assert "s3cr3t" not in str(findings)
    assert findings[f"bucket {BUCKET}"][0] == "ok"


async def test_invalid_settings_exit_with_78_and_the_broker_is_still_checked(
    cli: Cli,
) -> None:
    wrong = cli.with_settings(VQA_MAX_ATTEMPTS="many", VQA_ALLOWED_BUCKETS="")
    reported = await wrong.run_json("check", code=78)
    faults = [it["message"].partition(":")[0] for it in reported if it["check"] == "settings"]
    assert sorted(faults) == ["VQA_ALLOWED_BUCKETS", "VQA_MAX_ATTEMPTS"]
    assert any(it["check"] == "broker" and it["status"] == "ok" for it in reported)
    assert not any(it["check"] == "model API" for it in reported)
    reported = await cli.with_settings(VQA_RETRY_DELAYS="soon").run_json("check", code=78)
    assert [it["check"] for it in reported] == ["settings"]


async def test_rejected_credentials_and_virtual_hosts_are_reported(stack: Stack, cli: Cli) -> None:
    wrong = await found(cli.with_settings(VQA_RABBITMQ_URL=url_as(stack, "guest", "s3cr3t")), code=1)
    assert failures(wrong) == ["broker"]
    assert "refuses this user name and password" in wrong["broker"][1]
    assert "s3cr3t" not in str(wrong)
    elsewhere = cli.with_settings(VQA_RABBITMQ_URL=url_as(stack, "guest", "guest", "nowhere"))
    assert "the virtual host does not exist" in (await found(elsewhere, code=1))["broker"][1]
