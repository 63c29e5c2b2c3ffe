"""The same worker with FastStream: a subscriber and publisher with pydantic models.

It follows the documentation: `RabbitQueue` of the quorum type, prefetch on the default channel, the result
returned to `@broker.publisher`. Its command line uses `uvloop` if installed. Logging per message, on by
default, is disabled.
"""

import asyncio
import base64
import os
from typing import Any

import boto3
import uvloop
from botocore.config import Config
from faststream import AckPolicy, FastStream
from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue
from openai import AsyncOpenAI
from pydantic import BaseModel

CONCURRENCY = int(os.environ["CONCURRENCY"])

s3 = boto3.client(
    "s3",
    endpoint_url=os.environ["S3_ENDPOINT_URL"],
    config=Config(signature_version="s3v4", max_pool_connections=CONCURRENCY),
)
model = AsyncOpenAI(base_url=os.environ["MODEL_BASE_URL"], api_key=os.environ["MODEL_API_KEY"])
broker = RabbitBroker(
    os.environ["RABBITMQ_URL"], default_channel=Channel(prefetch_count=CONCURRENCY), logger=None
)
jobs = RabbitQueue(os.environ["JOBS_QUEUE"], queue_type=QueueType.QUORUM, durable=True)
results = RabbitQueue(os.environ["RESULTS_QUEUE"], queue_type=QueueType.QUORUM, durable=True)


class Job(BaseModel):
    id: str
    question: str
    images: list[str]


class Result(BaseModel):
    id: str
    answer: str | None


def data_url(url: str) -> str:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    answer = s3.get_object(Bucket=bucket, Key=key)
    encoded = base64.b64encode(answer["Body"].read()).decode()
    return f"data:{answer['ContentType']};base64,{encoded}"


@broker.subscriber(jobs, ack_policy=AckPolicy.NACK_ON_ERROR)
@broker.publisher(results, persist=True)
async def answer(job: Job) -> Result:
    content: list[dict[str, Any]] = [{"type": "text", "text": job.question}]
    for image in job.images:
        url = await asyncio.to_thread(data_url, image)
        content.append({"type": "image_url", "image_url": {"url": url}})
    completion = await model.chat.completions.create(
        model=os.environ["MODEL"],
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc] # built above as dicts
    )
    return Result(id=job.id, answer=completion.choices[0].message.content)


if __name__ == "__main__":
    uvloop.run(FastStream(broker, logger=None).run())
