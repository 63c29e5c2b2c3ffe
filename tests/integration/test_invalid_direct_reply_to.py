"""Invalid direct reply-to names, for some of which RabbitMQ closes the connection."""

import uuid
from typing import Any

from tests.conftest import MakeClient, StartWorker
from tests.running import until


async def test_an_invalid_direct_reply_to_blocks_neither_the_worker_nor_its_stop(
    start_worker: StartWorker, client_of: MakeClient
) -> None:
    worker = await start_worker()
    client = await client_of(worker)
    job_id = uuid.uuid4().hex
    job: dict[str, Any] = {"question": "What is it?", "images": ["https://example.com/a.png"]}
    await client.publish({"id": job_id, **job}, reply_to="amq.rabbitmq.reply-to.made-up.name")

    # RabbitMQ 3.10 closes the connection each time; newer versions may drop the message.
    await until(lambda: worker.metric("vqa_jobs_total", status="succeeded") >= 1, "the job ends")
    for reply in client.replies.get(job_id, []):
        assert reply.message.headers["vqa-undeliverable-to"] == "amq.rabbitmq.reply-to.made-up.name"
    assert (await client.ask(**job)).body["status"] == "succeeded"
    assert await worker.stop() == 0
