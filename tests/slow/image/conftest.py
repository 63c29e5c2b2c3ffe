import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.slow.image.engine import ROOT, Engine, an_engine, run

IMAGE = "localhost/vqa-worker:under-test"
SIMULATOR_IMAGE = "localhost/vqa-model-simulator:under-test"
INSIDE = Path(__file__).with_name("inside.py")


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """Docker or Podman; remove all containers and images at the end."""
    with an_engine() as engine:
        yield engine


@pytest.fixture(scope="session")
def image(engine: Engine) -> Iterator[str]:
    """The worker's image, built by `make image`."""
    run(
        "make",
        "image",
        f"ENGINE={' '.join(engine.command)}",
        f"BUILD_FLAGS={' '.join(engine.build_flags)}",
        f"IMAGE={IMAGE}",
    )
    yield IMAGE
    engine("rmi", "--force", IMAGE)


@pytest.fixture(scope="session")
def simulator_image(engine: Engine) -> Iterator[str]:
    """The model simulator's image, built as by Compose."""
    dockerfile = str(ROOT / "deploy" / "compose" / "Dockerfile")
    engine("build", *engine.build_flags, "--file", dockerfile, "--tag", SIMULATOR_IMAGE, str(ROOT))
    yield SIMULATOR_IMAGE
    engine("rmi", "--force", SIMULATOR_IMAGE)


@pytest.fixture(scope="session")
def config(engine: Engine, image: str) -> dict[str, Any]:
    """The configuration of the image."""
    config = json.loads(engine("inspect", "--type=image", image))[0]["Config"]
    assert isinstance(config, dict)
    return config


@pytest.fixture(scope="session")
def inside(engine: Engine, image: str) -> dict[str, Any]:
    """The properties of the image that `inside.py` prints in a container."""
    flags = (f"--volume={INSIDE}:/inside.py:ro", "--entrypoint=python")
    done = subprocess.run(
        engine.start(image, "/inside.py", flags=flags), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="session")
def services() -> dict[str, Any]:
    """The services of `deploy/compose.yaml`."""
    found = YAML(typ="safe").load(ROOT / "deploy" / "compose.yaml")["services"]
    assert isinstance(found, dict)
    return found
