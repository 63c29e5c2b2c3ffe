"""A client for asyncio programs that ask questions about images and wait for the answers.

It needs a broker with workers, and none of their settings. Each client has its own reply queue, so it never
takes the results of another program.
"""

import asyncio
import logging
import ssl
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from os import PathLike
from typing import Any, Final, Self, TypedDict, Unpack, overload

from pydantic import ValidationError

from vqa_worker.large_results import (
    LargeResultError,
    LargeResults,
    NotTheResultError,
    UnreadableObjectError,
)
from vqa_worker.local_images import Image, embed_local_images, has_local_images
from vqa_worker.messages.decoding import decode
from vqa_worker.messages.job import Job
from vqa_worker.messages.serialization import to_json
from vqa_worker.rabbitmq.addresses import check_same_cluster, split_urls
from vqa_worker.rabbitmq.connection import Broker, BrokerUnreachableError
from vqa_worker.rabbitmq.outgoing import UnroutableError
from vqa_worker.rabbitmq.replies import job_message
from vqa_worker.rabbitmq.requests import Replies, Requests
from vqa_worker.results import Result
from vqa_worker.structured import Model, params_for, value_of

# A program that uses the client need not configure structlog.
log = logging.getLogger(__name__)

MAX_JOB_BYTES: Final = 16_000_000
# For the cancellation of a job whose caller stopped waiting.
CANCEL_TIMEOUT_S: Final = 5.0


class ClientOptions(TypedDict, total=False):
    """The options of a client, see `AsyncClient`."""

    jobs_queue: str
    jobs_exchange: str
    replies: Replies
    reply_exchange: str
    max_in_flight: int
    connect_timeout: float
    keep_replies: int
    ssl_context: ssl.SSLContext | None
    name: str
    s3_endpoint_url: str | None


class JobOptions(TypedDict, total=False):
    """The options of a question, see `AsyncClient.ask`."""

    id: str | None
    system: str | None
    model: str | None
    params: Mapping[str, Any] | None
    metadata: Mapping[str, Any] | None
    deadline: datetime | None
    timeout: float | None


class NoSuchQueueError(Exception):
    """The jobs queue does not exist: no worker has run for it yet."""


class ReplyLostError(Exception):
    """The connection was lost after the job was published, so its result cannot arrive.

    Only with `exclusive` and `direct` replies. If the job is published again with the same id, the workers
    answer it from the result store (`VQA_RESULT_STORE`); without one, the model may be called and paid twice.
    """


class AsyncClient:
    """Publish jobs and wait for their results. An async context manager, for many tasks of one event loop.

        async with AsyncClient("amqp://user:password@rabbitmq/") as client:
            result = await client.ask("photo.jpg", "Which fruit is on the table?")
            print(result.raise_for_error().answer)

    Args:
        url: the broker's, `amqp://user:password@host:port/vhost`, or `amqps://`. For a cluster, the URLs of
            its nodes, as a sequence or a comma-separated list: the client connects to a random one, and to
            another one when the connection is lost.
        jobs_queue: the workers' jobs queue.
        jobs_exchange: the exchange to publish to (`vqa.jobs.intake`: see docs/permissions.md), if the user
            may not write to the default exchange.
        replies: the kind of reply queue. `queue`: a durable queue of this client that outlives lost
            connections, and the results with it; the user needs the configure permission for `vqa.results.*`.
            `exclusive`: a queue named by the server and deleted with the connection. `direct`: RabbitMQ's
            direct reply-to, the fastest; a result that cannot be delivered at once is lost.
        reply_exchange: the exchange that the workers publish results to (`VQA_REPLY_EXCHANGE`).
        max_in_flight: the number of jobs in flight; further ones wait.
        connect_timeout: seconds to wait for the first connection.
        keep_replies: seconds that results are kept after a lost connection (`queue`).
        ssl_context: for `amqps://` with authorities other than the system's.
        name: the connection name that the broker shows.
        s3_endpoint_url: base URL of the S3 server that the workers write large results to
            (`VQA_LARGE_RESULTS`), if it is not AWS. Credentials and region come from boto3's usual sources.
    """

    def __init__(
        self,
        url: str | Sequence[str],
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
        s3_endpoint_url: str | None = None,
    ) -> None:
        urls = split_urls(url) if isinstance(url, str) else list(url)
        if not urls or not all(it.startswith(("amqp://", "amqps://")) for it in urls):
            raise ValueError("the broker's URL must begin with amqp:// or amqps://")
        check_same_cluster(urls)
        if ssl_context is None and urls[0].startswith("amqps:"):
            ssl_context = ssl.create_default_context()
        broker = Broker(",".join(urls), ssl_context, name, setting="the broker's URL")
        self._requests = Requests(
            broker,
            jobs_queue,
            replies,
            reply_exchange=reply_exchange,
            expires_s=keep_replies,
            on_result=self._receive,
            on_loss=self._lose,
        )
        self._large_results = LargeResults(s3_endpoint_url)
        self._jobs_queue = jobs_queue
        self._jobs_exchange = jobs_exchange
        self._connect_timeout = connect_timeout
        self.max_in_flight = max_in_flight
        self._slots = asyncio.Semaphore(max_in_flight)
        self._waiting: dict[str, asyncio.Future[Result]] = {}
        # The ids of waiting jobs that may be in the queue, and of jobs that the broker has confirmed.
        self._sent: set[str] = set()
        self._confirmed: set[str] = set()
        self._session: asyncio.Task[None] | None = None
        self._ends_of_calls: set[asyncio.Future[None]] = set()
        self._cancellations: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def connect(self) -> Self:
        """Connect; `async with` does this.

        Raises:
            BrokerUnreachableError: there was no connection within `connect_timeout`.
            BrokerRefusedError, TopologyError: the broker refuses the credentials, or the reply queue.
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
            raise BrokerUnreachableError(f"the broker cannot be reached: {reason}")

    async def close(self) -> None:
        """Cancel the jobs of calls that still wait, which get a ConnectionError, and close the connection."""
        self._fail_all()
        for job_id in self._waiting:
            self._cancel_abandoned(job_id)
        await _wait_for(self._cancellations)
        await self._requests.close()
        await self._stop()
        await _wait_for(self._ends_of_calls)

    @overload
    async def ask(
        self, images: Image | Sequence[Image], question: str, **options: Unpack[JobOptions]
    ) -> Result: ...

    @overload
    async def ask(
        self,
        images: Image | Sequence[Image],
        question: str,
        *,
        returns: type[Model],
        **options: Unpack[JobOptions],
    ) -> Model: ...

    async def ask(
        self,
        images: Image | Sequence[Image],
        question: str,
        *,
        returns: type[Model] | None = None,
        **options: Unpack[JobOptions],
    ) -> Result | Model:
        """Ask a question about one or more images.

        Args:
            images: URLs (`s3://…`, `https://…`, `data:…`), paths of local files, or the contents of such as
                bytes. Local images are sent inside the job, at most 11 MB together.
            question: about the images.
            returns: a pydantic model. Its JSON schema is the `response_format` of the job, and its instance
                is returned instead of a result.
            options: the fields `id`, `system`, `model`, `params`, `metadata` and `deadline` of a job, and
                `timeout`, as for `ask_job`.

        Raises: as `ask_job`; and with `returns`
            JobFailedError: the job failed, for example with `schema_mismatch`.
            NoValueError: the answer is not an instance of the model.
        """
        if returns is not None:
            options["params"] = params_for(returns, options.get("params"))
        timeout, deadline = options.get("timeout"), options.get("deadline")
        fields: dict[str, Any] = {
            **options,
            "question": question,
            "images": [images] if isinstance(images, str | bytes | PathLike) else list(images),
            "deadline": deadline and _rfc3339(deadline),
        }
        job = {name: value for name, value in fields.items() if name != "timeout" and value is not None}
        result = await self.ask_job(job, timeout=timeout)
        return result if returns is None else value_of(result, returns)

    async def ask_job(self, job: Job | Mapping[str, Any], *, timeout: float | None = None) -> Result:
        """Publish a job and return its result; a job without an id gets one.

        A failed job is a result, not an exception: see `Result.raise_for_error`. A result that is too large
        for a message is read from S3, which needs the extra `s3` of the client. After `timeout`, or when the
        calling task is cancelled, the job is cancelled. With a `timeout`, a job without a deadline gets that
        as its deadline.

        Args:
            job: its fields, or a `Job`. Its `images` may also be local, as for `ask`.
            timeout: seconds for everything.

        Raises:
            InvalidJobError: the job is invalid, or a local image is.
            OSError: a local image cannot be read.
            TimeoutError: no result arrived in time.
            NoSuchQueueError: the jobs queue does not exist.
            RefusedError: this user may not publish jobs.
            TooLargeError: the job is larger than the broker accepts.
            ReplyLostError: the connection was lost, and with it the result.
            LargeResultError: the result is in S3 and cannot be read there, or not within `timeout`.
        """
        job_id, body = await _encoded(job, timeout)
        if self._session is None or self._session.done():
            raise RuntimeError("the client is not open: use it as an async context manager")
        if job_id in self._waiting:
            raise ValueError(f"a job with the id {job_id} is already in flight")
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting[job_id] = answer
        end = asyncio.get_running_loop().create_future()
        self._ends_of_calls.add(end)
        try:
            async with asyncio.timeout(timeout), self._slots:
                return await self._completed(await self._ask(job_id, body, answer))
        except TimeoutError:
            if (result := _large_result_in(answer)) is not None:
                text = f"{result.result_url} was not read within {timeout:g} s"
                raise LargeResultError(text, result) from None
            self._cancel_abandoned(job_id)
            text = f"no result after {timeout:g} s; is a worker consuming from the queue {self._jobs_queue}?"
            raise TimeoutError(text) from None
        except asyncio.CancelledError:
            self._cancel_abandoned(job_id)
            raise
        except UnroutableError:
            text = f"the queue {self._jobs_queue} does not exist: no worker has run for it yet"
            raise NoSuchQueueError(text) from None
        finally:
            self._ends_of_calls.discard(end)
            end.set_result(None)
            del self._waiting[job_id]
            self._sent.discard(job_id)
            self._confirmed.discard(job_id)

    async def ask_many(
        self,
        jobs: Iterable[Job | Mapping[str, Any]] | AsyncIterable[Job | Mapping[str, Any]],
        *,
        timeout: float | None = None,
    ) -> AsyncGenerator[Result, None]:
        """Publish many jobs, `max_in_flight` at a time, and yield the results in the order of arrival.

        When the iteration ends early, the jobs in flight are cancelled. Jobs with a deadline fail with a
        result when they are late, instead of an exception.

        Args:
            jobs: read only as fast as they are published.
            timeout: seconds for each job.

        Raises: as `ask_job`; the first exception ends the iteration.
        """
        source = _iterate(jobs)
        asking: set[asyncio.Task[Result]] = set()
        taking: asyncio.Task[Job | Mapping[str, Any] | None] | None = _take(source)
        try:
            while asking or taking is not None:
                may_take = taking is not None and len(asking) < self.max_in_flight
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
        """Cancel a job: its result is the error `cancelled`, unless it was answered before.

        Raises:
            ConnectionError: the cancellation cannot be published now.
        """
        await self._requests.cancel(job_id)

    async def _ask(self, job_id: str, body: bytes, answer: "asyncio.Future[Result]") -> Result:
        self._sent.add(job_id)
        sending = asyncio.create_task(self._send(job_id, body))
        try:
            # The result can arrive although the confirm was lost.
            either: set[asyncio.Future[Any]] = {sending, answer}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                sending.result()
            result = await answer
            # From here on there is nothing to cancel.
            self._sent.discard(job_id)
        finally:
            sending.cancel()
        return result

    async def _completed(self, result: Result) -> Result:
        """Return the whole result; one that is too large for a message is read from S3."""
        url = result.result_url
        if url is None:
            return result
        read = partial(self._large_results.read, url, job_id=result.id, status=result.status)
        try:
            return result.model_copy(update=await asyncio.to_thread(read))
        except (UnreadableObjectError, NotTheResultError) as error:
            raise LargeResultError(str(error), result) from error

    async def _send(self, job_id: str, body: bytes) -> None:
        await self._requests.publish(
            job_message(job_id, body, self._jobs_queue, exchange=self._jobs_exchange)
        )
        self._confirmed.add(job_id)

    def _receive(self, body: bytes) -> None:
        try:
            result = Result.model_validate_json(body, extra="ignore")
        except ValidationError:
            log.warning("ignored a message in the reply queue that is not a result")
            return
        waiting = self._waiting.get(result.id or "")
        if waiting is not None and not waiting.done():
            waiting.set_result(result)

    def _lose(self) -> None:
        """Fail the jobs that were published on the lost connection: their results cannot arrive."""
        for job_id in self._confirmed:
            _fail(self._waiting[job_id], ReplyLostError(f"{job_id}: the connection was lost"))

    def _cancel_abandoned(self, job_id: str) -> None:
        """Cancel a job that nobody waits for, in another task because this one is being cancelled."""
        if job_id not in self._sent or self._requests.problem:
            return
        self._sent.discard(job_id)
        cancellation = asyncio.create_task(self._publish_cancellation(job_id))
        self._cancellations.add(cancellation)
        cancellation.add_done_callback(self._cancellations.discard)

    async def _publish_cancellation(self, job_id: str) -> None:
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(CANCEL_TIMEOUT_S):
                await self._requests.cancel(job_id)

    def _end(self, session: "asyncio.Task[None]") -> None:
        """Fail all waiting jobs: the session ended, because of a bug or because the client closes."""
        self._fail_all()
        if not session.cancelled() and (error := session.exception()) is not None:
            log.debug("the session has ended: %s", error)

    def _fail_all(self) -> None:
        for waiting in self._waiting.values():
            _fail(waiting, ConnectionError("the client is closed"))

    async def _stop(self) -> None:
        if self._session is not None:
            self._session.cancel()
            await asyncio.wait({self._session})


def _large_result_in(answer: "asyncio.Future[Result]") -> Result | None:
    """Return the result that arrived, if it is one in S3."""
    is_received = answer.done() and not answer.cancelled() and answer.exception() is None
    return answer.result() if is_received and answer.result().result_url is not None else None


async def _wait_for(futures: "Iterable[asyncio.Future[None]]") -> None:
    if waiting := set(futures):
        await asyncio.wait(waiting)


def _fail(waiting: "asyncio.Future[Result]", error: Exception) -> None:
    if not waiting.done():
        waiting.set_exception(error)
        # Marks it as retrieved: asyncio logs an exception that no caller is left for.
        waiting.exception()


async def _encoded(job: Job | Mapping[str, Any], timeout: float | None) -> tuple[str, bytes]:
    """Return a job's id and its message body.

    Raises:
        InvalidJobError: the job is invalid, or a local image is.
        OSError: a local image cannot be read.
    """
    fields = job.model_dump(mode="json", exclude_unset=True) if isinstance(job, Job) else dict(job)
    if fields.get("id") is None:
        fields["id"] = uuid.uuid4().hex
    if fields.get("deadline") is None and timeout is not None:
        fields["deadline"] = _rfc3339(datetime.now(UTC) + timedelta(seconds=timeout))
    if has_local_images(fields):
        fields = await asyncio.to_thread(embed_local_images, fields)
    body = to_json(fields)
    return str(decode(body, None, MAX_JOB_BYTES).id), body


def _rfc3339(moment: datetime) -> str:
    """Format a time for a job; a time without a zone is local."""
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
