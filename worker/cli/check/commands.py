"""The command `vqa-worker check`."""

import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Final

import typer

from worker.cli.check import Finding, failed, ok, warning
from worker.cli.exit_codes import EXIT_CONFIG, EXIT_FAILURE, EXIT_OK
from worker.cli.shell import Screen, broker_of, counted

MARKS: Final = {"ok": "✓", "warning": "!", "failed": "✗", "skipped": "–"}
COLORS: Final = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "blue"}


async def check(
    screen: Screen,
    image: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Test read access to this image: s3://bucket/key; repeatable."),
    ] = None,
    ask: Annotated[
        bool, typer.Option("--ask", help="Also send one test request to the model (billed).")
    ] = False,
    management_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Also read the queues' policies from RabbitMQ's management API: http://host:15672.",
        ),
    ] = None,
) -> int:
    """Check the configuration and every dependency, and suggest a fix for each problem.

        vqa-worker check
        vqa-worker check --image s3://photos/2030/table.jpg --ask
        vqa-worker check --management-url http://rabbitmq:15672
        vqa-worker check --json | jq 'select(.status == "failed")'

    Consumes no job, publishes no message, creates no queue. Writes and deletes one test object in the result
    store, and writes one to VQA_LARGE_RESULTS, if configured. Exit codes: 0 success or warnings only, 1 a
    check failed, 78 invalid configuration.
    """
    from worker.observability.redaction import Redactor

    redact, count, code = Redactor(()), Counter[str](), EXIT_OK
    is_colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    async for status, name, text in _findings(screen, image or (), management_url, ask=ask):
        count[status] += 1
        if status == "failed":
            code = max(code, EXIT_CONFIG if name == "settings" else EXIT_FAILURE)
        mark = typer.style(MARKS[status], fg=COLORS[status]) if is_colored else MARKS[status]
        found = {"check": name, "status": status, "message": redact(text)}
        screen.emit(found, f"{mark} {name}: {redact(text)}")
    texts = {**{it: f"{count[it]} {it}" for it in MARKS}, "warning": counted(count["warning"], "warning")}
    screen.note(", ".join(texts[it] for it in MARKS if count[it]))
    return code


async def _findings(
    screen: Screen, images: Sequence[str], management_url: str | None, *, ask: bool
) -> AsyncIterator[Finding]:
    """Check the settings, then all dependencies; with wrong settings only RabbitMQ, if it can be checked."""
    from worker.settings import BrokerSettings, Settings, SettingsError, load_broker_settings, load_settings

    settings: Settings | None = None
    broker_settings: BrokerSettings
    try:
        settings = broker_settings = screen.load(load_settings, is_quiet=True)
        yield ok("settings", "valid")
        for text in settings.warnings():
            yield warning("settings", text)
    except SettingsError as error:
        for fault in error.faults:
            yield failed("settings", fault)
        try:
            broker_settings = screen.load(load_broker_settings, is_quiet=True)
        except SettingsError:
            return
    from worker.cli.check.broker import broker_findings
    from worker.cli.check.policies import policy_findings

    broker = broker_of(broker_settings)
    checks = [broker_findings(broker_settings, broker, screen.timeout_s)]
    if management_url:
        checks.append(policy_findings(broker_settings, broker, management_url, screen.timeout_s))
    if settings is not None:
        from worker.cli.check.api import api_findings
        from worker.cli.check.storage import storage_findings

        checks += [storage_findings(settings, images), api_findings(settings, ask=ask)]
    for findings in checks:
        async for finding in findings:
            yield finding
