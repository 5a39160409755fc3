"""Wall-clock times of named stages."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function


class Stages(dict[str, float]):
    """Seconds per stage, summed over calls; each stage is also a range in profiler traces.

    Args:
        device: Waited for at the end of a stage when it is a CUDA device, so that the stage owns its kernels.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time of the block to stage `name`."""
        start = time.perf_counter()
        with record_function(f"medvl_sam2.{name}"):
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        self[name] = self.get(name, 0.0) + time.perf_counter() - start

    def since(self, before: dict[str, float]) -> dict[str, float]:
        """Seconds per stage added after `before`, a copy of an earlier state."""
        return {name: value - before.get(name, 0.0) for name, value in self.items() if value > before.get(name, 0.0)}
