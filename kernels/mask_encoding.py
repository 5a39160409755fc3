"""Front of SAM2's memory encoder: mask logits to the first two stages of its mask down-sampler, in one launch.

    v = scale sigmoid(bilinear(logits, size)) + shift          (B, 1, H, W), or scale [bilinear > 0] + shift
    h = gelu(LN2d(conv3x3 stride 2 (v), over 4 channels))      (B, 4, H/2, W/2)
    y = gelu(LN2d(conv3x3 stride 2 (h), over 16 channels))     (B, 16, H/4, W/4)

Every output pixel recomputes the 7 x 7 values of v that it sees, from low-resolution logits that stay in cache, so
neither v nor h exists: at 1024 x 1024 these are 8 MB in float32, passed over some twenty times by the plain chain. The
recomputation costs about 80 sigmoids a pixel, which the special-function units do in the time of a launch.
The backward recomputes the chain with library operations: it runs in training only, where the convolutions dominate.
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
    match_autocast,
    tl,
    triton,
)
from medvl_sam2.kernels._library import define_op
from medvl_sam2.kernels._tuning import tile

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CHANNELS = (4, 16)


def mask_encoder_front_reference(
    logits: Tensor,
    size: tuple[int, int],
    *weights: Tensor,
    scale: float = 20.0,
    shift: float = -10.0,
    binarize: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Compute the chain as SAM2's modules read, in float32 (float64 for float64); the oracle, and differentiable."""
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    conv1, bias1, norm1, offset1, conv2, bias2, norm2, offset2 = (tensor.to(wide) for tensor in weights)
    x = F.interpolate(logits.to(wide), size=size, mode="bilinear", align_corners=False)
    x = ((x > 0).to(wide) if binarize else x.sigmoid()) * scale + shift
    for conv, bias, norm, offset in ((conv1, bias1, norm1, offset1), (conv2, bias2, norm2, offset2)):
        x = F.conv2d(x, conv, bias, stride=2, padding=1)
        x = F.gelu(F.layer_norm(x.movedim(1, -1), norm.shape, norm, offset, eps)).movedim(-1, 1)
    return x.to(weights[0].dtype)


def _wide(weights: list[Tensor]) -> torch.dtype:
    return torch.promote_types(weights[0].dtype, torch.float32)


def _probability(logits: Tensor, size: list[int], binarize: bool, wide: torch.dtype) -> Tensor:
    """Upsample and squash into a new map of float32 or float64."""
    x = logits.to(wide)
    if list(x.shape[-2:]) == list(size):
        return (x > 0).to(wide) if binarize else x.sigmoid()
    x = F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
    return (x > 0).to(wide) if binarize else x.sigmoid_()


def _normed(x: Tensor, conv: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Convolve and normalise over channels; gives the normed map and 1 / deviation.

    The mean over channels is linear in the weights, so it is taken out of them rather than out of the map.
    """
    wide = _wide([conv])
    conv, bias = conv.to(wide), bias.to(wide)
    conv, bias = (conv - conv.mean(0)).to(x.dtype), (bias - bias.mean()).to(x.dtype)
    if x.shape[1] == 1:
        # A single channel lies the same way in both layouts, and channels last is four times faster on a CPU.
        x, conv = (tensor.to(memory_format=torch.channels_last) for tensor in (x, conv))
    normed = F.conv2d(x, conv, bias, stride=2, padding=1).contiguous()
    rstd = normed.square().mean(1, keepdim=True).add_(eps).rsqrt_()
    return normed.mul_(rstd), rstd


def _forward(
    logits: Tensor, weights: list[Tensor], size: list[int], scale: float, shift: float, binarize: bool, eps: float
) -> Tensor:
    x = _probability(logits, size, binarize, _wide(weights)).mul_(scale).add_(shift).to(weights[0].dtype)
    for conv, bias, norm, offset in (weights[:4], weights[4:]):
        x, _ = _normed(x, conv, bias, eps)
        x = torch.ops.aten.gelu_(x.mul_(norm[:, None, None]).add_(offset[:, None, None]))
    return _fake_forward(logits, weights, size, scale, shift, binarize, eps).copy_(x)


def _backward(
    grad: Tensor,
    logits: Tensor,
    weights: list[Tensor],
    size: list[int],
    scale: float,
    shift: float,
    binarize: bool,
    eps: float,
) -> list[Tensor]:
    p = _probability(logits, size, binarize, _wide(weights))
    inputs, kept = [(p * scale).add_(shift).to(weights[0].dtype)], []
    for conv, bias, norm, offset in (weights[:4], weights[4:]):
        normed, rstd = _normed(inputs[-1], conv, bias, eps)
        pre = (normed * norm[:, None, None]).add_(offset[:, None, None])
        kept.append((normed, rstd, pre))
        inputs.append(F.gelu(pre))
    found: list[Tensor] = []
    for i in (1, 0):
        conv, bias, norm, _ = weights[4 * i : 4 * i + 4]
        normed, rstd, pre = kept[i]
        dpre = torch.ops.aten.gelu_backward(grad, pre)
        scaled = dpre * norm[:, None, None]
        centred = scaled - scaled.mean(1, keepdim=True) - normed * (scaled * normed).mean(1, keepdim=True)
        grad, dconv, dbias = torch.ops.aten.convolution_backward(
            centred * rstd, inputs[i], conv, [len(bias)], [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [True] * 3
        )
        found = [dconv, dbias, (dpre * normed).sum((0, 2, 3)), dpre.sum((0, 2, 3)), *found]
    if binarize:
        return [torch.zeros_like(logits), *found]
    grad = grad.to(p.dtype).mul_(scale).mul_(p * (1 - p))
    if list(logits.shape[-2:]) != list(size):
        grad = torch.ops.aten.upsample_bilinear2d_backward(grad, size, logits.shape, False)
    return [grad.to(logits.dtype).contiguous(), *found]


@triton.jit
def _gelu(x):
    return x * (0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476))


@triton.jit
def _mask_value(logits_ptr, y, x, height, width, H, W, scale, shift, BINARIZE: tl.constexpr):
    """Value of v at (y, x), zero outside of it as the convolution pads."""
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    # PyTorch's bilinear without aligned corners, its rounding included.
    ratio_y = tl.cast(height, tl.float32) / H
    ratio_x = tl.cast(width, tl.float32) / W
    source_y = tl.maximum((y.to(tl.float32) + 0.5) * ratio_y - 0.5, 0.0)
    source_x = tl.maximum((x.to(tl.float32) + 0.5) * ratio_x - 0.5, 0.0)
    top = tl.minimum(source_y.to(tl.int32), height - 1)
    left = tl.minimum(source_x.to(tl.int32), width - 1)
    down = tl.minimum(top + 1, height - 1)
    right = tl.minimum(left + 1, width - 1)
    part_y = source_y - top.to(tl.float32)
    part_x = source_x - left.to(tl.float32)
    a = tl.load(logits_ptr + top * width + left, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(logits_ptr + top * width + right, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(logits_ptr + down * width + left, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(logits_ptr + down * width + right, mask=inside, other=0.0).to(tl.float32)
    upper = a * (1.0 - part_x) + b * part_x
    lower = c * (1.0 - part_x) + d * part_x
    logit = upper * (1.0 - part_y) + lower * part_y
    if BINARIZE:
        p = tl.where(logit > 0, 1.0, 0.0)
    else:
        p = 1.0 / (1.0 + tl.exp(-logit))
    return tl.where(inside, p * scale + shift, 0.0)


@triton.jit
def _mask_encoding_fwd_kernel(
    logits_ptr,
    conv1_ptr,
    bias1_ptr,
    norm1_ptr,
    offset1_ptr,
    conv2_ptr,
    bias2_ptr,
    norm2_ptr,
    offset2_ptr,
    out_ptr,
    height,
    width,
    H,
    W,
    H1,
    W1,
    H2,
    W2,
    logits_b,
    scale,
    shift,
    eps,
    BINARIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    out_y = pixel // W2
    out_x = pixel % W2
    channel = tl.arange(0, 16)
    logits = logits_ptr + image * logits_b
    total = tl.zeros([BLOCK, 16], tl.float32) + tl.load(bias2_ptr + channel).to(tl.float32)[None, :]
    for tap in range(9):
        y1 = 2 * out_y - 1 + tap // 3
        x1 = 2 * out_x - 1 + tap % 3
        c0 = tl.zeros([BLOCK], tl.float32) + tl.load(bias1_ptr).to(tl.float32)
        c1 = tl.zeros([BLOCK], tl.float32) + tl.load(bias1_ptr + 1).to(tl.float32)
        c2 = tl.zeros([BLOCK], tl.float32) + tl.load(bias1_ptr + 2).to(tl.float32)
        c3 = tl.zeros([BLOCK], tl.float32) + tl.load(bias1_ptr + 3).to(tl.float32)
        for inner in range(9):
            y = 2 * y1 - 1 + inner // 3
            x = 2 * x1 - 1 + inner % 3
            value = _mask_value(logits, y, x, height, width, H, W, scale, shift, BINARIZE)
            c0 += value * tl.load(conv1_ptr + inner).to(tl.float32)
            c1 += value * tl.load(conv1_ptr + 9 + inner).to(tl.float32)
            c2 += value * tl.load(conv1_ptr + 18 + inner).to(tl.float32)
            c3 += value * tl.load(conv1_ptr + 27 + inner).to(tl.float32)
        mean = (c0 + c1 + c2 + c3) * 0.25
        c0 -= mean
        c1 -= mean
        c2 -= mean
        c3 -= mean
        rstd = 1.0 / tl.sqrt((c0 * c0 + c1 * c1 + c2 * c2 + c3 * c3) * 0.25 + eps)
        c0 = _gelu(c0 * rstd * tl.load(norm1_ptr).to(tl.float32) + tl.load(offset1_ptr).to(tl.float32))
        c1 = _gelu(c1 * rstd * tl.load(norm1_ptr + 1).to(tl.float32) + tl.load(offset1_ptr + 1).to(tl.float32))
        c2 = _gelu(c2 * rstd * tl.load(norm1_ptr + 2).to(tl.float32) + tl.load(offset1_ptr + 2).to(tl.float32))
        c3 = _gelu(c3 * rstd * tl.load(norm1_ptr + 3).to(tl.float32) + tl.load(offset1_ptr + 3).to(tl.float32))
        inside = (y1 >= 0) & (y1 < H1) & (x1 >= 0) & (x1 < W1)
        taps = conv2_ptr + channel * 36 + tap
        total += tl.where(inside, c0, 0.0)[:, None] * tl.load(taps).to(tl.float32)[None, :]
        total += tl.where(inside, c1, 0.0)[:, None] * tl.load(taps + 9).to(tl.float32)[None, :]
        total += tl.where(inside, c2, 0.0)[:, None] * tl.load(taps + 18).to(tl.float32)[None, :]
        total += tl.where(inside, c3, 0.0)[:, None] * tl.load(taps + 27).to(tl.float32)[None, :]
    total -= (tl.sum(total, 1) * 0.0625)[:, None]
    rstd = 1.0 / tl.sqrt(tl.sum(total * total, 1) * 0.0625 + eps)
    norm = tl.load(norm2_ptr + channel).to(tl.float32)
    offset = tl.load(offset2_ptr + channel).to(tl.float32)
    total = _gelu(total * rstd[:, None] * norm[None, :] + offset[None, :])
    plane = tl.cast(H2, tl.int64) * W2
    at = out_ptr + (image * plane + pixel[:, None]) * 16 + channel[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=(pixel < H2 * W2)[:, None])


def _halved(size: int) -> int:
    return (size + 1) // 2


def _launch_forward(
    logits: Tensor, weights: list[Tensor], size: list[int], scale: float, shift: float, binarize: bool, eps: float
) -> Tensor:
    out = _fake_forward(logits, weights, size, scale, shift, binarize, eps)
    if not out.numel():
        return out
    batch, _, height, width = logits.shape
    first = [_halved(n) for n in size]
    settings = tile("mask_encoding", {"BLOCK": 128, "num_warps": 4}, logits.device)
    grid = (batch, triton.cdiv(out.shape[2] * out.shape[3], settings["BLOCK"]))
    with device_guard(logits):
        _mask_encoding_fwd_kernel[grid](
            logits,
            *weights,
            out,
            height,
            width,
            *size,
            *first,
            *out.shape[2:],
            logits.stride(0),
            scale,
            shift,
            eps,
            BINARIZE=binarize,
            **settings,
        )
    return out


def _fake_forward(
    logits: Tensor, weights: list[Tensor], size: list[int], scale: float, shift: float, binarize: bool, eps: float
) -> Tensor:
    # Channels last, as the next convolution likes it on every device; the kernel then stores whole lines.
    shape = (logits.shape[0], CHANNELS[1], *(_halved(_halved(n)) for n in size))
    return torch.empty(shape, dtype=weights[0].dtype, device=logits.device, memory_format=torch.channels_last)


def _fake_backward(
    grad: Tensor,
    logits: Tensor,
    weights: list[Tensor],
    size: list[int],
    scale: float,
    shift: float,
    binarize: bool,
    eps: float,
) -> list[Tensor]:
    return [torch.empty_like(logits, memory_format=torch.contiguous_format), *map(torch.empty_like, weights)]


_bwd = define_op("mask_encoding_bwd", _backward, None, _fake_backward, switch="mask_encoding")


def _setup_context(ctx, inputs, output) -> None:
    logits, weights, *ctx.options = inputs
    ctx.save_for_backward(logits, *weights)


def _autograd(ctx, grad: Tensor) -> tuple:
    logits, *weights = ctx.saved_tensors
    dlogits, *rest = _bwd(grad.contiguous(), logits, weights, *ctx.options)
    return dlogits, rest, *[None] * 5


_fwd = define_op(
    "mask_encoding", _forward, _launch_forward, _fake_forward, backward=_autograd, setup_context=_setup_context
)


def mask_encoder_front(
    logits: Tensor,
    size: tuple[int, int],
    conv1: Tensor,
    bias1: Tensor,
    norm1: Tensor,
    offset1: Tensor,
    conv2: Tensor,
    bias2: Tensor,
    norm2: Tensor,
    offset2: Tensor,
    *,
    scale: float = 20.0,
    shift: float = -10.0,
    binarize: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Upsample mask logits, squash them, and run the first two stages of SAM2's mask down-sampler.

    The weights are those of ``MaskDownSampler.encoder`` 0, 1, 3 and 4 in the sam2 package; its further stages follow
    on what is returned. Differentiable in the logits (not with `binarize`, as there) and in the weights.

    Args:
        logits: (B, 1, h, w) of any float dtype; of `size` already, they are not resampled.
        size: (H, W) of the image that SAM2 encodes.
        conv1: (4, 1, 3, 3), with `bias1` (4,); followed by LayerNorm2d with `norm1` (4,) and `offset1` (4,).
        bias1: (4,).
        norm1: (4,).
        offset1: (4,).
        conv2: (16, 4, 3, 3), with `bias2` (16,), `norm2` (16,) and `offset2` (16,).
        bias2: (16,).
        norm2: (16,).
        offset2: (16,).
        scale: ``sigmoid_scale_for_mem_enc``.
        shift: ``sigmoid_bias_for_mem_enc``.
        binarize: Take [logit > 0] instead of the sigmoid (``binarize_mask_from_pts_for_mem_enc``).
        eps: Of both LayerNorms.

    Returns:
        (B, 16, ceil(H/4), ceil(W/4)) in the dtype of the weights, channels last in memory.

    Raises:
        ValueError: On shapes, dtypes or devices that do not fit.
    """
    name = "mask_encoding"
    weights = match_autocast(conv1, bias1, norm1, offset1, conv2, bias2, norm2, offset2)
    few, many = CHANNELS
    check_shape(name, "logits", logits, (None, 1, None, None))
    shapes = ((few, 1, 3, 3), (few,), (few,), (few,), (many, few, 3, 3), (many,), (many,), (many,))
    labels = ("conv1", "bias1", "norm1", "offset1", "conv2", "bias2", "norm2", "offset2")
    for label, tensor, shape in zip(labels, weights, shapes, strict=True):
        check_shape(name, label, tensor, shape)
        check_dtype(name, label, tensor, FLOATS if label == "conv1" else (weights[0].dtype,))
    check_dtype(name, "logits", logits, FLOATS)
    check_same_device(name, logits, *weights)
    if len(size) != 2 or min(*size, *logits.shape[2:]) < 1:
        raise ValueError(f"{name}: expected a size (H, W) and logits above 0, got {size} and {tuple(logits.shape)}")
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (logits, *weights))
    if trains and logits.device.type == "cpu" and weights[0].dtype == _wide(weights):
        # On a CPU it takes longer to make the maps again for the backward than to keep them.
        options = {"scale": scale, "shift": shift, "binarize": binarize, "eps": eps}
        return mask_encoder_front_reference(logits, size, *weights, **options)
    weights = [tensor.contiguous() for tensor in weights]
    return _fwd(logits.contiguous(), weights, list(size), float(scale), float(shift), binarize, eps)


def _variants() -> list[Variant]:
    found = []
    for kind, binarize in (("bf16", False), ("fp32", False), ("fp32", True)):
        weights = ("conv1", "bias1", "norm1", "offset1", "conv2", "bias2", "norm2", "offset2", "out")
        signature = {"logits_ptr": "*fp32:16", **{f"{weight}_ptr": f"*{kind}:16" for weight in weights}}
        signature |= dict.fromkeys(("height", "width", "H", "W", "H1", "W1", "H2", "W2", "logits_b"), "i32:16")
        signature |= dict.fromkeys(("scale", "shift", "eps"), "fp32")
        constants = {"BINARIZE": binarize, "BLOCK": 128}
        name = f"fwd-{kind}{'-binary' if binarize else ''}"
        found.append(Variant(name, _mask_encoding_fwd_kernel, signature, constants))
    return found


AOT_VARIANTS = _variants()
