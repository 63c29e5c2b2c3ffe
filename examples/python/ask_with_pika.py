"""Ask a question about an image in S3 and print the answer, with nothing but pika.

python ask_with_pika.py s3://photos/table.jpg "Which fruit is on the table?"
"""

import json
import os
import sys
import time
import uuid

import pika

RABBITMQ_URL = os.environ.get("VQA_RABBITMQ_URL", "amqp://guest:guest@localhost:5672/")
JOBS_QUEUE = os.environ.get("VQA_JOBS_QUEUE", "vqa.jobs")

image, question = sys.argv[1:]
job = {"id": str(uuid.uuid4()), "question": question, "images": [image]}

connection = pika.BlockingConnection(pika.URLParameters(RABBITMQ_URL))
channel = connection.channel()
# An exclusive queue with a name from the server (amq.gen-…): deleted when the connection closes.
reply_queue = channel.queue_declare("", exclusive=True).method.queue

# With confirms, basic_publish raises an exception if RabbitMQ does not accept the job or has no such queue.
channel.confirm_delivery()
channel.basic_publish(
    exchange="",
    routing_key=JOBS_QUEUE,
    body=json.dumps(job),
    properties=pika.BasicProperties(
        message_id=job["id"],
        correlation_id=job["id"],
        reply_to=reply_queue,
        content_type="application/json",
        delivery_mode=pika.DeliveryMode.Persistent,
        timestamp=int(time.time()),
    ),
    mandatory=True,
)

for _method, _properties, body in channel.consume(reply_queue, auto_ack=True, inactivity_timeout=60):
    if body is None:
        sys.exit("no result after 60 seconds: is a worker running?")
    result = json.loads(body)
    if result["error"]:
        sys.exit(f"{result['error']['code']}: {result['error']['message']}")
    print(result["answer"])
    break

connection.close()
