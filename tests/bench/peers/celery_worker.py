"""The same worker as a Celery task: `celery -A celery_worker worker --pool prefork -c 2`, or with threads.

It follows the documentation for tasks that must not be lost: quorum queues, late acks, a prefetch
multiplier of one, publisher confirms. Jobs use Celery's message protocol. The app's producer publishes the
result to the results queue, because a result backend stores results for polling callers.
"""

import base64
import functools
import os
from typing import Any

import boto3
from botocore.config import Config
from celery import Celery
from kombu import Queue
from openai import OpenAI

app = Celery("bench", broker=os.environ["RABBITMQ_URL"])
app.conf.update(
    task_queues=[Queue(os.environ["JOBS_QUEUE"], queue_arguments={"x-queue-type": "quorum"})],
    task_default_queue=os.environ["JOBS_QUEUE"],
    task_default_queue_type="quorum",
    task_default_exchange_type="topic",
    broker_transport_options={"confirm_publish": True},
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=1,
)


# Created on first use: the clients must not be shared across the fork of the pool's processes.
@functools.cache
def s3() -> Any:
    return boto3.client(
        "s3",
        endpoint_url=os.environ["S3_ENDPOINT_URL"],
        config=Config(signature_version="s3v4", max_pool_connections=int(os.environ["CONCURRENCY"])),
    )


@functools.cache
def model() -> OpenAI:
    return OpenAI(base_url=os.environ["MODEL_BASE_URL"], api_key=os.environ["MODEL_API_KEY"])


def data_url(url: str) -> str:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    answer = s3().get_object(Bucket=bucket, Key=key)
    encoded = base64.b64encode(answer["Body"].read()).decode()
    return f"data:{answer['ContentType']};base64,{encoded}"


@app.task(name="answer")
def answer(job: dict[str, Any]) -> None:
    content: list[dict[str, Any]] = [{"type": "text", "text": job["question"]}]
    content += [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in job["images"]]
    completion = model().chat.completions.create(
        model=os.environ["MODEL"],
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc] # built above as dicts
    )
    result = {"id": job["id"], "answer": completion.choices[0].message.content}
    with app.producer_or_acquire() as producer:
        producer.publish(
            result,
            routing_key=os.environ["RESULTS_QUEUE"],
            serializer="json",
            delivery_mode="persistent",
            retry=True,
        )
