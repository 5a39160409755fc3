"""The line in front of the engine: bounded, with time limits, and left by those who hang up."""

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request

from medvl_sam2.engine.cancelling import check
from medvl_sam2.engine.server.errors import CLIENT_GONE, ApiError
from medvl_sam2.engine.server.metrics import Metrics
from medvl_sam2.engine.server.settings import ServerSettings

T = TypeVar("T")
_END = object()


class RequestQueue:
    """Runs blocking work in threads on behalf of requests.

    Args:
        settings: How many at a time, how many wait, how long.
        metrics: Told of lengths and times.
    """

    def __init__(self, settings: ServerSettings, metrics: Metrics):
        self._settings, self._metrics = settings, metrics
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="medvl-sam2")
        self._lock = threading.Lock()
        self._cancels: set[threading.Event] = set()
        self._running = 0
        self._seconds = 1.0
        self._closing = False

    def check_room(self) -> None:
        """Find out before work such as an upload begins whether there will be a place.

        Raises:
            ApiError: 429 with Retry-After when the line is full, 503 at shutdown.
        """
        if self._closing:
            raise ApiError(503, "shutting_down", "the server is shutting down", {"Retry-After": "30"})
        admitted = len(self._cancels)
        if admitted >= self._settings.workers + self._settings.waiting:
            self._metrics.rejected.inc()
            wait = min(120, max(1, math.ceil(admitted * self._seconds / self._settings.workers)))
            message = f"{admitted} requests are ahead; come again in {wait} s"
            raise ApiError(429, "queue_full", message, {"Retry-After": str(wait)})

    async def run(self, request: Request, work: Callable[[threading.Event], T]) -> T:
        """Result of `work`, which runs in a thread and should end early once the event that it gets is set.

        Raises:
            ApiError: As `check_room`; 504 after the time limit; 499 when the client has gone.
        """
        cancel, future = self._submit(work)
        try:
            return await self._first(request, asyncio.wrap_future(future), self._deadline())
        finally:
            cancel.set()
            future.cancel()

    async def stream(self, request: Request, work: Callable[[threading.Event], Iterator[T]]) -> AsyncGenerator[T, None]:
        """Items of `work` as they come; returns once the first is there, so that early errors are still answers.

        Raises:
            ApiError: As `run`, here and later from the iterator.
        """
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[Any] = asyncio.Queue()

        def hand(item: Any) -> None:
            # The loop is gone when a process ends with work still running.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(items.put_nowait, item)

        def pump(cancel: threading.Event) -> None:
            try:
                for item in work(cancel):
                    hand(item)
                hand(_END)
            except Exception as error:
                hand(error)

        cancel, future = self._submit(pump)
        deadline = self._deadline()

        async def rest(item: Any) -> AsyncGenerator[T, None]:
            try:
                while item is not _END:
                    if isinstance(item, Exception):
                        raise item
                    yield item
                    item = await self._in_time(items.get(), deadline)
            finally:
                cancel.set()

        try:
            first = await self._first(request, asyncio.ensure_future(items.get()), deadline)
            if isinstance(first, Exception):
                raise first
        except BaseException:
            cancel.set()
            future.cancel()
            raise
        return rest(first)

    async def drain(self) -> None:
        """Take nothing new, let what runs finish within the grace time, and end the rest."""
        self._closing = True
        end = time.monotonic() + self._settings.grace
        while self._cancels and time.monotonic() < end:
            await asyncio.sleep(0.05)
        with self._lock:
            for cancel in self._cancels:
                cancel.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, work: Callable[[threading.Event], T]) -> tuple[threading.Event, "Future[T]"]:
        cancel, asked = threading.Event(), time.monotonic()

        def timed() -> T:
            start = time.monotonic()
            self._metrics.queue_seconds.observe(start - asked)
            self._count(1)
            try:
                check(cancel)
                return work(cancel)
            finally:
                self._seconds += 0.2 * (time.monotonic() - start - self._seconds)
                self._count(-1)

        def left(done: "Future[T]") -> None:
            with self._lock:
                self._cancels.discard(cancel)
            self._count(0)
            if not done.cancelled():
                # Looked at, so that the failure of work that nobody waits for is not reported as forgotten.
                done.exception()

        with self._lock:
            self.check_room()
            self._cancels.add(cancel)
        future = self._pool.submit(timed)
        self._count(0)
        future.add_done_callback(left)
        return cancel, future

    def _count(self, change: int) -> None:
        with self._lock:
            self._running += change
            self._metrics.running.set(self._running)
            self._metrics.waiting.set(max(0, len(self._cancels) - self._running))

    def _deadline(self) -> float:
        return time.monotonic() + self._settings.timeout

    async def _first(self, request: Request, future: "asyncio.Future[T]", deadline: float) -> T:
        """Wait for a future, the end of the time, or the end of the client."""
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            done, _ = await asyncio.wait(
                {future, gone}, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED
            )
            if future in done:
                return future.result()
            if gone in done:
                raise ApiError(CLIENT_GONE, "client_gone", "the client has hung up")
            raise self._late()
        finally:
            gone.cancel()
            future.cancel()

    async def _in_time(self, item: Any, deadline: float) -> Any:
        try:
            return await asyncio.wait_for(item, deadline - time.monotonic())
        except TimeoutError:
            raise self._late() from None

    def _late(self) -> ApiError:
        return ApiError(504, "timeout", f"not done within {self._settings.timeout:g} s; ask for less or come again")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
