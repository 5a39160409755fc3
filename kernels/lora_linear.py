"""Linear layers with unmerged LoRA: one adapter, or several in one batch; projections that share an input.

For row m of x with adapter e = adapter_index[m], and projection p of those that share x::

    t[m]   = A[e] x[m]                                  A stacks the projections: one skinny product for all of them
    y_p[m] = W_p x[m] + bias_p + scaling B_p[e] t_p[m]  rows with index -1 take the base layer alone

The base product is the library's. The adapters' kernels walk over tiles of rows, and in each over the adapters that
occur there: rows need not be sorted, nothing is copied per row, and no host synchronisation finds out who occurs. With
a single adapter for all rows the library has every product, the last with scale and sum as its epilogue.

    x: (..., k), W_p: (o_p, k), A: (E, P r, k), B_p: (E, o_p, r) -> y_p: (..., o_p)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medvl_sam2.kernels._common import (
    check_dtype,
    check_same_device,
    check_shape,
    device_guard,
    match_autocast,
)
from medvl_sam2.kernels._library import define_op
from medvl_sam2.kernels.lora_linear_kernels import multiply_rows, sum_weights

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    adapter_index: Tensor | None = None,
) -> Tensor:
    """Compute the layer in float32 with every row's own adapter gathered; the oracle. Arguments as `lora_linear`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, a, b = x.to(wide), a.to(wide).reshape(-1, *a.shape[-2:]), b.to(wide).reshape(-1, *b.shape[-2:])
    base = F.linear(rows, weight.to(wide), None if bias is None else bias.to(wide))
    if adapter_index is None:
        return (base + scaling * (rows @ a[0].mT @ b[0].mT)).to(x.dtype)
    index = adapter_index.reshape(*adapter_index.shape, *[1] * (x.ndim - 1 - adapter_index.ndim)).expand(x.shape[:-1])
    chosen = index.clamp(min=0)
    low = torch.einsum("...rk,...k->...r", a[chosen], rows)
    delta = torch.einsum("...or,...r->...o", b[chosen], low)
    return (base + scaling * delta * (index >= 0)[..., None]).to(x.dtype)


def _members(index: Tensor | None, adapters: int, rows: int) -> list[tuple[int, Tensor | slice]]:
    """Give each adapter that occurs with its rows: a slice where they follow each other, which costs no copy."""
    if index is None:
        return [(0, slice(0, rows))]
    found: list[tuple[int, Tensor | slice]] = []
    for adapter in range(adapters):
        members = (index == adapter).nonzero()[:, 0]
        if len(members):
            first, last = int(members[0]), int(members[-1])
            found.append((adapter, slice(first, last + 1) if last - first + 1 == len(members) else members))
    return found


def _add_product(y: Tensor, members: Tensor | slice, a: Tensor, b: Tensor, alpha: float) -> None:
    if isinstance(members, slice):
        y[members].addmm_(a, b, alpha=alpha)
    else:
        y.index_add_(0, members, a @ b, alpha=alpha)


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    a: Tensor,
    b: Sequence[Tensor],
    scaling: float,
    index: Tensor | None,
) -> list[Tensor]:
    rank = b[0].shape[2]
    low = x.new_zeros(len(x), a.shape[1])
    outputs = [F.linear(x, weight, bias if len(bias) else None) for weight, bias in zip(weights, biases)]
    for adapter, members in _members(index, len(a), len(x)):
        part = x[members] @ a[adapter].mT
        low[members] = part
        for y, up, piece in zip(outputs, b, part.split(rank, 1)):
            _add_product(y, members, piece, up[adapter].mT, scaling)
    return [low, *outputs]


def _backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    a: Tensor,
    b: Sequence[Tensor],
    low: Tensor,
    scaling: float,
    index: Tensor | None,
    needs_x: bool,
    needs_base: bool,
) -> list[Tensor]:
    dx, base = _base_backward(grads, x, weights, needs_x, needs_base)
    da, db = torch.zeros_like(a), [torch.zeros_like(up) for up in b]
    for adapter, members in _members(index, len(a), len(x)):
        parts = [grad[members] for grad in grads]
        dlow = torch.cat([scaling * (part @ up[adapter]) for part, up in zip(parts, b)], 1)
        torch.mm(dlow.mT, x[members], out=da[adapter])
        for part, piece, out in zip(parts, low[members].split(b[0].shape[2], 1), db):
            out[adapter] = scaling * (part.mT @ piece)
        if needs_x:
            _add_product(dx, members, dlow, a[adapter], 1.0)
    return [dx, da, *db, *base]


def _base_backward(
    grads: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], needs_x: bool, needs_base: bool
) -> tuple[Tensor, list[Tensor]]:
    dx = x.new_empty(0)
    if needs_x:
        dx = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:]):
            dx.addmm_(grad, weight)
    return dx, [*(grad.mT @ x for grad in grads), *(grad.sum(0) for grad in grads)] if needs_base else []


def _launch_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    a: Tensor,
    b: Sequence[Tensor],
    scaling: float,
    index: Tensor | None,
) -> list[Tensor]:
    if index is None or not len(x):
        return _forward(x, weights, biases, a, b, scaling, index)
    low = x.new_empty(len(x), a.shape[1])
    outputs = [F.linear(x, weight, bias if len(bias) else None) for weight, bias in zip(weights, biases)]
    with device_guard(x):
        multiply_rows(x, a.mT, low, index, 1.0, False)
        for y, up, piece in zip(outputs, b, low.split(b[0].shape[2], 1)):
            multiply_rows(piece, up.mT, y, index, scaling, True)
    return [low, *outputs]


def _launch_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    a: Tensor,
    b: Sequence[Tensor],
    low: Tensor,
    scaling: float,
    index: Tensor | None,
    needs_x: bool,
    needs_base: bool,
) -> list[Tensor]:
    if index is None or not len(x):
        return _backward(grads, x, weights, a, b, low, scaling, index, needs_x, needs_base)
    dx, base = _base_backward(grads, x, weights, needs_x, needs_base)
    da, db = torch.empty_like(a), [torch.empty_like(up) for up in b]
    dlow = torch.empty_like(low)
    rank = b[0].shape[2]
    with device_guard(x):
        for grad, up, piece, dpiece, out in zip(grads, b, low.split(rank, 1), dlow.split(rank, 1), db):
            multiply_rows(grad, up, dpiece, index, scaling, False)
            sum_weights(grad, piece, out, index, scaling)
        sum_weights(dlow, x, da, index, 1.0)
        if needs_x:
            multiply_rows(dlow, a, dx, index, 1.0, True)
    return [dx, da, *db, *base]


def _fake_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    a: Tensor,
    b: Sequence[Tensor],
    scaling: float,
    index: Tensor | None,
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], a.shape[1]), *(x.new_empty(x.shape[0], weight.shape[0]) for weight in weights)]


def _fake_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    a: Tensor,
    b: Sequence[Tensor],
    low: Tensor,
    scaling: float,
    index: Tensor | None,
    needs_x: bool,
    needs_base: bool,
) -> list[Tensor]:
    base = [*map(torch.empty_like, weights), *(x.new_empty(weight.shape[0]) for weight in weights)]
    dx = x.new_empty(x.shape if needs_x else 0)
    return [dx, torch.empty_like(a), *map(torch.empty_like, b), *(base if needs_base else [])]


_bwd = define_op("lora_linear_bwd", _backward, _launch_backward, _fake_backward, switch="lora_linear")


def _setup_context(ctx, inputs, output) -> None:
    x, weights, ctx.biases, a, b, ctx.scaling, index = inputs
    ctx.save_for_backward(x, a, output[0], index, *weights, *b)
    ctx.needs_base = any(tensor.requires_grad for tensor in (*weights, *ctx.biases))
    ctx.biases = [len(bias) > 0 for bias in ctx.biases]


def _autograd(ctx, grads: list[Tensor]) -> tuple:
    x, a, low, index, *rest = ctx.saved_tensors
    count = len(ctx.biases)
    needs_x = ctx.needs_input_grad[0]
    outer = [grad.contiguous() for grad in grads[1:]]
    dx, da, *rest = _bwd(outer, x, rest[:count], a, rest[count:], low, ctx.scaling, index, needs_x, ctx.needs_base)
    db, dweights, dbiases = rest[:count], rest[count : 2 * count], rest[2 * count :]
    if not ctx.needs_base:
        dweights = dbiases = [None] * count
    dbiases = [grad if has else None for grad, has in zip(dbiases, ctx.biases)]
    return dx if needs_x else None, dweights, dbiases, da, db, None, None


_fwd = define_op(
    "lora_linear", _forward, _launch_forward, _fake_forward, backward=_autograd, setup_context=_setup_context
)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    adapter_index: Tensor | None = None,
) -> Tensor:
    """Apply a linear layer with unmerged LoRA; differentiable in all tensors.

    Args:
        x: (..., k) float32, float16 or bfloat16. Under autocast all tensors are cast as for a linear layer.
        weight: (o, k) of the base layer, with `bias` (o,) or None.
        bias: (o,) or None.
        a: (r, k), or (E, r, k) for several adapters.
        b: (o, r), or (E, o, r).
        scaling: Factor of the adapters' part, alpha / r.
        adapter_index: Integers -1..E-1 for the leading axes of `x`, in full or for the first of them only ((B,) for
            (B, L, k)); -1 leaves the base layer alone. None means that all rows take the only adapter.

    Returns:
        (..., o) in the dtype of `x`.

    Raises:
        ValueError: On shapes, dtypes or devices that do not fit.
    """
    return lora_linear_shared(x, [weight], [bias], a, [b], scaling, adapter_index)[0]


def lora_linear_shared(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Tensor,
    b: Sequence[Tensor],
    scaling: float,
    adapter_index: Tensor | None = None,
) -> list[Tensor]:
    """Apply several linear layers with LoRA to one input (q, k, v; gate, up), their A stacked into one product.

    Args:
        x: (..., k), as in `lora_linear`.
        weights: (o_p, k) of each layer.
        biases: (o_p,) or None of each layer.
        a: (P r, k) or (E, P r, k): the layers' A one after the other along the rank.
        b: (o_p, r) or (E, o_p, r) of each layer.
        scaling: As in `lora_linear`.
        adapter_index: As in `lora_linear`.

    Returns:
        (..., o_p) for each layer.

    Raises:
        ValueError: On shapes, dtypes or devices that do not fit.
    """
    name, count = "lora_linear", len(weights)
    if not count or len(biases) != count or len(b) != count:
        raise ValueError(f"{name}: expected as many biases and b as weights, got {count}, {len(biases)} and {len(b)}")
    x, a, *rest = match_autocast(x, a, *weights, *biases, *b)
    weights, biases, b = rest[:count], rest[count : 2 * count], rest[2 * count :]
    check_dtype(name, "x", x, FLOATS)
    check_same_device(name, x, a, *weights, *biases, *b, adapter_index)
    a, b = (a[None] if a.ndim == 2 else a), [up[None] if up.ndim == 2 else up for up in b]
    if x.ndim < 2 or x.shape[-1] == 0 or 0 in b[0].shape:
        shapes = f"{tuple(x.shape)} and {tuple(b[0].shape)}"
        raise ValueError(f"{name}: expected x of shape (..., k) with k above 0 and b of rank above 0, got {shapes}")
    k, rank = x.shape[-1], b[0].shape[-1]
    check_shape(name, "a", a, (None, count * rank, k))
    for weight, bias, up in zip(weights, biases, b):
        check_shape(name, "weight", weight, (None, k))
        check_shape(name, "b", up, (a.shape[0], weight.shape[0], rank))
        if bias is not None:
            check_shape(name, "bias", bias, (weight.shape[0],))
    for tensor in (a, *weights, *b, *(bias for bias in biases if bias is not None)):
        check_dtype(name, "weights and adapters", tensor, (x.dtype,))
    index = None if adapter_index is None else _row_index(adapter_index, x.shape[:-1])
    if index is None and a.shape[0] != 1:
        raise ValueError(f"{name}: expected an adapter_index with {a.shape[0]} adapters, got None")
    rows = x.reshape(-1, k).contiguous()
    biases = [x.new_empty(0) if bias is None else bias for bias in biases]
    weights, b = [w.contiguous() for w in weights], [up.contiguous() for up in b]
    _, *outputs = _fwd(rows, weights, biases, a.contiguous(), b, float(scaling), index)
    return [y.view(*x.shape[:-1], y.shape[1]) for y in outputs]


def _row_index(index: Tensor, leading: torch.Size) -> Tensor:
    if index.is_floating_point() or index.dtype == torch.bool or index.shape != leading[: index.ndim]:
        raise ValueError(
            f"lora_linear: expected an integer adapter_index over the leading axes {tuple(leading)}, got "
            f"{tuple(index.shape)} of {str(index.dtype).removeprefix('torch.')}"
        )
    spread = index.reshape(*index.shape, *[1] * (len(leading) - index.ndim)).expand(leading)
    return spread.reshape(-1).to(torch.int32)
