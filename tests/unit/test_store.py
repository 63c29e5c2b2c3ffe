"""The result store: claims, heartbeats, new owners, and concurrent answers."""

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping

import pytest

from worker.clock import Clock
from worker.errors import Dependency, DependencyDownError, NotAdmittedError
from worker.result_store import store as result_store
from worker.result_store.store import ResultStore
from worker.s3.conditional_store import ConditionalStore, StoredObject

PATIENCE_S = 60


class Memory(ConditionalStore):
    """Objects in memory with S3's preconditions."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.asked: list[str] = []
        self.fails: Callable[[str, str], bool] = lambda _method, _name: False
        """Whether requests are lost before S3 receives them."""
        self.forgets: Callable[[str, str], bool] = lambda _method, _name: False
        """Whether S3 executes requests and their responses are lost."""

    async def create(self, name: str, body: bytes) -> str | None:
        return self._written("create", name, body, may=name not in self.objects)

    async def replace(self, name: str, body: bytes, etag: str) -> str | None:
        found = self.objects.get(name)
        return self._written("replace", name, body, may=found is not None and etag_of(found[0]) == etag)

    async def write(self, name: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        assert headers is None
        self._written("write", name, body, may=True)

    async def read(self, name: str) -> StoredObject | None:
        self._asked("read", name)
        found = self.objects.get(name)
        return StoredObject(found[0], etag_of(found[0]), time.monotonic() - found[1]) if found else None

    async def delete(self, name: str, etag: str | None = None) -> None:
        self._asked("delete", name)
        if name in self.objects and etag in (None, etag_of(self.objects[name][0])):
            del self.objects[name]

    def _written(self, method: str, name: str, body: bytes, *, may: bool) -> str | None:
        self._asked(method, name)
        if may:
            self.objects[name] = body, time.monotonic()
        if self.forgets(method, name):
            raise down()
        return etag_of(body) if may else None

    def _asked(self, method: str, name: str) -> None:
        self.asked.append(f"{method} {name.partition('/')[0]}")
        if self.fails(method, name):
            raise down()

    async def is_asked(self, what: str, times: int) -> None:
        """Wait for a number of further requests of this kind."""
        wanted = self.asked.count(what) + times
        async with asyncio.timeout(PATIENCE_S):
            while self.asked.count(what) < wanted:  # noqa: ASYNC110 - polling is what tests do
                await asyncio.sleep(0.01)


def etag_of(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def down() -> DependencyDownError:
    return DependencyDownError(Dependency.S3, "unreachable")


@pytest.fixture
def objects(monkeypatch: pytest.MonkeyPatch) -> Memory:
    monkeypatch.setattr(result_store, "ADMISSION_CHECK_S", 0.01)
    monkeypatch.setattr(result_store, "RELEASE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(result_store, "FIRST_POLL_S", 0.01)
    monkeypatch.setattr(result_store, "MAX_POLL_S", 0.02)
    monkeypatch.setattr(result_store, "STORE_RETRY_S", 0.01)
    monkeypatch.setattr(result_store, "STORE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(result_store, "HEARTBEAT_S", 0.05)
    return Memory()


def a_worker(objects: Memory, *, max_job_s: float = 600.0) -> ResultStore:
    return ResultStore(objects, max_job_s=max_job_s, clock=Clock())


def living(store: ResultStore) -> asyncio.Task[None]:
    """Run the store's background tasks."""

    async def live() -> None:
        await asyncio.gather(store.send_heartbeats(), store.tidy_up())

    return asyncio.create_task(live())


async def ask(store: ResultStore, answer: bytes, name: str = "job") -> tuple[bytes | None, bytes | None]:
    """Acquire the job and store an answer; return the answer found before and the stored one."""
    async with asyncio.timeout(PATIENCE_S), store.acquire(name) as lease:
        if lease.answer is not None:
            return lease.answer, None
        return None, await lease.put(answer)


async def test_the_first_worker_calls_the_model_and_the_second_gets_the_answer(objects: Memory) -> None:
    assert await ask(a_worker(objects), b"cat") == (None, b"cat")
    assert await ask(a_worker(objects), b"dog") == (b"cat", None)
    assert await ask(a_worker(objects), b"dog", "another job") == (None, b"dog")


async def test_a_worker_waits_for_an_owner_with_heartbeats(objects: Memory) -> None:
    first, second = a_worker(objects), a_worker(objects)
    life = living(first)
    async with first.acquire("job") as lease:
        waiting = asyncio.create_task(ask(second, b"dog"))
        await objects.is_asked("read jobs", 10)
        assert not waiting.done()
        await lease.put(b"cat")
    assert await waiting == (b"cat", None)
    life.cancel()


async def test_within_one_worker_the_second_job_waits_without_requests_to_the_store(objects: Memory) -> None:
    store = a_worker(objects)
    async with store.acquire("job") as lease:
        waiting = asyncio.create_task(ask(store, b"dog"))
        await asyncio.sleep(0)
        asked = len(objects.asked)
        await asyncio.sleep(0.1)
        assert len(objects.asked) == asked
        await lease.put(b"cat")
    assert await waiting == (b"cat", None)


@pytest.mark.parametrize("how", ["silent for long", "its life was taken away", "far too old a claim"])
async def test_a_dead_worker_s_claim_is_taken_over(
    objects: Memory, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    dead = a_worker(objects)
    await dead.acquire("job").__aenter__()
    new_owner = a_worker(objects, max_job_s=0.1 if how == "far too old a claim" else 600)
    monkeypatch.setattr(result_store, "DEAD_AFTER_S", 0.1 if how == "silent for long" else 20)
    if how == "its life was taken away":
        await dead.close()
    if how == "far too old a claim":
        monkeypatch.setattr(new_owner, "_claim_expires_s", 0.1)
    assert await ask(new_owner, b"dog") == (None, b"dog")


async def test_only_one_of_several_new_owners_calls_the_model(objects: Memory) -> None:
    dead = a_worker(objects)
    await dead.acquire("job").__aenter__()
    await dead.close()
    ends = await asyncio.gather(*(ask(a_worker(objects), b"%d" % n) for n in range(5)))
    assert sorted(there is None for there, _ in ends) == [False] * 4 + [True]
    assert len({there or kept for there, kept in ends}) == 1


async def test_a_worker_considered_dead_gets_the_answer_of_the_new_owner(objects: Memory) -> None:
    slow, new_owner = a_worker(objects), a_worker(objects)
    async with slow.acquire("job") as lease:
        await slow.close()
        assert await ask(new_owner, b"dog") == (None, b"dog")
        assert await lease.put(b"cat") == b"dog"


async def test_a_slower_new_owner_gets_the_answer_of_the_worker_considered_dead(objects: Memory) -> None:
    slow, new_owner = a_worker(objects), a_worker(objects)
    async with slow.acquire("job") as lease:
        await slow.close()
        async with new_owner.acquire("job") as new_owners:
            assert new_owners.answer is None
            assert await lease.put(b"cat") == b"cat"
            assert await new_owners.put(b"dog") == b"cat"


async def test_a_job_without_an_answer_leaves_no_claim(objects: Memory) -> None:
    first, second = a_worker(objects), a_worker(objects)
    with pytest.raises(ValueError, match="no such image"):
        async with first.acquire("job"):
            raise ValueError("no such image")
    assert await ask(second, b"cat") == (None, b"cat")


async def test_a_claim_that_could_not_be_released_is_released_later(objects: Memory) -> None:
    first, second = a_worker(objects), a_worker(objects)
    objects.fails = lambda method, name: method == "delete" and name.startswith("jobs/")
    async with first.acquire("job"):
        pass
    objects.fails = lambda _method, _name: False
    life = living(first)
    async with first.acquire("another job, so that it is seen to live"):
        assert await ask(second, b"cat") == (None, b"cat")
    life.cancel()


async def test_a_claim_whose_response_was_lost_is_recognised_as_own(objects: Memory) -> None:
    store = a_worker(objects)
    objects.forgets = lambda method, name: method == "create" and name.startswith("jobs/")
    with pytest.raises(DependencyDownError):
        await ask(store, b"cat")
    objects.forgets = lambda _method, _name: False
    assert await ask(store, b"cat") == (None, b"cat")


async def test_an_answer_whose_response_was_lost_is_stored_once(objects: Memory) -> None:
    store, lost = a_worker(objects), [True]
    objects.forgets = lambda method, name: name == "jobs/job" and method == "replace" and lost.pop(0)
    async with store.acquire("job") as lease:
        lost.append(False)
        assert await lease.put(b"cat") == b"cat"
    assert objects.objects["jobs/job"][0] == b"cat"


async def test_an_answer_that_cannot_be_stored_is_returned_and_its_claim_released(objects: Memory) -> None:
    store = a_worker(objects)
    objects.fails = lambda method, name: method == "replace" and name == "jobs/job"
    assert await ask(store, b"cat") == (None, b"cat")
    assert "jobs/job" not in objects.objects


async def test_a_store_that_ignores_conditions_is_not_used(objects: Memory) -> None:
    async def create(name: str, body: bytes) -> str:
        await objects.write(name, body)
        return "etag"

    objects.create = create  # type: ignore[method-assign]
    with pytest.raises(DependencyDownError, match="If-None-Match"):
        await ask(a_worker(objects), b"cat")
    assert "jobs/job" not in objects.objects


async def test_a_new_job_costs_one_request_for_the_claim_and_one_for_the_answer(objects: Memory) -> None:
    store = a_worker(objects)
    await ask(store, b"cat", "the first")
    objects.asked.clear()
    await ask(store, b"cat", "the second")
    assert objects.asked == ["create jobs", "replace jobs"]


async def test_heartbeats_are_written_only_while_there_are_claims(objects: Memory) -> None:
    store = a_worker(objects)
    life = living(store)
    await asyncio.sleep(0.2)
    assert objects.asked == []
    async with store.acquire("job"):
        await objects.is_asked("write workers", 2)
    life.cancel()


async def test_an_unreachable_store_does_not_stop_the_worker(objects: Memory) -> None:
    store = a_worker(objects)
    life = living(store)
    async with store.acquire("job"):
        objects.fails = lambda _method, _name: True
        await objects.is_asked("write workers", 2)
    assert not life.done()
    life.cancel()
    await store.close()


async def test_releasing_many_claims_on_a_slow_s3_does_not_delay_heartbeats(
    objects: Memory,
) -> None:
    store, is_slow = a_worker(objects), asyncio.Event()
    objects.fails = lambda method, name: method == "delete" and name.startswith("jobs/")
    await asyncio.gather(*[_left_behind(store, f"job {n}") for n in range(5)])
    objects.fails = lambda _method, _name: False

    async def read(name: str) -> StoredObject | None:
        assert name.startswith("jobs/")
        is_slow.set()
        await asyncio.Event().wait()
        return None

    objects.read = read  # type: ignore[method-assign]
    life = living(store)
    async with asyncio.timeout(PATIENCE_S):
        await is_slow.wait()
    async with store.acquire("another job"):
        await objects.is_asked("write workers", 2)
    life.cancel()


async def _left_behind(store: ResultStore, name: str) -> None:
    async with store.acquire(name):
        pass


async def test_a_bug_in_the_store_does_not_lose_the_answer(objects: Memory) -> None:
    store = a_worker(objects)
    async with store.acquire("job") as lease:
        objects.objects["jobs/job"] = b"another's", time.monotonic()
        objects.read = None  # type: ignore[method-assign, assignment]
        assert await lease.put(b"cat") == b"cat"


async def test_a_job_that_may_not_wait_for_another_worker_does_not(objects: Memory) -> None:
    first, second = a_worker(objects), a_worker(objects)

    def check_admission() -> None:
        raise NotAdmittedError("the worker is shutting down")

    async with first.acquire("job"):
        with pytest.raises(NotAdmittedError):
            async with second.acquire("job", check_admission):
                pass
        # A job without an owner may still be claimed.
        async with second.acquire("another job", check_admission) as lease:
            assert lease.answer is None


async def test_a_store_without_permission_to_delete_is_rejected_before_the_first_call(
    objects: Memory,
) -> None:
    objects.fails = lambda method, _: method == "delete"
    with pytest.raises(DependencyDownError):
        await ask(a_worker(objects), b"cat")
    assert "jobs/job" not in objects.objects


class Hanging(Memory):
    """A store whose requests hang until the test makes them fail."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = 0
        self.is_asked_once = asyncio.Event()
        self.fails_now = asyncio.Event()

    async def write(
        self,
        name: str,  # noqa: ARG002 - the port's signature
        body: bytes,  # noqa: ARG002 - the port's signature
        headers: Mapping[str, str] | None = None,  # noqa: ARG002 - the port's signature
    ) -> None:
        await self.hang()

    async def delete(self, name: str, etag: str | None = None) -> None:  # noqa: ARG002 - the port's signature
        await self.hang()

    async def hang(self) -> None:
        self.requests += 1
        self.is_asked_once.set()
        await self.fails_now.wait()
        raise down()


async def test_one_failed_heartbeat_fails_all_jobs_that_wait_for_it() -> None:
    objects = Hanging()
    store = a_worker(objects)
    jobs = [asyncio.create_task(ask(store, b"cat", f"job {n}")) for n in range(12)]
    async with asyncio.timeout(PATIENCE_S):
        await objects.is_asked_once.wait()
        objects.fails_now.set()
        ends = await asyncio.gather(*jobs, return_exceptions=True)
    assert all(isinstance(end, DependencyDownError) for end in ends)
    assert objects.requests == 1


@pytest.mark.parametrize("name", ["the same job", "another job"])
async def test_jobs_that_wait_for_a_hanging_store_leave_when_admission_closes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_store, "ADMISSION_CHECK_S", 0.01)
    objects, is_closed = Hanging(), asyncio.Event()
    store = a_worker(objects)

    def check_admission() -> None:
        if is_closed.is_set():
            raise NotAdmittedError("the worker is shutting down")

    async def wait(name: str) -> None:
        async with store.acquire(name, check_admission):
            pass

    jobs = [asyncio.create_task(wait("the same job")), asyncio.create_task(wait(name))]
    async with asyncio.timeout(PATIENCE_S):
        await objects.is_asked_once.wait()
        is_closed.set()
        ends = await asyncio.gather(*jobs, return_exceptions=True)
    assert all(isinstance(end, NotAdmittedError) for end in ends)
    await store.close()


async def test_releasing_and_closing_do_not_wait_for_a_hanging_store(
    objects: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, hanging = a_worker(objects), Hanging()
    async with asyncio.timeout(PATIENCE_S):
        async with store.acquire("job"):
            monkeypatch.setattr(objects, "delete", hanging.delete)
        await store.close()
    assert hanging.requests == 2


# Drafts: answers that another call is to repair


@pytest.mark.parametrize("how", ["killed", "released", "not released, but alive"])
async def test_a_draft_outlives_its_worker(objects: Memory, how: str) -> None:
    first, second = a_worker(objects), a_worker(objects)
    if how == "killed":
        lease = await first.acquire("job").__aenter__()
        assert await lease.put_draft(b'{"text": "}"}')
        await first.close()
    else:
        async with first.acquire("job") as lease:
            assert lease.draft is None
            assert await lease.put_draft(b'{"text": "}"}')
            if how == "not released, but alive":
                objects.fails = lambda method, _name: method == "replace"
        objects.fails = lambda _method, _name: False
    life = living(first) if how == "not released, but alive" else None
    async with asyncio.timeout(PATIENCE_S), second.acquire("job") as lease:
        assert (lease.answer, lease.draft) == (None, b'{"text": "}"}')
        assert await second.find("job") == b'{"text": "}"}'
        assert await lease.put(b"repaired") == b"repaired"
    if life is not None:
        life.cancel()
    assert await ask(first, b"?") == (b"repaired", None)


async def test_a_draft_is_passed_on_until_there_is_an_answer(objects: Memory) -> None:
    for _ in range(3):
        async with a_worker(objects).acquire("job") as lease:
            if lease.draft is None:
                await lease.put_draft(b"1")
            assert lease.draft == b"1"
    async with a_worker(objects).acquire("job") as lease:
        assert await lease.put_draft(b"2")
    async with a_worker(objects).acquire("job") as lease:
        assert lease.draft == b"2"


async def test_a_draft_that_cannot_be_stored_does_not_stop_the_job(objects: Memory) -> None:
    async with a_worker(objects).acquire("job") as lease:
        objects.fails = lambda method, _name: method == "replace"
        assert not await lease.put_draft(b"draft")
        objects.fails = lambda _method, _name: False
        objects.forgets = lambda method, _name: method == "replace"
        assert not await lease.put_draft(b"draft")
        objects.forgets = lambda _method, _name: False
        assert await lease.put(b"cat") == b"cat"
    assert await ask(a_worker(objects), b"?") == (b"cat", None)


async def test_a_worker_considered_dead_does_not_replace_the_claim_by_its_draft(objects: Memory) -> None:
    slow, new_owner = a_worker(objects), a_worker(objects)
    async with slow.acquire("job") as lease:
        await slow.close()
        async with new_owner.acquire("job") as new_owners:
            assert not await lease.put_draft(b"draft")
            assert await new_owners.put(b"dog") == b"dog"
        assert await lease.put(b"cat") == b"dog"
