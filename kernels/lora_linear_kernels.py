"""Triton kernels of `lora_linear` for batches of several adapters, and their launches.

A program owns a tile of rows, or of an adapter's weights, and asks for each adapter whether it occurs among the rows at
hand. Rows need not be sorted, an adapter that does not occur is not read, and nobody on the host has to know which do.
"""

import torch
from torch import Tensor

from medvl_sam2.kernels._aot import Variant
from medvl_sam2.kernels._common import dot_precision, tl, triton
from medvl_sam2.kernels._tuning import operand_width, tile


@triton.jit
def _lora_rows_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    index_ptr,
    M,
    N,
    K,
    adapters,
    x_m,
    y_m,
    w_e,
    w_k,
    w_n,
    scaling,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[m] = scaling x[m] @ w[index[m]], zero for rows without an adapter; added to y with ACCUMULATE."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m = m < M
    in_n = n < N
    index = tl.load(index_ptr + m, mask=in_m, other=-1)
    inner = tl.arange(0, BLOCK_K).to(tl.int64)
    x_tile = x_ptr + m[:, None] * x_m + inner[None, :]
    w_tile = w_ptr + inner[:, None] * w_k + n[None, :] * w_n
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for adapter in range(adapters):
        here = index == adapter
        if tl.max(here.to(tl.int32), 0) > 0:
            for step in range(tl.cdiv(K, BLOCK_K)):
                k0 = tl.cast(step, tl.int64) * BLOCK_K
                in_k = k0 + inner < K
                x = tl.load(x_tile + k0, mask=here[:, None] & in_k[None, :], other=0.0)
                at = w_tile + (tl.cast(adapter, tl.int64) * w_e + k0 * w_k)
                w = tl.load(at, mask=in_k[:, None] & in_n[None, :], other=0.0)
                total = tl.dot(x, w, total, input_precision=PRECISION)
    at = y_ptr + m[:, None] * y_m + n[None, :]
    total *= scaling
    if ACCUMULATE:
        inside = (index >= 0)[:, None] & in_n[None, :]
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        inside = in_m[:, None] & in_n[None, :]
    tl.store(at, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _lora_weights_kernel(
    p_ptr,
    q_ptr,
    out_ptr,
    index_ptr,
    M,
    N,
    K,
    p_m,
    q_m,
    out_e,
    scaling,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[e] = scaling sum over the rows m of adapter e of p[m] (N) outer q[m] (K)."""
    tiles = tl.cdiv(N, BLOCK_N)
    n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    adapter = tl.program_id(1)
    in_n = n < N
    in_k = k < K
    inner = tl.arange(0, BLOCK_M).to(tl.int64)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for step in range(tl.cdiv(M, BLOCK_M)):
        m = tl.cast(step, tl.int64) * BLOCK_M + inner
        here = tl.load(index_ptr + m, mask=m < M, other=-1) == adapter
        if tl.max(here.to(tl.int32), 0) > 0:
            p = tl.load(p_ptr + m[None, :] * p_m + n[:, None], mask=here[None, :] & in_n[:, None], other=0.0)
            q = tl.load(q_ptr + m[:, None] * q_m + k[None, :], mask=here[:, None] & in_k[None, :], other=0.0)
            total = tl.dot(p, q, total, input_precision=PRECISION)
    at = out_ptr + adapter.to(tl.int64) * out_e + n[:, None] * K + k[None, :]
    total *= scaling
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=in_n[:, None] & in_k[None, :])


def multiply_rows(x: Tensor, w: Tensor, y: Tensor, index: Tensor, scaling: float, accumulate: bool) -> None:
    """Launch `_lora_rows_kernel` on x (M, K), w (E, K, N), y (M, N); rows of x and y are dense."""
    (m, k), n = x.shape, w.shape[2]
    narrow = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    # In float32 without tensor cores a wider tile spilled.
    width = 32 if n <= 64 else 64 if x.dtype == torch.float32 else 128
    settings = tile("lora_linear", {**narrow, "BLOCK_N": width}, x.device, f"N{n}-K{k}-{operand_width(x.dtype)}")
    grid = (triton.cdiv(m, settings["BLOCK_M"]), triton.cdiv(n, settings["BLOCK_N"]))
    strides = (x.stride(0), y.stride(0), *w.stride())
    _lora_rows_kernel[grid](
        x,
        w,
        y,
        index,
        m,
        n,
        k,
        len(w),
        *strides,
        scaling,
        ACCUMULATE=accumulate,
        PRECISION=dot_precision(x.dtype),
        **settings,
    )


def sum_weights(p: Tensor, q: Tensor, out: Tensor, index: Tensor, scaling: float) -> None:
    """Launch `_lora_weights_kernel` on p (M, N), q (M, K), out (E, N, K)."""
    (m, n), k = p.shape, q.shape[1]
    default = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    settings = tile("lora_linear_bwd", default, p.device, f"N{n}-K{k}-{operand_width(p.dtype)}")
    grid = (triton.cdiv(n, settings["BLOCK_N"]) * triton.cdiv(k, settings["BLOCK_K"]), len(out))
    strides = (p.stride(0), q.stride(0), out.stride(0))
    _lora_weights_kernel[grid](
        p, q, out, index, m, n, k, *strides, scaling, PRECISION=dot_precision(p.dtype), **settings
    )


def _variants() -> list[Variant]:
    found = []
    for kind, n, up in (("bf16", 32, False), ("bf16", 128, True), ("fp32", 64, True)):
        pointers = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), f"*{kind}:16") | {"index_ptr": "*i32:16"}
        numbers = dict.fromkeys(("N", "K", "x_m", "y_m", "w_e"), "i32:16") | {"M": "i32", "adapters": "i32"}
        signature = {**pointers, **numbers, "scaling": "fp32", "w_k" if up else "w_n": "i32:16"}
        sizes = {"PRECISION": "ieee", "BLOCK_M": 32, "BLOCK_N": n, "BLOCK_K": 64, "w_n" if up else "w_k": 1}
        name = f"{'up' if up else 'down'}-{kind}"
        found.append(Variant(name, _lora_rows_kernel, signature, {"ACCUMULATE": up, **sizes}))
    for kind in ("bf16", "fp32"):
        pointers = dict.fromkeys(("p_ptr", "q_ptr", "out_ptr"), f"*{kind}:16") | {"index_ptr": "*i32:16"}
        numbers = dict.fromkeys(("N", "K", "p_m", "q_m", "out_e"), "i32:16") | {"M": "i32", "scaling": "fp32"}
        sizes = {"PRECISION": "ieee", "BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64}
        found.append(Variant(f"weights-{kind}", _lora_weights_kernel, {**pointers, **numbers}, sizes))
    return found


AOT_VARIANTS = _variants()
