"""Linear projection whose output is turned by SAM2's axial rotary positions, in one pass.

    y = x W^T + b;   (y[2j] + i y[2j+1]) e^{i a(t, j)}  ->  out[j] + i out[D/2 + j]

The first half of the channel pairs turns with the column of a token, the second half with its row, as in
facebookresearch/sam2. The result keeps real parts in front and imaginary parts behind instead of side by side: dot
products between two results do not see the order, and both the kernel and plain torch then work on whole halves.
Turning in the epilogue of the projection costs one rotation per token; inside the attention kernel it would cost one
per token and query tile, and put a register round trip before the matrix unit. Since the map is linear in x, the
projection of a sum is the sum of projections: a temporal term may be added to the input, or its rotated image
(``bias=None``) to a result kept from before.
"""

import torch
from torch import Tensor

from medvl_sam2.kernels._aot import Variant
from medvl_sam2.kernels._common import (
    HAS_TRITON,
    check_dtype,
    check_same_device,
    check_shape,
    device_guard,
    match_autocast,
    tl,
    triton,
)
from medvl_sam2.kernels._library import define_op
from medvl_sam2.kernels._tuning import operand_width, tile
from medvl_sam2.kernels.linear import linear

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def axial_rope_tables(
    width: int, height: int, dim: int, device: torch.device | str | None = None, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Make the cosines and sines of a grid's positions, as SAM2's ``compute_axial_cis``.

    Args:
        width: Columns of the grid; tokens run row by row.
        height: Rows of the grid.
        dim: Channels to turn; divisible by 4.
        device: Where the tables go.
        theta: Base of the frequencies.

    Returns:
        Two fp32 tensors (height * width, dim / 2).
    """
    if dim % 4 or dim <= 0 or width <= 0 or height <= 0:
        raise ValueError(f"axial_rope_tables: expected dim divisible by 4 and a grid, got {dim}, {width} x {height}")
    steps = torch.arange(0, dim, 4, dtype=torch.float32, device=device)
    frequencies = 1.0 / theta ** (steps / dim)
    x = torch.arange(width, dtype=torch.float32, device=device).outer(frequencies)
    y = torch.arange(height, dtype=torch.float32, device=device).outer(frequencies)
    angles = torch.cat((x[None].expand(height, -1, -1), y[:, None].expand(-1, width, -1)), -1).flatten(0, 1)
    return angles.cos(), angles.sin()


def _split_pairs(rows: Tensor) -> Tensor:
    """Reorder the first axis from pairs side by side to real parts in front of imaginary parts."""
    return rows.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)


def _join_pairs(rows: Tensor) -> Tensor:
    return rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def _turn(y: Tensor, cos: Tensor, sin: Tensor, plain: int) -> Tensor:
    """Rotate (B, T, D), real parts in front, by repeating tables; the last `plain` tokens stay."""
    batch, tokens, dim = y.shape
    shape = (batch, (tokens - plain) // cos.shape[0], cos.shape[0], 2, dim // 2)
    head = y[:, : tokens - plain].reshape(shape)
    wide = torch.promote_types(y.dtype, torch.float32)
    real, imaginary = head[..., 0, :].to(wide), head[..., 1, :].to(wide)
    out = torch.empty_like(y)
    turned = out[:, : tokens - plain].unflatten(1, shape[1:3]).unflatten(-1, shape[3:])
    turned[..., 0, :] = torch.addcmul(real * cos, imaginary, sin, value=-1)
    turned[..., 1, :] = torch.addcmul(real * sin, imaginary, cos)
    out[:, tokens - plain :] = y[:, tokens - plain :]
    return out


def rope_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, num_plain_tokens: int
) -> Tensor:
    """Project with plain torch, rotate in fp32 and cast back."""
    y = linear(x, _split_pairs(weight), None if bias is None else _split_pairs(bias))
    return _turn(y, cos, sin, num_plain_tokens)


@triton.jit
def _rope_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    rows,
    tokens,
    turned,
    period,
    C: tl.constexpr,
    HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    inside = first + m < rows
    pair = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.arange(0, BLOCK_C)

    x_block = x_ptr + first * C + m[:, None] * C + c[None, :]
    even_block = weight_ptr + pair[None, :] * (2 * C) + c[:, None]
    real = tl.zeros([BLOCK_M, BLOCK_H], dtype=tl.float32)
    imaginary = tl.zeros([BLOCK_M, BLOCK_H], dtype=tl.float32)
    for start in range(0, C, BLOCK_C):
        deep = start + c < C
        x = tl.load(x_block + start, mask=inside[:, None] & deep[None, :], other=0.0)
        mask = deep[:, None] & (pair < HALF)[None, :]
        even = tl.load(even_block + start, mask=mask, other=0.0)
        odd = tl.load(even_block + C + start, mask=mask, other=0.0)
        real = tl.dot(x, even, real, input_precision=PRECISION)
        imaginary = tl.dot(x, odd, imaginary, input_precision=PRECISION)
    if HAS_BIAS:
        real += tl.load(bias_ptr + 2 * pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        imaginary += tl.load(bias_ptr + 2 * pair + 1, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]

    token = ((first % tokens).to(tl.int32) + m) % tokens
    position = token % period
    mask = (token < turned)[:, None] & (pair < HALF)[None, :]
    cos = tl.load(cos_ptr + position[:, None] * HALF + pair[None, :], mask=mask, other=1.0)
    sin = tl.load(sin_ptr + position[:, None] * HALF + pair[None, :], mask=mask, other=0.0)
    kind = out_ptr.dtype.element_ty
    # The projection is rounded before it is turned, as in a chain of separate operations.
    real, imaginary = real.to(kind).to(tl.float32), imaginary.to(kind).to(tl.float32)
    mask = inside[:, None] & (pair < HALF)[None, :]
    out = out_ptr + first * (2 * HALF) + m[:, None] * (2 * HALF) + pair[None, :]
    tl.store(out, (real * cos - imaginary * sin).to(kind), mask=mask)
    tl.store(out + HALF, (real * sin + imaginary * cos).to(kind), mask=mask)


def _precision(dtype: torch.dtype) -> str:
    # Three tf32 products make an fp32 one to about 1e-6 on the matrix unit; plain tf32 would keep three digits.
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _default_tile(rows: int, channels: int, half: int, dtype: torch.dtype) -> dict[str, int]:
    # fp32 operands fill the registers twice over, and tf32x3 splits each in two.
    widest = 32 if dtype == torch.float32 else 64
    block_h = max(16, min(widest, triton.next_power_of_2(half)))
    large = rows >= 4096 and block_h == 64
    return {
        "BLOCK_M": 128 if large else 64,
        "BLOCK_H": block_h,
        "BLOCK_C": max(16, min(widest, triton.next_power_of_2(channels))),
        "num_warps": 8 if large else 4,
        "num_stages": 3,
    }


def _launch_rope_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, num_plain_tokens: int
) -> Tensor:
    batch, tokens, channels = x.shape
    dim, half = weight.shape[0], weight.shape[0] // 2
    out = torch.empty((batch, tokens, dim), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, weight = x.contiguous(), weight.contiguous()
    rows = batch * tokens
    key = f"C{channels}-D{dim}-{operand_width(x.dtype)}"
    config = tile("rope_linear", _default_tile(rows, channels, half, x.dtype), x.device, key)
    grid = (triton.cdiv(rows, config["BLOCK_M"]), triton.cdiv(half, config["BLOCK_H"]))
    with device_guard(x):
        _rope_linear_kernel[grid](
            x,
            weight,
            weight if bias is None else bias.contiguous(),
            cos.contiguous(),
            sin.contiguous(),
            out,
            rows,
            tokens,
            tokens - num_plain_tokens,
            cos.shape[0],
            C=channels,
            HALF=half,
            HAS_BIAS=bias is not None,
            PRECISION=_precision(x.dtype),
            **config,
        )
    return out


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, num_plain_tokens: int) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], weight.shape[0]))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, cos, sin, ctx.plain = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, cos, sin)


def _backward(ctx, grad):
    x, weight, cos, sin = ctx.saved_tensors
    grad = _turn(grad, cos, -sin, ctx.plain)
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dx = grad @ _split_pairs(weight) if needs_x else None
    flat = grad.flatten(0, 1)
    dweight = _join_pairs(flat.mT @ x.flatten(0, 1)) if needs_weight else None
    dbias = _join_pairs(flat.sum(0)) if ctx.has_bias and needs_bias else None
    return dx, dweight, dbias, None, None, None


_rope_linear = define_op(
    "rope_linear",
    rope_linear_reference,
    _launch_rope_linear,
    _fake,
    backward=_backward,
    setup_context=_setup_context,
    switch="axial_rope",
)


def rope_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, rope: tuple[Tensor, Tensor], *, num_plain_tokens: int = 0
) -> Tensor:
    """Project tokens and turn them by their grid positions.

    Args:
        x: (B, T, C); T - num_plain_tokens is a multiple of the grid's N tokens, and every N tokens meet the same
            positions (SAM2's ``rope_k_repeat``).
        weight: (D, C), the dtype of `x`, in the layout of ``nn.Linear``. Under autocast both are cast as there.
        bias: (D,) or None.
        rope: Cosines and sines (N, D / 2) in fp32, from `axial_rope_tables`.
        num_plain_tokens: How many tokens at the end have no position (SAM2's object pointers).

    Returns:
        (B, T, D) in the dtype of `x`, real parts in the first half of the channels and imaginary parts in the second:
        an operand for dot products with another result of this function.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    op = "rope_linear"
    cos, sin = rope
    x, weight, bias = match_autocast(x, weight, bias)
    check_shape(op, "x", x, (None, None, None))
    check_dtype(op, "x", x, FLOATS)
    check_shape(op, "weight", weight, (None, x.shape[-1]))
    check_dtype(op, "weight", weight, (x.dtype,))
    dim, period = weight.shape[0], len(cos)
    if dim % 2:
        raise ValueError(f"{op}: expected an even number of output channels, got {dim}")
    if bias is not None:
        check_shape(op, "bias", bias, (dim,))
        check_dtype(op, "bias", bias, (x.dtype,))
    for what, table in (("cosines", cos), ("sines", sin)):
        check_shape(op, what, table, (period, dim // 2))
        check_dtype(op, what, table, (torch.float32, torch.float64))
    check_same_device(op, x, weight, bias, cos, sin)
    turned = x.shape[1] - num_plain_tokens
    if num_plain_tokens < 0 or turned < 0 or period < 1 or turned % period:
        raise ValueError(
            f"{op}: expected a multiple of {period} tokens before {num_plain_tokens} plain ones, got {x.shape[1]} in "
            "all; make the tables for the grid of x"
        )
    return _rope_linear(x, weight, bias, cos, sin, num_plain_tokens)


def _variants() -> tuple[Variant, ...]:
    variants = []
    for label, rows, channels, dim in (("memory", 28736, 64, 256), ("query", 4096, 256, 256), ("micro", 1856, 32, 128)):
        for dtype, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            names = ("x_ptr", "weight_ptr", "bias_ptr", "out_ptr")
            signature = dict.fromkeys(names, f"*{dtype}:16") | {"cos_ptr": "*fp32:16", "sin_ptr": "*fp32:16"}
            signature |= dict.fromkeys(("rows", "tokens", "turned", "period"), "i32:16")
            settings = _default_tile(rows, channels, dim // 2, kind)
            warps, stages = settings.pop("num_warps"), settings.pop("num_stages")
            constants = {"C": channels, "HALF": dim // 2, "HAS_BIAS": True, **settings}
            constants["PRECISION"] = _precision(kind)
            hopper = dtype == "bf16" and rows >= 4096
            name = f"fwd-{label}-{dtype}"
            variants.append(Variant(name, _rope_linear_kernel, signature, constants, warps, stages, wgmma=hopper))
    return tuple(variants)


AOT_VARIANTS = _variants() if HAS_TRITON else ()
