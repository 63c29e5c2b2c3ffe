"""Writes the pages of documentation that are made from the code: `python docs/generate.py [--check]`."""
# ruff: noqa: INP001  # a script beside the pages, not a package

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from worker.settings import Settings, variable

HERE: Final = Path(__file__).parent

# The settings stand in the order of the class; each title begins at the field it is given for.
SETTINGS_SECTIONS: Final = {
    "rabbitmq_url": "RabbitMQ",
    "max_attempts": "Jobs and retries",
    "s3_endpoint_url": "Images",
    "model_base_url": "Model API",
    "result_store": "Results",
    "http_host": "Process",
}

SETTINGS_INTRODUCTION: Final = """\
# Settings

<!-- Made from worker/settings.py by docs/generate.py: change that, and run it again. -->

Settings are environment variables. What the environment does not say is looked for in a file `.env` in the
working directory, then in the folder that `VQA_SECRETS_DIR` names, whose files are named as the variables and
hold one value each.

- An empty value is the same as none at all, except for `VQA_ALLOWED_REPLY_TO` and `VQA_ALLOWED_LINK_HOSTS`,
  where it says that nothing is allowed.
- Lists are separated by commas, globs know `*`, `?` and `[…]`, sizes are in bytes, times in seconds.
- Everything is checked before the first connection is made. What is wrong ends the start with exit code 78
  and one line a fault on stderr.
- A variable that begins with `VQA_` and is not listed here earns a warning at the start.
- S3 credentials and region come from the usual AWS variables, files and roles. Proxies and certificates
  follow `HTTPS_PROXY`, `NO_PROXY` and `SSL_CERT_FILE`.
"""


def settings_page() -> str:
    """The reference of all settings."""
    return SETTINGS_INTRODUCTION + "".join(_settings_lines())


def _settings_lines() -> Iterator[str]:
    for name, field in Settings.model_fields.items():
        if name in SETTINGS_SECTIONS:
            yield f"\n## {SETTINGS_SECTIONS[name]}\n\n| Variable | Default | Meaning |\n|---|---|---|\n"
        cells = (f"`{variable(name)}`", default_text(field), field.description or "")
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |\n"


def default_text(field: FieldInfo) -> str:
    """A setting's default as a user would write it, or in words where it follows from something else."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "default_text" in extra:
        return str(extra["default_text"])
    written = _written(field.default)
    return f"`{written}`" if written else "none"


def _written(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case SecretStr():
            return value.get_secret_value()
        case tuple():
            return ",".join(map(_written, value))
        case dict() if not value:
            return "{}"
    return str(value)


PAGES: Final[Mapping[str, Callable[[], str]]] = {
    "settings.md": settings_page,
}


def outdated(folder: Path) -> list[str]:
    """The pages that are missing from a folder or differ from what the code says."""
    return [name for name, page in PAGES.items() if _read(folder / name) != page()]


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def main(arguments: list[str] | None = None, folder: Path = HERE) -> int:
    """Write the pages, or with `--check` only compare them. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    names = outdated(folder)
    if parser.parse_args(arguments).check:
        sys.stderr.writelines(f"docs/{name} is out of date: run docs/generate.py\n" for name in names)
        return 1 if names else 0
    for name in names:
        (folder / name).write_text(PAGES[name](), encoding="utf-8")
        sys.stdout.write(f"wrote docs/{name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
