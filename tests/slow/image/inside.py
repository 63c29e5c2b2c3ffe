"""Run in the image with its Python, and print its properties as JSON."""

import errno
import importlib
import importlib.util
import json
import os
import pkgutil
import ssl
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import botocore.session

import worker

# Virtual file systems of the kernel.
KERNELS = ("/dev", "/proc", "/sys")
EXTRAS = ("opentelemetry",)
SOURCES_OF_CREDENTIALS = ("s3", "signin", "sso", "sso-oidc", "sts")


def main() -> None:
    """Print all properties."""
    for module in pkgutil.walk_packages(worker.__path__, "worker."):
        if not module.name.endswith("__main__"):
            _load(module.name)
    found = {
        "python": sys.version,
        "user": [os.getuid(), os.getgid()],
        "groups": os.getgroups(),
        "process": _of_process(),
        "distributions": [(it.name, it.version) for it in distributions()],
        "foreign_modules": sorted(_foreign_modules()),
        "commands": sorted(path.name for path in Path(sys.prefix, "bin").iterdir()),
        "not_compiled": sorted(str(path) for path in _sources() if not _is_compiled(path)),
        "attempts_to_write": dict(_attempts_to_write()),
        "writable_to_the_user": sorted(_writable_to_the_user()),
        "authorities": len(ssl.create_default_context().get_ca_certs()),
        "megabytes": _megabytes(),
        "clients": [_client(service) for service in SOURCES_OF_CREDENTIALS],
    }
    print(json.dumps(found))  # noqa: T201


def _load(module: str) -> None:
    """Import a module of the worker, unless it requires an extra, which the image does not have."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise


def _of_process() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines)
    return {name: value.strip() for name, value in pairs if name.startswith("Cap") or name == "NoNewPrivs"}


def _foreign_modules() -> Iterator[str]:
    """Yield loaded modules outside the image's packages and the standard library."""
    own, standard = sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")
    for name, module in sys.modules.items():
        file = getattr(module, "__file__", None)
        if file and file != __file__ and not (file.startswith(own) or _is_in(standard, file)):
            yield f"{name} {file}"


def _is_in(standard: str, file: str) -> bool:
    return file.startswith(f"{standard}/") and "-packages/" not in file


def _sources() -> Iterator[Path]:
    """Yield all modules of the packages, and the loaded ones of the standard library."""
    yield from Path(sysconfig.get_path("purelib")).rglob("*.py")
    for module in sys.modules.values():
        file = getattr(module, "__file__", None)
        if file and file.endswith(".py") and _is_in(sysconfig.get_path("stdlib"), file):
            yield Path(file)


def _is_compiled(source: Path) -> bool:
    compiled = Path(importlib.util.cache_from_source(str(source)))
    # Bytes 4 to 7: 1 means unchecked hash-based (PEP 552).
    return compiled.exists() and compiled.read_bytes()[4:8] == b"\x01\x00\x00\x00"


def _folders() -> Iterator[Path]:
    for folder, below, _ in os.walk("/"):
        below[:] = [name for name in below if str(Path(folder, name)) not in KERNELS]
        yield Path(folder)


def _attempts_to_write() -> Counter[str]:
    """Count the results of creating a file in every folder."""
    results = Counter[str]()
    for folder in _folders():
        try:
            (folder / ".probe").touch()
            results[f"wrote to {folder}"] += 1
        except OSError as error:
            results[errno.errorcode[error.errno or 0]] += 1
    return results


def _writable_to_the_user() -> Iterator[str]:
    """Yield files that the user could change if the root file system were writable."""
    for path in (Path(sys.prefix), *Path(sys.prefix).rglob("*")):
        status = path.lstat()
        if not path.is_symlink() and (status.st_uid == os.getuid() or status.st_mode & 0o022):
            yield str(path)


def _megabytes() -> dict[str, float]:
    """Return the size of the image's files by kind."""
    sizes = Counter[str]()
    for path in Path(sys.prefix).rglob("*"):
        if path.is_file() and not path.is_symlink():
            sizes[_kind(path)] += path.stat().st_size
    for path in Path(sysconfig.get_path("stdlib")).rglob("*.pyc"):
        sizes["standard library"] += path.stat().st_size
    return {kind: size / 1e6 for kind, size in sizes.items()}


def _kind(path: Path) -> str:
    if ".so" in path.suffixes:
        return "native"
    return {".pyc": "compiled", ".py": "sources"}.get(path.suffix, "data")


def _client(service: str) -> str:
    client = botocore.session.get_session().create_client(
        service, region_name="eu-west-1", aws_access_key_id="nobody", aws_secret_access_key="nobody"
    )
    return str(client.meta.service_model.service_name)


main()
