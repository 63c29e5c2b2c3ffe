"""Warn when another model answered than the one that was asked: providers forward retired names silently."""

import re
from typing import Final

import structlog

from vqa_worker.rabbitmq.rate_limited_warnings import RateLimitedWarnings

log = structlog.get_logger(__name__)

INTERVAL_S: Final = 3600.0
# The name comes from the API.
_MAX_CHARS: Final = 200
# OpenAI docs, Models: an alias such as gpt-4o stands for a dated snapshot.
_SNAPSHOT: Final = re.compile(r"[-@:](\d{4}-\d{2}-\d{2}|\d{8}|\d{4})")


def is_same_model(asked: str, answered: str) -> bool:
    """Return whether a name means the model that was asked, but for case, path and the date of a snapshot."""
    asked, answered = asked.casefold(), answered.casefold()
    if answered == asked or answered.endswith(f"/{asked}") or asked.endswith(f"/{answered}"):
        return True
    return answered.startswith(asked) and _SNAPSHOT.fullmatch(answered[len(asked) :]) is not None


class AnsweredModels:
    """Logs substituted models: each pair once an hour."""

    def __init__(self) -> None:
        self._warnings = RateLimitedWarnings(INTERVAL_S)

    def check(self, asked: str, answered: str | None) -> None:
        """Log a warning if another model answered."""
        if answered is None or is_same_model(asked, answered):
            return
        name = answered[:_MAX_CHARS]
        if self._warnings.should_log(f"{asked} {name}", "substituted"):
            log.warning("model_substituted", model=asked, answered_model=name)
