"""SAM2's work beside the language model's.

On CUDA it runs in a thread and on a stream of its own: image features are computed while the language model reads the
scan, and masks while it goes on writing. On a CPU, where both would only share the cores, it runs when its result is
asked for.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Held while a CUDA graph is recorded: a process records one at a time, and memory must not be given back meanwhile.
RECORDING = Lock()


class Lane(Protocol):
    """Keeps the stream of whoever asks and the one of the work in step."""

    def leave(self, tensors: list[Tensor]) -> Any:
        """On the asking side: a mark behind what made these tensors, which the work will use."""

    def inside(self, mark: Any) -> Any:
        """On the working side: a context in which the work runs, and nothing before that mark is reached."""

    def mark(self) -> Any:
        """Within the context: a mark behind the work."""

    def take(self, tensors: list[Tensor], mark: Any) -> None:
        """On the asking side: let what comes use these tensors, and nothing before that mark is reached."""


class CudaLane:
    """A second stream of a device.

    Memory is given back by the stream that it was taken on; `record_stream` makes it wait for the other one's use.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        # Of another priority than graphs are recorded on: PyTorch deals out 32 of each again and again.
        self._device, self._stream = device, torch.cuda.Stream(device, priority=-1)

    def leave(self, tensors: list[Tensor]) -> torch.cuda.Event:
        """See `Lane.leave`."""
        for tensor in tensors:
            tensor.record_stream(self._stream)
        return torch.cuda.current_stream(self._device).record_event()

    @contextmanager
    def inside(self, mark: torch.cuda.Event) -> Iterator[None]:
        """See `Lane.inside`."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            yield

    def mark(self) -> torch.cuda.Event:
        """See `Lane.mark`."""
        return self._stream.record_event()

    def take(self, tensors: list[Tensor], mark: torch.cuda.Event) -> None:
        """See `Lane.take`."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(mark)
        for tensor in tensors:
            tensor.record_stream(stream)


class Job(Generic[T]):
    """Work that was handed over.

    Args:
        work: Still to be run, by whoever asks for the result; None when a thread runs it.
        future: Gets the result and the mark behind it.
        lane: Between the two sides.
    """

    def __init__(self, work: Callable[[], T] | None, future: "Future[tuple[T, Any]]", lane: Lane | None) -> None:
        self._work, self._future, self._lane = work, future, lane

    @property
    def is_ready(self) -> bool:
        """Whether there is nothing to wait for: it is done, or asking does it."""
        return self._work is not None or self._future.done()

    @property
    def is_usable(self) -> bool:
        """Whether it is under way or has a result."""
        return self._work is None and not (self._future.done() and self._future.exception() is not None)

    @property
    def finished(self) -> T | None:
        """The result if it is there."""
        return self._future.result()[0] if self.is_usable and self._future.done() else None

    def wait(self) -> None:
        """Wait until it is ready."""
        if self._work is None:
            wait([self._future])

    def result(self) -> T:
        """The result, for use on the caller's stream.

        Raises:
            Exception: What the work raised.
        """
        work, self._work = self._work, None
        if work is not None:
            try:
                self._future.set_result((work(), None))
            except BaseException as error:
                self._future.set_exception(error)
        value, mark = self._future.result()
        if self._lane is not None:
            self._lane.take(list(tensors_of(value)), mark)
        return value


class Beside:
    """Takes jobs, and does them one at a time in the order in which they came.

    Args:
        lane: Between the sides where a thread does the work; None leaves it to whoever asks for the result.
        pool: Runs the work; by default a thread of its own.
    """

    def __init__(self, lane: Lane | None, pool: Executor | None = None) -> None:
        self._lane = lane
        if lane is not None and pool is None:
            pool = ThreadPoolExecutor(1, thread_name_prefix="medvl-sam2-masks")
        self._pool = pool

    @classmethod
    def of(cls, device: torch.device) -> "Beside":
        """As it pays on a device."""
        return cls(CudaLane(device) if device.type == "cuda" else None)

    def in_one_thread(self) -> "Beside":
        """The same, but the thread that hands work over also launches it: for profilers, which follow one thread."""
        return Beside(self._lane, None if self._lane is None else _Here())

    @property
    def is_parallel(self) -> bool:
        """Whether work begins before its result is asked for."""
        return self._pool is not None

    def start(self, work: Callable[[], T], *inputs: Any) -> Job[T]:
        """Hand work over.

        Args:
            work: Makes the result.
            inputs: Tensors, or what holds them, that the work uses and the caller's stream made.
        """
        if self._pool is None:
            return Job(work, Future(), None)
        lane = self._lane
        begun = lane.leave([tensor for value in inputs for tensor in tensors_of(value)])

        def run() -> tuple[T, Any]:
            with lane.inside(begun):
                return work(), lane.mark()

        return Job(None, self._pool.submit(run), lane)


class _Here(Executor):
    """Runs what it is given at once."""

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """The result, which is there."""
        future: Future[T] = Future()
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)
        return future


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))
