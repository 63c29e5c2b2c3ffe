"""Writes the files beside this, or those for names of your own."""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

from deploy.rabbitmq.files import Place, files
from worker.rabbitmq.topology import Topology
from worker.settings import BrokerSettings, SettingsError, load_broker_settings

HERE = Path(__file__).parent
PLACE = Place(vhost="vqa", cluster="rabbitmq")
# The worker's settings with which it can do without the default exchange.
STRICT = {"VQA_REPLY_EXCHANGE": "vqa.replies", "VQA_JOBS_EXCHANGE": "vqa.jobs.back"}
# With them it would try direct replies in vain.
STRICT_SETTINGS = {
    **STRICT,
    "VQA_ALLOWED_REPLY_TO": "vqa.results,vqa.results.*,amq.gen-*",
    "VQA_DECLARE_TOPOLOGY": "false",
}


def topology_with(settings: Mapping[str, str]) -> Topology:
    """As these settings say, and no others."""
    with patch.dict(os.environ, settings, clear=True):
        return Topology.from_settings(BrokerSettings(_env_file=None))


def own_files() -> Mapping[Path, str]:
    """The files of this folder: for the default settings, and below `strict` for those that need least."""
    folders = {HERE: topology_with({}), HERE / "strict": topology_with(STRICT)}
    return {
        folder / name: text
        for folder, topology in folders.items()
        for name, text in files(topology, PLACE).items()
    }


def outdated(wanted: Mapping[Path, str]) -> list[Path]:
    """Those that are missing or say something else."""
    return [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]


def main(arguments: list[str] | None = None) -> int:
    """Write them, or with `--check` only compare; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.rabbitmq", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if one is out of date")
    parser.add_argument(
        "--into",
        type=Path,
        metavar="FOLDER",
        help="write files there for the names that VQA_JOBS_QUEUE and the like say in the environment",
    )
    parser.add_argument("--vhost", default=PLACE.vhost, help="with --into: the virtual host (%(default)s)")
    parser.add_argument(
        "--cluster", default=PLACE.cluster, help="with --into: the RabbitmqCluster (%(default)s)"
    )
    given = parser.parse_args(arguments)
    try:
        wanted = _wanted(given)
    except SettingsError as error:
        sys.stderr.writelines(f"{fault}\n" for fault in error.faults)
        return 78
    paths = outdated(wanted)
    if given.check:
        sys.stderr.writelines(f"{path} is out of date: run python -m deploy.rabbitmq\n" for path in paths)
        return 1 if paths else 0
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path])
        sys.stdout.write(f"wrote {path}\n")
    return 0


def _wanted(given: argparse.Namespace) -> Mapping[Path, str]:
    if given.into is None:
        return own_files()
    topology = Topology.from_settings(load_broker_settings())
    place = Place(vhost=given.vhost, cluster=given.cluster)
    return {given.into / name: text for name, text in files(topology, place).items()}


if __name__ == "__main__":
    sys.exit(main())
