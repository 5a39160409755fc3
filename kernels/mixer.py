"""One layer of the MLP-Mixer projector: tokens n -> n', then channels d -> d' (as Med3DVLM's ``MixerLayer``).

    u = W1 LN1(x) + b1        (B, n', d)     token mixing acts on the columns of LN1(x): no transposed copy is made
    s = W2 gelu(u) + b2       (B, n', d)
    t = LN2(s) V1^T + c1      (B, n', d')    gelu is the exact (erf) one; there is no residual
    y = gelu(t) V2^T + c2     (B, n', d')

Every product is one launch of the same kernel: LayerNorm is applied to an operand's tile on its way in, from row
statistics found beforehand, bias and GELU on the way out. The backward recomputes gelu(u) and gelu(t) beside the
derivative it needs anyway, and the normed operands in flight, so the forward keeps u, s and t only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from medvl_sam2.kernels._aot import Variant
from medvl_sam2.kernels._common import (
    check_dtype,
    check_same_device,
    check_shape,
    device_guard,
    dot_precision,
    match_autocast,
    tl,
    triton,
)
from medvl_sam2.kernels._library import define_op
from medvl_sam2.kernels._tuning import Tile, operand_width, tile

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def mixer_layer_reference(x: Tensor, *weights: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute the layer as its modules read, in float32 (float64 for float64); the oracle. Weights as `mixer_layer`."""
    dtype = x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    x, *weights = (tensor.to(wide) for tensor in (x, *weights))
    ln1_weight, ln1_bias, w1, b1, w2, b2, ln2_weight, ln2_bias, v1, c1, v2, c2 = weights
    x = F.layer_norm(x, x.shape[-1:], ln1_weight, ln1_bias, eps)
    x = F.linear(F.gelu(F.linear(x.mT, w1, b1)), w2, b2).mT
    x = F.layer_norm(x, x.shape[-1:], ln2_weight, ln2_bias, eps)
    return F.linear(F.gelu(F.linear(x, v1, c1)), v2, c2).to(dtype)


def _tokens(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """(m, n) @ (B, n, d) + bias (m) -> (B, m, d)."""
    if len(x) == 1:
        x = x[0]
        return (weight @ x if bias is None else torch.addmm(bias[:, None], weight, x))[None]
    weight = weight.expand(len(x), -1, -1)
    return torch.bmm(weight, x) if bias is None else torch.baddbmm(bias[:, None], weight, x)


def _norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # On the CPU torch wants the statistics in the dtype of x, on CUDA in float32.
    kind = x.dtype if x.device.type == "cpu" else torch.float32
    stats = (s.to(kind).view(*x.shape[:-1], 1) for s in (mean, rstd))
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[-1:], *stats, weight, bias, [needs_x, True, True]
    )
    return x.new_empty(0) if dx is None else dx, dweight, dbias


def _forward(x: Tensor, weights: list[Tensor], eps: float, keep: bool) -> list[Tensor]:
    ln1_weight, ln1_bias, w1, b1, w2, b2, ln2_weight, ln2_bias, v1, c1, v2, c2 = weights
    d = x.shape[2:]
    normed, *stats1 = torch.native_layer_norm(x, d, ln1_weight, ln1_bias, eps)
    u = _tokens(w1, normed, b1)
    s = _tokens(w2, F.gelu(u), b2)
    normed, *stats2 = torch.native_layer_norm(s, d, ln2_weight, ln2_bias, eps)
    t = F.linear(normed, v1, c1)
    y = F.linear(F.gelu(t), v2, c2)
    return [y, u, s, t, *(stat.float().flatten() for stat in (*stats1, *stats2))] if keep else [y]


def _backward(
    grad: Tensor, x: Tensor, weights: list[Tensor], kept: list[Tensor], eps: float, needs_x: bool
) -> list[Tensor]:
    ln1_weight, ln1_bias, w1, _, w2, _, ln2_weight, ln2_bias, v1, _, v2, _ = weights
    u, s, t, mean1, rstd1, mean2, rstd2 = kept
    d = x.shape[2:]
    grad, t = grad.flatten(0, 1), t.flatten(0, 1)
    dt = torch.ops.aten.gelu_backward(grad @ v2, t)
    dv2 = grad.mT @ F.gelu(t)
    dv1 = dt.mT @ F.layer_norm(s, d, ln2_weight, ln2_bias, eps).flatten(0, 1)
    ds, dln2_weight, dln2_bias = _norm_backward((dt @ v1).view_as(s), s, mean2, rstd2, ln2_weight, ln2_bias, True)
    du = torch.ops.aten.gelu_backward(_tokens(w2.mT, ds), u)
    dw2 = _pairs(ds, F.gelu(u))
    dw1 = _pairs(du, F.layer_norm(x, d, ln1_weight, ln1_bias, eps))
    dx, dln1_weight, dln1_bias = _norm_backward(_tokens(w1.mT, du), x, mean1, rstd1, ln1_weight, ln1_bias, needs_x)
    first = [dx, dln1_weight, dln1_bias, dw1, du.sum((0, 2)), dw2, ds.sum((0, 2))]
    return [*first, dln2_weight, dln2_bias, dv1, dt.sum(0), dv2, grad.sum(0)]


def _pairs(a: Tensor, b: Tensor) -> Tensor:
    """Sum over the batch of a (B, m, d) @ b (B, n, d)^T."""
    return a[0] @ b[0].mT if len(a) == 1 else torch.einsum("bmd,bnd->mn", a, b)


@triton.jit
def _mixer_stats_kernel(x_ptr, mean_ptr, rstd_ptr, rows, d, x_row, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (c < d)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_row + c[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / d
    centred = tl.where(inside, x - mean[:, None], 0.0)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / d + eps), mask=row < rows)


@triton.jit
def _mixer_matmul_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    bias_ptr,
    pre_ptr,
    act_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    shift_ptr,
    M,
    N,
    K,
    rounds,
    a_b,
    a_m,
    a_k,
    b_b,
    b_k,
    b_n,
    out_b,
    out_m,
    out_n,
    stat_b,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    REDUCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[b] = epilogue(norm(a[b]) @ norm(b[b]) + bias), or its sum over b with REDUCE.

    NORM "a": rows of a are tokens; "b": rows of b are. EPILOGUE "gelu": out = gelu(v); "keep": also pre = v;
    "backward": out = v * gelu'(pre) and act = gelu(pre).
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m = m < M
    in_n = n < N
    batch = tl.program_id(1).to(tl.int64)
    steps = tl.cdiv(K, BLOCK_K)
    inner = tl.arange(0, BLOCK_K)
    a_tile = a_ptr + m[:, None] * a_m + inner[None, :].to(tl.int64) * a_k
    b_tile = b_ptr + inner[:, None].to(tl.int64) * b_k + n[None, :] * b_n
    if NORM == "b":
        scale = tl.load(scale_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
        shift = tl.load(shift_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(rounds * steps):
        k0 = (step % steps).to(tl.int64) * BLOCK_K
        if REDUCE:
            batch = (step // steps).to(tl.int64)
        k = k0 + inner
        in_k = k < K
        a = tl.load(a_tile + (batch * a_b + k0 * a_k), mask=in_m[:, None] & in_k[None, :], other=0.0)
        b = tl.load(b_tile + (batch * b_b + k0 * b_k), mask=in_k[:, None] & in_n[None, :], other=0.0)
        if NORM == "a":
            mean = tl.load(mean_ptr + batch * stat_b + m, mask=in_m, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + batch * stat_b + m, mask=in_m, other=0.0)[:, None]
            scale = tl.load(scale_ptr + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
            shift = tl.load(shift_ptr + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
            a = ((a.to(tl.float32) - mean) * rstd * scale + shift).to(b.dtype)
        if NORM == "b":
            mean = tl.load(mean_ptr + batch * stat_b + k, mask=in_k, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + batch * stat_b + k, mask=in_k, other=0.0)[:, None]
            b = ((b.to(tl.float32) - mean) * rstd * scale + shift).to(a.dtype)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    if BIAS == "m":
        total += tl.load(bias_ptr + m, mask=in_m, other=0.0).to(tl.float32)[:, None]
    if BIAS == "n":
        total += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    at = tl.program_id(1).to(tl.int64) * out_b + m[:, None] * out_m + n[None, :] * out_n
    inside = in_m[:, None] & in_n[None, :]
    kind = out_ptr.dtype.element_ty
    if EPILOGUE == "keep":
        total = total.to(kind)
        tl.store(pre_ptr + at, total, mask=inside)
        total = total.to(tl.float32)
    if EPILOGUE == "backward":
        pre = tl.load(pre_ptr + at, mask=inside, other=0.0).to(tl.float32)
        half = 0.5 + 0.5 * tl.math.erf(pre * 0.7071067811865476)
        tl.store(act_ptr + at, (pre * half).to(kind), mask=inside)
        total = total * (half + pre * 0.3989422804014327 * tl.exp(-0.5 * pre * pre))
    elif EPILOGUE != "none":
        total = total * (0.5 + 0.5 * tl.math.erf(total * 0.7071067811865476))
    tl.store(out_ptr + at, total.to(kind), mask=inside)


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, d = x.shape[0] * x.shape[1], x.shape[2]
    mean, rstd = x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)
    block = triton.next_power_of_2(d)
    per = max(1, 4096 // block)
    _mixer_stats_kernel[(triton.cdiv(rows, per),)](
        x, mean, rstd, rows, d, x.stride(1), eps, ROWS=per, BLOCK=block, num_warps=4
    )
    return mean, rstd


def _heuristic(dtype: torch.dtype, m: int, n: int, batches: int, epilogue: str) -> Tile:
    if dtype == torch.float32:
        # Without tensor cores the operands sit in registers as well; deeper or with fewer warps they spilled.
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
    # Half a wave of large tiles is slower than a wave of small ones: 132 multiprocessors on the target. The derivative
    # of GELU needs the registers that a wider tile would hold, which spilled.
    if triton.cdiv(m, 128) * triton.cdiv(n, 128) * batches < 132:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
    width = 64 if epilogue == "backward" else 128
    return {"BLOCK_M": 128, "BLOCK_N": width, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def _matmul(
    a: Tensor,
    b: Tensor,
    out: Tensor | None = None,
    *,
    norm: str = "none",
    stats: tuple[Tensor, ...] = (),
    bias: Tensor | None = None,
    bias_axis: str = "none",
    epilogue: str = "none",
    pre: Tensor | None = None,
    act: Tensor | None = None,
    reduce: bool = False,
) -> Tensor:
    """Launch `_mixer_matmul_kernel` on a (B, M, K) and b (B, K, N); `pre` and `act` have the layout of `out`."""
    batches, m, k = a.shape
    n = b.shape[2]
    if out is None:
        out = a.new_empty((1, m, n) if reduce else (batches, m, n))
    mean, rstd, scale, shift = stats or (out,) * 4
    # The same product occurs forward and backward, with epilogues of unlike appetite for registers.
    key = f"M{m}-N{n}-K{k}-{norm}-{epilogue}-{operand_width(a.dtype)}"
    settings = tile("mixer", _heuristic(a.dtype, m, n, out.shape[0], epilogue), a.device, key)
    grid = (triton.cdiv(m, settings["BLOCK_M"]) * triton.cdiv(n, settings["BLOCK_N"]), out.shape[0])
    _mixer_matmul_kernel[grid](
        a,
        b,
        out,
        out if bias is None else bias,
        out if pre is None else pre,
        out if act is None else act,
        mean,
        rstd,
        scale,
        shift,
        m,
        n,
        k,
        batches if reduce else 1,
        *a.stride(),
        *b.stride(),
        *out.stride(),
        mean.numel() // batches if stats else 0,
        NORM=norm,
        BIAS=bias_axis,
        EPILOGUE=epilogue,
        REDUCE=reduce,
        PRECISION=dot_precision(a.dtype),
        **settings,
    )
    return out


def _launch_forward(x: Tensor, weights: list[Tensor], eps: float, keep: bool) -> list[Tensor]:
    ln1_weight, ln1_bias, w1, b1, w2, b2, ln2_weight, ln2_bias, v1, c1, v2, c2 = weights
    kept = _fake_forward(x, weights, eps, keep)
    batch, _, d = x.shape
    tokens, rows = len(w1), batch * len(w1)
    if not batch:
        return kept
    u, s, t = kept[1:4] if keep else (None, x.new_empty(batch, tokens, d), None)
    epilogue = "keep" if keep else "gelu"
    with device_guard(x):
        stats1 = _stats(x, eps)
        first = {"bias_axis": "m", "epilogue": epilogue, "pre": u}
        hidden = _matmul(w1.expand(batch, -1, -1), x, norm="b", stats=(*stats1, ln1_weight, ln1_bias), bias=b1, **first)
        _matmul(w2.expand(batch, -1, -1), hidden, s, bias=b2, bias_axis="m")
        stats2 = _stats(s, eps)
        second = {"bias_axis": "n", "epilogue": epilogue, "pre": t}
        hidden = _matmul(
            s.view(1, rows, d), v1.mT[None], norm="a", stats=(*stats2, ln2_weight, ln2_bias), bias=c1, **second
        )
        _matmul(hidden, v2.mT[None], kept[0].view(1, rows, -1), bias=c2, bias_axis="n")
    return [*kept[:4], *stats1, *stats2] if keep else kept


def _launch_backward(
    grad: Tensor, x: Tensor, weights: list[Tensor], kept: list[Tensor], eps: float, needs_x: bool
) -> list[Tensor]:
    ln1_weight, ln1_bias, w1, _, w2, _, ln2_weight, ln2_bias, v1, _, v2, _ = weights
    u, s, t, mean1, rstd1, mean2, rstd2 = kept
    batch, n, _ = x.shape
    if not batch:
        return _backward(grad, x, weights, kept, eps, needs_x)
    norm1, norm2 = (mean1, rstd1, ln1_weight, ln1_bias), (mean2, rstd2, ln2_weight, ln2_bias)
    grad, t, flat = grad.flatten(0, 1), t.flatten(0, 1), s.flatten(0, 1)
    # Products with nothing to fuse are left to the library.
    with device_guard(x):
        gelu_t = torch.empty_like(t)
        dt = _matmul(grad[None], v2[None], epilogue="backward", pre=t, act=gelu_t)[0]
        dv2 = grad.mT @ gelu_t
        dv1 = _matmul(dt.mT[None], flat[None], norm="b", stats=norm2)[0]
        ds, dln2_weight, dln2_bias = _norm_backward((dt @ v1).view_as(s), s, *norm2, True)
        gelu_u = torch.empty_like(u)
        du = _matmul(w2.mT.expand(batch, -1, -1), ds, epilogue="backward", pre=u, act=gelu_u)
        dw2 = _matmul(ds, gelu_u.mT, reduce=True)[0]
        dw1 = torch.empty_like(w1)
        _matmul(x, du.mT, dw1.mT[None], norm="a", stats=norm1, reduce=True)
        dx, dln1_weight, dln1_bias = _norm_backward(_tokens(w1.mT, du), x, *norm1, needs_x)
    first = [dx, dln1_weight, dln1_bias, dw1, du.sum((0, 2)), dw2, ds.sum((0, 2))]
    return [*first, dln2_weight, dln2_bias, dv1, dt.sum(0), dv2, grad.sum(0)]


def _fake_forward(x: Tensor, weights: list[Tensor], eps: float, keep: bool) -> list[Tensor]:
    batch, n, d = x.shape
    tokens, channels = weights[2].shape[0], weights[8].shape[0]
    y = x.new_empty(batch, tokens, channels)
    if not keep:
        return [y]
    kept = [x.new_empty(batch, tokens, width) for width in (d, d, channels)]
    stats = [x.new_empty(batch * rows, dtype=torch.float32) for rows in (n, n, tokens, tokens)]
    return [y, *kept, *stats]


def _fake_backward(
    grad: Tensor, x: Tensor, weights: list[Tensor], kept: list[Tensor], eps: float, needs_x: bool
) -> list[Tensor]:
    return [x.new_empty(x.shape if needs_x else 0), *(torch.empty_like(weight) for weight in weights)]


_bwd = define_op("mixer_bwd", _backward, _launch_backward, _fake_backward, switch="mixer")


def _setup_context(ctx, inputs, output) -> None:
    x, weights, ctx.eps, _ = inputs
    ctx.save_for_backward(x, *weights, *output[1:])


def _autograd(ctx, grads: list[Tensor]) -> tuple:
    x, *saved = ctx.saved_tensors
    needs_x = ctx.needs_input_grad[0]
    dx, *rest = _bwd(grads[0].contiguous(), x, saved[:12], saved[12:], ctx.eps, needs_x)
    return dx if needs_x else None, rest, None, None


_fwd = define_op("mixer", _forward, _launch_forward, _fake_forward, backward=_autograd, setup_context=_setup_context)


def mixer_layer(
    x: Tensor,
    ln1_weight: Tensor,
    ln1_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    ln2_weight: Tensor,
    ln2_bias: Tensor,
    v1: Tensor,
    c1: Tensor,
    v2: Tensor,
    c2: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Mix tokens n -> n', then channels d -> d': one Mixer layer of Med3DVLM, without residual.

    Differentiable in every tensor; the gradient of `x` is computed only when it is asked for.

    Args:
        x: (B, n, d) float32, float16 or bfloat16. Under autocast all tensors are cast as for a linear layer.
        ln1_weight: (d,) of the LayerNorm before token mixing, as `ln1_bias`.
        ln1_bias: (d,).
        w1: (n', n) first token layer, with bias `b1` (n',).
        b1: (n',).
        w2: (n', n') second token layer, with bias `b2` (n',).
        b2: (n',).
        ln2_weight: (d,) of the LayerNorm before channel mixing, as `ln2_bias`.
        ln2_bias: (d,).
        v1: (d', d) first channel layer, with bias `c1` (d',).
        c1: (d',).
        v2: (d', d') second channel layer, with bias `c2` (d',).
        c2: (d',).
        eps: Of both LayerNorms.

    Returns:
        (B, n', d') in the dtype of `x`.

    Raises:
        ValueError: On shapes, dtypes or devices that do not fit.
    """
    name = "mixer"
    weights = (ln1_weight, ln1_bias, w1, b1, w2, b2, ln2_weight, ln2_bias, v1, c1, v2, c2)
    x, *weights = match_autocast(x, *weights)
    check_shape(name, "x", x, (None, None, None))
    check_shape(name, "w1", w1, (None, x.shape[1]))
    check_shape(name, "v1", v1, (None, x.shape[2]))
    tokens, channels, d = w1.shape[0], v1.shape[0], x.shape[2]
    shapes = ((d,), (d,), None, (tokens,), (tokens, tokens), (tokens,), (d,), (d,), None, (channels,))
    labels = ("ln1_weight", "ln1_bias", "w1", "b1", "w2", "b2", "ln2_weight", "ln2_bias", "v1", "c1", "v2", "c2")
    for label, tensor, shape in zip(labels, weights, (*shapes, (channels, channels), (channels,)), strict=True):
        if shape is not None:
            check_shape(name, label, tensor, shape)
        check_dtype(name, label, tensor, (x.dtype,))
    check_dtype(name, "x", x, FLOATS)
    check_same_device(name, x, *weights)
    if 0 in (*x.shape[1:], tokens, channels):
        raise ValueError(f"{name}: expected tokens and channels above 0, got {tuple(x.shape)} to {tokens}, {channels}")
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights))
    return _fwd(x.contiguous(), [tensor.contiguous() for tensor in weights], eps, keep)[0]


def _variants() -> list[Variant]:
    rows = ("a_m", "b_k", "out_m")
    # norm, bias, epilogue, strides divisible by 16, strides of 1
    cases = {
        "token1": ("b", "m", "keep", rows, ("a_k", "b_n", "out_n")),
        "token2": ("none", "m", "none", rows, ("a_k", "b_n", "out_n")),
        "channel1": ("a", "n", "gelu", ("a_m", "b_n", "out_m"), ("a_k", "b_k", "out_n")),
        "gelu-bwd": ("none", "none", "backward", ("a_k", "b_k", "out_m"), ("a_m", "b_n", "out_n")),
        "token1-bwd": ("a", "none", "none", ("a_m", "b_n", "out_n"), ("a_k", "b_k", "out_m")),
    }
    chosen = [(case, "bf16", m, n) for case in cases for m, n in ((64, 64), (128, 64 if case == "gelu-bwd" else 128))]
    chosen += [
        ("token1", "fp16", 64, 64),
        ("gelu-bwd", "fp16", 64, 64),
        ("token1", "fp32", 64, 64),
        ("gelu-bwd", "fp32", 64, 64),
    ]
    found = []
    for case, kind, m, n in chosen:
        norm, bias, epilogue, strides, ones = cases[case]
        signature = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr", "bias_ptr", "pre_ptr", "act_ptr"), f"*{kind}:16")
        signature |= {"mean_ptr": "*fp32:16", "rstd_ptr": "*fp32:16"}
        signature |= dict.fromkeys(("scale_ptr", "shift_ptr"), f"*{kind}:16")
        signature |= dict.fromkeys(("M", "N", "K", *strides, "a_b", "b_b", "out_b", "stat_b"), "i32:16")
        flags = {"NORM": norm, "BIAS": bias, "EPILOGUE": epilogue, "REDUCE": case == "token1-bwd", "PRECISION": "ieee"}
        deep = kind != "fp32"
        constants = {**dict.fromkeys(ones, 1), **flags, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64 if deep else 32}
        options = {"num_warps": m // 16 if deep else 8, "num_stages": 4 if deep and m == 64 else 3, "wgmma": deep}
        name = f"{case}-{kind}-{m}x{n}"
        found.append(Variant(name, _mixer_matmul_kernel, {**signature, "rounds": "i32"}, constants, **options))
    stats = dict.fromkeys(("d", "x_row"), "i32:16") | {"rows": "i32", "eps": "fp32"}
    stats |= {"x_ptr": "*bf16:16", "mean_ptr": "*fp32:16", "rstd_ptr": "*fp32:16"}
    return [*found, Variant("stats", _mixer_stats_kernel, stats, {"ROWS": 4, "BLOCK": 1024})]


AOT_VARIANTS = _variants()
