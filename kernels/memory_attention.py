"""SAM2's memory attention: one head, rotary keys, and values left at the width of the memory.

    out = softmax(q k^T / sqrt(D)) m,   q = rope(Wq x + bq) (B, N, D),   k = rope(Wk (m + pos) + bk) (B, T, D)

SAM2 takes values Wv m + bv and projects their average by Wo. Attention weights sum to one, so the average may be taken
over the memories m themselves (64 wide instead of 256) and both projections applied once per query::

    Wo (sum_j a_j (Wv m_j + bv)) + bo  =  (Wo Wv) (sum_j a_j m_j) + (Wo bv + bo)

which is exact and saves the value projection and 3/8 of the attention's operations. Softmax does not see the order of
the keys, so the slots of a ring buffer never move, and a device-side count per slot says how much of it is valid.

Backward, with p = exp(scores - lse), g the gradient of out and delta = sum(g * out)::

    dm = p^T g;   ds = p * (g m^T - delta);   dq = scale * ds k;   dk = scale * ds^T q
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from medvl_sam2.kernels._common import (
    check_dtype,
    check_same_device,
    check_shape,
    device_guard,
    triton,
    without_autocast,
)
from medvl_sam2.kernels._library import define_op
from medvl_sam2.kernels._tuning import tile
from medvl_sam2.kernels.attention import attention
from medvl_sam2.kernels.axial_rope import FLOATS, rope_linear
from medvl_sam2.kernels.linear import linear
from medvl_sam2.kernels.memory_attention_kernels import (
    forward_kernel,
    forward_tile,
    key_gradient_kernel,
    key_gradient_tile,
    merge_kernel,
    num_ranges,
    precision,
    query_gradient_kernel,
    query_gradient_tile,
)
from medvl_sam2.kernels.memory_attention_torch import attend_backward_in_chunks, attend_in_chunks


class Projections(NamedTuple):
    """Weights of SAM2's ``RoPEAttention``, each in the layout of ``nn.Linear``."""

    q_weight: Tensor
    q_bias: Tensor
    k_weight: Tensor
    k_bias: Tensor
    v_weight: Tensor
    v_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor


def _takes(q: Tensor, v: Tensor, *, widest_value: int) -> bool:
    """Whether the kernels take these widths and dtypes; what they do not take runs as chunked matrix products."""
    width, value_width = q.shape[-1], v.shape[-1]
    # fp32 tiles of 256 channels do not fit the registers in any shape tried (docs/kernels.md), so fp32 is cuBLAS's.
    fits = all(w >= 16 and w & (w - 1) == 0 for w in (width, value_width)) and width <= 256
    return fits and value_width <= widest_value and q.dtype in (torch.float16, torch.bfloat16)


def _launch_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    slot_size: int,
    num_slots: int,
    scale: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    if not _takes(q, v, widest_value=256):
        return attend_in_chunks(q, k, v, lengths, slot_size, num_slots, scale, need_lse)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    (batch, queries, width), tokens, value_width = q.shape, k.shape[1], v.shape[-1]
    out = torch.empty((batch, queries, value_width), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, queries), dtype=torch.float32, device=q.device)
    nothing = lse.new_empty(0)
    if tokens == 0 or out.numel() == 0:
        return out.zero_(), (lse.fill_(-math.inf) if need_lse else nothing)
    key = f"D{width}-V{value_width}-T{tokens}"
    config = dict(tile("memory_attention", forward_tile(), q.device, key))
    ranges = config.pop("RANGES", 0)
    tiles, key_tiles = triton.cdiv(queries, config["BLOCK_M"]), triton.cdiv(tokens, config["BLOCK_N"])
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
    ranges = ranges or num_ranges(tiles * batch, key_tiles, processors)
    range_size = triton.cdiv(key_tiles, ranges) * config["BLOCK_N"]
    ranges = triton.cdiv(tokens, range_size)
    split = ranges > 1
    part = torch.empty((ranges, batch, queries, value_width), dtype=torch.float32, device=q.device) if split else out
    part_lse = torch.empty((ranges, batch, queries), dtype=torch.float32, device=q.device) if split else lse
    with device_guard(q):
        forward_kernel[(tiles, ranges, batch)](
            q,
            k,
            v,
            part_lse if lengths is None else lengths,
            part,
            part_lse,
            queries,
            tokens,
            slot_size,
            num_slots,
            range_size,
            scale,
            HAS_LENGTHS=lengths is not None,
            D=width,
            DV=value_width,
            PRECISION=precision(q.dtype),
            **config,
        )
        if split:
            rows = batch * queries
            merge_kernel[(triton.cdiv(rows, 16),)](
                part, part_lse, out, lse, rows, ranges, DV=value_width, BLOCK_M=16, num_warps=4
            )
    return out, (lse if need_lse else nothing)


def _launch_attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    slot_size: int,
    num_slots: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _takes(q, v, widest_value=128):
        return attend_backward_in_chunks(grad, q, k, v, out, lse, lengths, slot_size, num_slots, scale)
    q, k, v, grad = q.contiguous(), k.contiguous(), v.contiguous(), grad.contiguous()
    (batch, queries, width), tokens, value_width = q.shape, k.shape[1], v.shape[-1]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if queries == 0 or tokens == 0 or batch == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    delta = (grad.float() * out.float()).sum(-1)
    sizes = (queries, tokens, slot_size, num_slots, scale)
    constants = {"HAS_LENGTHS": lengths is not None, "D": width, "DV": value_width, "PRECISION": precision(q.dtype)}
    key = f"D{width}-V{value_width}"
    with device_guard(q):
        inputs = (q, k, v, lse if lengths is None else lengths, grad, lse, delta)
        config = tile("memory_attention_dq", query_gradient_tile(width, value_width), q.device, key)
        query_gradient_kernel[(triton.cdiv(queries, config["BLOCK_M"]), batch)](
            *inputs, dq, *sizes, **constants, **config
        )
        config = tile("memory_attention_dk", key_gradient_tile(width, value_width), q.device, key)
        key_gradient_kernel[(triton.cdiv(tokens, config["BLOCK_N"]), batch)](
            *inputs, dk, dv, *sizes, **constants, **config
        )
    return dq, dk, dv


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    slot_size: int,
    num_slots: int,
    scale: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:2], v.shape[-1])), q.new_empty(q.shape[:2] if need_lse else (0,), dtype=wide)


def _fake_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    slot_size: int,
    num_slots: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, lengths, *ctx.sizes, _ = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, lengths)


def _backward(ctx, grad, _grad_lse):
    q, k, v, out, lse, lengths = ctx.saved_tensors
    if lse.numel() == 0 and q.numel() != 0:
        raise RuntimeError("memory_attention: asked for a gradient of a forward run without need_lse")
    return *_attend_backward(grad, q, k, v, out, lse, lengths, *ctx.sizes), None, None, None, None, None


_attend_backward = define_op(
    "memory_attention_bwd",
    attend_backward_in_chunks,
    _launch_attend_backward,
    _fake_backward,
    switch="memory_attention",
)
_attend = define_op(
    "memory_attention",
    attend_in_chunks,
    _launch_attend,
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def absorb_values(projections: Projections) -> tuple[Tensor, Tensor]:
    """Fold the value projection into the output projection, in fp32 (fp64 for fp64) and then rounded once.

    Returns:
        Weight (C, M) and bias (C,) that map averaged memories (..., M) to the attention's output (..., C).
    """
    out_weight = projections.out_weight
    wide = torch.promote_types(out_weight.dtype, torch.float32)
    with without_autocast(out_weight.device.type):
        weight = out_weight.to(wide) @ projections.v_weight.to(wide)
        bias = out_weight.to(wide) @ projections.v_bias.to(wide) + projections.out_bias.to(wide)
    return weight.to(out_weight.dtype), bias.to(out_weight.dtype)


def memory_attention(
    query: Tensor,
    memory: Tensor,
    memory_pos: Tensor,
    projections: Projections,
    rope: tuple[Tensor, Tensor],
    *,
    num_pointer_tokens: int = 0,
) -> Tensor:
    """Attend from image tokens to memories, as SAM2's ``RoPEAttention`` with ``rope_k_repeat`` (dropout 0).

    Args:
        query: (B, N, C), before its projection.
        memory: (B, T, M): whole grids of N memory tokens, then the object pointers.
        memory_pos: Added to the memories for the keys alone; broadcasts to (B, T, M).
        projections: Weights with D inner channels (one head).
        rope: Tables (N, D / 2) from `axial_rope.axial_rope_tables`.
        num_pointer_tokens: How many tokens at the end of `memory` have no grid position.

    Returns:
        (B, N, C) in the dtype of `query`.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    q = rope_linear(query, projections.q_weight, projections.q_bias, rope)
    source = memory + memory_pos
    k = rope_linear(source, projections.k_weight, projections.k_bias, rope, num_plain_tokens=num_pointer_tokens)
    slot_size = rope[0].shape[0]
    out = memory_attention_cached(q, k, memory.to(k.dtype), slot_size=slot_size, num_pointer_tokens=num_pointer_tokens)
    return linear(out, *absorb_values(projections))


def memory_attention_cached(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    slot_size: int,
    num_pointer_tokens: int = 0,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend to keys that were projected and turned before: the ring buffer's form.

    The buffer is S slots of `slot_size` tokens with the pointer tokens behind them, T = S * slot_size +
    num_pointer_tokens. Slots are written in place, in any order. A slot's keys change when its age does: the temporal
    encoding is part of ``memory_pos``. Either project them again, ``rope_linear(memory + pos + temporal)``, or keep
    ``rope_linear(memory + pos)`` and add ``rope_linear(temporal, bias=None)`` from a table of all ages; both are exact.

    Args:
        q: (B, N, D) from `axial_rope.rope_linear`; objects are the batch.
        keys: (B, T, D) from `axial_rope.rope_linear`, pointers as plain tokens.
        values: (B, T, M), the memories themselves.
        slot_size: Tokens of a slot.
        num_pointer_tokens: Tokens behind the slots.
        lengths: Valid tokens at the start of each slot, and of the pointers in the last column: (B, S + 1) int32 on the
            device of `q`. None when all are valid. A query without a valid key gives zeros.
        scale: Factor on the scores, 1 / sqrt(D) by default.

    Returns:
        (B, N, M) averaged memories in the dtype of `q`; project them with `absorb_values`.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    op = "memory_attention"
    check_shape(op, "q", q, (None, None, None))
    batch, _, width = q.shape
    check_dtype(op, "q", q, FLOATS)
    check_shape(op, "keys", keys, (batch, None, width))
    check_shape(op, "values", values, (batch, keys.shape[1], None))
    check_dtype(op, "keys", keys, (q.dtype,))
    check_dtype(op, "values", values, (q.dtype,))
    check_same_device(op, q, keys, values, lengths)
    in_slots = keys.shape[1] - num_pointer_tokens
    if slot_size < 1 or num_pointer_tokens < 0 or in_slots < 0 or in_slots % slot_size:
        raise ValueError(
            f"{op}: expected whole slots of {slot_size} keys before {num_pointer_tokens} pointers, got "
            f"{keys.shape[1]} keys; pad the last slot and give lengths"
        )
    num_slots = in_slots // slot_size
    if lengths is not None:
        check_shape(op, "lengths", lengths, (batch, num_slots + 1))
        check_dtype(op, "lengths", lengths, (torch.int32,))
        lengths = lengths.contiguous()
    scale = width**-0.5 if scale is None else scale
    if scale <= 0:
        raise ValueError(f"{op}: expected a positive scale, got {scale}")
    need_lse = _needs_grad(q, keys, values)
    return _attend(q, keys, values, lengths, slot_size, num_slots, scale, need_lse)[0]


def memory_self_attention(x: Tensor, projections: Projections, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Self-attention of the memory-attention layers, as SAM2's ``RoPEAttention`` on equal inputs (dropout 0).

    Args:
        x: (B, N, C).
        projections: Weights; values are as wide as keys here, and stay projected.
        rope: Tables (N, D / 2).

    Returns:
        (B, N, C) in the dtype of `x`.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    q = rope_linear(x, projections.q_weight, projections.q_bias, rope)
    k = rope_linear(x, projections.k_weight, projections.k_bias, rope)
    v = linear(x, projections.v_weight, projections.v_bias)
    if (q.dtype in (torch.float16, torch.bfloat16) or not q.is_cuda) and not _needs_grad(q, k, v):
        out = memory_attention_cached(q, k, v, slot_size=k.shape[1])
    else:
        out = attention(q[:, None], k[:, None], v[:, None])[:, 0]
    return linear(out, projections.out_weight, projections.out_bias)
