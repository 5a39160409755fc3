"""Plain torch of `window_attention`: the fp32 oracle, the path through PyTorch's attention, an explicit backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from medvl_sam2.kernels.attention import attention
from medvl_sam2.kernels.linear import is_fast


def partition(x: Tensor, window: int) -> Tensor:
    """Copy a map (B, H, W, C), H and W divisible, into windows (B * n, window, window, C)."""
    b, h, w, c = x.shape
    rows, columns = h // window, w // window
    x = x.reshape(b, rows, window, columns, window, c).transpose(2, 3)
    return x.reshape(b * rows * columns, window, window, c)


def unpartition(x: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Undo `partition`, and cut the map (B, height, width, C) out of what the windows cover."""
    _, side, _, c = x.shape
    rows, columns = -(-height // side), -(-width // side)
    x = x.reshape(batch, rows, columns, side, side, c).transpose(2, 3)
    return x.reshape(batch, rows * side, columns * side, c)[:, :height, :width]


def pad(x: Tensor, window: int, value: Tensor | None) -> Tensor:
    """Extend a map to whole windows at the right and the bottom, by a vector or zeros."""
    b, h, w, c = x.shape
    value = x.new_zeros(c) if value is None else value
    if w % window:
        x = torch.cat((x, value.expand(b, h, -w % window, c)), 2)
    if h % window:
        x = torch.cat((x, value.expand(b, -h % window, x.shape[2], c)), 1)
    return x


def attend_in_windows(qkv: Tensor, num_heads: int, pool: bool) -> Tensor:
    """Attend within windows (n, side, side, 3 * C), through PyTorch's attention; (n, side', side', C)."""
    n, side, _, channels = qkv.shape
    if pool:
        q, kv = qkv.split((channels // 3, 2 * channels // 3), -1)
        q = F.max_pool2d(q.contiguous().permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        k, v = kv.chunk(2, -1)
        side //= 2
    else:
        q, k, v = qkv.chunk(3, -1)
    q, k, v = (t.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    attend = attention if is_fast(q, k, v) and side**2 >= 128 else F.scaled_dot_product_attention
    return attend(q, k, v).transpose(1, 2).reshape(n, side, side, channels // 3)


def attend_map(qkv: Tensor, padding: Tensor | None, num_heads: int, window: int, pool: bool) -> Tensor:
    """Attend in the windows of a projected map: one copy into windows, PyTorch's attention, one copy back."""
    b, h, w, _ = qkv.shape
    step = 2 if pool else 1
    out = attend_in_windows(partition(pad(qkv, window, padding), window), num_heads, pool)
    return unpartition(out, b, h // step, w // step)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """Windows (n, side, side, heads * D) to (n, heads, side * side, D)."""
    return x.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _joined(x: Tensor, side: int) -> Tensor:
    return x.transpose(1, 2).flatten(2).unflatten(1, (side, side))


def _cells(q: Tensor) -> Tensor:
    """Windows (n, side, side, C) to (n, side / 2, side / 2, 4, C), the four tokens of a cell row by row."""
    return q.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3, 4)


def _scores(qkv: Tensor, num_heads: int, pool: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Split windows into q, k, v (n, heads, tokens, D), their scores, and which token of its cell gave each query."""
    q, k, v = qkv.chunk(3, -1)
    chosen = None
    if pool:
        q, chosen = _cells(q).max(3)
    q, k, v = (_heads(t, num_heads) for t in (q, k, v))
    return q, k, v, (q @ k.mT) * q.shape[-1] ** -0.5, chosen


def window_attention_reference(
    qkv: Tensor, padding: Tensor | None, num_heads: int, window_size: int, pool: bool
) -> Tensor:
    """Attend in fp32 (fp64 for fp64) with whole score matrices, in windows cut as SAM2 does."""
    b, h, w, _ = qkv.shape
    wide, step = torch.promote_types(qkv.dtype, torch.float32), 2 if pool else 1
    windows = partition(pad(qkv.to(wide), window_size, None if padding is None else padding.to(wide)), window_size)
    _, _, v, scores, _ = _scores(windows, num_heads, pool)
    out = _joined(scores.softmax(-1) @ v, window_size // step)
    return unpartition(out, b, h // step, w // step).to(qkv.dtype)


def attend_windows(
    qkv: Tensor, padding: Tensor | None, num_heads: int, window_size: int, pool: bool, need_lse: bool
) -> tuple[Tensor, Tensor]:
    """The operation in plain torch: (B, H', W', C) and, if needed, the scores' log-sum-exp (B, H', W', heads)."""
    b, h, w, _ = qkv.shape
    wide, step = torch.promote_types(qkv.dtype, torch.float32), 2 if pool else 1
    if not need_lse:
        out = attend_map(qkv, padding, num_heads, window_size, pool)
        return out.contiguous(), qkv.new_empty(0, dtype=wide)
    windows = partition(pad(qkv, window_size, padding), window_size)
    _, _, v, scores, _ = _scores(windows.to(wide), num_heads, pool)
    lse = scores.logsumexp(-1, keepdim=True)
    parts = (scores.sub(lse).exp() @ v, lse)
    out, lse = (unpartition(_joined(x, window_size // step), b, h // step, w // step).contiguous() for x in parts)
    return out.to(qkv.dtype), lse


def attend_windows_backward(
    grad: Tensor,
    qkv: Tensor,
    padding: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    window_size: int,
    pool: bool,
) -> tuple[Tensor, Tensor]:
    """Differentiate `attend_windows`; returns the gradients of qkv and of padding (zeros without padding)."""
    b, h, w, channels = qkv.shape
    side = window_size // 2 if pool else window_size
    windows = partition(pad(qkv, window_size, padding).to(lse.dtype), window_size)
    q, k, v, scores, chosen = _scores(windows, num_heads, pool)
    g = _heads(partition(pad(grad.to(lse.dtype), side, None), side), num_heads)
    # Queries of the padding have no row in the output: an infinite log-sum-exp takes them out.
    bound = _heads(partition(pad(lse, side, lse.new_full((num_heads,), torch.inf)), side), num_heads)
    p = (scores - bound).exp()
    ds = g @ v.mT
    ds = (ds - (ds * p).sum(-1, keepdim=True)) * p * q.shape[-1] ** -0.5
    dq, dk, dv = _joined(ds @ k, side), _joined(ds.mT @ q, window_size), _joined(p.mT @ g, window_size)
    if chosen is not None:
        cells = dq.new_zeros((*dq.shape[:3], 4, dq.shape[3])).scatter_(3, chosen[..., None, :], dq[..., None, :])
        dq = cells.unflatten(3, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    covered = (h + -h % window_size, w + -w % window_size)
    whole = unpartition(torch.cat((dq, dk, dv), -1), b, *covered)
    dpadding = whole[:, h:].sum((0, 1, 2)) + whole[:, :h, w:].sum((0, 1, 2))
    return whole[:, :h, :w].to(qkv.dtype).contiguous(), dpadding.to(qkv.dtype)
