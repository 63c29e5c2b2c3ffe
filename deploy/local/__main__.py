"""`python -m deploy.local`: run the local stack in the foreground until Ctrl-C.

Prints the environment variables with which the worker uses it.
"""

import shlex
import signal
import sys
import time

from deploy.local.stack import Stack
from deploy.local.terminal import print_status, raise_keyboard_interrupt

_CHECK_SECONDS = 0.5


def main() -> int:
    """Run the stack; return the exit code."""
    # Also if they were ignored before, as in the background of a script.
    signal.signal(signal.SIGINT, raise_keyboard_interrupt)
    signal.signal(signal.SIGTERM, raise_keyboard_interrupt)
    print_status("Starting the local stack …")
    try:
        with Stack.start(on_progress=print_status) as stack:
            return _run(stack)
    except KeyboardInterrupt:
        return 0
    except RuntimeError as error:
        print_status(str(error))
        return 1


def _run(stack: Stack) -> int:
    for name, value in stack.environment().items():
        print(f"export {name}={shlex.quote(value)}")
    sys.stdout.flush()
    print_status(
        f"Ready. Bucket: {stack.s3.bucket}. RabbitMQ management: {stack.rabbitmq.management_url}\n"
        "Paste the lines above into another shell to use the stack. Ctrl-C stops it and deletes its data."
    )
    services = {"RabbitMQ": stack.rabbitmq, "S3": stack.s3, "the model simulator": stack.model}
    while not (stopped := [name for name, service in services.items() if not service.running]):
        time.sleep(_CHECK_SECONDS)
    print_status(f"Stopped unexpectedly: {', '.join(stopped)}. Stopping the rest.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
