"""Jobs as publishers send them, through a real worker, broker, S3 and the stand-in model."""

import uuid

from deploy.local.stack import Stack
from deploy.local.standin.behaviour import Error
from tests.conftest import PutImage
from tests.running import Client


async def test_a_job_in_the_short_form_is_answered(client: Client, put_image: PutImage) -> None:
    reply = await client.ask(question="What is in this image?", images=[put_image()], metadata={"order": 7})

    assert reply.body["status"] == "succeeded"
    assert "PNG" in reply.body["answer"]
    assert reply.body["metadata"] == {"order": 7}
    assert reply.body["error"] is None
    assert reply.body["usage"]["prompt_tokens"] > 0
    assert reply.message.content_type == "application/json"
    assert reply.message.type == "vqa.result.v1"


async def test_a_fault_that_passes_is_tried_again(client: Client, stack: Stack, put_image: PutImage) -> None:
    marker = uuid.uuid4().hex
    stack.model.play(Error(status=500), marker=marker)
    reply = await client.ask(question=f"{marker}?", images=[put_image()])

    assert reply.body["status"] == "succeeded"
    assert reply.body["attempts"] == 2
