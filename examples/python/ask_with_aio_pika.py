"""Ask a question about an image in S3 and print the answer, with nothing but aio-pika.

python ask_with_aio_pika.py s3://photos/table.jpg "Which fruit is on the table?"
"""

import asyncio
import json
import os
import sys
import uuid
from datetime import UTC, datetime

import aio_pika

RABBITMQ_URL = os.environ.get("VQA_RABBITMQ_URL", "amqp://guest:guest@localhost:5672/")
JOBS_QUEUE = os.environ.get("VQA_JOBS_QUEUE", "vqa.jobs")


async def main(image: str, question: str) -> None:
    job = {"id": str(uuid.uuid4()), "question": question, "images": [image]}
    async with await aio_pika.connect(RABBITMQ_URL) as connection:
        # Without on_return_raises, a job for a queue that does not exist would be lost silently.
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        # An exclusive queue with a name from the server (amq.gen-…): deleted when the connection closes.
        replies = await channel.declare_queue(exclusive=True)
        message = aio_pika.Message(
            json.dumps(job).encode(),
            message_id=job["id"],
            correlation_id=job["id"],
            reply_to=replies.name,
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            timestamp=datetime.now(UTC),
        )
        # Returns when RabbitMQ has confirmed the job.
        await channel.default_exchange.publish(message, JOBS_QUEUE, mandatory=True)
        try:
            async with asyncio.timeout(60), replies.iterator(no_ack=True) as results:
                result = json.loads((await anext(results)).body)
        except TimeoutError:
            sys.exit("no result after 60 seconds: is a worker running?")
    if result["error"]:
        sys.exit(f"{result['error']['code']}: {result['error']['message']}")
    print(result["answer"])


asyncio.run(main(*sys.argv[1:]))
