"""Log a lasting problem once in a while, not once for every job that meets it."""

import time
from collections import OrderedDict

INTERVAL_S = 60.0
# Jobs name some of the queues, so the number of subjects has to be bounded.
MAX_SUBJECTS = 1000


class RateLimitedWarnings:
    """Decide which warnings to log: each reason once in `interval_s` seconds for each subject."""

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self._interval_s = interval_s
        # By subject: when each reason was last logged.
        self._logged: OrderedDict[str, dict[str, float]] = OrderedDict()

    def should_log(self, subject: str, reason: str) -> bool:
        """Return whether to log this reason now; a caller that gets True logs it."""
        logged, now = self._logged.setdefault(subject, {}), time.monotonic()
        if now - logged.get(reason, float("-inf")) < self._interval_s:
            return False
        logged[reason] = now
        if len(self._logged) > MAX_SUBJECTS:
            self._logged.popitem(last=False)
        return True

    def recovered(self, subject: str) -> bool:
        """Forget the subject's warnings; return whether there were any."""
        return self._logged.pop(subject, None) is not None
