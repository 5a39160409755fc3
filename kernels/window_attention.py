"""Hiera's attention inside windows, and its pooled queries, on a map that is never cut into windows.

    out[window] = softmax(q k^T / sqrt(D)) v   per window and head;   pooled: q = max over 2x2 tokens, half as large

SAM2 cuts the map into windows (a copy), pads it with zero tokens at the right and bottom edge (another), projects, and
puts the windows back (a third). Here the projection works on the map and the kernel reads a window's tokens where they
are. A padding token is zero before the projection, so after it it is the projection's bias: ``padding`` below. It takes
part as key and value and never as query, since its row is cut off again.

Backward per window, with p = exp(scores - lse), g the gradient of out and delta = sum(g * out)::

    dv = p^T g;   ds = p * (g v^T - delta);   dq = scale * ds k;   dk = scale * ds^T q

The maximum passes its gradient to the first token that attains it, as ``max_pool2d`` does; dk and dv of padding tokens
add up to the gradient of ``padding``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from medvl_sam2.kernels._common import check_dtype, check_same_device, check_shape, device_guard, triton
from medvl_sam2.kernels._library import define_op
from medvl_sam2.kernels._tuning import operand_width, tile
from medvl_sam2.kernels.attention import attention
from medvl_sam2.kernels.linear import linear
from medvl_sam2.kernels.window_attention_kernels import (
    column_blocks,
    forward_kernel,
    key_gradient_kernel,
    key_gradient_tile,
    precision,
    query_gradient_kernel,
    query_gradient_tile,
    window_tile,
)
from medvl_sam2.kernels.window_attention_torch import (
    attend_in_windows,
    attend_map,
    attend_windows,
    attend_windows_backward,
    partition,
    unpartition,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Projected windows at a time on the CPU. From 32 MiB on the C library also takes every buffer fresh from the system,
# and its pages then cost more than the products.
_PROJECTED_BYTES = 8 << 20


def _launch_windows(
    qkv: Tensor, padding: Tensor | None, num_heads: int, window_size: int, pool: bool, need_lse: bool
) -> tuple[Tensor, Tensor]:
    b, h, w, channels = qkv.shape
    if window_size * w * channels >= 2**31:
        return attend_windows(qkv, padding, num_heads, window_size, pool, need_lse)
    dim, step = channels // (3 * num_heads), 2 if pool else 1
    qkv = qkv.contiguous()
    out = torch.empty((b, h // step, w // step, channels // 3), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((*out.shape[:3], num_heads), dtype=torch.float32, device=qkv.device)
    if out.numel() == 0:
        return out, (lse if need_lse else lse.new_empty(0))
    d1, d2 = column_blocks(dim)
    key = f"D{dim}-W{window_size}-{'pool' if pool else 'same'}-{operand_width(qkv.dtype)}"
    config = tile("window_attention", window_tile(window_size, pool, qkv.dtype), qkv.device, key)
    windows = b * triton.cdiv(h, window_size) * triton.cdiv(w, window_size)
    grid = (windows, num_heads, triton.cdiv((window_size // step) ** 2, config["BLOCK_M"]))
    with device_guard(qkv):
        forward_kernel[grid](
            qkv,
            qkv if padding is None else padding.contiguous(),
            out,
            lse,
            h,
            w,
            num_heads,
            dim**-0.5,
            WINDOW=window_size,
            POOL=pool,
            PADDED=bool(h % window_size or w % window_size),
            DIM=dim,
            D1=d1,
            D2=d2,
            PRECISION=precision(qkv.dtype),
            **config,
        )
    return out, (lse if need_lse else lse.new_empty(0))


def _launch_windows_backward(
    grad: Tensor,
    qkv: Tensor,
    padding: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    window_size: int,
    pool: bool,
) -> tuple[Tensor, Tensor]:
    b, h, w, channels = qkv.shape
    if window_size * w * channels >= 2**31:
        return attend_windows_backward(grad, qkv, padding, out, lse, num_heads, window_size, pool)
    dim, step = channels // (3 * num_heads), 2 if pool else 1
    qkv, grad = qkv.contiguous(), grad.contiguous()
    dqkv = torch.empty_like(qkv)
    if qkv.numel() == 0:
        return dqkv, qkv.new_zeros(channels)
    delta = (grad.float() * out.float()).unflatten(-1, (num_heads, dim)).sum(-1)
    d1, d2 = column_blocks(dim)
    key = f"D{dim}-W{window_size}-{'pool' if pool else 'same'}-{operand_width(qkv.dtype)}"
    sizes = (window_size, pool, qkv.dtype)
    query_config = tile("window_attention_dq", query_gradient_tile(*sizes), qkv.device, key)
    key_config = tile("window_attention_dk", key_gradient_tile(*sizes), qkv.device, key)
    windows = b * triton.cdiv(h, window_size) * triton.cdiv(w, window_size)
    padded = bool(h % window_size or w % window_size)
    query_tiles = triton.cdiv((window_size // step) ** 2, query_config["BLOCK_M"])
    key_tiles = triton.cdiv(window_size**2, key_config["BLOCK_N"])
    shape = (windows * key_tiles, 2 * channels // 3) if padded else (0,)
    sums = torch.empty(shape, dtype=torch.float32, device=qkv.device)
    constants = {"WINDOW": window_size, "POOL": pool, "PADDED": padded, "DIM": dim, "D1": d1, "D2": d2}
    constants["PRECISION"] = precision(qkv.dtype)
    inputs = (qkv, qkv if padding is None else padding.contiguous(), grad, lse, delta, dqkv)
    sizes = (h, w, num_heads, dim**-0.5)
    with device_guard(qkv):
        query_gradient_kernel[(windows, num_heads, query_tiles)](*inputs, *sizes, **constants, **query_config)
        key_gradient_kernel[(windows, num_heads, key_tiles)](*inputs, sums, *sizes, **constants, **key_config)
    dpadding = torch.zeros(channels, dtype=torch.float32, device=qkv.device)
    if padded:
        dpadding[channels // 3 :] = sums.sum(0)
    return dqkv, dpadding.to(qkv.dtype)


def _fake(
    qkv: Tensor, padding: Tensor | None, num_heads: int, window_size: int, pool: bool, need_lse: bool
) -> tuple[Tensor, Tensor]:
    b, h, w, channels = qkv.shape
    step = 2 if pool else 1
    out = qkv.new_empty((b, h // step, w // step, channels // 3))
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return out, qkv.new_empty((*out.shape[:3], num_heads) if need_lse else (0,), dtype=wide)


def _fake_backward(
    grad: Tensor,
    qkv: Tensor,
    padding: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    window_size: int,
    pool: bool,
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), qkv.new_empty((qkv.shape[-1],))


def _setup_context(ctx, inputs, output) -> None:
    qkv, padding, *ctx.sizes, _ = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, padding, out, lse)


def _backward(ctx, grad, _grad_lse):
    qkv, padding, out, lse = ctx.saved_tensors
    dqkv, dpadding = _windows_backward(grad, qkv, padding, out, lse, *ctx.sizes)
    return dqkv, None if padding is None else dpadding, None, None, None, None


_windows_backward = define_op(
    "window_attention_bwd",
    attend_windows_backward,
    _launch_windows_backward,
    _fake_backward,
    switch="window_attention",
)
_windows = define_op(
    "window_attention",
    attend_windows,
    _launch_windows,
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)


def _attend_globally(qkv: Tensor, num_heads: int, pool: bool) -> Tensor:
    b, h, w, _ = qkv.shape
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(3)
    if pool:
        q = F.max_pool2d(q.flatten(3).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).unflatten(-1, (num_heads, -1))
    out = attention(*(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2).flatten(2).unflatten(1, q.shape[1:3])


def window_attention(
    qkv: Tensor, num_heads: int, window_size: int, padding: Tensor | None = None, *, pool: bool = False
) -> Tensor:
    """Attend inside each window of a map, as SAM2's Hiera blocks.

    Args:
        qkv: (B, H, W, 3 * C), the projected map: queries, keys, values, each `num_heads` heads side by side.
        num_heads: Divides C.
        window_size: Side of a window; 0 attends over the whole map, through `attention.attention`.
        padding: (3 * C,), what a zero token projects to, that is the projection's bias; None stands for zeros. Windows
            at the right and bottom edge see it where they hang over.
        pool: Take the maximum of the queries over 2x2 tokens. H, W and the window are then even.

    Returns:
        (B, H, W, C), or (B, H / 2, W / 2, C) with `pool`, in the dtype of `qkv`.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    op = "window_attention"
    check_shape(op, "qkv", qkv, (None, None, None, None))
    check_dtype(op, "qkv", qkv, FLOATS)
    channels = qkv.shape[-1]
    if num_heads < 1 or channels % (3 * num_heads) or channels == 0:
        raise ValueError(f"{op}: expected 3 * C channels with C divisible by {num_heads} heads, got {channels}")
    if window_size < 0 or (pool and any(side % 2 for side in (*qkv.shape[1:3], window_size))):
        raise ValueError(
            f"{op}: expected a window of at least 0, and even sides with pool, got a map of {tuple(qkv.shape[1:3])} "
            f"and windows of {window_size}"
        )
    if padding is not None:
        check_shape(op, "padding", padding, (channels,))
        check_same_device(op, qkv, padding)
        padding = padding.to(qkv.dtype)
    if window_size == 0:
        return _attend_globally(qkv, num_heads, pool)
    if not qkv.is_cuda:
        # PyTorch's attention saves its own log-sum-exp and differentiates itself faster than the operation does here.
        return attend_map(qkv, padding, num_heads, window_size, pool)
    need_lse = torch.is_grad_enabled() and (qkv.requires_grad or (padding is not None and padding.requires_grad))
    return _windows(qkv, padding, num_heads, window_size, pool, need_lse)[0]


def projected_window_attention(
    x: Tensor, weight: Tensor, bias: Tensor, num_heads: int, window_size: int, *, pool: bool = False
) -> Tensor:
    """Project a map to queries, keys and values and attend inside its windows: `window_attention` with its projection.

    On the CPU a map of whole windows is cut before it is projected, when it is a third as wide, and goes through in
    parts whose projection stays in the cache; a map that would need padding is projected first, which saves projecting
    the padding.

    Args:
        x: (B, H, W, K).
        weight: (3 * C, K), in the layout of ``nn.Linear``.
        bias: (3 * C,).
        num_heads: Divides C.
        window_size: Side of a window, 0 for the whole map.
        pool: Take the maximum of the queries over 2x2 tokens.

    Returns:
        (B, H, W, C), or (B, H / 2, W / 2, C) with `pool`.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    check_shape("window_attention", "x", x, (None, None, None, weight.shape[-1]))
    b, h, w, _ = x.shape
    whole = window_size > 0 and h % window_size == 0 and w % window_size == 0 and not (pool and window_size % 2)
    if x.is_cuda or not whole or weight.shape[0] % (3 * num_heads):
        return window_attention(linear(x, weight, bias), num_heads, window_size, bias, pool=pool)
    windows = partition(x, window_size)
    some = max(1, _PROJECTED_BYTES // (window_size**2 * weight.shape[0] * x.itemsize))
    parts = [attend_in_windows(linear(part, weight, bias), num_heads, pool) for part in windows.split(some)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return unpartition(out, b, *((h // 2, w // 2) if pool else (h, w)))
