"""The arguments and options that select dead letters."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from worker.cli import times
from worker.cli.shell import count

if TYPE_CHECKING:
    from worker.rabbitmq.dead_letter_record import DeadLetter

# A shorter prefix could match by accident.
MIN_PREFIX_CHARS: Final = 4
ID_HELP: Final = "Job id, or the NAME printed by `dlq list`."


def parse_time(text: str) -> datetime:
    """Parse `2h` (ago; s, m, h, d, w), `2030-01-31` (UTC) or an RFC 3339 time.

    Raises:
        BadParameter: the text has another form.
    """
    try:
        return times.parse_time(text, from_now=-1)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.") from None


def _filter(*names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Filters", **more)


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Conditions on dead letters: all that are given must match; of several values of one, any."""

    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", show_default=False, help=ID_HELP)] = None
    codes: Annotated[list[str] | None, _filter("--code", metavar="GLOB", help="Filter by error code.")] = None
    models: Annotated[
        list[str] | None,
        _filter(
            "--model",
            metavar="GLOB",
            help="Filter by model. `default` matches jobs without a model, `unknown` matches unreadable"
            " messages.",
        ),
    ] = None
    since: Annotated[
        datetime | None,
        _filter(
            "--since",
            metavar="TIME",
            parser=parse_time,
            help="Dead-lettered at this time or later: 2h (ago), 2030-01-31 or an RFC 3339 time.",
        ),
    ] = None
    until: Annotated[
        datetime | None,
        _filter("--until", metavar="TIME", parser=parse_time, help="Dead-lettered before this time."),
    ] = None
    limit: Annotated[
        int | None, typer.Option(metavar="N", parser=count, help="Maximum number of messages.")
    ] = None

    @property
    def matches_all(self) -> bool:
        """Whether no condition is given."""
        return not (self.codes or self.models or self.ids or self.since or self.until)

    def __contains__(self, dead_letter: "DeadLetter") -> bool:
        return (
            _matches(dead_letter.code, self.codes)
            and _matches(dead_letter.model, self.models)
            and (not self.ids or any(matches_id(dead_letter, name) for name in self.ids))
            and self._is_in_range(dead_letter.died_at)
        )

    def _is_in_range(self, died_at: datetime | None) -> bool:
        """Return whether the time matches; an unknown time matches only without `since` and `until`."""
        if died_at is None:
            return self.since is None and self.until is None
        return (self.since is None or died_at >= self.since) and (self.until is None or died_at <= self.until)


def matches_id(dead_letter: "DeadLetter", name: str) -> bool:
    """Return whether `name` is the job's id, or the dead letter's name or a prefix of it."""
    return dead_letter.job_id == name or (len(name) >= MIN_PREFIX_CHARS and dead_letter.name.startswith(name))


def _matches(text: str, globs: Sequence[str] | None) -> bool:
    return not globs or any(fnmatchcase(text, glob) for glob in globs)
