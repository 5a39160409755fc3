"""Times of named stages, by the host's clock or, on a GPU, by that of the stream that does the work."""

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.profiler import record_function


class Stages(Mapping[str, float]):
    """Seconds per stage, summed over calls; each stage is also a range in profiler traces.

    On CUDA a stage lasts from the end of what its stream did before to the end of its own work. Nothing waits for that
    until a time is looked at, so that stages on two streams may run at once.

    Args:
        device: That computes.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds: dict[str, float] = {}
        self._marks: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._lock = threading.Lock()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time of the block to stage `name`."""
        with record_function(f"medvl_sam2.{name}"), self._timed(name):
            yield

    def part(self) -> "Stages":
        """Stages of one request: what they measure counts here as well."""
        return _Part(self)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        if self._device.type != "cuda":
            start = time.perf_counter()
            yield
            with self._lock:
                self._add(name, time.perf_counter() - start)
            return
        stream = torch.cuda.current_stream(self._device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(stream)
        yield
        last.record(stream)
        with self._lock:
            self._marks.append((name, first, last))
            # What has ended is added up here, so that marks nobody asks for do not pile up, two a token.
            while self._marks and self._marks[0][2].query():
                self._settle()

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def _settle(self) -> None:
        name, first, last = self._marks.popleft()
        last.synchronize()
        self._add(name, first.elapsed_time(last) / 1000)

    def _settled(self) -> dict[str, float]:
        with self._lock:
            while self._marks:
                self._settle()
            return self._seconds.copy()

    def __getitem__(self, name: str) -> float:
        return self._settled()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settled())

    def __len__(self) -> int:
        return len(self._settled())


class _Part(Stages):
    def __init__(self, whole: Stages):
        super().__init__(whole._device)
        self._whole = whole

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        with self._whole.measure(name), self._timed(name):
            yield
