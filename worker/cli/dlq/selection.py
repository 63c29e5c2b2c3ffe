"""The arguments and options that select dead letters."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final

import typer

from worker.cli.times import parse_time

if TYPE_CHECKING:
    from worker.rabbitmq.dead_letter_record import DeadLetter

# A shorter prefix could match by accident.
MIN_PREFIX_CHARS: Final = 4
ID_HELP: Final = "Job id, or the NAME printed by `dlq list`."


_filter = partial(typer.Option, rich_help_panel="Filters")
_time = partial(_filter, metavar="TIME", parser=partial(parse_time, from_now=-1))


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
        _time(help="Dead-lettered at this time or later: 2h (ago), 2030-01-31 or an RFC 3339 time."),
    ] = None
    until: Annotated[datetime | None, _time(help="Dead-lettered before this time.")] = None
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Maximum number of messages.")] = None

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
