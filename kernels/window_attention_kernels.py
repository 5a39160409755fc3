"""Triton kernels of `window_attention`: attention inside windows of a map that stays where it is.

A program owns one window, one head and a tile of its queries (or keys) and reads tokens at their place in the map
(B, H, W, 3 * heads * DIM). Keys of a window that hang over the map's edge are the padding vector. Head dims are seldom
powers of two, so a tile is two column blocks, for instance 72 = 64 + 8 of 16, instead of one of 128. A window's place
in the map is reckoned in 64 bit, a token's place behind it in 32, for which a window's rows must span less than 2**31.
"""

import torch

from medvl_sam2.kernels._aot import Variant
from medvl_sam2.kernels._common import HAS_TRITON, tl, triton
from medvl_sam2.kernels._tuning import Tile

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _window_corner(window, height, width, WINDOW: tl.constexpr, STEP: tl.constexpr):
    """First token of a window in the map and first cell of it in the output (64 bit), and the rows and columns left."""
    across = tl.cdiv(width, WINDOW)
    per_image = across * tl.cdiv(height, WINDOW)
    image, inside = window // per_image, window % per_image
    top, left = (inside // across) * WINDOW, (inside % across) * WINDOW
    token = (image * height + top) * width + left
    cell = (image * (height // STEP) + top // STEP) * (width // STEP) + left // STEP
    return token, cell, (height - top).to(tl.int32), (width - left).to(tl.int32)


@triton.jit
def _load_halves(ptr, rows, mask, DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    d1 = tl.arange(0, D1)
    first = tl.load(ptr + rows[:, None] + d1[None, :], mask=mask[:, None] & (d1 < DIM)[None, :], other=0.0)
    second = first
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2)
        second = tl.load(ptr + rows[:, None] + d2[None, :], mask=mask[:, None] & (d2 < DIM)[None, :], other=0.0)
    return first, second


@triton.jit
def _store_halves(ptr, rows, first, second, mask, DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    kind = ptr.dtype.element_ty
    d1 = tl.arange(0, D1)
    tl.store(ptr + rows[:, None] + d1[None, :], first.to(kind), mask=mask[:, None] & (d1 < DIM)[None, :])
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2)
        tl.store(ptr + rows[:, None] + d2[None, :], second.to(kind), mask=mask[:, None] & (d2 < DIM)[None, :])


@triton.jit
def _load_queries(
    ptr,
    rows,
    row_stride,
    column_stride,
    mask,
    POOL: tl.constexpr,
    DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
):
    """Queries at `rows`, or the maximum of the 2x2 tokens that begin there."""
    first, second = _load_halves(ptr, rows, mask, DIM, D1, D2)
    if POOL:
        for index in tl.static_range(1, 4):
            at = rows + (index // 2) * row_stride + (index % 2) * column_stride
            other_first, other_second = _load_halves(ptr, at, mask, DIM, D1, D2)
            # bfloat16 comes back from a maximum as fp32.
            first = tl.maximum(first, other_first).to(ptr.dtype.element_ty)
            second = tl.maximum(second, other_second).to(ptr.dtype.element_ty)
    return first, second


@triton.jit
def _load_keys(
    ptr, padding_ptr, rows, inside, PADDED: tl.constexpr, DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr
):
    first, second = _load_halves(ptr, rows, inside, DIM, D1, D2)
    if PADDED:
        nowhere = tl.zeros_like(rows)
        pad_first, pad_second = _load_halves(padding_ptr, nowhere, nowhere == 0, DIM, D1, D2)
        first = tl.where(inside[:, None], first, pad_first)
        second = tl.where(inside[:, None], second, pad_second)
    return first, second


@triton.jit
def _dot_halves(a1, a2, b1, b2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """Products of all rows of `a` with all rows of `b`."""
    product = tl.dot(a1, tl.trans(b1), input_precision=PRECISION)
    if D2 > 0:
        product = tl.dot(a2, tl.trans(b2), product, input_precision=PRECISION)
    return product


@triton.jit
def forward_kernel(
    qkv_ptr,
    padding_ptr,
    out_ptr,
    lse_ptr,
    height,
    width,
    heads,
    scale,
    WINDOW: tl.constexpr,
    POOL: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (windows, heads, query tiles); out (B, H', W', heads * DIM), lse (B, H', W', heads)."""
    STEP: tl.constexpr = 2 if POOL else 1
    SIDE: tl.constexpr = WINDOW // STEP
    window = tl.program_id(0).to(tl.int64)
    token, first_cell, below, beyond = _window_corner(window, height, width, WINDOW, STEP)
    head = tl.program_id(1)
    channels = heads * DIM
    stride = 3 * channels
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    my, mx = m // SIDE, m % SIDE
    present = (m < SIDE * SIDE) & (my * STEP < below) & (mx * STEP < beyond)
    base = qkv_ptr + token * stride + head * DIM
    q_rows = (my * STEP * width + mx * STEP) * stride
    q1, q2 = _load_queries(base, q_rows, width * stride, stride, present, POOL, DIM, D1, D2)

    upper = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1], dtype=tl.float32)
    acc2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 16], dtype=tl.float32)
    for at in range(0, WINDOW * WINDOW, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        real = n < WINDOW * WINDOW
        inside = real & (n // WINDOW < below) & (n % WINDOW < beyond)
        rows = (n // WINDOW * width + n % WINDOW) * stride
        pad = padding_ptr + head * DIM
        k1, k2 = _load_keys(base + channels, pad + channels, rows, inside, PADDED, DIM, D1, D2)
        s = tl.where(real[None, :], _dot_halves(q1, q2, k1, k2, D2, PRECISION), float("-inf"))
        higher = tl.maximum(upper, tl.max(s, axis=1) * (scale * LOG2E))
        p = tl.exp2(s * (scale * LOG2E) - higher[:, None])
        shrink = tl.exp2(upper - higher)
        total = total * shrink + tl.sum(p, axis=1)
        upper = higher
        v1, v2 = _load_keys(base + 2 * channels, pad + 2 * channels, rows, inside, PADDED, DIM, D1, D2)
        p = p.to(v1.dtype)
        acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION)
        if D2 > 0:
            acc2 = tl.dot(p, v2, acc2 * shrink[:, None], input_precision=PRECISION)

    cell = my * (width // STEP) + mx
    lse = (upper + tl.log2(total)) / LOG2E
    tl.store(lse_ptr + first_cell * heads + head + cell * heads, lse, mask=present)
    acc1, acc2 = acc1 / total[:, None], acc2 / total[:, None]
    _store_halves(out_ptr + first_cell * channels + head * DIM, cell * channels, acc1, acc2, present, DIM, D1, D2)


@triton.jit
def query_gradient_kernel(
    qkv_ptr,
    padding_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    height,
    width,
    heads,
    scale,
    WINDOW: tl.constexpr,
    POOL: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid as `forward_kernel`; a pooled query passes its gradient to the first of its tokens that has the maximum."""
    STEP: tl.constexpr = 2 if POOL else 1
    SIDE: tl.constexpr = WINDOW // STEP
    window = tl.program_id(0).to(tl.int64)
    token, first_cell, below, beyond = _window_corner(window, height, width, WINDOW, STEP)
    head = tl.program_id(1)
    channels = heads * DIM
    stride = 3 * channels
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    my, mx = m // SIDE, m % SIDE
    present = (m < SIDE * SIDE) & (my * STEP < below) & (mx * STEP < beyond)
    base = qkv_ptr + token * stride + head * DIM
    q_rows = (my * STEP * width + mx * STEP) * stride
    q1, q2 = _load_queries(base, q_rows, width * stride, stride, present, POOL, DIM, D1, D2)
    cell = my * (width // STEP) + mx
    g1, g2 = _load_halves(grad_ptr + first_cell * channels + head * DIM, cell * channels, present, DIM, D1, D2)
    lse = tl.load(lse_ptr + first_cell * heads + head + cell * heads, mask=present, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + first_cell * heads + head + cell * heads, mask=present, other=0.0)

    dq1 = tl.zeros([BLOCK_M, D1], dtype=tl.float32)
    dq2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 16], dtype=tl.float32)
    for at in range(0, WINDOW * WINDOW, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        real = n < WINDOW * WINDOW
        inside = real & (n // WINDOW < below) & (n % WINDOW < beyond)
        rows = (n // WINDOW * width + n % WINDOW) * stride
        pad = padding_ptr + head * DIM
        k1, k2 = _load_keys(base + channels, pad + channels, rows, inside, PADDED, DIM, D1, D2)
        v1, v2 = _load_keys(base + 2 * channels, pad + 2 * channels, rows, inside, PADDED, DIM, D1, D2)
        s = _dot_halves(q1, q2, k1, k2, D2, PRECISION)
        p = tl.where(real[None, :], tl.exp2(s * (scale * LOG2E) - lse[:, None]), 0.0)
        ds = (p * (_dot_halves(g1, g2, v1, v2, D2, PRECISION) - delta[:, None])).to(k1.dtype)
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
        if D2 > 0:
            dq2 = tl.dot(ds, k2, dq2, input_precision=PRECISION)

    target = dqkv_ptr + token * stride + head * DIM
    dq1, dq2 = dq1 * scale, dq2 * scale
    if POOL:
        taken1, taken2 = tl.zeros_like(q1) != 0, tl.zeros_like(q2) != 0
        for index in tl.static_range(4):
            at = q_rows + (index // 2) * (width * stride) + (index % 2) * stride
            own1, own2 = _load_halves(base, at, present, DIM, D1, D2)
            here1, here2 = (own1 == q1) & ~taken1, (own2 == q2) & ~taken2
            taken1, taken2 = taken1 | here1, taken2 | here2
            _store_halves(
                target,
                at,
                tl.where(here1, dq1, 0.0),
                tl.where(here2, dq2, 0.0) if D2 > 0 else dq2,
                present,
                DIM,
                D1,
                D2,
            )
    else:
        _store_halves(target, q_rows, dq1, dq2, present, DIM, D1, D2)


@triton.jit
def key_gradient_kernel(
    qkv_ptr,
    padding_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    dpadding_ptr,
    height,
    width,
    heads,
    scale,
    WINDOW: tl.constexpr,
    POOL: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (windows, heads, key tiles); padded keys leave their sum in dpadding (windows, key tiles, 2, heads, DIM)."""
    STEP: tl.constexpr = 2 if POOL else 1
    SIDE: tl.constexpr = WINDOW // STEP
    window = tl.program_id(0).to(tl.int64)
    token, first_cell, below, beyond = _window_corner(window, height, width, WINDOW, STEP)
    head = tl.program_id(1)
    channels = heads * DIM
    stride = 3 * channels
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = n < WINDOW * WINDOW
    inside = real & (n // WINDOW < below) & (n % WINDOW < beyond)
    base = qkv_ptr + token * stride + head * DIM
    pad = padding_ptr + head * DIM
    key_rows = (n // WINDOW * width + n % WINDOW) * stride
    k1, k2 = _load_keys(base + channels, pad + channels, key_rows, inside, PADDED, DIM, D1, D2)
    v1, v2 = _load_keys(base + 2 * channels, pad + 2 * channels, key_rows, inside, PADDED, DIM, D1, D2)

    dk1 = tl.zeros([BLOCK_N, D1], dtype=tl.float32)
    dk2 = tl.zeros([BLOCK_N, D2 if D2 > 0 else 16], dtype=tl.float32)
    dv1 = tl.zeros([BLOCK_N, D1], dtype=tl.float32)
    dv2 = tl.zeros([BLOCK_N, D2 if D2 > 0 else 16], dtype=tl.float32)
    for at in range(0, SIDE * SIDE, BLOCK_M):
        m = at + tl.arange(0, BLOCK_M)
        my, mx = m // SIDE, m % SIDE
        present = (m < SIDE * SIDE) & (my * STEP < below) & (mx * STEP < beyond)
        rows = (my * STEP * width + mx * STEP) * stride
        q1, q2 = _load_queries(base, rows, width * stride, stride, present, POOL, DIM, D1, D2)
        cell = my * (width // STEP) + mx
        g1, g2 = _load_halves(grad_ptr + first_cell * channels + head * DIM, cell * channels, present, DIM, D1, D2)
        lse = tl.load(lse_ptr + first_cell * heads + head + cell * heads, mask=present, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + first_cell * heads + head + cell * heads, mask=present, other=0.0)
        s = _dot_halves(k1, k2, q1, q2, D2, PRECISION)
        p = tl.where(real[:, None] & present[None, :], tl.exp2(s * (scale * LOG2E) - lse[None, :]), 0.0)
        ds = (p * (_dot_halves(v1, v2, g1, g2, D2, PRECISION) - delta[None, :])).to(q1.dtype)
        p = p.to(g1.dtype)
        dv1 = tl.dot(p, g1, dv1, input_precision=PRECISION)
        dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
        if D2 > 0:
            dv2 = tl.dot(p, g2, dv2, input_precision=PRECISION)
            dk2 = tl.dot(ds, q2, dk2, input_precision=PRECISION)

    dk1, dk2 = dk1 * scale, dk2 * scale
    target = dqkv_ptr + token * stride + head * DIM
    _store_halves(target + channels, key_rows, dk1, dk2, inside, DIM, D1, D2)
    _store_halves(target + 2 * channels, key_rows, dv1, dv2, inside, DIM, D1, D2)
    if PADDED:
        hanging = (real & ~inside)[:, None]
        # One row of one program each: summed on the host side of the launch, in a fixed order.
        row = (window * tl.num_programs(2) + tl.program_id(2)) * (2 * channels) + tl.zeros([1], dtype=tl.int64)
        whole = row == row
        target = dpadding_ptr + head * DIM
        sum1 = tl.sum(tl.where(hanging, dk1, 0.0), axis=0)[None, :]
        sum2 = tl.sum(tl.where(hanging, dk2, 0.0), axis=0)[None, :]
        _store_halves(target, row, sum1, sum2, whole, DIM, D1, D2)
        sum1 = tl.sum(tl.where(hanging, dv1, 0.0), axis=0)[None, :]
        sum2 = tl.sum(tl.where(hanging, dv2, 0.0), axis=0)[None, :]
        _store_halves(target + channels, row, sum1, sum2, whole, DIM, D1, D2)


def column_blocks(dim: int) -> tuple[int, int]:
    """Cut a head's columns into two blocks for the matrix unit, powers of two from 16; the second may be 0."""
    whole = max(16, triton.next_power_of_2(dim))
    first = whole // 2
    second = max(16, triton.next_power_of_2(dim - first)) if first >= 16 else whole
    return (first, second) if first + second < whole else (whole, 0)


def precision(dtype: torch.dtype) -> str:
    """How the matrix unit multiplies operands of a dtype; other than fp32 the word has no effect."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def window_tile(window: int, pool: bool, dtype: torch.dtype) -> Tile:
    """Tile of the forward kernel: a window's tokens at once up to 64, which is what Hopper's matrix unit takes."""
    largest = 32 if dtype == torch.float32 else 64
    queries, keys = (window // 2) ** 2 if pool else window * window, window * window
    block_m = max(16, min(largest, triton.next_power_of_2(queries)))
    block_n = max(16, min(largest, triton.next_power_of_2(keys)))
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4 if block_m * block_n >= 1024 else 1, "num_stages": 2}


def query_gradient_tile(window: int, pool: bool, dtype: torch.dtype) -> Tile:
    """Tile of `query_gradient_kernel`."""
    settings = window_tile(window, pool, dtype)
    return settings | {"num_stages": 1, "num_warps": 8 if settings["BLOCK_N"] == 64 else settings["num_warps"]}


def key_gradient_tile(window: int, pool: bool, dtype: torch.dtype) -> Tile:
    """Tile of `key_gradient_kernel`; with 64 queries at a time head dims from 72 spill on sm_80."""
    settings = window_tile(window, pool, dtype)
    warps = 4 if settings["BLOCK_N"] >= 32 else 1
    return settings | {"BLOCK_M": min(32, settings["BLOCK_M"]), "num_warps": warps, "num_stages": 1}


def _variants() -> tuple[Variant, ...]:
    variants = []
    # (head dim, window, pooled): SAM2 tiny with and without padding and pooling, large, base plus, and the micro trunk.
    shapes = ((96, 8, False), (96, 14, False), (96, 8, True), (72, 16, False), (56, 14, False), (48, 8, False))
    for dim, window, pool in shapes:
        d1, d2 = column_blocks(dim)
        kernels = (
            ("fwd", forward_kernel, window_tile),
            ("dq", query_gradient_kernel, query_gradient_tile),
            ("dk", key_gradient_kernel, key_gradient_tile),
        )
        for way, kernel, choose in kernels:
            signature = {name: "*bf16:16" for name in kernel.arg_names if name.endswith("_ptr")}
            exact = ("lse_ptr", "delta_ptr", "dpadding_ptr")
            signature |= {name: "*fp32:16" for name in exact if name in kernel.arg_names}
            signature |= {"height": "i32", "width": "i32", "heads": "i32", "scale": "fp32"}
            settings = choose(window, pool, torch.bfloat16)
            warps, stages = settings.pop("num_warps"), settings.pop("num_stages")
            constants = {"WINDOW": window, "POOL": pool, "PADDED": window in (14, 16), "DIM": dim, "D1": d1, "D2": d2}
            constants |= {"PRECISION": "tf32", **settings}
            name = f"{way}-{dim}-w{window}{'-pool' if pool else ''}"
            hopper = settings["BLOCK_M" if way != "dk" else "BLOCK_N"] == 64 and warps >= 4
            variants.append(Variant(name, kernel, signature, constants, warps, stages, wgmma=hopper))
    return tuple(variants)


AOT_VARIANTS = _variants() if HAS_TRITON else ()
