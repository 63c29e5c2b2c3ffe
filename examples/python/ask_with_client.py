"""Ask a question about an image in S3 and print the answer.

python ask_with_client.py s3://photos/table.jpg "Which fruit is on the table?"
"""

import asyncio
import os
import sys

from vqa_worker import Client

RABBITMQ_URL = os.environ.get("VQA_RABBITMQ_URL", "amqp://guest:guest@localhost:5672/")
JOBS_QUEUE = os.environ.get("VQA_JOBS_QUEUE", "vqa.jobs")


async def main(image: str, question: str) -> None:
    async with Client(RABBITMQ_URL, jobs_queue=JOBS_QUEUE) as client:
        result = await client.ask(image, question, timeout=60)
    if result.error:
        sys.exit(f"{result.error.code}: {result.error.message}")
    print(result.answer)


asyncio.run(main(*sys.argv[1:]))
