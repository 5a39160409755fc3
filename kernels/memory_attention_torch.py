"""Plain torch of `memory_attention`: the fp32 oracle, and the chunked path that CPUs and other widths take.

Keys lie in ``num_slots`` slots of ``slot_size`` with a run of tokens behind them; ``lengths`` (B, num_slots + 1) counts
the valid keys at the start of each. A query without a single valid key gives zeros.
"""

import math

import torch
from torch import Tensor

from medvl_sam2.kernels.linear import product

# Scores of one query chunk: they must stay in the cache between the two matrix products.
CHUNK_BYTES = 8 << 20


def _valid(lengths: Tensor, tokens: int, slot_size: int, num_slots: int) -> Tensor:
    index = torch.arange(tokens, device=lengths.device)
    slot = (index // slot_size).clamp(max=num_slots)
    return index - slot * slot_size < lengths[:, slot]


def memory_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, slot_size: int, num_slots: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend in fp32 (fp64 for fp64) with the whole score matrix.

    Returns:
        (B, N, V) in the dtype of `v` and the log-sum-exp of the scores (B, N).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT * scale
    if lengths is not None:
        scores = scores.masked_fill(~_valid(lengths, k.shape[1], slot_size, num_slots)[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.clamp(min=torch.finfo(wide).min)[..., None]).exp()
    return (weights @ v.to(wide)).to(v.dtype), lse


def _compact(x: Tensor, lengths: list[int], slot_size: int) -> Tensor:
    parts, tokens = [], x.shape[0]
    for slot, length in enumerate(lengths):
        start = slot * slot_size
        if length > 0:
            parts.append(x[start : min(start + length, tokens)])
    kept = sum(part.shape[0] for part in parts)
    if kept == tokens:
        return x
    return torch.cat(parts) if parts else x[:0]


def _row_chunks(queries: int, tokens: int, itemsize: int) -> list[slice]:
    step = max(64, min(512, CHUNK_BYTES // max(1, tokens * itemsize)))
    return [slice(start, start + step) for start in range(0, queries, step)]


def attend_in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    slot_size: int,
    num_slots: int,
    scale: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Attend in plain torch, a cache-sized chunk of queries at a time: two matrix products and a softmax each."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty((*q.shape[:2], v.shape[-1]))
    lse = q.new_empty(q.shape[:2] if need_lse else (0,), dtype=wide)
    valid = None if lengths is None else _valid(lengths, k.shape[1], slot_size, num_slots)
    for batch, queries in enumerate((q * scale).unbind()):
        keys, values, hidden = k[batch], v[batch], None
        if valid is not None and not k.is_cuda:
            counts = lengths[batch].tolist()
            keys, values = _compact(keys, counts, slot_size), _compact(values, counts, slot_size)
        elif valid is not None:
            hidden = ~valid[batch]
        if keys.shape[0] == 0:
            out[batch] = 0
            if need_lse:
                lse[batch] = -math.inf
            continue
        values = values.mT.contiguous()
        for rows in _row_chunks(q.shape[1], keys.shape[0], q.element_size()):
            scores = product(queries[rows], keys)
            if hidden is not None:
                scores.masked_fill_(hidden, -math.inf)
            if need_lse:
                lse[batch, rows] = scores.to(wide).logsumexp(-1)
            weights = scores.softmax(-1)
            if hidden is not None:
                weights = weights.nan_to_num(0.0)
            out[batch, rows] = product(weights, values)
    return out, lse


def attend_backward_in_chunks(
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
    """Differentiate `attend_in_chunks`; returns the gradients of q, k and v."""
    wide = lse.dtype
    dq = torch.empty_like(q)
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    delta = (grad.to(wide) * out.to(wide)).sum(-1)
    valid = None if lengths is None else _valid(lengths, k.shape[1], slot_size, num_slots)
    for batch in range(q.shape[0]):
        keys, values = k[batch].to(wide), v[batch].to(wide)
        for rows in _row_chunks(q.shape[1], k.shape[1], keys.element_size()):
            queries, g = q[batch, rows].to(wide) * scale, grad[batch, rows].to(wide)
            p = (queries @ keys.mT).sub_(lse[batch, rows, None]).exp_()
            if valid is not None:
                p.masked_fill_(~valid[batch], 0.0)
            dv[batch].addmm_(p.mT, g)
            ds = (g @ values.mT).sub_(delta[batch, rows, None]).mul_(p)
            dq[batch, rows] = (ds @ keys).mul_(scale).to(q.dtype)
            dk[batch].addmm_(ds.mT, queries)
    return dq, dk.to(k.dtype), dv.to(v.dtype)
