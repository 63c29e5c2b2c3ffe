"""Ask a question about an image and print the answer. The image is a file, or a URL of S3 or the web.

python ask_with_client.py photo.jpg "Which fruit is on the table?"
"""

import os
import sys

from vqa_worker import Client, JobFailedError, NoSuchQueueError

RABBITMQ_URL = os.environ.get("VQA_RABBITMQ_URL", "amqp://guest:guest@localhost:5672/")
JOBS_QUEUE = os.environ.get("VQA_JOBS_QUEUE", "vqa.jobs")

image, question = sys.argv[1:]
with Client(RABBITMQ_URL, jobs_queue=JOBS_QUEUE) as client:
    try:
        print(client.ask(image, question, timeout=60).raise_for_error().answer)
    except (JobFailedError, OSError, TimeoutError, NoSuchQueueError) as error:
        sys.exit(str(error))
