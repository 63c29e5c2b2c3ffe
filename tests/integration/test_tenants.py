"""Costs and jobs by tenant on a real worker; a job cannot add a tenant."""

import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.model_simulator.behavior import Error
from deploy.local.stack import Stack
from tests.conftest import StartWorker
from tests.running import Client, Worker, until
from worker.observability.tenants import Tenants

LINK = "https://example.com/x.png"


def _by(worker: Worker, name: str, *labels: str) -> dict[tuple[str, ...], float]:
    """Return a metric's samples by the values of some labels, without those that are 0."""
    families = text_string_to_metric_families(worker.get("/metrics")[1])
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return {tuple(it.labels[label] for label in labels): it.value for it in samples if it.value}


async def test_jobs_tokens_and_costs_are_counted_by_tenant(stack: Stack, tmp_path: Path) -> None:
    first, second = stack.model.models
    async with (
        Worker.running(stack, tmp_path, VQA_TENANT_FROM="metadata.customer", VQA_TENANTS="acme,7") as worker,
        Client.of(stack, worker) as client,
    ):
        fresh = text_string_to_metric_families(worker.get("/metrics")[1])
        begun = {it.labels["tenant"] for f in fresh for it in f.samples if it.name.startswith("vqa_tenant_")}
        assert begun == {"acme", "7", "other"}

        stack.model.play(Error(status=422), marker="refuse me")
        acme = await client.ask(question="?", images=[LINK], metadata={"customer": "acme"})
        seven = await client.ask(question="?", images=[LINK], metadata={"customer": 7}, model=second)
        unlisted = await client.ask(question="?", images=[LINK], metadata={"customer": "evil"})
        nobody = await client.ask(question="?", images=[LINK])
        await client.ask(question="refuse me", images=[LINK], metadata={"customer": "acme"})
        await client.publish(b"no job", message_id="x", timestamp=int(time.time()))
        await until(lambda: worker.metric("vqa_jobs_total") == 6, "all are counted")

        assert _by(worker, "vqa_tenant_jobs_total", "tenant", "status") == {
            ("acme", "succeeded"): 1,
            ("acme", "failed"): 1,
            ("7", "succeeded"): 1,
            ("other", "succeeded"): 2,
            ("other", "failed"): 1,
        }
        usage = [reply.body["usage"] for reply in (acme, seven, unlisted, nobody)]
        assert _by(worker, "vqa_tenant_cost_usd_total", "tenant", "model") == {
            ("acme", first): pytest.approx(usage[0]["cost_usd"]),
            ("7", second): pytest.approx(usage[1]["cost_usd"]),
            ("other", first): pytest.approx(usage[2]["cost_usd"] + usage[3]["cost_usd"]),
        }
        tokens = _by(worker, "vqa_tenant_tokens_total", "tenant", "model", "type")
        assert tokens["acme", first, "prompt"] == usage[0]["prompt_tokens"]
        assert tokens["7", second, "completion"] == usage[1]["completion_tokens"]
        assert "evil" not in worker.get("/metrics")[1]


async def test_a_billed_answer_is_counted_once_and_a_stored_answer_is_not(
    stack: Stack, start_worker: StartWorker, tmp_path: Path
) -> None:
    del tmp_path
    worker = await start_worker(
        VQA_TENANT_FROM="metadata.customer",
        VQA_TENANTS="acme",
        VQA_RESULT_STORE="s3://test-images/tenants",
    )
    async with Client.of(stack, worker) as client:
        job = {"id": "twice", "question": "?", "images": [LINK], "metadata": {"customer": "acme"}}
        await client.publish(job, message_id="1")
        paid = (await client.result("twice")).body["usage"]["cost_usd"]
        await client.publish(job, message_id="2")
        await until(lambda: len(client.replies["twice"]) == 2, "the second answer")

        assert _by(worker, "vqa_tenant_jobs_total", "tenant", "status") == {("acme", "succeeded"): 2}
        costs = _by(worker, "vqa_tenant_cost_usd_total", "tenant")
        assert costs == {("acme",): pytest.approx(paid)}


@pytest.mark.parametrize("value", [None, 1.5, ["red"], {"red": 1}, "RED", " red", "x" * 10_000])
def test_only_listed_tenants_have_their_own_label_value(value: object) -> None:
    tenants = Tenants("team", ["red"])
    assert tenants.of({"team": value}) == "other"


def test_a_tenant_is_a_string_or_an_integer() -> None:
    tenants = Tenants("team", ["red", "7"])
    assert tenants.of({"team": "red"}) == "red"
    assert tenants.of({"team": 7}) == "7"
    assert tenants.of({}) == "other"


def test_without_a_field_there_are_no_tenants() -> None:
    assert Tenants().of({"team": "red"}) is None
