"""Triton kernels of `memory_attention`: attention split over keys, with narrow values; its merge and its backward.

Keys lie in slots of equal size with a shorter run behind them (SAM2's memory frames and object pointers)::

    key index   0 .. slot_size-1 | ... | (num_slots-1)*slot_size .. | num_slots*slot_size .. tokens-1
    valid       lengths[b, 0]    | ... | lengths[b, num_slots-1]    | lengths[b, num_slots]

A program owns a tile of queries and one range of keys and walks the valid part of each slot inside its range, so that
empty slots cost nothing and nobody on the host has to know which they are. With more than one range it leaves its
normalised result and log-sum-exp to `merge_kernel`. Base pointers advance in 64 bit (loop counters by way of `one`,
for they are plain numbers in the interpreter), offsets inside a tile stay small.
"""

import math

import torch

from medvl_sam2.kernels._aot import Variant
from medvl_sam2.kernels._common import HAS_TRITON, tl, triton
from medvl_sam2.kernels._tuning import Tile

MAX_RANGES = 16
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    out_ptr,
    lse_ptr,
    queries,
    tokens,
    slot_size,
    num_slots,
    range_size,
    scale,
    HAS_LENGTHS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (query tiles, ranges, batch); writes out (ranges, batch, queries, DV) and lse (ranges, batch, queries)."""
    batch = tl.program_id(2).to(tl.int64)
    one = tl.full([], 1, tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    inside = first + m < queries

    q = tl.load(q_ptr + (batch * queries + first) * D + m[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
    k_base = k_ptr + batch * tokens * D
    v_base = v_ptr + batch * tokens * DV
    low = tl.program_id(1) * range_size
    high = tl.minimum(low + range_size, tokens)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, DV], dtype=tl.float32)

    first_slot = tl.minimum(low // slot_size, num_slots)
    last_slot = tl.minimum((high - 1) // slot_size, num_slots)
    for slot in range(first_slot, last_slot + 1):
        start = slot * slot_size
        end = tl.where(slot < num_slots, start + slot_size, tokens)
        if HAS_LENGTHS:
            end = tl.minimum(end, start + tl.load(lengths_ptr + batch * (num_slots + 1) + slot))
        begin = tl.maximum(start, low)
        end = tl.minimum(end, high)
        for at in range(begin, end, BLOCK_N):
            valid = at + n < end
            base = at * one
            k = tl.load(k_base + base * D + n[:, None] * D + d[None, :], mask=valid[:, None], other=0.0)
            s = tl.where(valid[None, :], tl.dot(q, tl.trans(k), input_precision=PRECISION), float("-inf"))
            # The scale is positive, so the maximum may be scaled instead of every score: one fused multiply-add each.
            higher = tl.maximum(top, tl.max(s, axis=1) * (scale * LOG2E))
            p = tl.exp2(s * (scale * LOG2E) - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(p, axis=1)
            top = higher
            v = tl.load(v_base + base * DV + n[:, None] * DV + dv[None, :], mask=valid[:, None], other=0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)

    some = total > 0.0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) / LOG2E, float("-inf"))
    row = (tl.program_id(1).to(tl.int64) * tl.num_programs(2) + batch) * queries + first
    tl.store(lse_ptr + row + m, lse, mask=inside)
    out = out_ptr + row * DV + m[:, None] * DV + dv[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def merge_kernel(part_ptr, part_lse_ptr, out_ptr, lse_ptr, rows, ranges, DV: tl.constexpr, BLOCK_M: tl.constexpr):
    """Weigh the ranges' results by exp(their log-sum-exp); grid (tiles of batch * queries,)."""
    one = tl.full([], 1, tl.int64)
    first = tl.program_id(0) * one * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    dv = tl.arange(0, DV)
    inside = first + m < rows
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, DV], dtype=tl.float32)
    for index in range(ranges):
        row = index * one * rows + first
        lse = tl.load(part_lse_ptr + row + m, mask=inside, other=float("-inf"))
        part = tl.load(part_ptr + row * DV + m[:, None] * DV + dv[None, :], mask=inside[:, None], other=0.0)
        higher = tl.maximum(top, lse)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2((top - safe) * LOG2E)
        weight = tl.exp2((lse - safe) * LOG2E)
        acc = acc * shrink[:, None] + part * weight[:, None]
        total = total * shrink + weight
        top = higher
    some = total > 0.0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)) / LOG2E, float("-inf"))
    tl.store(lse_ptr + first + m, lse, mask=inside)
    out = out_ptr + first * DV + m[:, None] * DV + dv[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    queries,
    tokens,
    slot_size,
    num_slots,
    scale,
    HAS_LENGTHS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (query tiles, batch): dq = scale * sum over keys of p (grad . v - delta) k."""
    batch = tl.program_id(1).to(tl.int64)
    one = tl.full([], 1, tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    inside = first + m < queries
    row = batch * queries + first
    q = tl.load(q_ptr + row * D + m[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
    grad = tl.load(grad_ptr + row * DV + m[:, None] * DV + dv[None, :], mask=inside[:, None], other=0.0)
    lse = tl.load(lse_ptr + row + m, mask=inside, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + row + m, mask=inside, other=0.0)
    k_base = k_ptr + batch * tokens * D
    v_base = v_ptr + batch * tokens * DV
    dq = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    for slot in range(num_slots + 1):
        start = slot * slot_size
        end = tl.where(slot < num_slots, start + slot_size, tokens)
        if HAS_LENGTHS:
            end = tl.minimum(end, start + tl.load(lengths_ptr + batch * (num_slots + 1) + slot))
        for at in range(start, end, BLOCK_N):
            valid = at + n < end
            base = at * one
            k = tl.load(k_base + base * D + n[:, None] * D + d[None, :], mask=valid[:, None], other=0.0)
            v = tl.load(v_base + base * DV + n[:, None] * DV + dv[None, :], mask=valid[:, None], other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p = tl.where(valid[None, :], tl.exp2(s * (scale * LOG2E) - lse[:, None]), 0.0)
            ds = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    out = dq_ptr + row * D + m[:, None] * D + d[None, :]
    tl.store(out, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    queries,
    tokens,
    slot_size,
    num_slots,
    scale,
    HAS_LENGTHS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (key tiles, batch): dk = scale * sum over queries of p (grad . v - delta) q, dv = sum of p grad."""
    batch = tl.program_id(1).to(tl.int64)
    one = tl.full([], 1, tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    inside = first + n < tokens
    valid = inside
    if HAS_LENGTHS:
        index = first.to(tl.int32) + n
        slot = tl.minimum(index // slot_size, num_slots)
        length = tl.load(lengths_ptr + batch * (num_slots + 1) + slot, mask=inside, other=0)
        valid = inside & (index - slot * slot_size < length)
    row = batch * tokens + first
    k = tl.load(k_ptr + row * D + n[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
    v = tl.load(v_ptr + row * DV + n[:, None] * DV + dv[None, :], mask=inside[:, None], other=0.0)
    q_base = q_ptr + batch * queries * D
    grad_base = grad_ptr + batch * queries * DV
    row_base = batch * queries
    dk = tl.zeros([BLOCK_N, D], dtype=tl.float32)
    dvalue = tl.zeros([BLOCK_N, DV], dtype=tl.float32)
    for at in range(0, queries, BLOCK_M):
        present = at + m < queries
        base = at * one
        q = tl.load(q_base + base * D + m[:, None] * D + d[None, :], mask=present[:, None], other=0.0)
        grad = tl.load(grad_base + base * DV + m[:, None] * DV + dv[None, :], mask=present[:, None], other=0.0)
        lse = tl.load(lse_ptr + row_base + base + m, mask=present, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + row_base + base + m, mask=present, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.where(valid[:, None] & present[None, :], tl.exp2(s * (scale * LOG2E) - lse[None, :]), 0.0)
        dvalue = tl.dot(p.to(grad.dtype), grad, dvalue, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    out = row * D + n[:, None] * D + d[None, :]
    tl.store(dk_ptr + out, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside[:, None])
    out = row * DV + n[:, None] * DV + dv[None, :]
    tl.store(dv_ptr + out, dvalue.to(dv_ptr.dtype.element_ty), mask=inside[:, None])


def precision(dtype: torch.dtype) -> str:
    """How the matrix unit multiplies operands of a dtype; other than fp32 the word has no effect."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def forward_tile() -> Tile:
    """Tile of `forward_kernel`; its shared memory fits an A100 and an H100."""
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


def query_gradient_tile(width: int, value_width: int) -> Tile:
    """Tile of `query_gradient_kernel`: the widest of those tried that spills nothing on sm_80 and sm_90."""
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4 if width + value_width < 256 else 8, "num_stages": 1}


def key_gradient_tile(width: int, value_width: int) -> Tile:
    """Tile of `key_gradient_kernel`, chosen likewise."""
    if width == 256:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    return query_gradient_tile(width, value_width)


def num_ranges(programs: int, key_tiles: int, slots: int) -> int:
    """How many ranges to cut the keys into: the fewest waves of programs times the tiles each walks, plus start-up."""

    def cost(ranges: int) -> int:
        start_up = 2 if ranges == 1 else 4
        return math.ceil(programs * ranges / slots) * (math.ceil(key_tiles / ranges) + start_up)

    return min(range(1, min(MAX_RANGES, key_tiles) + 1), key=cost)


def _variants() -> tuple[Variant, ...]:
    variants = []
    for label, width, value_width in (("cross256", 256, 64), ("cross128", 128, 32), ("self256", 256, 256)):
        kernels = [("fwd", forward_kernel, forward_tile())]
        if value_width <= 128:
            kernels.append(("dq", query_gradient_kernel, query_gradient_tile(width, value_width)))
            kernels.append(("dk", key_gradient_kernel, key_gradient_tile(width, value_width)))
        for name, kernel, settings in kernels:
            signature = {a: "*bf16:16" for a in kernel.arg_names if a.endswith("_ptr")}
            exact = ("lse_ptr", "delta_ptr") if name != "fwd" else ("out_ptr", "lse_ptr")
            signature |= dict.fromkeys(exact, "*fp32:16") | {
                "lengths_ptr": "*i32:16",
                "num_slots": "i32",
                "scale": "fp32",
            }
            signature |= dict.fromkeys(("queries", "tokens", "slot_size"), "i32:16")
            if name == "fwd":
                signature["range_size"] = "i32:16"
            warps, stages = settings.pop("num_warps"), settings.pop("num_stages")
            constants = {"HAS_LENGTHS": True, "D": width, "DV": value_width, "PRECISION": "tf32", **settings}
            variants.append(Variant(f"{name}-{label}", kernel, signature, constants, warps, stages, wgmma=True))
    for value_width in (64, 256):
        names = ("part_ptr", "part_lse_ptr", "lse_ptr")
        signature = dict.fromkeys(names, "*fp32:16") | {"out_ptr": "*bf16:16", "rows": "i32:16", "ranges": "i32"}
        constants = {"DV": value_width, "BLOCK_M": 16}
        variants.append(Variant(f"merge-{value_width}", merge_kernel, signature, constants, 4, 3))
    return tuple(variants)


AOT_VARIANTS = _variants() if HAS_TRITON else ()
