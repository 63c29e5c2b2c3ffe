"""Names of direct reply-to that RabbitMQ never gave, over some of which it closes the connection."""

import uuid
from typing import Any

from tests.conftest import MakeClient, StartWorker
from tests.running import until


async def test_a_made_up_direct_reply_to_stops_neither_the_worker_nor_its_end(
    start_worker: StartWorker, client_of: MakeClient
) -> None:
    worker = await start_worker()
    client = await client_of(worker)
    job_id = uuid.uuid4().hex
    job: dict[str, Any] = {"question": "What is it?", "images": ["https://example.com/a.png"]}
    await client.publish({"id": job_id, **job}, reply_to="amq.rabbitmq.reply-to.made-up.name")

    # RabbitMQ 3.10 closes the connection over it, each time; newer ones may take it and drop it.
    await until(lambda: worker.metric("vqa_jobs_total", status="succeeded") >= 1, "the job has ended")
    for reply in client.replies.get(job_id, []):
        assert reply.message.headers["vqa-undeliverable-to"] == "amq.rabbitmq.reply-to.made-up.name"
    assert (await client.ask(**job)).body["status"] == "succeeded"
    assert await worker.stop() == 0
