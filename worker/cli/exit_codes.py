"""The exit codes of all commands; `docs/cli.md` describes them."""

from typing import Final

EXIT_OK: Final = 0
# Something failed: a job, a check, a dependency, a confirmation that was declined.
EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2
# sysexits.h: EX_CONFIG. Wrong settings, or credentials or permissions that RabbitMQ or S3 refuse.
EXIT_CONFIG: Final = 78
# 128 + SIGINT and 128 + SIGPIPE, as shells report them.
EXIT_INTERRUPTED: Final = 130
EXIT_CLOSED_PIPE: Final = 141
