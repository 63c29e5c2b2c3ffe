"""The client's distribution matches the worker's, which contains the same package."""

import tomllib
from typing import Any

import vqa_worker
from tests.running import ROOT
from worker import __version__


def _dependencies(file: str) -> set[str]:
    return set(_project(file)["dependencies"])


def _project(file: str) -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / file).read_text())["project"]
    return project


def test_both_distributions_have_one_version() -> None:
    assert vqa_worker.__version__ == __version__


def test_the_client_requires_a_part_of_what_the_worker_requires() -> None:
    extras = _project("vqa_worker/pyproject.toml")["optional-dependencies"]
    wanted = _dependencies("vqa_worker/pyproject.toml").union(*extras.values())
    assert wanted < _dependencies("pyproject.toml")
