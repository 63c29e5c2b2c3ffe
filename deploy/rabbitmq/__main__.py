"""Write the files in this folder, or those for your own names."""

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
# With these settings the worker does not need the default exchange.
STRICT = {"VQA_REPLY_EXCHANGE": "vqa.replies", "VQA_JOBS_EXCHANGE": "vqa.jobs.back"}
STRICT_SETTINGS = {
    **STRICT,
    "VQA_ALLOWED_REPLY_TO": "vqa.results,vqa.results.*,amq.gen-*",
    "VQA_DECLARE_TOPOLOGY": "false",
}


def topology_with(settings: Mapping[str, str]) -> Topology:
    """Return the topology of these settings only."""
    with patch.dict(os.environ, settings, clear=True):
        return Topology.from_settings(BrokerSettings(_env_file=None))


def own_files() -> Mapping[Path, str]:
    """Return the files of this folder: for the default settings, and in `strict` for least privilege."""
    folders = {HERE: topology_with({}), HERE / "strict": topology_with(STRICT)}
    return {
        folder / name: text
        for folder, topology in folders.items()
        for name, text in files(topology, PLACE).items()
    }


def outdated(wanted: Mapping[Path, str]) -> list[Path]:
    """Return the files that are missing or differ."""
    return [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or with `--check` only compare them; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.rabbitmq", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if a file is out of date"
    )
    parser.add_argument(
        "--into",
        type=Path,
        metavar="FOLDER",
        help="write files to this folder for the names in the environment (VQA_JOBS_QUEUE, …)",
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
