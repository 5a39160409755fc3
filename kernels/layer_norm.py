"""LayerNorm over the last axis, or over the channels of a channels-first map, with the residual sum folded in.

    s = x + residual;   y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

One read and one write per element (two of each with a residual, whose sum is an output as well). Both layouts are the
same kernel over (images, pixels, channels) with strides: the last axis has ``pixels`` = all rows, a channels-first map
has neighbouring pixels side by side. Backward, with ``h = (s - mean) * rstd`` and ``g = weight * dy``::

    ds = (g - mean(g) - h * mean(g * h)) * rstd + dsum;   dweight = sum(dy * h);   dbias = sum(dy)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvl_sam2.kernels._aot import Variant
from medvl_sam2.kernels._common import HAS_TRITON, check_dtype, check_same_device, check_shape, device_guard, tl, triton
from medvl_sam2.kernels._library import define_op
from medvl_sam2.kernels._tuning import Tile, tile

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A row is held in registers as a whole; wider ones are PyTorch's.
WIDEST = 16_384


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _new_output(x: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=layout)


def _new_gradient(total: Tensor, axis: int) -> Tensor:
    """Empty gradient of a sum: channels last where that is, for the convolution before it, else contiguous."""
    last = axis == 1 and not total.is_contiguous() and total.is_contiguous(memory_format=torch.channels_last)
    return _new_output(total, total.dtype, last)


def _kinds(x: Tensor, residual: Tensor | None, wide: bool) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of the sum, which is PyTorch's for an addition, and of the normed tensor."""
    total = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return total, _accumulator(total) if wide else total


def layer_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    axis: int,
    channels_last: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise in fp32 with plain torch; returns (normed, sum or an empty tensor, mean, 1 / deviation)."""
    total = x if residual is None else x + residual
    exact = total.to(_accumulator(total.dtype)).movedim(axis, -1)
    scale, shift = weight.to(exact.dtype), bias.to(exact.dtype)
    normed, mean, rstd = torch.native_layer_norm(exact, exact.shape[-1:], scale, shift, eps)
    normed = _new_output(x, _kinds(x, residual, wide)[1], channels_last).copy_(normed.movedim(-1, axis))
    return normed, (x.new_empty(0) if residual is None else total.contiguous()), mean.squeeze(-1), rstd.squeeze(-1)


def layer_norm_backward_reference(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `layer_norm_reference`; returns the gradients of the sum, of weight and of bias."""
    wide = total.to(mean.dtype).movedim(axis, -1)
    dy, h = grad.to(mean.dtype).movedim(axis, -1), (wide - mean[..., None]) * rstd[..., None]
    g = dy * weight.to(mean.dtype)
    ds = (g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True)) * rstd[..., None]
    ds = ds.movedim(-1, axis)
    if grad_total is not None:
        ds = ds + grad_total
    rows = tuple(range(dy.ndim - 1))
    dweight = (dy * h).sum(rows) if rows else dy * h
    dbias = dy.sum(rows) if rows else dy.clone()
    return _new_gradient(total, axis).copy_(ds), dweight.to(weight.dtype), dbias.to(weight.dtype)


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    pixels,
    channels,
    eps,
    x_n,
    x_p,
    x_c,
    r_n,
    r_p,
    r_c,
    y_n,
    y_p,
    y_c,
    t_n,
    t_p,
    t_c,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(pixels, BLOCK_P)
    n = block // blocks
    p = (block % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    mask = (p < pixels)[:, None] & (c < channels)[None, :]

    s = tl.load(x_ptr + n * x_n + p[:, None] * x_p + c[None, :] * x_c, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        r = tl.load(residual_ptr + n * r_n + p[:, None] * r_p + c[None, :] * r_c, mask=mask, other=0.0)
        s = (s.to(tl.float32) + r.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + n * t_n + p[:, None] * t_p + c[None, :] * t_c, s, mask=mask)
    s = s.to(tl.float32)
    mean = tl.sum(s, axis=1) / channels
    centred = tl.where(mask, s - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / channels + eps)
    tl.store(mean_ptr + n * pixels + p, mean, mask=p < pixels)
    tl.store(rstd_ptr + n * pixels + p, rstd, mask=p < pixels)

    weight = tl.load(weight_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    y_at = y_ptr + n * y_n + p[:, None] * y_p + c[None, :] * y_c
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,
    dtotal_ptr,
    total_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    ds_ptr,
    dweight_ptr,
    dbias_ptr,
    blocks,
    pixels,
    channels,
    dy_n,
    dy_p,
    dy_c,
    dt_n,
    dt_p,
    dt_c,
    t_n,
    t_p,
    t_c,
    ds_n,
    ds_p,
    ds_c,
    HAS_DTOTAL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    per_image = tl.cdiv(pixels, BLOCK_P)
    weight = tl.load(weight_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_C], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_C], dtype=tl.float32)
    for block in range(program, blocks, tl.num_programs(0)):
        n = (block // per_image).to(tl.int64)
        p = (block % per_image).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (p < pixels)[:, None] & (c < channels)[None, :]
        dy = tl.load(dy_ptr + n * dy_n + p[:, None] * dy_p + c[None, :] * dy_c, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(total_ptr + n * t_n + p[:, None] * t_p + c[None, :] * t_c, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + n * pixels + p, mask=p < pixels, other=0.0)
        rstd = tl.load(rstd_ptr + n * pixels + p, mask=p < pixels, other=0.0)
        h = tl.where(mask, (s - mean[:, None]) * rstd[:, None], 0.0)
        g = dy * weight[None, :]
        mean_g = tl.sum(g, axis=1) / channels
        mean_gh = tl.sum(g * h, axis=1) / channels
        ds = (g - mean_g[:, None] - h * mean_gh[:, None]) * rstd[:, None]
        if HAS_DTOTAL:
            ds += tl.load(dtotal_ptr + n * dt_n + p[:, None] * dt_p + c[None, :] * dt_c, mask=mask, other=0.0).to(
                tl.float32
            )
        tl.store(ds_ptr + n * ds_n + p[:, None] * ds_p + c[None, :] * ds_c, ds.to(ds_ptr.dtype.element_ty), mask=mask)
        dweight += tl.sum(dy * h, axis=0)
        dbias += tl.sum(dy, axis=0)
    row = program.to(tl.int64) * channels
    tl.store(dweight_ptr + row + c, dweight, mask=c < channels)
    tl.store(dbias_ptr + row + c, dbias, mask=c < channels)


def _pixel_view(x: Tensor, axis: int) -> Tensor:
    """View `x` as (images, pixels, channels), copying only where its strides allow no view."""
    if axis == 1:
        return x.flatten(2).transpose(1, 2)
    return (x.flatten(0, -2) if x.ndim > 1 else x[None])[None]


def _default_tile(channels: int, channels_last: bool, heavy: int = 8192) -> Tile:
    block_c = triton.next_power_of_2(channels)
    # A channels-first map needs 16 neighbouring pixels for whole 32-byte sectors; rows need only fill the warps.
    block_p = max(1 if channels_last else 16, min(64, 4096 // block_c))
    return {"BLOCK_P": block_p, "num_warps": 8 if block_p * block_c >= heavy else 4}


def _launch_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    axis: int,
    channels_last: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.shape[axis] > WIDEST:
        return layer_norm_reference(x, weight, bias, eps, residual, axis, channels_last, wide)
    kind, kind_out = _kinds(x, residual, wide)
    y = _new_output(x, kind_out, channels_last)
    total = x.new_empty(0) if residual is None else _new_output(x, kind, False)
    views = [_pixel_view(t, axis) for t in (x, x if residual is None else residual, y)]
    views.append(views[2] if residual is None else _pixel_view(total, axis))
    images, pixels, channels = views[0].shape
    statistics = x.shape[:-1] if axis == -1 else (x.shape[0], *x.shape[2:])
    mean = torch.empty(statistics, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return y, total, mean, rstd
    config = tile("layer_norm", _default_tile(channels, axis == -1), x.device, f"C{channels}-axis{axis}")
    grid = (images * triton.cdiv(pixels, config["BLOCK_P"]),)
    with device_guard(x):
        _layer_norm_fwd_kernel[grid](
            views[0],
            views[1],
            weight,
            bias,
            y,
            total,
            mean,
            rstd,
            pixels,
            channels,
            float(eps),
            *(stride for view in views for stride in view.stride()),
            HAS_RESIDUAL=residual is not None,
            BLOCK_C=triton.next_power_of_2(channels),
            **config,
        )
    return y, total, mean, rstd


def _launch_layer_norm_backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    if total.shape[axis] > WIDEST:
        return layer_norm_backward_reference(grad, grad_total, total, weight, mean, rstd, axis)
    ds = _new_gradient(total, axis)
    views = [_pixel_view(t, axis) for t in (grad, grad if grad_total is None else grad_total, total, ds)]
    images, pixels, channels = views[0].shape
    if total.numel() == 0:
        return ds, torch.zeros_like(weight), torch.zeros_like(weight)
    config = tile("layer_norm_bwd", _default_tile(channels, axis == -1, 4096), total.device, f"C{channels}-axis{axis}")
    blocks = images * triton.cdiv(pixels, config["BLOCK_P"])
    processors = torch.cuda.get_device_properties(total.device).multi_processor_count if total.is_cuda else 2
    programs = min(blocks, 2 * processors)
    dweight = torch.empty((programs, channels), dtype=torch.float32, device=total.device)
    dbias = torch.empty_like(dweight)
    with device_guard(total):
        _layer_norm_bwd_kernel[(programs,)](
            views[0],
            views[1],
            views[2],
            weight,
            mean,
            rstd,
            ds,
            dweight,
            dbias,
            blocks,
            pixels,
            channels,
            *(stride for view in views for stride in view.stride()),
            HAS_DTOTAL=grad_total is not None,
            BLOCK_C=triton.next_power_of_2(channels),
            **config,
        )
    return ds, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(weight.dtype)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    axis: int,
    channels_last: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kind, kind_out = _kinds(x, residual, wide)
    total = x.new_empty(0) if residual is None else _new_output(x, kind, False)
    statistics = x.shape[:-1] if axis == -1 else (x.shape[0], *x.shape[2:])
    mean = x.new_empty(statistics, dtype=_accumulator(kind))
    return _new_output(x, kind_out, channels_last), total, mean, torch.empty_like(mean)


def _fake_backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_gradient(total, axis), torch.empty_like(weight), torch.empty_like(weight)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _, residual, ctx.axis, *_ = inputs
    _, total, mean, rstd = output
    ctx.dtypes = x.dtype, bias.dtype, None if residual is None else residual.dtype
    ctx.mark_non_differentiable(mean, rstd, *(() if residual is not None else (total,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)


def _backward(ctx, grad, grad_total, _grad_mean, _grad_rstd):
    total, weight, mean, rstd = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(total)
    ds, dweight, dbias = _layer_norm_bwd(grad, grad_total, total, weight, mean, rstd, ctx.axis)
    x, bias, residual = ctx.dtypes
    return ds.to(x), dweight, dbias.to(bias), None, (None if residual is None else ds.to(residual)), *[None] * 3


_layer_norm_bwd = define_op(
    "layer_norm_bwd",
    layer_norm_backward_reference,
    _launch_layer_norm_backward,
    _fake_backward,
    switch="layer_norm",
)
_layer_norm = define_op(
    "layer_norm",
    layer_norm_reference,
    _launch_layer_norm,
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, axis: int) -> None:
    check_dtype(op, "x", x, FLOATS)
    for what, tensor in (("weight", weight), ("bias", bias)):
        check_shape(op, what, tensor, (x.shape[axis],))
        check_dtype(op, what, tensor, FLOATS)
    check_same_device(op, x, weight, bias, residual)
    if residual is not None:
        check_shape(op, "residual", residual, x.shape)
        check_dtype(op, "residual", residual, FLOATS)


def _is_pytorchs(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> bool:
    """Whether PyTorch's layer_norm takes the tensors, and should: on a CPU it is one pass, and no operation of ours."""
    kinds = (_kinds(x, residual, False)[0], torch.float32)
    return not x.is_cuda and weight.dtype == bias.dtype and weight.dtype in kinds


def _wants_float32(x: Tensor) -> bool:
    # As PyTorch's layer_norm on CUDA, which autocast runs and leaves in float32.
    return x.is_cuda and torch.is_autocast_enabled("cuda")


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise over the last axis, after adding `residual` where one is given.

    Args:
        x: (..., C), float.
        weight: (C,), may be of another float dtype than `x`.
        bias: (C,).
        eps: Added to the variance.
        residual: (..., C), may be of another float dtype than `x`.

    Returns:
        The normed tensor, contiguous; with a residual also ``x + residual``. Both in the dtype of the sum, the normed
        one in float32 under autocast on CUDA, as PyTorch's.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"layer_norm: expected x of shape (..., C) with C >= 1, got {tuple(x.shape)}")
    _check("layer_norm", x, weight, bias, residual, -1)
    if _is_pytorchs(x, residual, weight, bias):
        total = x if residual is None else x + residual
        y = F.layer_norm(total, weight.shape, weight, bias, eps)
    else:
        y, total, _, _ = _layer_norm(x, weight, bias, eps, residual, -1, False, _wants_float32(x))
    return y if residual is None else (y, total)


def layer_norm_2d(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, channels_last: bool = False) -> Tensor:
    """Normalise a channels-first map over its channels, as SAM2's ``LayerNorm2d``.

    Args:
        x: (N, C, H, W), float, any strides.
        weight: (C,).
        bias: (C,).
        eps: Added to the variance.
        channels_last: Lay the result out with the channels innermost in memory, for convolutions and linear layers
            that want it so.

    Returns:
        (N, C, H, W), contiguous or channels last, in the dtype of `x` (float32 under autocast on CUDA).

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    check_shape("layer_norm_2d", "x", x, (None, None, None, None))
    if x.shape[1] == 0:
        raise ValueError(f"layer_norm_2d: expected x of shape (N, C, H, W) with C >= 1, got {tuple(x.shape)}")
    _check("layer_norm_2d", x, weight, bias, None, 1)
    if _is_pytorchs(x, None, weight, bias):
        y = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps).permute(0, 3, 1, 2)
        return y if channels_last else y.contiguous()
    return _layer_norm(x, weight, bias, eps, None, 1, channels_last, _wants_float32(x))[0]


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last axis, which can also take in the branch that a residual block adds."""

    def add(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalise ``x + branch`` (..., C) in one pass; gives the normed tensor and the sum. None adds nothing."""
        if branch is None:
            return self(x), x
        y, total = layer_norm(branch, self.weight, self.bias, self.eps, x)
        return y, total


def _variants() -> tuple[Variant, ...]:
    variants = []
    shapes = (
        ("rows768", True, True, 4, 1024),
        ("map256", False, False, 16, 256),
        ("map256-last", False, True, 16, 256),
    )
    for label, last, last_out, block_p, block_c in shapes:
        for dtype in ("fp32", "bf16"):
            for way, kernel in (("fwd", _layer_norm_fwd_kernel), ("bwd", _layer_norm_bwd_kernel)):
                strided = dict.fromkeys(("x", "r") if way == "fwd" else ("dt", "t", "ds"), last)
                strided |= dict.fromkeys(("y", "t") if way == "fwd" else ("dy",), last_out)
                signature = {name: f"*{dtype}:16" for name in kernel.arg_names if name.endswith("_ptr")}
                exact = ("mean", "rstd") if way == "fwd" else ("mean", "rstd", "dweight", "dbias")
                signature |= {f"{name}_ptr": "*fp32:16" for name in exact}
                signature |= {f"{name}_n": "i32:16" for name in strided}
                signature |= {f"{name}_{'p' if dense else 'c'}": "i32:16" for name, dense in strided.items()}
                signature |= {"pixels": "i32:16", "channels": "i32:16"}
                signature |= {"eps": "fp32"} if way == "fwd" else {"blocks": "i32"}
                constants = {f"{name}_{'c' if dense else 'p'}": 1 for name, dense in strided.items()}
                constants |= {"HAS_RESIDUAL" if way == "fwd" else "HAS_DTOTAL": last}
                constants |= {"BLOCK_P": block_p, "BLOCK_C": block_c}
                warps = 4 if way == "fwd" else 8
                variants.append(Variant(f"{way}-{label}-{dtype}", kernel, signature, constants, warps, 3))
    return tuple(variants)


AOT_VARIANTS = _variants() if HAS_TRITON else ()
