"""Work over many slices, some at a time: fewer when memory runs out, and none once it has been given up."""

import logging
from collections.abc import Callable
from threading import Event
from typing import TypeVar

import torch

from medvl_sam2.engine.beside import RECORDING
from medvl_sam2.engine.cancelling import check

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Chunks:
    """How many slices to take at a time.

    Args:
        size: To begin with.
        doing: What is done to them, for the message: "encoding".

    Attributes:
        size: Now; halved, for good, whenever an allocation fails.
    """

    def __init__(self, size: int, doing: str) -> None:
        self.size, self._doing = size, doing
        self._has_told = False

    def run(
        self,
        function: Callable[[int, int], T],
        start: int,
        stop: int,
        cancel: Event | None = None,
        limit: int | None = None,
    ) -> list[T]:
        """Results of `function(start, stop)` for consecutive parts of a range.

        Args:
            function: Does the work.
            start, stop: Of the range.
            cancel: Looked at before each part.
            limit: Most slices at a time for this call.

        Raises:
            Cancelled: The event was set.
            MemoryError, RuntimeError: Even one slice does not fit, or another failure of the function.
        """
        parts = []
        while start < stop:
            check(cancel)
            end = min(stop, start + max(1, self.size if limit is None else min(self.size, limit)))
            try:
                parts.append(function(start, end))
                start = end
            except (MemoryError, RuntimeError) as error:
                if end - start == 1 or not out_of_memory(error):
                    raise
                self.size = (end - start) // 2
                if not self._has_told:
                    logger.warning("out of memory: %s %d slices at a time from here on", self._doing, self.size)
                    self._has_told = True
            if start < end:
                # Out of the handler, which would keep the failed call's tensors alive.
                free_cached()
        return parts


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # PyTorch's on the CPU; cuBLAS's; Triton's, which names the CUDA error.
    words = ("DefaultCPUAllocator", "ALLOC_FAILED", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def free_cached() -> None:
    """Give memory that CUDA's allocator holds in pieces back, so that it can be had in one."""
    if torch.cuda.is_initialized():
        with RECORDING:
            torch.cuda.empty_cache()
