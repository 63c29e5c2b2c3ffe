"""A minimal worker with aio-pika.

It follows the documentation of aio-pika (a callback with `message.process()`, prefetch on the channel), boto3
(one client for all threads) and the openai SDK (one client, `chat.completions.create` with a data URL).
"""

import asyncio
import base64
import json
import os
from typing import Any

import aio_pika
import boto3
import uvloop
from aio_pika.abc import AbstractExchange, AbstractIncomingMessage
from botocore.config import Config
from openai import AsyncOpenAI

CONCURRENCY = int(os.environ["CONCURRENCY"])
AS_LINK = os.environ.get("IMAGE_DELIVERY") == "link"

s3 = boto3.client(
    "s3",
    endpoint_url=os.environ["S3_ENDPOINT_URL"],
    config=Config(signature_version="s3v4", max_pool_connections=CONCURRENCY),
)
model = AsyncOpenAI(base_url=os.environ["MODEL_BASE_URL"], api_key=os.environ["MODEL_API_KEY"])


def image_url(url: str) -> str:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if AS_LINK:
        return s3.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=3600)
    answer = s3.get_object(Bucket=bucket, Key=key)
    encoded = base64.b64encode(answer["Body"].read()).decode()
    return f"data:{answer['ContentType']};base64,{encoded}"


async def answer(job: dict[str, Any]) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": job["question"]}]
    for image in job["images"]:
        # Presigning needs no request.
        url = image_url(image) if AS_LINK else await asyncio.to_thread(image_url, image)
        content.append({"type": "image_url", "image_url": {"url": url}})
    completion = await model.chat.completions.create(
        model=os.environ["MODEL"],
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc] # built above as dicts
    )
    return {"id": job["id"], "answer": completion.choices[0].message.content}


async def work(message: AbstractIncomingMessage, exchange: AbstractExchange) -> None:
    async with message.process():
        result = await answer(json.loads(message.body))
        await exchange.publish(
            aio_pika.Message(json.dumps(result).encode(), delivery_mode=aio_pika.DeliveryMode.PERSISTENT),
            routing_key=os.environ["RESULTS_QUEUE"],
        )


async def main() -> None:
    connection = await aio_pika.connect_robust(os.environ["RABBITMQ_URL"])
    async with connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=CONCURRENCY)
        quorum = {"x-queue-type": "quorum"}
        jobs = await channel.declare_queue(os.environ["JOBS_QUEUE"], durable=True, arguments=quorum)
        await channel.declare_queue(os.environ["RESULTS_QUEUE"], durable=True, arguments=quorum)
        exchange = channel.default_exchange
        await jobs.consume(lambda message: work(message, exchange))
        await asyncio.Future()


if __name__ == "__main__":
    uvloop.run(main())
