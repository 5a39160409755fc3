"""From a scan's stored voxels to a model grid in one pass: rescale, clamp, normalise, trilinear resample.

    out = (trilinear(clamp(voxel * slope + intercept, lo, hi)) - offset) * gain

with the taps of `_resample`, those of `F.interpolate(align_corners=False)` on the cropped box.

Taps are clamped before they are interpolated, so an implant outside the window cannot leak into its neighbours. The
native volume is never cast as a whole: the kernel reads the eight taps of each output in the stored dtype, the CPU path
two planes per output slice.
"""

import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medvl_sam2.kernels._aot import Variant
from medvl_sam2.kernels._common import (
    check_dtype,
    check_same_device,
    check_shape,
    device_guard,
    one_thread,
    tl,
    triton,
)
from medvl_sam2.kernels._library import define_op
from medvl_sam2.kernels._resample import axis_taps, taps
from medvl_sam2.kernels._tuning import tile

STORED = tuple(
    getattr(torch, name)
    for name in ("int16", "uint8", "int8", "uint16", "int32", "float32", "float16", "bfloat16", "float64", "int64")
)
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)
# Voxels from which on the CPU path shares the slices among threads.
_SHARED = 1 << 22


def _slice_taps(positions: Tensor, start: int, stop: int, length: int, flipped: bool) -> tuple[Tensor, Tensor, Tensor]:
    clamped = positions.cpu().float().clamp(start, stop - 1)
    low = clamped.floor()
    high = (low + 1).clamp(max=stop - 1)
    weight = clamped - low
    return (length - 1 - low.long(), length - 1 - high.long(), weight) if flipped else (low.long(), high.long(), weight)


def volume_ingest_reference(
    voxels: Tensor,
    scale: Tensor,
    box: Tensor,
    z_positions: Tensor | None,
    size: Sequence[int],
    flips: Sequence[int],
    slope: float,
    intercept: float,
    dtype: torch.dtype,
) -> Tensor:
    """Resample slice by slice with plain torch, in buffers small enough for the cache. Arguments as the operation's."""
    depth, height, width = size
    z0, y0, x0, z1, y1, x1 = box.tolist()
    if z_positions is None:
        z_taps = axis_taps(depth, z0, z1, voxels.shape[0], bool(flips[0]))
    else:
        z_taps = _slice_taps(z_positions, z0, z1, voxels.shape[0], bool(flips[0]))
    device = voxels.device
    y_low, y_high, y_weight = (t.to(device) for t in axis_taps(height, y0, y1, voxels.shape[1], bool(flips[1])))
    x_low, x_high, x_weight = (t.to(device) for t in axis_taps(width, x0, x1, voxels.shape[2], bool(flips[2])))
    rows = torch.cat((y_low, y_high)) if 2 * height < voxels.shape[1] else None
    if rows is not None:
        y_low, y_high = torch.arange(2 * height, device=device).split(height)
    y_weight = y_weight[:, None]

    out = torch.empty((len(scale), depth, height, width), dtype=dtype, device=device)
    plane = (voxels.shape[1] if rows is None else len(rows), voxels.shape[2])
    slices = list(enumerate(zip(*(t.tolist() for t in z_taps))))

    # Autograd's modes belong to a thread: a worker does not have the caller's.
    @torch.inference_mode()
    def resample(part: Sequence[tuple[int, tuple[int, int, float]]]) -> None:
        raw = {key: torch.empty(plane, device=device) for key in ("a", "b")}
        near, far = (torch.empty(plane, device=device) for _ in range(2))
        above, below = (torch.empty((height, plane[1]), device=device) for _ in range(2))
        left, right = (torch.empty((height, width), device=device) for _ in range(2))
        held: dict[int, str] = {}

        def fetch(index: int, keep: int) -> Tensor:
            if index not in held:
                free = next(key for key in raw if key != held.get(keep))
                for stale in [i for i, key in held.items() if key == free]:
                    del held[stale]
                raw[free].copy_(voxels[index] if rows is None else voxels[index].index_select(0, rows))
                held[index] = free
            return raw[held[index]]

        with one_thread():
            for d, (low, high, weight) in part:
                first, second = fetch(low, high), (fetch(high, low) if weight else None)
                for c, (offset, gain, lo, hi) in enumerate(scale.tolist()):
                    bounds = sorted(((lo - intercept) / slope, (hi - intercept) / slope))
                    torch.clamp(first, *bounds, out=near)
                    if second is not None:
                        near.lerp_(torch.clamp(second, *bounds, out=far), weight)
                    torch.index_select(near, 0, y_low, out=above)
                    torch.index_select(near, 0, y_high, out=below)
                    above.lerp_(below, y_weight)
                    torch.index_select(above, 1, x_low, out=left)
                    torch.index_select(above, 1, x_high, out=right)
                    left.lerp_(right, x_weight).mul_(slope * gain)
                    out[c, d].copy_(torch.add(left, (intercept - offset) * gain, out=right))

    workers = min(torch.get_num_threads(), depth) if device.type == "cpu" and voxels.numel() >= _SHARED else 1
    if workers == 1:
        resample(slices)
    else:
        share = math.ceil(depth / workers)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(resample, (slices[i : i + share] for i in range(0, depth, share))))
    return out


@triton.jit
def _volume_ingest_kernel(
    voxels_ptr,
    scale_ptr,
    box_ptr,
    z_ptr,
    out_ptr,
    base,
    v_z,
    v_y,
    v_x,
    depth,
    height,
    width,
    slope,
    intercept,
    HAS_Z: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    across = tl.cdiv(width, BLOCK_W)
    down = tl.cdiv(height, BLOCK_H)
    program = tl.program_id(0)
    d = program // (across * down)
    h = (program // across % down) * BLOCK_H + tl.arange(0, BLOCK_H)
    w = program % across * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = (h < height)[:, None] & (w < width)[None, :]

    z_start, z_stop = tl.load(box_ptr), tl.load(box_ptr + 3)
    if HAS_Z:
        at = tl.minimum(tl.maximum(tl.load(z_ptr + d), z_start.to(tl.float32)), (z_stop - 1).to(tl.float32))
        z_low = tl.floor(at).to(tl.int32)
        z_high = tl.minimum(z_low + 1, z_stop - 1)
        z_weight = at - tl.floor(at)
    else:
        z_low, z_high, z_weight = taps(d, depth, z_start, z_stop)
    y_low, y_high, y_weight = taps(h, height, tl.load(box_ptr + 1), tl.load(box_ptr + 4))
    x_low, x_high, x_weight = taps(w, width, tl.load(box_ptr + 2), tl.load(box_ptr + 5))

    near = voxels_ptr + base + z_low.to(tl.int64) * v_z
    far = voxels_ptr + base + z_high.to(tl.int64) * v_z
    row_low, row_high = y_low.to(tl.int64)[:, None] * v_y, y_high.to(tl.int64)[:, None] * v_y
    column_low, column_high = x_low.to(tl.int64)[None, :] * v_x, x_high.to(tl.int64)[None, :] * v_x
    v000 = tl.load(near + row_low + column_low, mask=mask, other=0).to(tl.float32)
    v001 = tl.load(near + row_low + column_high, mask=mask, other=0).to(tl.float32)
    v010 = tl.load(near + row_high + column_low, mask=mask, other=0).to(tl.float32)
    v011 = tl.load(near + row_high + column_high, mask=mask, other=0).to(tl.float32)
    v100 = tl.load(far + row_low + column_low, mask=mask, other=0).to(tl.float32)
    v101 = tl.load(far + row_low + column_high, mask=mask, other=0).to(tl.float32)
    v110 = tl.load(far + row_high + column_low, mask=mask, other=0).to(tl.float32)
    v111 = tl.load(far + row_high + column_high, mask=mask, other=0).to(tl.float32)

    out = out_ptr + (d.to(tl.int64) * height + h[:, None]) * width + w[None, :]
    for c in tl.static_range(CHANNELS):
        offset, gain = tl.load(scale_ptr + 4 * c), tl.load(scale_ptr + 4 * c + 1)
        # In raw units, so that each tap is clamped and no more; a negative slope swaps the bounds.
        one = (tl.load(scale_ptr + 4 * c + 2) - intercept) / slope
        other = (tl.load(scale_ptr + 4 * c + 3) - intercept) / slope
        lo, hi = tl.minimum(one, other), tl.maximum(one, other)
        c000, c001 = tl.minimum(tl.maximum(v000, lo), hi), tl.minimum(tl.maximum(v001, lo), hi)
        c010, c011 = tl.minimum(tl.maximum(v010, lo), hi), tl.minimum(tl.maximum(v011, lo), hi)
        c100, c101 = tl.minimum(tl.maximum(v100, lo), hi), tl.minimum(tl.maximum(v101, lo), hi)
        c110, c111 = tl.minimum(tl.maximum(v110, lo), hi), tl.minimum(tl.maximum(v111, lo), hi)
        c00, c01 = c000 + (c100 - c000) * z_weight, c001 + (c101 - c001) * z_weight
        c10, c11 = c010 + (c110 - c010) * z_weight, c011 + (c111 - c011) * z_weight
        left = c00 + (c10 - c00) * y_weight[:, None]
        right = c01 + (c11 - c01) * y_weight[:, None]
        value = (left + (right - left) * x_weight[None, :]) * (slope * gain) + (intercept - offset) * gain
        tl.store(out + c * (tl.cast(depth, tl.int64) * height * width), value.to(out_ptr.dtype.element_ty), mask=mask)


def _launch_volume_ingest(
    voxels: Tensor,
    scale: Tensor,
    box: Tensor,
    z_positions: Tensor | None,
    size: Sequence[int],
    flips: Sequence[int],
    slope: float,
    intercept: float,
    dtype: torch.dtype,
) -> Tensor:
    depth, height, width = size
    out = torch.empty((len(scale), depth, height, width), dtype=dtype, device=voxels.device)
    strides = [-stride if flipped else stride for stride, flipped in zip(voxels.stride(), flips)]
    base = sum((n - 1) * s for n, s, flipped in zip(voxels.shape, voxels.stride(), flips) if flipped)
    # Width first: neighbouring outputs read neighbouring taps, and rows of 128 fill whole sectors of the stored dtype.
    config = tile("volume_ingest", {"BLOCK_H": 4, "BLOCK_W": 128, "num_warps": 4}, voxels.device)
    grid = (depth * triton.cdiv(height, config["BLOCK_H"]) * triton.cdiv(width, config["BLOCK_W"]),)
    with device_guard(voxels):
        _volume_ingest_kernel[grid](
            voxels,
            scale,
            box,
            scale if z_positions is None else z_positions,
            out,
            base,
            *strides,
            depth,
            height,
            width,
            slope,
            intercept,
            HAS_Z=z_positions is not None,
            CHANNELS=len(scale),
            **config,
        )
    return out


def _fake(
    voxels: Tensor,
    scale: Tensor,
    box: Tensor,
    z_positions: Tensor | None,
    size: Sequence[int],
    flips: Sequence[int],
    slope: float,
    intercept: float,
    dtype: torch.dtype,
) -> Tensor:
    return voxels.new_empty((scale.shape[0], *size), dtype=dtype)


_volume_ingest = define_op("volume_ingest", volume_ingest_reference, _launch_volume_ingest, _fake)


def _make_constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    # The copy is waited for: another stream may ask for the same constant next.
    return torch.tensor(values, dtype=dtype).to(device)


_kept_constant = lru_cache(maxsize=64)(_make_constant)


def _constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Kept, so that a repeated call copies nothing to the device; inside a graph it is a constant anyway.
    return (_make_constant if torch.compiler.is_compiling() else _kept_constant)(values, dtype, device)


def as_voxels(voxels: Tensor | np.ndarray, device: torch.device | str | None = None) -> tuple[Tensor, tuple[int, ...]]:
    """Take an array as a tensor without a copy, and tell which axes it runs backwards along.

    Args:
        voxels: (Z, Y, X); a NumPy view may be strided, transposed, flipped or memory-mapped.
        device: Where to put it.

    Returns:
        The tensor, unflipped where the array had a negative stride, and for each axis 1 if it must be read backwards.
    """
    if isinstance(voxels, np.ndarray):
        flips = tuple(int(stride < 0) for stride in voxels.strides)
        forward = voxels[tuple(slice(None, None, -1 if flipped else 1) for flipped in flips)]
        if not forward.dtype.isnative:
            forward = forward.astype(forward.dtype.newbyteorder("="))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")
            voxels = torch.from_numpy(forward)
    else:
        flips = (0,) * voxels.ndim
    return (voxels if device is None else voxels.to(device, non_blocking=True)), flips


def _scale_table(window: Any, windows: Any, scale: Any, device: torch.device) -> Tensor:
    if sum(option is not None for option in (window, windows, scale)) > 1:
        raise ValueError("ingest_volume: expected one of window, windows, scale, got several; pass one")
    if isinstance(scale, Tensor):
        table = scale.reshape(-1, 4) if scale.ndim == 1 else scale
        check_shape("ingest_volume", "scale", table, (None, 4))
        return table.to(device, torch.float32)
    if scale is not None:
        return _constant((tuple(float(v) for v in scale),), torch.float32, device)
    if window is None and windows is None:
        return _constant(((0.0, 1.0, -math.inf, math.inf),), torch.float32, device)
    pairs = [(float(lo), float(hi)) for lo, hi in (windows if windows is not None else [window])]
    if not pairs or any(not hi > lo for lo, hi in pairs):
        raise ValueError(f"ingest_volume: expected windows (lo, hi) with lo < hi, got {pairs}; swap or widen them")
    return _constant(tuple((lo, 1 / (hi - lo), lo, hi) for lo, hi in pairs), torch.float32, device)


def _box_table(box: Any, shape: Sequence[int], device: torch.device) -> Tensor:
    if isinstance(box, Tensor):
        check_shape("ingest_volume", "box", box, (6,))
        return box.to(device, torch.int32)
    corners = (0, 0, 0, *shape) if box is None else tuple(int(v) for v in box)
    if len(corners) != 6 or any(not 0 <= a < b <= n for a, b, n in zip(corners[:3], corners[3:], shape)):
        raise ValueError(f"ingest_volume: expected box (z0, y0, x0, z1, y1, x1) within {tuple(shape)}, got {corners}")
    return _constant(corners, torch.int32, device)


def ingest_volume(
    voxels: Tensor | np.ndarray,
    size: Sequence[int],
    *,
    box: Sequence[int] | Tensor | None = None,
    slope: float = 1.0,
    intercept: float = 0.0,
    window: tuple[float, float] | None = None,
    windows: Sequence[tuple[float, float]] | None = None,
    scale: Sequence[float] | Tensor | None = None,
    z_positions: Sequence[float] | Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Rescale, clamp, normalise and resample a scan onto a grid, in one pass over what it needs.

    Args:
        voxels: (Z, Y, X) in the stored dtype, any strides; NumPy views may run backwards.
        size: (D, H, W) of the grid.
        box: Voxels (z0, y0, x0, z1, y1, x1), end excluded, that the grid spans; the whole scan by default. As a tensor
            on the device (see `foreground_box`) it is used as it is, without a check.
        slope: Value of one stored unit, in HU for CT.
        intercept: Value of stored zero.
        window: (lo, hi) in the unit of ``voxel * slope + intercept``, mapped to [0, 1].
        windows: Several windows, one channel each.
        scale: (offset, gain, lo, hi) giving ``(clamp(value, lo, hi) - offset) * gain``: four numbers, or a tensor (4,)
            or (C, 4) on the device, for what was measured there (min-max, percentiles).
        z_positions: (D,) native slice coordinates of the grid's slices, instead of an even division of the box's
            depth; whole numbers give the stored slices themselves.
        dtype: float32, bfloat16 or float16.
        device: Where to resample; by default where `voxels` are.

    Returns:
        (D, H, W), or (C, D, H, W) for `windows` and for a (C, 4) `scale`. Without any of the three the values stay as
        they are.

    Raises:
        ValueError: Wrong rank, dtype, size, box, window or slope.
    """
    voxels, flips = as_voxels(voxels, device)
    check_shape("ingest_volume", "voxels", voxels, (None, None, None))
    check_dtype("ingest_volume", "voxels", voxels, STORED)
    if not voxels.numel():
        raise ValueError(f"ingest_volume: expected voxels with at least one element, got shape {tuple(voxels.shape)}")
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"ingest_volume: expected size (D, H, W) of positive numbers, got {tuple(size)}")
    if dtype not in OUTPUTS:
        raise ValueError(f"ingest_volume: expected dtype float32, bfloat16 or float16, got {dtype}")
    if slope == 0 or not math.isfinite(slope):
        raise ValueError(
            f"ingest_volume: expected a finite slope other than 0, got {slope}; read the file's rescale slope"
        )
    table = _scale_table(window, windows, scale, voxels.device)
    if z_positions is not None:
        if not isinstance(z_positions, Tensor):
            z_positions = _constant(tuple(float(z) for z in z_positions), torch.float32, voxels.device)
        check_shape("ingest_volume", "z_positions", z_positions, (size[0],))
        z_positions = z_positions.to(torch.float32)
        check_same_device("ingest_volume", voxels, z_positions)
    corners = _box_table(box, voxels.shape, voxels.device)
    sizes = [int(n) for n in size]
    out = _volume_ingest(voxels, table, corners, z_positions, sizes, list(flips), float(slope), float(intercept), dtype)
    return out if windows is not None or (isinstance(scale, Tensor) and scale.ndim == 2) else out[0]


def _variants() -> tuple[Variant, ...]:
    pointers = {"scale_ptr": "*fp32:16", "box_ptr": "*i32:16", "z_ptr": "*fp32:16"}
    numbers = {"base": "i32", "v_z": "i32:16", "v_y": "i32:16", "slope": "fp32", "intercept": "fp32"}
    numbers |= dict.fromkeys(("depth", "height", "width"), "i32:16")
    variants = []
    # A launch makes constants of sides of 1.
    one = dict.fromkeys(("depth", "height", "width"), 1)
    for stored, out, channels, chosen, sides in (
        ("i16", "fp32", 1, False, {}),
        ("i16", "bf16", 3, True, {}),
        ("fp32", "fp32", 1, False, {}),
        ("i16", "fp32", 1, True, one),
    ):
        constants = {"v_x": 1, "HAS_Z": chosen, "CHANNELS": channels, "BLOCK_H": 4, "BLOCK_W": 128, **sides}
        signature = {"voxels_ptr": f"*{stored}:16", **pointers, "out_ptr": f"*{out}:16", **numbers}
        signature = {name: kind for name, kind in signature.items() if name not in sides}
        name = f"{stored}-{out}-c{channels}{'-one' if sides else ''}"
        variants.append(Variant(name, _volume_ingest_kernel, signature, constants, 4, 3))
    return tuple(variants)


AOT_VARIANTS = _variants()
