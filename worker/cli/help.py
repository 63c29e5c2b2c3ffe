"""Help texts: plain, at most 80 columns wide, examples unchanged, options by section."""

import re
from typing import TYPE_CHECKING, Any, Final

from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    # typer has no public name for the types of these arguments.
    _Context = Any
    _Formatter = Any
    _Base = TyperCommand
else:
    _Base = object

# typer's notation for the type of an option without a `metavar`, and for a range.
_NOTATION: Final = re.compile(r" <[^>]*>$|  \[required\]$|  \[x>=[\d.]+\]$|; x>=[\d.]+(?=\]$)")

# The section of the common options: only the help of the program describes them.
COMMON: Final = "Options for all commands"


class _Help(_Base):
    def collect_usage_pieces(self, ctx: "_Context") -> list[str]:
        """Return the arguments as `NAME`; typer writes `{NAME}`."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def format_help_text(self, ctx: "_Context", formatter: "_Formatter") -> None:  # noqa: ARG002 - typer's signature
        """Write the docstring; an indented paragraph keeps its lines."""
        for paragraph in (self.help or "").split("\n\n"):
            formatter.write_paragraph()
            with formatter.indentation():
                if paragraph.startswith("    "):
                    formatter.write("".join(f"{line}\n" for line in paragraph.split("\n")))
                else:
                    formatter.write_text(paragraph)

    def format_options(self, ctx: "_Context", formatter: "_Formatter") -> None:
        """Write a section for arguments, for options, and for each `rich_help_panel`."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            default = "Arguments" if param.param_type_name == "argument" else "Options"
            section = getattr(param, "rich_help_panel", None) or default
            if record := param.get_help_record(ctx):
                names, text = (_NOTATION.sub("", part) for part in record)
                sections.setdefault(section, []).append((names, text))
        common = sections.pop(COMMON, [])
        for title, records in (sections if ctx.parent else {**sections, COMMON: common}).items():
            with formatter.section(title):
                formatter.write_dl(records)
        if ctx.parent is not None and common:
            names = " ".join(names.split(" ")[0].rstrip(",") for names, _ in common)
            formatter.write_paragraph()
            formatter.write_text(f"{COMMON} (see vqa-worker --help): {names}")


class Command(_Help, TyperCommand):
    """A command with this help."""


class Group(_Help, TyperGroup):
    """A group of commands with this help."""

    def format_options(self, ctx: "_Context", formatter: "_Formatter") -> None:
        """Write the first line of each command's docstring, then the options."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, (self.commands[name].help or "").split("\n")[0]) for name in sorted(self.commands)]
            )
        super().format_options(ctx, formatter)

    def parse_args(self, ctx: "_Context", args: list[str]) -> list[str]:
        """Parse the arguments; none means `--help`."""
        return super().parse_args(ctx, args or ([] if ctx.resilient_parsing else ["--help"]))
