"""`python -m deploy.local.sample_jobs`: asks a worker that runs already about a handful of pictures.

It uses the broker and the S3 server that the environment names, by the variables of the worker itself.
"""

import asyncio
import os
import sys
import tempfile
from pathlib import Path

from deploy.local.external import IncompleteConfigurationError, external_rabbitmq, external_s3
from deploy.local.sample_images import create_sample_images
from deploy.local.sample_jobs import UnansweredError, answers, show, upload
from deploy.local.terminal import print_status

_USUAL_QUEUE = "vqa.jobs"


def main() -> int:
    """Ask, and show what was answered; return the exit code."""
    try:
        with tempfile.TemporaryDirectory(prefix="vqa-ask-") as folder:
            _ask(Path(folder))
    except (IncompleteConfigurationError, UnansweredError) as error:
        print_status(str(error))
        return 1
    return 0


def _ask(folder: Path) -> None:
    rabbitmq, s3 = external_rabbitmq(os.environ), external_s3(os.environ)
    if rabbitmq is None or s3 is None:
        raise IncompleteConfigurationError(
            "Set VQA_RABBITMQ_URL and VQA_S3_ENDPOINT_URL as they are set for the worker."
        )
    jobs = upload(s3, create_sample_images(folder))
    queue = os.environ.get("VQA_JOBS_QUEUE") or _USUAL_QUEUE
    show(jobs, asyncio.run(answers(rabbitmq.url, queue, jobs)))


if __name__ == "__main__":
    sys.exit(main())
