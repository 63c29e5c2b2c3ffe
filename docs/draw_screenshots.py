"""Draw what commands show on terminals of 80 and 200 columns: `python docs/draw_screenshots.py`.

Runs `submit`, `submissions list`, `top` and `check` in a pseudo-terminal, with two workers, on a local stack.
"""
# ruff: noqa: INP001  # a script next to the pages, not a package

import argparse
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

from deploy.local.sample_images import sample_images
from deploy.local.stack import Stack
from deploy.local.terminal import print_status
from deploy.local.worker import running_worker

ROOT: Final = Path(__file__).parent.parent
FOLDER: Final = Path(__file__).parent / "screenshots"
WIDTHS: Final = (80, 200)
ROWS: Final = 50
# Of the simulated model, and for how long `top` runs.
LATENCY_S: Final = 1.0
TOP_S: Final = 12.0
PATIENCE_S: Final = 120.0
# The large file has each job of the small one so often.
LOAD_ROUNDS: Final = 60
SETTINGS: Final = {
    "VQA_PRICES": '{"simulated/vision": [0.35, 0.4], "simulated/vision-small": [0.05, 0.1]}',
    "VQA_MAX_CONCURRENCY": "8",
}

# Read from a terminal without new output.
NOTHING: Final = b"\0"

_TOKEN: Final = re.compile(r"\x1b\[([0-9;?]*)([a-zA-Z])|(.)", re.DOTALL)
# The default template of rich loads fonts from the network.
_FONTS: Final = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)


@dataclass
class Terminal:
    """A terminal that knows the escape sequences of rich: colors, cursor up, erase line.

    Attributes:
        rows: the characters of each row, each with the escape sequences of its style.
    """

    columns: int
    rows: list[list[tuple[str, str]]] = field(default_factory=lambda: [[]])
    _row: int = 0
    _column: int = 0
    _style: str = ""

    def write(self, output: str) -> None:
        """Show the output of a program."""
        for token in _TOKEN.finditer(output):
            match token[2], token[3]:
                case "m", _:
                    self._style = "" if token[1] in ("", "0") else f"{self._style}{token[0]}"
                case "A", _:
                    self._row = max(0, self._row - int(token[1] or 1))
                case "K", _:
                    self.rows[self._row] = []
                case _, "\r":
                    self._column = 0
                case _, "\n":
                    self._feed_line()
                case _, str() as char if char.isprintable():
                    self._put(char)

    def _put(self, char: str) -> None:
        if self._column == self.columns:
            self._column = 0
            self._feed_line()
        row = self.rows[self._row]
        row += [("", " ")] * (self._column + 1 - len(row))
        row[self._column] = (self._style, char)
        self._column += 1

    def _feed_line(self) -> None:
        self._row += 1
        if self._row == len(self.rows):
            self.rows.append([])

    def text(self) -> Text:
        """Return the rows with their styles."""
        return Text.from_ansi("\n".join(map(_ansi, self.rows)).rstrip())


def _ansi(row: Sequence[tuple[str, str]]) -> str:
    spans = groupby(row, key=lambda cell: cell[0])
    return "".join(f"{style}{''.join(char for _, char in cells)}\x1b[0m" for style, cells in spans)


def to_svg(terminal: Terminal, command: str, name: str) -> str:
    """Draw a terminal with a command and its output, as an SVG without references to other files."""
    console = Console(record=True, width=terminal.columns, file=StringIO(), highlight=False)
    console.print(Text(f"$ {command}", style="bold"))
    console.print(terminal.text(), soft_wrap=True)
    svg = _FONTS.sub("", console.export_svg(title="vqa-worker", unique_id=name))
    # Some renderers drop spaces at the beginning of a text otherwise, also no-break spaces.
    return svg.replace("<svg ", '<svg xml:space="preserve" ', 1)


def run(
    arguments: Sequence[str],
    columns: int,
    folder: Path,
    environment: Mapping[str, str],
    while_running: Callable[[subprocess.Popen[bytes]], None] = lambda _: None,
) -> Terminal:
    """Run a command in a pseudo-terminal; return what it shows at the end.

    `while_running` gets the process, again and again.

    Raises:
        TimeoutError: the command does not end.
    """
    keyboard, side = pty.openpty()
    termios.tcsetwinsize(side, (ROWS, columns))
    command = [sys.executable, "-m", "worker", *arguments]
    with subprocess.Popen(  # noqa: S603 - a command of this program
        command, env=environment, cwd=folder, stdin=side, stdout=side, stderr=side
    ) as process:
        os.close(side)
        output, ends = b"", time.monotonic() + PATIENCE_S
        while some := _read(keyboard):
            output += some.removeprefix(NOTHING)
            while_running(process)
            if time.monotonic() > ends:
                process.kill()
                raise TimeoutError(f"{arguments} does not end: {output!r}")
    os.close(keyboard)
    terminal = Terminal(columns)
    terminal.write(output.decode())
    return terminal


def _read(keyboard: int) -> bytes:
    """Return what the program wrote, `NOTHING` if it wrote nothing for a moment, or b"" at the end."""
    if not select.select([keyboard], [], [], 0.2)[0]:
        return NOTHING
    try:
        return os.read(keyboard, 65536)
    except OSError:
        # Linux reports the end in this way.
        return b""


def draw(folder: Path) -> None:
    """Run the commands on a local stack and write the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as running:
        place = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="vqa-screenshots-")))
        print_status("Starting RabbitMQ, S3, the model simulator and two workers")
        stack = running.enter_context(Stack.start())
        stack.model.configure(latency=LATENCY_S)
        write_inputs(place, stack)
        workers = [
            running.enter_context(running_worker(stack, place / name, **SETTINGS)) for name in ("a", "b")
        ]
        urls = [f"--worker={worker.address}" for worker in workers]
        for columns in WIDTHS:
            take = partial(_take, folder, columns, place, environment(stack, place))
            take("submit", ["submit", "orders.csv", "--name", f"orders-{columns}", "--wait"])
            load = ("submit", "load.jsonl", "--name", f"night-shift-{columns}", "--wait", "-o", os.devnull)
            with _in_background(load, place, environment(stack, place)):
                take("top", ["top", *urls, "--worker=localhost:1"], while_running=_quitter())
                take("submissions-list", ["submissions", "list"])
                take("check", ["check"])


def write_inputs(folder: Path, stack: Stack) -> None:
    """Upload the sample images; write a file with a job for each of them, and one with many jobs."""
    samples, bucket = sample_images(), stack.s3.bucket
    with closing(stack.s3.client()) as client:
        for it in samples:
            client.put_object(Bucket=bucket, Key=f"photos/{it.name}", Body=it.content)
    rows = [(f"order-{4711 + n}", it.name, it.question) for n, it in enumerate(samples)]
    rows.append(("order-4799", "missing.jpg", "Is the parcel damaged?"))
    orders = [f's3://{bucket}/photos/{image},"{question}",{order}' for order, image, question in rows]
    (folder / "orders.csv").write_text("\n".join(("image,question,id", *orders, "")))
    jobs = [
        {
            "question": question,
            "images": [f"s3://{bucket}/photos/{image}"],
            "model": stack.model_api.models[n % 3 == 0],
        }
        for n, (_, image, question) in enumerate(rows * LOAD_ROUNDS)
    ]
    (folder / "load.jsonl").write_text("".join(f"{json.dumps(job)}\n" for job in jobs))
    for worker in ("a", "b"):
        (folder / worker).mkdir()


def environment(stack: Stack, folder: Path) -> dict[str, str]:
    """Return the environment of the commands."""
    return {
        "PATH": os.environ["PATH"],
        "LANG": "C.UTF-8",
        "TERM": "xterm-256color",
        "PYTHONPATH": str(ROOT),
        "XDG_STATE_HOME": str(folder / "state"),
        **stack.environment(),
        **SETTINGS,
        "VQA_ALLOWED_BUCKETS": stack.s3.bucket,
    }


def _take(
    folder: Path,
    columns: int,
    place: Path,
    environment: Mapping[str, str],
    name: str,
    arguments: Sequence[str],
    *,
    while_running: Callable[[subprocess.Popen[bytes]], None] = lambda _: None,
) -> None:
    """Run a command and write its picture."""
    print_status(f"{name}, {columns} columns")
    shown = run(arguments, columns, place, environment, while_running)
    name = f"{name}-{columns}"
    svg = to_svg(shown, " ".join(("vqa-worker", *arguments)), name)
    (folder / f"{name}.svg").write_text(svg, encoding="utf-8")


@contextmanager
def _in_background(arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Run a command while the context lasts, and wait for its end."""
    command = [sys.executable, "-m", "worker", *arguments]
    with subprocess.Popen(  # noqa: S603 - a command of this program
        command, env=environment, cwd=folder, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield
            process.wait(PATIENCE_S)
        finally:
            process.kill()


def _quitter() -> Callable[[subprocess.Popen[bytes]], None]:
    """Return a function that interrupts a process once, as Ctrl-C does, after `TOP_S` seconds."""
    ends = time.monotonic() + TOP_S

    def press(process: subprocess.Popen[bytes]) -> None:
        nonlocal ends
        if time.monotonic() > ends:
            ends = math.inf
            process.send_signal(signal.SIGINT)

    return press


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=FOLDER, metavar="FOLDER")
    folder = parser.parse_args(arguments).to
    try:
        draw(folder)
    except (RuntimeError, TimeoutError) as error:
        print_status(str(error))
        return 1
    print_status(f"wrote {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
