"""The command itself."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.check.finding import Finding, Report, Status, failed, ok, warning
from worker.cli.shell import (
    DEFAULT_PATIENCE_S,
    EXIT_CONFIG,
    EXIT_FAILURE,
    EXIT_OK,
    Json,
    Patience,
    Screen,
    add,
    broker_of,
    read,
)

if TYPE_CHECKING:
    from worker.settings import BrokerSettings, Settings


def register(app: typer.Typer) -> None:
    """Add `check`."""
    add(app, "check", check)


async def check(
    image: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="An image to look at as the worker would: s3://bucket/key."),
    ] = None,
    ask: Annotated[
        bool, typer.Option("--ask", help="Ask the model a real question too. It costs what a question costs.")
    ] = False,
    as_json: Json = False,
    patience: Patience = DEFAULT_PATIENCE_S,
) -> int:
    """Look at every setting and at all that the worker depends on, and say what to do about it.

    - `vqa-worker check`
    - `vqa-worker check --image s3://photos/2030/table.jpg --ask`
    - `vqa-worker check --json | jq 'select(.status == "failed")'`

    Nothing is changed: no job is taken, no message published, no queue made; one small object comes and goes
    in the result store, where there is one. Ends with 0 if nothing has failed (warnings are none), 1 if
    something has, 78 if settings are wrong.
    """
    screen = Screen(as_json=as_json)
    report = Report(screen)
    settings, broker_settings = _settings(screen, report)
    if broker_settings is not None:
        from worker.cli.check.broker import broker_findings

        await _all(report, broker_findings(broker_settings, broker_of(broker_settings), patience))
    if settings is not None:
        from worker.cli.check.api import api_findings
        from worker.cli.check.storage import storage_findings

        await _all(report, storage_findings(settings, image or ()))
        await _all(report, api_findings(settings, ask=ask))
    report.end()
    if settings is None:
        return EXIT_CONFIG
    return EXIT_FAILURE if report.count[Status.FAILED] else EXIT_OK


async def _all(report: Report, findings: AsyncIterator[Finding]) -> None:
    async for finding in findings:
        report.add(finding)


def _settings(screen: Screen, report: Report) -> "tuple[Settings | None, BrokerSettings | None]":
    """All settings; where some are wrong, those of the broker, if they are not."""
    from worker.settings import SettingsError, load_broker_settings, load_settings

    try:
        settings = read(load_settings, screen)
    except SettingsError as error:
        for fault in error.faults:
            report.add(failed("settings", fault))
    else:
        report.add(ok("settings", "make sense"))
        for text in settings.warnings():
            # The others have been told by `read`.
            if text not in settings.unknown_variables:
                report.add(warning("settings", text))
        return settings, settings
    try:
        return None, read(load_broker_settings, screen)
    except SettingsError:
        return None, None
