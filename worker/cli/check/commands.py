"""The command `vqa-worker check`."""

from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.check.finding import Finding, Report, Status, failed, ok, warning
from worker.cli.exit_codes import EXIT_CONFIG, EXIT_FAILURE, EXIT_OK
from worker.cli.shell import Screen, add, broker_of

if TYPE_CHECKING:
    from worker.settings import BrokerSettings, Settings


def register(app: typer.Typer) -> None:
    """Add `check`."""
    add(app, "check", check)


async def check(
    screen: Screen,
    image: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Test read access to this image: s3://bucket/key; repeatable."),
    ] = None,
    ask: Annotated[
        bool, typer.Option("--ask", help="Also send one test request to the model (billed).")
    ] = False,
) -> int:
    """Check the configuration and every dependency, and suggest a fix for each problem.

        vqa-worker check
        vqa-worker check --image s3://photos/2030/table.jpg --ask
        vqa-worker check --json | jq 'select(.status == "failed")'

    Consumes no job, publishes no message, creates no queue. Writes and deletes one test object in the result
    store, if configured. Exit codes: 0 success or warnings only, 1 a check failed, 78 invalid configuration.
    """
    report = Report(screen)
    settings, broker_settings = _settings(screen, report)
    if broker_settings is not None:
        from worker.cli.check.broker import broker_findings

        await _add_all(report, broker_findings(broker_settings, broker_of(broker_settings), screen.timeout_s))
    if settings is not None:
        from worker.cli.check.api import api_findings
        from worker.cli.check.storage import storage_findings

        await _add_all(report, storage_findings(settings, image or ()))
        await _add_all(report, api_findings(settings, ask=ask))
    report.print_summary()
    if settings is None:
        return EXIT_CONFIG
    return EXIT_FAILURE if report.count[Status.FAILED] else EXIT_OK


async def _add_all(report: Report, findings: AsyncIterator[Finding]) -> None:
    async for finding in findings:
        report.add(finding)


def _settings(screen: Screen, report: Report) -> "tuple[Settings | None, BrokerSettings | None]":
    """Load all settings; if one is wrong, at least the settings of the broker."""
    from worker.settings import SettingsError, load_broker_settings, load_settings

    texts: list[str] = []

    def quietly(load: Any, **given: Any) -> Any:
        settings = load(**given)
        texts[:] = settings.warnings() if load is load_settings else []
        # `Screen.load` would print these findings too.
        settings.unknown_variables.clear()
        return settings

    try:
        settings = screen.load(partial(quietly, load_settings))
    except SettingsError as error:
        for fault in error.faults:
            report.add(failed("settings", fault))
    else:
        report.add(ok("settings", "valid"))
        for text in texts:
            report.add(warning("settings", text))
        return settings, settings
    try:
        return None, screen.load(partial(quietly, load_broker_settings))
    except SettingsError:
        return None, None
