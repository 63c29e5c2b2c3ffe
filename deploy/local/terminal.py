"""Status lines and signals of the commands here."""

import sys
from types import FrameType


def print_status(line: str) -> None:
    """Print a line to standard error."""
    print(line, file=sys.stderr, flush=True)


def raise_keyboard_interrupt(_number: int, _frame: FrameType | None) -> None:
    """Handle a signal as Ctrl-C."""
    raise KeyboardInterrupt
