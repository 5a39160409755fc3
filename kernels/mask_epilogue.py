"""From the decoder's low-resolution logits to labels on the scan's own grid, in one pass.

    v_b(z, y, x) = linear over slices (bilinear in plane (logits[s, b]))
    label = value[argmax_b v_b] where max_b v_b > threshold, else 0

Each native slice lies between two model slices. A program takes one native row and up to 16 native slices between the
same two: their planes are interpolated once per object and shared by those slices, and the float values of an object
live in registers only, compared with the best so far. Nothing of float at native size exists. The CPU path goes slice
by slice and, as interpolation of numbers that are all at most the threshold stays there, visits each object only where
one of its taps is above.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from medvl_sam2.kernels._aot import Variant
from medvl_sam2.kernels._common import check_dtype, check_same_device, check_shape, device_guard, one_thread, tl, triton
from medvl_sam2.kernels._library import define_op
from medvl_sam2.kernels._resample import axis_taps, taps
from medvl_sam2.kernels._tuning import tile
from medvl_sam2.kernels.volume_ingest import as_voxels

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MOST_SLICES = 16
# Floats of upsampled planes that the CPU path holds at a time, two planes per object.
HELD_FLOATS = 4 << 20


def _region(live: Tensor, low: Tensor, high: Tensor, limits: tuple[int, int]) -> slice:
    """Outputs within `limits` of which a tap is live; taps ascend, so they are a range."""
    at = live.nonzero()
    if not len(at):
        return slice(0, 0)
    touched = ((high >= int(at[0])) & (low <= int(at[-1]))).nonzero()
    return slice(max(int(touched[0]), limits[0]), min(int(touched[-1]) + 1, limits[1]))


def _upsample(plane: Tensor, y: tuple[Tensor, ...], x: tuple[Tensor, ...]) -> Tensor:
    rows = torch.lerp(plane.index_select(0, y[0]), plane.index_select(0, y[1]), y[2][:, None])
    return torch.lerp(rows.index_select(1, x[0]), rows.index_select(1, x[1]), x[2])


def mask_epilogue_reference(
    out: Tensor,
    logits: Tensor,
    chunks: Tensor,
    weights: Tensor,
    values: Tensor,
    box: Sequence[int],
    flips: Sequence[int],
    threshold: float,
    thick: int,
    per_object: bool,
) -> None:
    """Fill `out` with plain torch, slice by slice. Arguments as the operation's, see `mask_epilogue`."""
    y0, x0, y1, x1 = box
    device, objects = logits.device, logits.shape[1]
    y_taps = [t.to(device) for t in axis_taps(y1 - y0, 0, logits.shape[2])]
    x_taps = [t.to(device) for t in axis_taps(x1 - x0, 0, logits.shape[3])]
    band = max(1, HELD_FLOATS // max(1, 2 * objects * (x1 - x0)))
    backwards = [axis - 1 for axis in (1, 2) if flips[axis]]
    labels, shares = values.tolist(), weights.tolist()
    out.zero_()

    def place(axis: int, start: int, stop: int) -> slice:
        n = out.shape[axis - 3]
        return slice(n - stop, n - start) if flips[axis] else slice(start, stop)

    def put(target: Tensor, z: int, rows: slice, columns: slice, values: Tensor) -> None:
        spot = place(1, y0 + rows.start, y0 + rows.stop), place(2, x0 + columns.start, x0 + columns.stop)
        target[place(0, z, z + 1).start][spot].copy_(values.flip(backwards) if backwards else values)

    with one_thread():
        for low, high, first, count in chunks.tolist():
            if low < 0:
                continue
            pair = logits[[low, high]].float()
            live = (pair > threshold).any(0)
            for top in range(0, y1 - y0, band):
                bottom, planes = min(top + band, y1 - y0), []
                for b in range(objects):
                    rows = _region(live[b].any(1), *y_taps[:2], (top, bottom))
                    columns = _region(live[b].any(0), *x_taps[:2], (0, x1 - x0))
                    if rows.stop > rows.start and columns.stop > columns.start:
                        part = [t[rows] for t in y_taps], [t[columns] for t in x_taps]
                        near = _upsample(pair[0, b], *part)
                        planes.append((b, rows, columns, near, near if high == low else _upsample(pair[1, b], *part)))
                for z in range(first, first + count) if planes else ():
                    if per_object:
                        for b, rows, columns, near, far in planes:
                            put(out[b], z, rows, columns, torch.lerp(near, far, shares[z]) > threshold)
                        continue
                    best = torch.full((bottom - top, x1 - x0), threshold, device=device)
                    label = torch.zeros_like(best, dtype=torch.uint8)
                    for b, rows, columns, near, far in planes:
                        value = torch.lerp(near, far, shares[z])
                        spot = slice(rows.start - top, rows.stop - top), columns
                        label[spot].masked_fill_(value > best[spot], labels[b])
                        torch.fmax(best[spot], value, out=best[spot])
                    put(out, z, slice(top, bottom), slice(0, x1 - x0), label)


@triton.jit
def _mask_epilogue_kernel(
    out_ptr,
    logits_ptr,
    chunks_ptr,
    weights_ptr,
    values_ptr,
    base,
    o_b,
    o_z,
    o_y,
    o_x,
    l_s,
    l_b,
    l_y,
    l_x,
    objects,
    rows,
    columns,
    height,
    width,
    y0,
    x0,
    y1,
    x1,
    threshold,
    PER_OBJECT: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    across = tl.cdiv(width, BLOCK_X)
    program = tl.program_id(0)
    x = program % across * BLOCK_X + tl.arange(0, BLOCK_X)
    y = program // across % height
    chunk = chunks_ptr + program // (across * height) * 4
    low, high, first, count = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2), tl.load(chunk + 3)
    z = first + tl.arange(0, BLOCK_Z)
    mask = (tl.arange(0, BLOCK_Z) < count)[:, None] & (x < width)[None, :]
    inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1) & (low >= 0)
    share = tl.load(weights_ptr + z, mask=tl.arange(0, BLOCK_Z) < count, other=0.0)[:, None]

    y_low, y_high, y_weight = taps(y - y0, y1 - y0, 0, rows)
    x_low, x_high, x_weight = taps(x - x0, x1 - x0, 0, columns)
    near = logits_ptr + low.to(tl.int64) * l_s
    far = logits_ptr + high.to(tl.int64) * l_s
    top_left = y_low.to(tl.int64) * l_y + x_low.to(tl.int64) * l_x
    top_right = y_low.to(tl.int64) * l_y + x_high.to(tl.int64) * l_x
    bottom_left = y_high.to(tl.int64) * l_y + x_low.to(tl.int64) * l_x
    bottom_right = y_high.to(tl.int64) * l_y + x_high.to(tl.int64) * l_x
    spot = base + z.to(tl.int64)[:, None] * o_z + y.to(tl.int64) * o_y + x.to(tl.int64)[None, :] * o_x
    best = tl.zeros([BLOCK_Z, BLOCK_X], dtype=tl.float32) + threshold
    label = tl.zeros([BLOCK_Z, BLOCK_X], dtype=tl.int32)
    plane = tl.zeros([1], dtype=tl.int64)
    for b in range(objects):
        one = tl.load(near + plane + top_left, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(near + plane + bottom_left, mask=inside, other=0.0).to(tl.float32)
        left = one + (two - one) * y_weight
        one = tl.load(near + plane + top_right, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(near + plane + bottom_right, mask=inside, other=0.0).to(tl.float32)
        right = one + (two - one) * y_weight
        here = left + (right - left) * x_weight
        one = tl.load(far + plane + top_left, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(far + plane + bottom_left, mask=inside, other=0.0).to(tl.float32)
        left = one + (two - one) * y_weight
        one = tl.load(far + plane + top_right, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(far + plane + bottom_right, mask=inside, other=0.0).to(tl.float32)
        right = one + (two - one) * y_weight
        there = left + (right - left) * x_weight
        value = here[None, :] + (there - here)[None, :] * share
        if PER_OBJECT:
            found = (value > threshold) & inside[None, :]
            tl.store(out_ptr + spot, found.to(out_ptr.dtype.element_ty), mask=mask)
            spot += o_b
        else:
            better = (value > best) & inside[None, :]
            best = tl.where(better, value, best)
            label = tl.where(better, tl.load(values_ptr + b), label)
        plane += l_b
    if not PER_OBJECT:
        tl.store(out_ptr + spot, label.to(out_ptr.dtype.element_ty), mask=mask)


def _launch_mask_epilogue(
    out: Tensor,
    logits: Tensor,
    chunks: Tensor,
    weights: Tensor,
    values: Tensor,
    box: Sequence[int],
    flips: Sequence[int],
    threshold: float,
    thick: int,
    per_object: bool,
) -> None:
    if not out.numel():
        return
    height, width = out.shape[-2:]
    if per_object:
        # One byte per element either way; a pointer to booleans would be read as single bits.
        out = out.view(torch.uint8)
    strides = out.stride()[-3:]
    base = sum((n - 1) * s for n, s, flipped in zip(out.shape[-3:], strides, flips) if flipped)
    default = {"BLOCK_X": 128 if thick > 4 else 256, "num_warps": 4}
    config = tile("mask_epilogue", default, out.device, f"Z{thick}")
    with device_guard(out):
        _mask_epilogue_kernel[(len(chunks) * height * triton.cdiv(width, config["BLOCK_X"]),)](
            out,
            logits,
            chunks,
            weights,
            values,
            base,
            out.stride(0) if per_object else 0,
            *(-s if flipped else s for s, flipped in zip(strides, flips)),
            *logits.stride(),
            logits.shape[1],
            *logits.shape[2:],
            height,
            width,
            *box,
            threshold,
            PER_OBJECT=per_object,
            BLOCK_Z=thick,
            **config,
        )


def _fake(
    out: Tensor,
    logits: Tensor,
    chunks: Tensor,
    weights: Tensor,
    values: Tensor,
    box: Sequence[int],
    flips: Sequence[int],
    threshold: float,
    thick: int,
    per_object: bool,
) -> None:
    return None


_mask_epilogue = define_op(
    "mask_epilogue", mask_epilogue_reference, _launch_mask_epilogue, _fake, mutates_args=("out",)
)


def _slice_table(positions: tuple[float, ...], depth: int, start: int, stop: int) -> tuple[list, list, int]:
    """Group native slices by the two model slices around them: rows (low, high, first, count), weights, largest count.

    Slices beyond the outermost model slice take that one; those outside ``[start, stop)`` have low = -1.
    """
    order = sorted(range(len(positions)), key=lambda s: positions[s])
    chunks: list[list[int]] = []
    weights, after, thick = [], 0, 1
    for z in range(depth):
        while after < len(order) and positions[order[after]] <= z:
            after += 1
        low, high = order[max(after - 1, 0)], order[min(after, len(order) - 1)]
        gap = positions[high] - positions[low]
        weights.append((z - positions[low]) / gap if gap > 0 else 0.0)
        if not start <= z < stop:
            low = high = -1
        if chunks and chunks[-1][:2] == [low, high] and chunks[-1][3] < MOST_SLICES:
            chunks[-1][3] += 1
            thick = max(thick, chunks[-1][3])
        else:
            chunks.append([low, high, z, 1])
    return chunks, weights, next(n for n in (1, 2, 4, 8, MOST_SLICES) if n >= thick)


def _make_tables(
    positions: tuple[float, ...], depth: int, start: int, stop: int, labels: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, int]:
    chunks, weights, thick = _slice_table(positions, depth, start, stop)
    # The copies are waited for: another stream may ask for the same tables next.
    return (
        torch.tensor(chunks, dtype=torch.int32).reshape(-1, 4).to(device),
        torch.tensor(weights, dtype=torch.float32).to(device),
        torch.tensor(labels, dtype=torch.int32).to(device),
        thick,
    )


_kept_tables = lru_cache(maxsize=64)(_make_tables)


def mask_epilogue(
    logits: Tensor,
    size: Sequence[int] | None = None,
    *,
    box: Sequence[int] | None = None,
    z_positions: Sequence[float] | None = None,
    threshold: float = 0.0,
    label_values: Sequence[int] | None = None,
    per_object: bool = False,
    out: Tensor | np.ndarray | None = None,
) -> Tensor | np.ndarray:
    """Put the masks of several objects onto the native grid, as labels.

    Args:
        logits: (S, B, h, w) float: S model slices, B objects.
        size: (Z, Y, X) of the native grid; may be left out where `out` is given.
        box: Native voxels (z0, y0, x0, z1, y1, x1), end excluded, that the model grid spans, as in `ingest_volume`;
            everything outside is background.
        z_positions: (S,) native slice coordinate of each model slice, in any order; by default they divide the box
            evenly. Beyond the first and the last their plane holds on.
        threshold: Logit above which a voxel belongs to an object.
        label_values: (B,) label of each object, 1 to 255; 1, 2, ... by default. Where objects overlap the larger logit
            wins, the earlier object on a tie.
        per_object: Give one boolean mask per object instead, which may overlap.
        out: Written in place: (Z, Y, X) uint8, or (B, Z, Y, X) bool for `per_object`; any strides, and a NumPy view may
            run backwards.

    Returns:
        `out`, or a new tensor on the device of `logits`. ``foreground_box(labels, 0)`` bounds what was found, for a
        lossless crop.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    op = "mask_epilogue"
    check_shape(op, "logits", logits, (None, None, None, None))
    check_dtype(op, "logits", logits, FLOATS)
    slices, objects = logits.shape[:2]
    if size is None and out is None:
        raise ValueError(f"{op}: expected size (Z, Y, X) or out, got neither")
    size = [int(n) for n in (out.shape[-3:] if size is None else size)]
    if len(size) != 3 or 0 in (slices, *logits.shape[2:]):
        raise ValueError(f"{op}: expected size (Z, Y, X) and logits with slices and pixels, got {size}, {logits.shape}")
    kind = torch.bool if per_object else torch.uint8
    shape = (objects, *size) if per_object else tuple(size)
    given = torch.empty(shape, dtype=kind, device=logits.device) if out is None else out
    target, flips = as_voxels(given)
    check_shape(op, "out", target, shape)
    check_dtype(op, "out", target, (kind,))
    check_same_device(op, logits, target)
    z0, y0, x0, z1, y1, x1 = (0, 0, 0, *size) if box is None else (int(v) for v in box)
    if any(not 0 <= a < b <= n for a, b, n in zip((z0, y0, x0), (z1, y1, x1), size)) and target.numel():
        raise ValueError(f"{op}: expected box (z0, y0, x0, z1, y1, x1) within {size}, got {box}")
    if z_positions is None:
        z_positions = [z0 + (s + 0.5) * (z1 - z0) / slices - 0.5 for s in range(slices)]
    if len(z_positions) != slices:
        raise ValueError(f"{op}: expected {slices} z_positions, one per slice of logits, got {len(z_positions)}")
    labels = tuple(range(1, objects + 1)) if label_values is None else tuple(int(v) for v in label_values)
    if len(labels) != objects or any(not 1 <= v <= 255 for v in labels) and not per_object:
        raise ValueError(f"{op}: expected {objects} label_values from 1 to 255, got {labels}; use per_object=True")
    # Kept, so that a repeated call copies nothing to the device; inside a graph the tables are constants anyway.
    make = _make_tables if torch.compiler.is_compiling() else _kept_tables
    tables = make(tuple(float(z) for z in z_positions), size[0], z0, z1, labels, logits.device)
    options = ([y0, x0, y1, x1], list(flips[-3:]), float(threshold), tables[3], per_object)
    _mask_epilogue(target, logits, *tables[:3], *options)
    return given


def _variants() -> tuple[Variant, ...]:
    pointers = {"out_ptr": "*u8:16", "chunks_ptr": "*i32:16", "weights_ptr": "*fp32:16", "values_ptr": "*i32:16"}
    strides = dict.fromkeys(("o_b", "o_z", "o_y", "l_s", "l_b", "l_y"), "i32:16")
    sizes = dict.fromkeys(("rows", "columns", "height", "width"), "i32:16")
    plain = dict.fromkeys(("base", "objects", "y0", "x0", "y1", "x1"), "i32")
    variants = []
    for dtype, thick, across, separate in (("fp32", 16, 128, False), ("bf16", 16, 128, False), ("fp32", 1, 256, True)):
        signature = {**pointers, "logits_ptr": f"*{dtype}:16", **strides, **sizes, **plain, "threshold": "fp32"}
        constants = {"o_x": 1, "l_x": 1, "PER_OBJECT": separate, "BLOCK_Z": thick, "BLOCK_X": across}
        name = f"{dtype}-z{thick}{'-objects' if separate else ''}"
        variants.append(Variant(name, _mask_epilogue_kernel, signature, constants, 4, 3))
    return tuple(variants)


AOT_VARIANTS = _variants()
