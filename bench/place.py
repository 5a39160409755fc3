"""Where the sides of a benchmark run, in which number format, and how to measure memory there."""

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from medvl_sam2.engine.precision import choose_device, cuda_dtype

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Device and number format of both sides.

    Attributes:
        device: That computes.
        dtype: Of the weights of ours; public code keeps float32 weights where it runs under autocast.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32

    @classmethod
    def choose(cls, name: str = "auto") -> "Place":
        """Place of a device's name: bfloat16 on CUDA from capability 8.0, float32 elsewhere.

        Args:
            name: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...

        Raises:
            ValueError: No such device here, or one that is neither a CPU nor of CUDA.
        """
        device = choose_device(name)
        if device.type == "cpu":
            return CPU
        if device.type != "cuda":
            raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}; rates and memory are known for these")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        # Kernels, streams and counters go to the current device.
        torch.cuda.set_device(device)
        return cls(device, cuda_dtype(device))

    @property
    def dtype_name(self) -> str:
        """Name without "torch."."""
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager:
        """Within it code with float32 weights computes in this format, as its authors run it; nothing for float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


CPU = Place(torch.device("cpu"))


def watched(call: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """What a call gives, and by how many bytes memory rose for it.

    On CUDA that is what PyTorch allocates on the device, elsewhere the resident memory of the process, which Linux
    alone tells; None where it is not known.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        found = call()
        torch.cuda.synchronize(device)
        return found, torch.cuda.max_memory_allocated(device) - before
    if not _CLEAR.exists():
        return call(), None
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        # What earlier work freed but the allocator kept would hide as much of the next peak.
        trim(0)
    _CLEAR.write_text("5")
    before = _status("VmRSS")
    found = call()
    return found, _status("VmHWM") - before


_CLEAR = Path("/proc/self/clear_refs")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
