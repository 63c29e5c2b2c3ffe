"""Writes the dashboard: `python -m deploy.grafana [--check]`."""

import argparse
import sys
from pathlib import Path

from deploy.grafana.build import dashboard_json

FILE = Path(__file__).with_name("vqa-worker.json")


def main(arguments: list[str] | None = None) -> int:
    """Write the file, or with `--check` only compare it. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.grafana", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is out of date")
    text = dashboard_json()
    if FILE.is_file() and FILE.read_text(encoding="utf-8") == text:
        return 0
    if parser.parse_args(arguments).check:
        sys.stderr.write("deploy/grafana/vqa-worker.json is out of date: run `make docs`\n")
        return 1
    FILE.write_text(text, encoding="utf-8")
    sys.stdout.write("wrote deploy/grafana/vqa-worker.json\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
