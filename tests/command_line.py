"""Signals and log levels of the test programs with a command line."""

import logging
import signal

from deploy.local.terminal import raise_keyboard_interrupt


def set_up() -> None:
    """Raise KeyboardInterrupt on SIGINT and SIGTERM, and do not log lost broker connections."""
    for name in ("aio_pika", "aiormq"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for number in (signal.SIGINT, signal.SIGTERM):
        # Explicitly: a shell script starts background jobs with SIGINT ignored.
        signal.signal(number, raise_keyboard_interrupt)
