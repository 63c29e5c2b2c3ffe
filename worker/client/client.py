"""A client for programs that ask questions about images and wait for the answers.

    async with Client("amqp://user:password@rabbitmq/") as client:
        result = await client.ask("s3://photos/table.jpg", "Which fruit is on the table?")
        print(result.answer)

It needs a broker with workers behind it, and none of their settings. Results come to a queue of its own, so
that a program that asks never takes a result from another one.
"""

import asyncio
import logging
import ssl
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Self

from pydantic import Field, ValidationError

from worker.errors import ErrorCode
from worker.messages.decoding import InvalidJobError, decode
from worker.messages.job import Job
from worker.messages.result import JobFailure
from worker.messages.result import Result as _Result
from worker.messages.serialization import to_json
from worker.rabbitmq.connection import Broker, BrokerRefusedError, BrokerUnreachableError
from worker.rabbitmq.outgoing import RefusedError, TooLargeError, UnroutableError
from worker.rabbitmq.replies import job_message
from worker.rabbitmq.requests import Replies, Requests
from worker.rabbitmq.topology import TopologyError

__all__ = [
    "BrokerRefusedError",
    "BrokerUnreachableError",
    "Client",
    "ErrorCode",
    "Failure",
    "InvalidJobError",
    "Job",
    "NoSuchQueueError",
    "RefusedError",
    "Replies",
    "ReplyLostError",
    "Result",
    "TooLargeError",
    "TopologyError",
]

# Whoever uses this may have set up nothing but the standard library's logging.
log = logging.getLogger(__name__)

MAX_JOB_BYTES: Final = 16_000_000
# For telling the workers that nobody waits any more.
FAREWELL_S: Final = 5.0


class Failure(JobFailure):
    """Why there is no answer."""

    # A worker that is newer than this client can have new ones.
    code: ErrorCode | str = Field(union_mode="left_to_right")  # type: ignore[assignment]  # wider on purpose


class Result(_Result):
    """What became of a job: an `answer`, or an `error`. Fields that a newer worker adds are left out."""

    error: Failure | None = None

    @property
    def succeeded(self) -> bool:
        """Whether there is an answer (None where the model only called tools: see `response`)."""
        return self.status == "succeeded"


class NoSuchQueueError(Exception):
    """There is no queue of this name at the broker: no worker has ever run for it."""


class ReplyLostError(Exception):
    """The connection was lost while the job was asked, and the result with it, if there was one.

    Only with `exclusive` and `direct` replies. Asked again under the same id, it is answered from the result
    store if the workers have one (`VQA_RESULT_STORE`), and may be paid twice if they don't.
    """


class Client:
    """Asks, and waits for the answers. An async context manager, for any number of tasks of one event loop.

    Args:
        url: of the broker, `amqp://user:password@host:port/vhost`, or `amqps://`.
        jobs_queue: the queue that the workers take jobs from.
        jobs_exchange: publish by this exchange (`vqa.jobs.intake`: see docs/permissions.md), if the default
            one is closed to the user.
        replies: where results come. `queue`: a queue of the client's own that outlives lost connections, so
            that what is being asked is not lost with them; the user must be allowed to make `vqa.results.*`.
            `exclusive`: a queue named by the server, gone with the connection. `direct`: RabbitMQ's direct
            reply-to, the quickest; a result that cannot be delivered at once is lost.
        reply_exchange: where the workers publish results, if they are set up so (`VQA_REPLY_EXCHANGE`).
        max_in_flight: so many jobs are asked at a time; more wait for their turn.
        connect_timeout: seconds that the broker may be out of reach at the beginning.
        keep_replies: seconds that results are kept for a client that has lost its connection (`queue`).
        ssl_context: for `amqps://` with authorities other than the system's.
        name: that the broker shows for the connection.
    """

    def __init__(
        self,
        url: str,
        *,
        jobs_queue: str = "vqa.jobs",
        jobs_exchange: str = "",
        replies: Replies = "queue",
        reply_exchange: str = "",
        max_in_flight: int = 100,
        connect_timeout: float = 15.0,
        keep_replies: int = 600,
        ssl_context: ssl.SSLContext | None = None,
        name: str = "vqa-client",
    ) -> None:
        if ssl_context is None and url.startswith("amqps:"):
            ssl_context = ssl.create_default_context()
        broker = Broker(url, ssl_context, name, setting="the broker's URL")
        self._requests = Requests(
            broker,
            jobs_queue,
            replies,
            reply_exchange=reply_exchange,
            expires_s=keep_replies,
            on_result=self._receive,
            on_loss=self._lose,
        )
        self._jobs_queue = jobs_queue
        self._jobs_exchange = jobs_exchange
        self._connect_timeout = connect_timeout
        self._max_in_flight = max_in_flight
        self._turns = asyncio.Semaphore(max_in_flight)
        self._waiting: dict[str, asyncio.Future[Result]] = {}
        # Of those that wait, the ones that may be in the queue, and the ones that are.
        self._sent: set[str] = set()
        self._confirmed: set[str] = set()
        self._session: asyncio.Task[None] | None = None
        self._farewells: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            BrokerUnreachableError: the broker is out of reach.
            BrokerRefusedError, TopologyError: it refuses the credentials, or the queue for results.
        """
        self._session = asyncio.create_task(self._requests.run(), name="vqa-client")
        self._session.add_done_callback(self._end)
        connected = asyncio.create_task(self._requests.connected.wait())
        try:
            await asyncio.wait(
                {self._session, connected},
                timeout=self._connect_timeout,
                return_when=asyncio.FIRST_COMPLETED,
            )
            self._raise_unless_connected(self._session)
        except BaseException:
            await self._stop()
            raise
        finally:
            connected.cancel()
        return self

    def _raise_unless_connected(self, session: "asyncio.Task[None]") -> None:
        if session.done():
            session.result()
        if not self._requests.connected.is_set():
            reason = self._requests.problem or "it does not answer"
            raise BrokerUnreachableError(f"the broker is out of reach: {reason}")

    async def __aexit__(self, *_: object) -> None:
        """Close the connection; what is still asked is cancelled."""
        if self._farewells:
            await asyncio.wait(self._farewells)
        await self._requests.close()
        await self._stop()

    async def ask(
        self,
        images: str | Sequence[str],
        question: str,
        *,
        id: str | None = None,  # noqa: A002 - the job's own name for it
        system: str | None = None,
        model: str | None = None,
        params: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        deadline: datetime | None = None,
        timeout: float | None = None,
    ) -> Result:
        """Ask a question about one or more images (`s3://…`, `https://…` or `data:…`).

        Args and Raises: as `ask_job`, and those of a job.
        """
        fields = {
            "id": id,
            "question": question,
            "images": [images] if isinstance(images, str) else list(images),
            "system": system,
            "model": model,
            "params": params and dict(params),
            "metadata": metadata and dict(metadata),
            "deadline": deadline and _rfc3339(deadline),
        }
        job = {name: value for name, value in fields.items() if value is not None}
        return await self.ask_job(job, timeout=timeout)

    async def ask_job(self, job: Job | Mapping[str, Any], *, timeout: float | None = None) -> Result:
        """Ask what a job asks; without an id it gets one.

        A job that fails is a result, too. Who gives up waiting, by `timeout` or by cancelling the task, takes
        the job back: it is cancelled. With a `timeout` the job has that for a deadline, if it has none.

        Args:
            job: its fields, or as a `Job`.
            timeout: seconds for all of it.

        Raises:
            InvalidJobError: it is no job.
            TimeoutError: there was no result in time.
            NoSuchQueueError: there is no queue for jobs.
            RefusedError: this user may not publish jobs.
            TooLargeError: the broker takes no job of this size.
            ReplyLostError: the connection was lost, and the result with it.
        """
        job_id, body = _encoded(job, timeout)
        if self._session is None or self._session.done():
            raise RuntimeError("the client is not open: use it as an async context manager")
        if job_id in self._waiting:
            raise ValueError(f"a job with the id {job_id} is being asked")
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting[job_id] = answer
        try:
            async with asyncio.timeout(timeout), self._turns:
                return await self._ask(job_id, body, answer)
        except (TimeoutError, asyncio.CancelledError):
            self._take_back(job_id)
            raise
        except UnroutableError:
            text = f"the queue {self._jobs_queue} does not exist: no worker has ever run for it"
            raise NoSuchQueueError(text) from None
        finally:
            del self._waiting[job_id]
            self._sent.discard(job_id)
            self._confirmed.discard(job_id)

    async def ask_many(
        self,
        jobs: Iterable[Job | Mapping[str, Any]] | AsyncIterable[Job | Mapping[str, Any]],
        *,
        timeout: float | None = None,
    ) -> AsyncGenerator[Result, None]:
        """Ask many jobs, `max_in_flight` at a time, and yield the results as they come, in any order.

        When the iteration ends early, what is still asked is cancelled. To have late jobs as failed results
        instead of an exception, give them a deadline.

        Args:
            jobs: taken only as there is room for them.
            timeout: seconds for each job.

        Raises: as `ask_job`; the first one ends it.
        """
        source = _iterate(jobs)
        asking: set[asyncio.Task[Result]] = set()
        taking: asyncio.Task[Job | Mapping[str, Any] | None] | None = _take(source)
        try:
            while asking or taking is not None:
                may_take = taking is not None and len(asking) < self._max_in_flight
                tasks: set[asyncio.Task[Any]] = {*asking, *([taking] if may_take and taking else [])}
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if taking in done and taking is not None:
                    done.discard(taking)
                    job, taking = taking.result(), None
                    if job is not None:
                        asking.add(asyncio.create_task(self.ask_job(job, timeout=timeout)))
                        taking = _take(source)
                for task in done:
                    asking.discard(task)
                    yield task.result()
        finally:
            left = [*asking, *([taking] if taking is not None else [])]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def cancel(self, job_id: str) -> None:
        """Take a job back: its result says `cancelled`, unless it is answered already.

        Raises:
            ConnectionError: the workers cannot be told now.
        """
        await self._requests.cancel(job_id)

    async def _ask(self, job_id: str, body: bytes, answer: "asyncio.Future[Result]") -> Result:
        self._sent.add(job_id)
        sending = asyncio.create_task(self._send(job_id, body))
        try:
            # The answer can be there though the confirm was lost.
            either: set[asyncio.Future[Any]] = {sending, answer}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                sending.result()
            return await answer
        finally:
            sending.cancel()

    async def _send(self, job_id: str, body: bytes) -> None:
        await self._requests.publish(
            job_message(job_id, body, self._jobs_queue, exchange=self._jobs_exchange)
        )
        self._confirmed.add(job_id)

    def _receive(self, body: bytes) -> None:
        try:
            result = Result.model_validate_json(body, extra="ignore")
        except ValidationError:
            log.warning("a message in the queue for results is no result, and is left out")
            return
        waiting = self._waiting.get(result.id or "")
        if waiting is not None and not waiting.done():
            waiting.set_result(result)

    def _lose(self) -> None:
        """The results of what was asked on the lost connection have no way to come."""
        for job_id in self._confirmed:
            _fail(self._waiting[job_id], ReplyLostError(f"{job_id}: the connection was lost"))

    def _take_back(self, job_id: str) -> None:
        """Nobody waits for it any more; said by a task of its own, since this one is told to end."""
        if job_id not in self._sent or self._requests.problem:
            return
        farewell = asyncio.create_task(self._say_cancelled(job_id))
        self._farewells.add(farewell)
        farewell.add_done_callback(self._farewells.discard)

    async def _say_cancelled(self, job_id: str) -> None:
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                await self._requests.cancel(job_id)

    def _end(self, session: "asyncio.Task[None]") -> None:
        """The session has ended, by a bug or because the client closes: nothing more will come."""
        for waiting in self._waiting.values():
            _fail(waiting, ConnectionError("the client is closed"))
        if not session.cancelled() and (error := session.exception()) is not None:
            log.debug("the session has ended: %s", error)

    async def _stop(self) -> None:
        if self._session is not None:
            self._session.cancel()
            await asyncio.wait({self._session})


def _fail(waiting: "asyncio.Future[Result]", error: Exception) -> None:
    if not waiting.done():
        waiting.set_exception(error)


def _encoded(job: Job | Mapping[str, Any], timeout: float | None) -> tuple[str, bytes]:
    """A job's id and its message's body.

    Raises:
        InvalidJobError: it is no job.
    """
    fields = job.model_dump(mode="json", exclude_unset=True) if isinstance(job, Job) else dict(job)
    if fields.get("id") is None:
        fields["id"] = uuid.uuid4().hex
    if fields.get("deadline") is None and timeout is not None:
        fields["deadline"] = _rfc3339(datetime.now(UTC) + timedelta(seconds=timeout))
    body = to_json(fields)
    return str(decode(body, None, MAX_JOB_BYTES).id), body


def _rfc3339(moment: datetime) -> str:
    """A time as jobs have it; one without a zone is the local one's."""
    return moment.astimezone(UTC).isoformat()


async def _iterate(
    jobs: Iterable[Job | Mapping[str, Any]] | AsyncIterable[Job | Mapping[str, Any]],
) -> AsyncIterator[Job | Mapping[str, Any]]:
    if isinstance(jobs, AsyncIterable):
        async for job in jobs:
            yield job
    else:
        for job in jobs:
            yield job


def _take(
    source: AsyncIterator[Job | Mapping[str, Any]],
) -> "asyncio.Task[Job | Mapping[str, Any] | None]":
    async def take() -> Job | Mapping[str, Any] | None:
        return await anext(source, None)

    return asyncio.create_task(take())
