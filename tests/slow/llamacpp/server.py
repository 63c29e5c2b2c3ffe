"""Run llama.cpp's server with a small model until stdin ends, and print its URL when it is ready.

`python -m tests.slow.llamacpp.server FOLDER KEY` writes the model into the folder.
"""

import sys
from pathlib import Path

import xllamacpp

from tests.slow.llamacpp.small_model import CONTEXT_TOKENS, write_model, write_projector


def main(folder: Path, key: str) -> None:
    model, projector = folder / "model.gguf", folder / "projector.gguf"
    write_model(model)
    write_projector(projector)
    options = xllamacpp.CommonParams()
    options.model.path = str(model)
    options.mmproj.path = str(projector)
    options.model_alias = {"small"}
    options.api_keys = [key]
    options.hostnames = ["127.0.0.1"]
    options.port = 0
    options.n_ctx = CONTEXT_TOKENS
    options.n_parallel = 1
    options.cpuparams.n_threads = 1
    options.warmup = False
    options.fit_params = False
    server = xllamacpp.Server(options)
    print(server.listening_address, flush=True)  # noqa: T201 - for the test
    sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
