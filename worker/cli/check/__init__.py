"""`vqa-worker check`: each check yields findings."""

from functools import partial
from typing import NamedTuple


class Finding(NamedTuple):
    """A check's status and name, and a message with a fix if there is a problem.

    With a `warning` a worker still runs; what is `skipped` cannot be checked.
    """

    status: str
    check: str
    message: str


ok, warning, failed, skipped = (partial(Finding, it) for it in ("ok", "warning", "failed", "skipped"))
