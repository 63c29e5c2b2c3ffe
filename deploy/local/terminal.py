"""How the commands here talk to a person, and end when they are told to."""

import sys
from types import FrameType


def print_status(line: str) -> None:
    """Print a line beside the output proper."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def raise_keyboard_interrupt(_number: int, _frame: FrameType | None) -> None:
    """A signal handler: end as with Ctrl-C."""
    raise KeyboardInterrupt
