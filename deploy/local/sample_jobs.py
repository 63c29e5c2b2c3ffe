"""`python -m deploy.local.sample_jobs`: ask a running worker about sample images.

Uses the broker and the S3 server that the worker's environment variables name.
"""

import asyncio
import base64
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from deploy.local.external import IncompleteConfigurationError, external_rabbitmq, external_s3
from deploy.local.s3 import ObjectStore
from deploy.local.sample_images import sample_images
from deploy.local.terminal import print_status
from vqa_worker import (
    AsyncClient,
    BrokerRefusedError,
    BrokerUnreachableError,
    NoSuchQueueError,
    ReplyLostError,
    Result,
)

ANSWER_TIMEOUT_S = 180.0
KEY_PREFIX = "vqa-demo"

console = Console()


class JobsUnansweredError(RuntimeError):
    """Not all jobs were answered; the message says why."""


def main() -> int:
    """Ask, and show the answers; return the exit code."""
    try:
        rabbitmq, s3 = external_rabbitmq(os.environ), external_s3(os.environ)
        if rabbitmq is None or s3 is None:
            print_status("Set VQA_RABBITMQ_URL and VQA_S3_ENDPOINT_URL to the values of the worker.")
            return 1
        ask(rabbitmq.url, os.environ.get("VQA_JOBS_QUEUE") or "vqa.jobs", s3)
    except (IncompleteConfigurationError, JobsUnansweredError) as error:
        print_status(str(error))
        return 1
    return 0


def ask(rabbitmq_url: str, jobs_queue: str, s3: ObjectStore) -> None:
    """Upload the sample images, submit jobs about them, and print the results.

    Raises:
        JobsUnansweredError: The broker is unreachable, or a job was not answered in time.
    """
    jobs = _upload(s3)
    try:
        results = asyncio.run(_results(rabbitmq_url, jobs_queue, jobs))
    except TimeoutError:
        raise JobsUnansweredError("Not all jobs were answered in time: does a worker run?") from None
    except (BrokerUnreachableError, BrokerRefusedError, NoSuchQueueError, ReplyLostError) as error:
        raise JobsUnansweredError(str(error)) from None
    for job in jobs:
        _print(job, results[job["id"]])
    console.print(_summary(list(results.values())), highlight=False)


def _print(job: Mapping[str, Any], result: Result) -> None:
    """Print the question, the answer or error, and what they cost."""
    console.print(f"\n[bold]{job['metadata']['name']}[/bold]: {job['question']}", highlight=False)
    answer, style = (
        (str(result.answer), "green")
        if result.error is None
        else (f"{result.error.code}: {result.error.message}", "red")
    )
    console.print(Padding(Text(answer, style), (0, 0, 0, 3)))
    usage = result.usage
    figures = f"{usage.total_tokens or 0} tokens, {usage.cost_usd or 0:.6f} USD, " if usage else ""
    console.print(f"   {figures}{result.timings.total_s:.2f} s", style="dim", highlight=False)


def _summary(results: Sequence[Result]) -> str:
    succeeded = sum(result.error is None for result in results)
    usages = [result.usage for result in results if result.usage]
    tokens = sum(usage.total_tokens or 0 for usage in usages)
    cost_usd = sum(usage.cost_usd or 0 for usage in usages)
    failed = f", {len(results) - succeeded} failed (its image is missing)" if succeeded < len(results) else ""
    return f"\n{succeeded} jobs succeeded{failed}. {tokens} tokens, {cost_usd:.6f} USD."


def _upload(s3: ObjectStore) -> list[dict[str, Any]]:
    """Upload the images; return the jobs."""
    client = s3.client()
    prefix = f"s3://{s3.bucket}/{KEY_PREFIX}"
    samples = sample_images()
    for sample in samples:
        client.put_object(Bucket=s3.bucket, Key=f"{KEY_PREFIX}/{sample.name}", Body=sample.content)
    client.close()
    console.print(f"[bold]Uploaded[/bold] {len(samples)} images to {prefix}/")
    sign = next(sample.content for sample in samples if sample.name == "street-sign.png")
    data_url = f"data:image/png;base64,{base64.b64encode(sign).decode()}"
    return [
        *(_job(sample.name, sample.question, f"{prefix}/{sample.name}") for sample in samples),
        _job("two images", "Which shows the sea?", f"{prefix}/chart.png", f"{prefix}/seascape.jpg"),
        _job("inline image", "What do the signs say?", data_url),
        _job("missing image", "What is this?", f"{prefix}/missing.jpg"),
    ]


def _job(name: str, question: str, *images: str) -> dict[str, Any]:
    return {
        "id": f"demo-{uuid.uuid4().hex[:8]}",
        "question": question,
        "images": list(images),
        "params": {"max_tokens": 200},
        "metadata": {"name": name},
    }


async def _results(
    rabbitmq_url: str, jobs_queue: str, jobs: Sequence[Mapping[str, Any]]
) -> dict[str | None, Result]:
    """Submit the jobs and return their results by id."""
    console.print(f"[bold]Submitting[/bold] {len(jobs)} jobs to the queue {jobs_queue}")
    with console.status("Waiting for the answers"):
        async with AsyncClient(rabbitmq_url, jobs_queue=jobs_queue, replies="exclusive") as client:
            results = client.ask_many(jobs, timeout=ANSWER_TIMEOUT_S)
            return {result.id: result async for result in results}


if __name__ == "__main__":
    sys.exit(main())
