"""Screenshots for the documentation: what a terminal shows after a program's output, as SVG."""

import sys
from pathlib import Path

from docs.draw_screenshots import Terminal, run, to_svg


def shown(output: str, columns: int = 80) -> list[str]:
    terminal = Terminal(columns)
    terminal.write(output)
    return terminal.text().plain.split("\n")


def test_a_terminal_shows_the_last_state_of_a_progress_bar() -> None:
    assert shown("1/3\r\n\x1b[2K\r\x1b[1A\x1b[2K2/3\r\n") == ["2/3"]
    assert shown("a\r\nb\r\n\x1b[2A\x1b[2Knew\r\n\x1b[?25h") == ["new", "b"]
    assert shown("first\r\n\rS") == ["first", "S"]


def test_a_long_line_continues_on_the_next_row() -> None:
    assert shown("x" * 25 + "\r\nnext", columns=10) == ["x" * 10, "x" * 10, "x" * 5, "next"]
    assert shown("x" * 10 + "\r\nnext", columns=10) == ["x" * 10, "next"]


def test_an_svg_has_the_text_and_colors_and_refers_to_no_other_file() -> None:
    terminal = Terminal(20)
    terminal.write("\x1b[31mred\x1b[0m plain\r\n")
    svg = to_svg(terminal, "vqa-worker check", "it")
    assert all(text in svg for text in ("vqa-worker&#160;check", ">red</text>", "plain"))
    assert "url(" not in svg.replace("url(#", "")
    assert "http" not in svg.replace("http://www.w3.org", "").replace("https://www.textualize.io", "")


def test_a_command_runs_in_a_terminal_of_a_width(tmp_path: Path) -> None:
    program = tmp_path / "worker.py"
    program.write_text("import os, sys\nprint(os.get_terminal_size().columns, sys.argv[1])\n")
    terminal = run(["it"], 37, tmp_path, {"PATH": str(Path(sys.executable).parent)})
    assert terminal.text().plain == "37 it"
