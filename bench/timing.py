"""What every benchmark shares: sides that take turns, rates of the machine, straight lines through measurements."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from medvl_sam2.kernels.linear import product


def synchronise(device: torch.device | str) -> None:
    """Wait for a CUDA device; elsewhere nothing is to be waited for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(sides: Sequence[Callable[[], Any]], rounds: int, device: torch.device | str = "cpu") -> list[list[float]]:
    """Seconds of each side, one round after the other, so that other load meets all of them alike.

    Args:
        sides: What is timed.
        rounds: Times that each runs.
        device: That computes; each run begins when its work before is done, and ends when its own is.
    """
    spent: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, seconds in zip(sides, spent):
            synchronise(device)
            start = time.perf_counter()
            side()
            synchronise(device)
            seconds.append(time.perf_counter() - start)
    return spent


def gemm_rate(
    side: int | None = None, rounds: int = 10, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> float:
    """FLOP/s of the fastest square product, on a CPU by torch's BLAS and by oneDNN."""
    side = side or (8192 if torch.device(device).type == "cuda" else 2048)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    with torch.inference_mode():
        spent = in_turns([lambda: a @ b, lambda: product(a, b)], rounds, device)
    return 2 * side**3 / min(min(seconds) for seconds in spent)


def copy_rate(megabytes: int = 256, rounds: int = 10, *, device: torch.device | str = "cpu") -> float:
    """Bytes/s of the fastest copy between two buffers that no cache holds, read and written bytes both counted."""
    source = torch.ones(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    (spent,) = in_turns([lambda: target.copy_(source)], rounds, device)
    return 2 * source.nbytes / min(spent)


def timed(seconds: Sequence[float]) -> dict[str, Any]:
    """Columns of a row: the median of the rounds, and how far they spread."""
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "rounds": len(seconds),
    }


@dataclass(frozen=True)
class Line:
    """Least-squares line ``y = intercept + slope x``, and the share of y's variance that it explains."""

    slope: float
    intercept: float
    r2: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Fit a line.

    Raises:
        ValueError: Fewer than two different x, or not as many y.
    """
    if len(x) != len(y) or len(set(x)) < 2:
        raise ValueError(f"fit: expected two different x or more and a y for each, got {list(x)} and {list(y)}")
    slope, intercept = statistics.linear_regression(x, y)
    mean = statistics.fmean(y)
    total = sum((b - mean) ** 2 for b in y)
    left = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y))
    return Line(slope, intercept, 1.0 if total == 0 else 1 - left / total)


def fit_power(x: Sequence[float], y: Sequence[float]) -> Line:
    """Fit ``y = c x^p`` as a line through the logarithms: its slope is p."""
    return fit_line([math.log(a) for a in x], [math.log(b) for b in y])
