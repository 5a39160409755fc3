"""Where an output sample reads its source, for all linear resampling here: `F.interpolate(align_corners=False)`.

For output index ``i`` of ``m`` over a box ``[start, stop)`` of ``n`` source samples::

    t = clamp((2 i + 1) n - m, 0, 2 m (n - 1));   tap = start + t // (2 m);   weight = (t % (2 m)) / (2 m)

Whole numbers up to the last division, so that no rounding separates one path from another.
"""

import torch
from torch import Tensor

from medvl_sam2.kernels._common import tl, triton


def axis_taps(
    size: int, start: int, stop: int, length: int | None = None, flipped: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the two taps and the weight of the second for each of `size` outputs over ``[start, stop)``.

    Args:
        size: Number of outputs.
        start: First source sample of the box.
        stop: End of the box, excluded.
        length: Samples of the whole axis, needed where `flipped`.
        flipped: Whether the source lies backwards in memory.

    Returns:
        (size,) int64, (size,) int64, (size,) float32, on the CPU.
    """
    n = stop - start
    position = ((2 * torch.arange(size) + 1) * n - size).clamp(0, (n - 1) * 2 * size)
    low = position // (2 * size)
    weight = (position - low * 2 * size).float() / (2 * size)
    low, high = start + low, start + (low + 1).clamp(max=n - 1)
    return (length - 1 - low, length - 1 - high, weight) if flipped else (low, high, weight)


@triton.jit
def taps(i, size, start, stop):
    """`axis_taps` inside a kernel, for an index or a block of them."""
    n = stop - start
    position = tl.minimum(tl.maximum((2 * i + 1) * n - size, 0), (n - 1) * 2 * size)
    low = position // (2 * size)
    # Cast by function: Triton makes an argument of 1 a constant, which has no methods.
    weight = tl.cast(position - low * 2 * size, tl.float32) / tl.cast(2 * size, tl.float32)
    return start + low, start + tl.minimum(low + 1, n - 1), weight
