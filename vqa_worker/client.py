"""A client for programs without asyncio: the asynchronous client, with its event loop in a thread."""

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Self, TypeVar, Unpack, overload

from vqa_worker.async_client import AsyncClient, ClientOptions, JobOptions
from vqa_worker.local_images import Image
from vqa_worker.messages.job import Job
from vqa_worker.results import Result
from vqa_worker.structured import Model

T = TypeVar("T")


class Client:
    """Publish jobs and wait for their results. A context manager, for any number of threads.

        with Client("amqp://user:password@rabbitmq/") as client:
            result = client.ask("photo.jpg", "Which fruit is on the table?")
            print(result.raise_for_error().answer)

    In a program with asyncio, use `AsyncClient`, which has the same methods, arguments and exceptions.
    """

    def __init__(self, url: str | Sequence[str], **options: Unpack[ClientOptions]) -> None:
        """`options`: as for `AsyncClient`."""
        self._client = AsyncClient(url, **options)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = asyncio.Event()
        self._thread: threading.Thread | None = None

    def connect(self) -> Self:
        """Connect; `with` does this. Raises: as `AsyncClient.connect`."""
        if self._thread is not None:
            raise RuntimeError("a client can connect only once")
        started: Future[asyncio.AbstractEventLoop] = Future()
        # A daemon: a program that does not close its client can exit.
        self._thread = threading.Thread(
            target=asyncio.run, args=(self._run(started),), name="vqa-client", daemon=True
        )
        self._thread.start()
        self._loop = started.result()
        try:
            self._wait(self._client.connect())
        except BaseException:
            self._stop()
            raise
        return self

    def close(self) -> None:
        """Cancel the jobs of calls that still wait, which get a ConnectionError, and close the connection."""
        if self._loop is not None:
            try:
                self._wait(self._client.close())
            finally:
                self._stop()

    def __enter__(self) -> Self:
        return self.connect()

    def __exit__(self, *_: object) -> None:
        self.close()

    @overload
    def ask(
        self, images: Image | Sequence[Image], question: str, **options: Unpack[JobOptions]
    ) -> Result: ...

    @overload
    def ask(
        self,
        images: Image | Sequence[Image],
        question: str,
        *,
        returns: type[Model],
        **options: Unpack[JobOptions],
    ) -> Model: ...

    def ask(
        self,
        images: Image | Sequence[Image],
        question: str,
        *,
        returns: type[Model] | None = None,
        **options: Unpack[JobOptions],
    ) -> Result | Model:
        """Ask a question about one or more images, see `AsyncClient.ask`."""
        if returns is None:
            return self._wait(self._client.ask(images, question, **options))
        return self._wait(self._client.ask(images, question, returns=returns, **options))

    def ask_job(self, job: Job | Mapping[str, Any], *, timeout: float | None = None) -> Result:
        """Publish a job and return its result, see `AsyncClient.ask_job`."""
        return self._wait(self._client.ask_job(job, timeout=timeout))

    def ask_many(
        self, jobs: Iterable[Job | Mapping[str, Any]], *, timeout: float | None = None
    ) -> Iterator[Result]:
        """Publish many jobs, `max_in_flight` at a time, and yield the results in the order of arrival.

        As `AsyncClient.ask_many`. The next job is taken in the calling thread; results that arrive meanwhile
        are yielded after it.
        """
        source = iter(jobs)
        asking: set[Future[Result]] = set()
        try:
            while True:
                may_take = len(asking) < self._client.max_in_flight
                job = next(source, None) if may_take else None
                if job is not None:
                    asking.add(self._start(self._client.ask_job(job, timeout=timeout)))
                elif not asking:
                    return
                done, asking = wait(asking, 0 if job is not None else None, FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            for future in asking:
                future.cancel()

    def cancel(self, job_id: str) -> None:
        """Cancel a job, see `AsyncClient.cancel`."""
        self._wait(self._client.cancel(job_id))

    def _start(self, call: Coroutine[Any, Any, T]) -> "Future[T]":
        if self._loop is None:
            call.close()
            raise RuntimeError("the client is not open: use it as a context manager")
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        future = self._start(call)
        try:
            return future.result()
        finally:
            # After Ctrl-C, the job is cancelled; otherwise this does nothing.
            future.cancel()

    async def _run(self, started: "Future[asyncio.AbstractEventLoop]") -> None:
        started.set_result(asyncio.get_running_loop())
        await self._stopped.wait()

    def _stop(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()
