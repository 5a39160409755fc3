"""What normalising and cropping a scan need to know of it, each in one pass over the stored voxels, left on the device.

    min, max;   h[b] = #{voxels = b - 32768} and exact percentiles from it;   box of {voxel * slope + intercept > t}

A percentile of whole numbers needs no sort: the order statistics ``floor(q (n - 1))`` and its successor are found in
the cumulative histogram and interpolated as `numpy.percentile` does. None of these waits for the device: the results go
on to `ingest_volume` as tensors.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medvl_sam2.kernels._aot import Variant
from medvl_sam2.kernels._common import check_dtype, check_shape, device_guard, one_thread, tl, triton
from medvl_sam2.kernels._library import define_op
from medvl_sam2.kernels._tuning import tile

BINS, LOWEST = 65_536, -32_768
# Air fills half of a scan with a few dozen values; copies keep their atomic additions from queueing at one address.
COPIES = 16


def volume_histogram_reference(voxels: Tensor) -> Tensor:
    """Count every int16 value, slice by slice; (65536,) int64."""
    histogram = torch.zeros(BINS, dtype=torch.int64, device=voxels.device)
    with one_thread():
        for plane in voxels:
            histogram += torch.bincount(plane.flatten().int() - LOWEST, minlength=BINS)
    return histogram


@triton.jit
def _volume_histogram_kernel(
    voxels_ptr, histogram_ptr, rows, height, width, v_z, v_y, v_x, COPIES: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    counts = histogram_ptr + (program % COPIES).to(tl.int64) * 65536
    for row in range(program, rows, tl.num_programs(0)):
        line = voxels_ptr + (row // height).to(tl.int64) * v_z + (row % height).to(tl.int64) * v_y
        for start in range(0, width, BLOCK):
            x = start + tl.arange(0, BLOCK)
            value = tl.load(line + x.to(tl.int64) * v_x, mask=x < width, other=0).to(tl.int32)
            tl.atomic_add(counts + value + 32768, 1, mask=x < width, sem="relaxed")


def _launch_volume_histogram(voxels: Tensor) -> Tensor:
    counts = torch.zeros((COPIES, BINS), dtype=torch.int32, device=voxels.device)
    depth, height, width = voxels.shape
    if voxels.numel():
        config = tile("volume_histogram", {"BLOCK": 512, "num_warps": 4}, voxels.device)
        programs = min(depth * height, 2048)
        with device_guard(voxels):
            _volume_histogram_kernel[(programs,)](
                voxels, counts, depth * height, height, width, *voxels.stride(), COPIES=COPIES, **config
            )
    return counts.sum(0)


def _fake_histogram(voxels: Tensor) -> Tensor:
    return voxels.new_empty(BINS, dtype=torch.int64)


def foreground_box_reference(voxels: Tensor, threshold: Tensor, slope: float, intercept: float) -> Tensor:
    """Bound the voxels above a threshold, slice by slice; (6,) int32, the whole scan where there are none."""
    depth, height, width = voxels.shape
    limit = float((threshold.reshape(()).double() - intercept) / slope)
    rows = torch.zeros((depth, height), dtype=torch.bool, device=voxels.device)
    columns = torch.zeros(width, dtype=torch.bool, device=voxels.device)
    with one_thread():
        for z, plane in enumerate(voxels):
            hit = plane > limit if slope > 0 else plane < limit
            torch.any(hit, 1, out=rows[z])
            columns |= hit.any(0)
    box = [0, 0, 0, depth, height, width]
    if bool(columns.any()):
        for axis, line in enumerate((rows.any(1), rows.any(0), columns)):
            at = line.nonzero()
            box[axis], box[axis + 3] = int(at[0]), int(at[-1]) + 1
    return torch.tensor(box, dtype=torch.int32, device=voxels.device)


@triton.jit
def _foreground_box_kernel(
    voxels_ptr,
    threshold_ptr,
    box_ptr,
    height,
    width,
    v_z,
    v_y,
    v_x,
    slope,
    intercept,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    program = tl.program_id(0)
    bands = tl.cdiv(height, BLOCK_Y)
    z = program // bands
    y = program % bands * BLOCK_Y + tl.arange(0, BLOCK_Y)
    threshold = tl.load(threshold_ptr)
    line = voxels_ptr + z.to(tl.int64) * v_z + y.to(tl.int64)[:, None] * v_y
    y_hit = tl.zeros([BLOCK_Y], dtype=tl.int32)
    x_min = tl.zeros([BLOCK_X], dtype=tl.int32) + width
    x_max = tl.zeros([BLOCK_X], dtype=tl.int32)
    for start in range(0, width, BLOCK_X):
        x = start + tl.arange(0, BLOCK_X)
        mask = (y < height)[:, None] & (x < width)[None, :]
        value = tl.load(line + x.to(tl.int64)[None, :] * v_x, mask=mask, other=0).to(tl.float32) * slope + intercept
        hit = (mask & (value > threshold)).to(tl.int32)
        y_hit = tl.maximum(y_hit, tl.max(hit, axis=1))
        column = tl.max(hit, axis=0)
        x_min = tl.minimum(x_min, tl.where(column > 0, x, width))
        x_max = tl.maximum(x_max, tl.where(column > 0, x + 1, 0))
    if tl.max(y_hit, axis=0) > 0:
        tl.atomic_min(box_ptr, z, sem="relaxed")
        tl.atomic_min(box_ptr + 1, tl.min(tl.where(y_hit > 0, y, height), axis=0), sem="relaxed")
        tl.atomic_min(box_ptr + 2, tl.min(x_min, axis=0), sem="relaxed")
        tl.atomic_max(box_ptr + 3, z + 1, sem="relaxed")
        tl.atomic_max(box_ptr + 4, tl.max(tl.where(y_hit > 0, y + 1, 0), axis=0), sem="relaxed")
        tl.atomic_max(box_ptr + 5, tl.max(x_max, axis=0), sem="relaxed")


def _launch_foreground_box(voxels: Tensor, threshold: Tensor, slope: float, intercept: float) -> Tensor:
    depth, height, width = voxels.shape
    whole = torch.zeros(6, dtype=torch.int32, device=voxels.device)
    for axis, n in enumerate(voxels.shape):
        whole[axis + 3].fill_(n)
    box = whole.roll(3)
    config = tile("foreground_box", {"BLOCK_Y": 16, "BLOCK_X": 128, "num_warps": 4}, voxels.device)
    with device_guard(voxels):
        _foreground_box_kernel[(depth * triton.cdiv(height, config["BLOCK_Y"]),)](
            voxels, threshold, box, height, width, *voxels.stride(), slope, intercept, **config
        )
    return torch.where(box[3] > 0, box, whole)


def _fake_box(voxels: Tensor, threshold: Tensor, slope: float, intercept: float) -> Tensor:
    return voxels.new_empty(6, dtype=torch.int32)


_volume_histogram = define_op(
    "volume_histogram",
    volume_histogram_reference,
    _launch_volume_histogram,
    _fake_histogram,
    switch="volume_statistics",
)
_foreground_box = define_op(
    "foreground_box", foreground_box_reference, _launch_foreground_box, _fake_box, switch="volume_statistics"
)


def volume_minmax(voxels: Tensor, slope: float = 1.0, intercept: float = 0.0) -> Tensor:
    """Find the smallest and the largest value.

    Args:
        voxels: (Z, Y, X) in the stored dtype.
        slope: Value of one stored unit.
        intercept: Value of stored zero.

    Returns:
        (2,) float32 on the device of `voxels`: min and max of ``voxel * slope + intercept``.

    Raises:
        ValueError: Wrong rank or an empty scan.
    """
    check_shape("volume_minmax", "voxels", voxels, (None, None, None))
    if not voxels.numel():
        raise ValueError(f"volume_minmax: expected voxels with at least one element, got {tuple(voxels.shape)}")
    # One pass in the stored dtype at memory speed already, on either device.
    ends = torch.stack(torch.aminmax(voxels.int() if voxels.dtype == torch.uint16 else voxels)).float()
    ends = ends * slope + intercept
    return ends if slope >= 0 else ends.flip(0)


def volume_histogram(voxels: Tensor) -> Tensor:
    """Count every value of a 16-bit (or 8-bit) scan.

    Args:
        voxels: (Z, Y, X) int16, int8 or uint8, any strides.

    Returns:
        (65536,) int64 on the device of `voxels`; bin ``b`` counts the stored value ``b - 32768``.

    Raises:
        ValueError: Another dtype; round to int16 first, which holds every CT value.
    """
    check_shape("volume_histogram", "voxels", voxels, (None, None, None))
    check_dtype("volume_histogram", "voxels", voxels, (torch.int16, torch.int8, torch.uint8))
    return _volume_histogram(voxels)


def percentiles_from_histogram(
    histogram: Tensor, percentiles: Sequence[float], *, above: float | str | Tensor | None = None
) -> Tensor:
    """Read percentiles off a histogram, exactly as `numpy.percentile` gives them for the voxels themselves.

    Args:
        histogram: (65536,) from `volume_histogram`.
        percentiles: Numbers in [0, 100].
        above: Count only stored values above this; ``"mean"`` for the mean of all (the foreground of M3D-Seg).

    Returns:
        (len(percentiles),) float32 stored values on the device of `histogram`; NaN where nothing was counted.

    Raises:
        ValueError: Wrong shape, or a percentile outside [0, 100].
    """
    check_shape("percentiles_from_histogram", "histogram", histogram, (BINS,))
    if not all(0 <= p <= 100 for p in percentiles):
        raise ValueError(f"percentiles_from_histogram: expected percentiles in [0, 100], got {list(percentiles)}")
    values = torch.arange(LOWEST, LOWEST + BINS, device=histogram.device, dtype=torch.float64)
    if above is not None:
        limit = (histogram * values).sum() / histogram.sum() if isinstance(above, str) else above
        histogram = torch.where(values > limit, histogram, 0)
    cumulative = histogram.cumsum(0)
    count = cumulative[-1]
    position = torch.tensor(list(percentiles), dtype=torch.float64).to(histogram.device, non_blocking=True) / 100
    position = position * (count - 1)
    low = position.floor()
    # The k-th smallest voxel (from 0) lies in the first bin whose cumulative count exceeds k.
    ends = [torch.searchsorted(cumulative, k.long(), right=True).clamp(max=BINS - 1) for k in (low, position.ceil())]
    first, second = values[ends[0]], values[ends[1]]
    return torch.where(count > 0, first + (second - first) * (position - low), torch.nan).float()


def foreground_box(voxels: Tensor, threshold: float | Tensor, slope: float = 1.0, intercept: float = 0.0) -> Tensor:
    """Bound the voxels whose value is above a threshold, as MONAI's ``CropForeground``.

    Args:
        voxels: (Z, Y, X) in the stored dtype, any strides.
        threshold: In the unit of ``voxel * slope + intercept``; a tensor of one element stays on the device.
        slope: Value of one stored unit.
        intercept: Value of stored zero.

    Returns:
        (6,) int32 on the device of `voxels`: (z0, y0, x0, z1, y1, x1), end excluded; the whole scan where no voxel is
        above. Goes into `ingest_volume` as it is.

    Raises:
        ValueError: Wrong rank, an empty scan, or a slope of 0.
    """
    check_shape("foreground_box", "voxels", voxels, (None, None, None))
    if not voxels.numel():
        raise ValueError(f"foreground_box: expected voxels with at least one element, got {tuple(voxels.shape)}")
    if slope == 0 or not math.isfinite(slope):
        raise ValueError(f"foreground_box: expected a finite slope other than 0, got {slope}; an absent slope is 1")
    if not isinstance(threshold, Tensor):
        threshold = torch.full((1,), float(threshold), device=voxels.device)
    return _foreground_box(voxels, threshold.to(voxels.device, torch.float32), float(slope), float(intercept))


AOT_VARIANTS = (
    Variant(
        "histogram",
        _volume_histogram_kernel,
        {"voxels_ptr": "*i16:16", "histogram_ptr": "*i32:16", "rows": "i32"}
        | dict.fromkeys(("height", "width", "v_z", "v_y"), "i32:16"),
        {"v_x": 1, "COPIES": COPIES, "BLOCK": 512},
    ),
    Variant(
        "foreground-box",
        _foreground_box_kernel,
        {"voxels_ptr": "*i16:16", "threshold_ptr": "*fp32:16", "box_ptr": "*i32:16"}
        | dict.fromkeys(("height", "width", "v_z", "v_y"), "i32:16")
        | dict.fromkeys(("slope", "intercept"), "fp32"),
        {"v_x": 1, "BLOCK_Y": 16, "BLOCK_X": 128},
    ),
)
