"""Questions about drawn pictures, for a worker to answer: uploaded, submitted, shown with what comes back."""

import asyncio
import base64
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractQueue
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from deploy.local.sample_images import Picture

if TYPE_CHECKING:
    from deploy.local.stack import ObjectStore

ANSWERS_TIMEOUT_S = 180.0
FOLDER_IN_BUCKET = "vqa-demo"

console = Console()


class UnansweredError(Exception):
    """Jobs were not answered in time; the message says how many."""


def upload(store: "ObjectStore", pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    """The jobs to submit, their pictures uploaded."""
    s3 = store.client()
    urls = {}
    for picture in pictures:
        key = f"{FOLDER_IN_BUCKET}/{picture.name}"
        s3.put_object(Bucket=store.bucket, Key=key, Body=picture.path.read_bytes())
        urls[picture.name] = f"s3://{store.bucket}/{key}"
    console.print(f"[bold]Uploaded[/bold] {len(urls)} pictures to s3://{store.bucket}/{FOLDER_IN_BUCKET}/")
    sign = base64.b64encode(next(p for p in pictures if p.name == "street-sign.png").path.read_bytes())
    return [
        *(_job(picture.name, picture.question, urls[picture.name]) for picture in pictures),
        _job("two pictures", "Which of the two shows the sea?", urls["chart.png"], urls["seascape.jpg"]),
        _job("in the job itself", "What do the signs say?", f"data:image/png;base64,{sign.decode()}"),
        _job("must fail", "What is this?", f"s3://{store.bucket}/{FOLDER_IN_BUCKET}/not-there.jpg"),
    ]


def _job(name: str, question: str, *images: str) -> dict[str, Any]:
    return {
        "id": f"demo-{uuid.uuid4().hex[:8]}",
        "question": question,
        "images": list(images),
        "params": {"max_tokens": 200},
        "metadata": {"name": name},
    }


async def answers(url: str, jobs_queue: str, jobs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Submit the jobs and gather their results by id, showing how far it is."""
    async with _reply_queue(url) as (channel, replies):
        for job in jobs:
            message = aio_pika.Message(
                json.dumps(job).encode(), reply_to=replies.name, timestamp=time.time(), message_id=job["id"]
            )
            await channel.default_exchange.publish(message, jobs_queue)
        console.print(f"[bold]Submitted[/bold] {len(jobs)} jobs to the queue {jobs_queue}")
        with Progress(
            TextColumn("   answered"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        ) as progress:
            task = progress.add_task("answers", total=len(jobs))
            return await _gather(replies, len(jobs), lambda: progress.advance(task))


@asynccontextmanager
async def _reply_queue(url: str) -> AsyncIterator[tuple[AbstractChannel, AbstractQueue]]:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel(on_return_raises=True)
        yield channel, await channel.declare_queue(exclusive=True)


async def _gather(
    replies: AbstractQueue, count: int, on_result: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    try:
        async with asyncio.timeout(ANSWERS_TIMEOUT_S), replies.iterator() as messages:
            async for message in messages:
                await message.ack()
                result = json.loads(message.body)
                results[result["id"]] = result
                on_result()
                if len(results) == count:
                    return results
    except TimeoutError:
        raise UnansweredError(f"Only {len(results)} of {count} jobs were answered in time.") from None
    return results


def show(jobs: Sequence[Mapping[str, Any]], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table of them."""
    table = Table(title="Questions and answers", show_lines=True, expand=True)
    table.add_column("picture", no_wrap=True)
    table.add_column("question", ratio=2)
    table.add_column("answer", ratio=5, overflow="fold")
    for heading in ("tokens", "USD", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for job in jobs:
        table.add_row(*_row(job, results[job["id"]]))
    console.print(table)


def _row(job: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[str, ...]:
    usage = result["usage"] or {}
    error = result["error"] or {}
    said = result["answer"] if result["status"] == "succeeded" else f"{error['code']}: {error['message']}"
    return (
        job["metadata"]["name"],
        job["question"],
        _escaped(said or "") if not error else f"[red]{_escaped(said)}[/red]",
        str(usage.get("total_tokens", "-")),
        f"{usage['cost_usd']:.6f}" if usage.get("cost_usd") is not None else "-",
        f"{result['timings']['total_s']:.2f}",
    )


def _escaped(text: str) -> str:
    """`text` so that rich takes its brackets for brackets."""
    return text.replace("[", r"\[")
