"""3D patch embedding straight from stored voxels: window, gather, product, bias and position in one launch.

    a[t, (p1 p2 p3)] = (clamp(voxel * slope + intercept, lo, hi) - lo) / (hi - lo)
    y = a @ weight.T + bias + position[t]

Tokens run depth first, then rows, then columns; within a patch the voxels do (MONAI's ``perceptron`` embedding,
``b c (d p1) (h p2) (w p3) -> b (d h w) (p1 p2 p3 c)`` with one channel). The clamp is not linear, so it cannot be
folded into the weight; on values already in registers it is free. Backward gives ``dweight = dy.T @ a``, gathering the
patches again rather than keeping them, ``dbias`` and ``dposition``; the voxels need no gradient.
"""

import math
from collections.abc import Sequence

import torch
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
from medvl_sam2.kernels._tuning import operand_width, tile

VOXELS = (
    torch.int16,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _patches(volume: Tensor, patch: Sequence[int], lo: float, hi: float, gain: float, offset: float) -> Tensor:
    values = volume.double() if volume.dtype == torch.float64 else volume.float()
    values = values.clamp(lo, hi).mul(gain).add(offset)
    batch, depth, height, width = volume.shape
    p, q, r = patch
    blocks = values.reshape(batch, depth // p, p, height // q, q, width // r, r).permute(0, 1, 3, 5, 2, 4, 6)
    return blocks.reshape(batch, (depth // p) * (height // q) * (width // r), p * q * r)


def patch_embed3d_reference(
    volume: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    patch: Sequence[int],
    lo: float,
    hi: float,
    gain: float,
    offset: float,
) -> Tensor:
    """Embed with plain torch in fp32: ``clamp(voxel, lo, hi) * gain + offset``, rearrange, product, sums."""
    patches = _patches(volume, patch, lo, hi, gain, offset)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    out = torch.nn.functional.linear(patches.to(wide), weight.to(wide), bias.to(wide))
    return (out if position is None else out + position.to(wide)).to(weight.dtype)


def patch_embed3d_backward_reference(
    grad: Tensor, volume: Tensor, patch: Sequence[int], lo: float, hi: float, gain: float, offset: float
) -> Tensor:
    """Gradient of the weight, (N, K) in the dtype of `grad`."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    patches = _patches(volume, patch, lo, hi, gain, offset).to(wide)
    return (grad.to(wide).flatten(0, 1).T @ patches.flatten(0, 1)).to(grad.dtype)


@triton.jit
def _token_offsets(m, across, down, deep, v_b, v_d, v_h, v_w, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr):
    w = m % across
    h = m // across % down
    d = m // (across * down) % deep
    b = m // (across * down * deep)
    return b.to(tl.int64) * v_b + (d * P).to(tl.int64) * v_d + (h * Q).to(tl.int64) * v_h + (w * R).to(tl.int64) * v_w


@triton.jit
def _voxel_offsets(k, v_d, v_h, v_w, Q: tl.constexpr, R: tl.constexpr):
    return (k // (Q * R)).to(tl.int64) * v_d + (k // R % Q).to(tl.int64) * v_h + (k % R).to(tl.int64) * v_w


@triton.jit
def _patch_embed3d_fwd_kernel(
    volume_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    out_ptr,
    tokens,
    width_n,
    across,
    down,
    deep,
    v_b,
    v_d,
    v_h,
    v_w,
    lo,
    hi,
    gain,
    offset,
    HAS_POSITION: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K: tl.constexpr = P * Q * R
    # Neighbouring programs share their patches, which come from HBM; the weight stays in L2.
    columns = tl.cdiv(width_n, BLOCK_N)
    program = tl.program_id(0)
    m = program // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = program % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    token = volume_ptr + _token_offsets(m, across, down, deep, v_b, v_d, v_h, v_w, P, Q, R)[:, None]
    row = weight_ptr + n.to(tl.int64)[None, :] * K
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (m < tokens)[:, None] & (k < K)[None, :]
        voxel = tl.load(token + _voxel_offsets(k, v_d, v_h, v_w, Q, R)[None, :], mask=inside, other=0).to(tl.float32)
        a = tl.minimum(tl.maximum(voxel, lo), hi) * gain + offset
        w = tl.load(row + k[:, None], mask=(k < K)[:, None] & (n < width_n)[None, :], other=0.0)
        acc = tl.dot(a.to(w.dtype), w, acc, input_precision=PRECISION)
    acc += tl.load(bias_ptr + n, mask=n < width_n, other=0.0).to(tl.float32)[None, :]
    mask = (m < tokens)[:, None] & (n < width_n)[None, :]
    if HAS_POSITION:
        place = (m % (across * down * deep)).to(tl.int64)[:, None] * width_n + n[None, :]
        acc += tl.load(position_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + m.to(tl.int64)[:, None] * width_n + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _patch_embed3d_bwd_kernel(
    grad_ptr,
    volume_ptr,
    partial_ptr,
    tokens,
    width_n,
    across,
    down,
    deep,
    v_b,
    v_d,
    v_h,
    v_w,
    lo,
    hi,
    gain,
    offset,
    share,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K: tl.constexpr = P * Q * R
    columns: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    n = program // columns * BLOCK_N + tl.arange(0, BLOCK_N)
    k = program % columns * BLOCK_K + tl.arange(0, BLOCK_K)
    voxels = volume_ptr + _voxel_offsets(k, v_d, v_h, v_w, Q, R)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, tokens), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = (m < tokens)[:, None] & (k < K)[None, :]
        token = _token_offsets(m, across, down, deep, v_b, v_d, v_h, v_w, P, Q, R)[:, None]
        voxel = tl.load(voxels + token, mask=inside, other=0).to(tl.float32)
        a = tl.minimum(tl.maximum(voxel, lo), hi) * gain + offset
        place = m.to(tl.int64)[None, :] * width_n + n[:, None]
        dy = tl.load(grad_ptr + place, mask=(m < tokens)[None, :] & (n < width_n)[:, None], other=0.0)
        acc = tl.dot(dy, a.to(dy.dtype), acc, input_precision=PRECISION)
    part = tl.program_id(1).to(tl.int64) * width_n
    mask = (n < width_n)[:, None] & (k < K)[None, :]
    tl.store(partial_ptr + (part + n[:, None]) * K + k[None, :], acc, mask=mask)


def _grid(volume: Tensor, patch: Sequence[int]) -> tuple[int, int, int]:
    return tuple(n // p for n, p in zip(reversed(volume.shape[1:]), reversed(patch)))


def _launch_patch_embed3d(
    volume: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    patch: Sequence[int],
    lo: float,
    hi: float,
    gain: float,
    offset: float,
) -> Tensor:
    across, down, deep = _grid(volume, patch)
    per_volume, width_n = across * down * deep, weight.shape[0]
    tokens = volume.shape[0] * per_volume
    out = torch.empty((volume.shape[0], per_volume, width_n), dtype=weight.dtype, device=volume.device)
    if not out.numel():
        return out
    default = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    if weight.dtype == torch.float32:
        default |= {"BLOCK_N": 64, "BLOCK_K": 32}
    key = f"M{tokens}-K{weight.shape[1]}-N{width_n}-{operand_width(weight.dtype)}"
    config = tile("patch_embed3d", default, volume.device, key)
    weight = weight.contiguous()
    programs = triton.cdiv(tokens, config["BLOCK_M"]) * triton.cdiv(width_n, config["BLOCK_N"])
    with device_guard(volume):
        _patch_embed3d_fwd_kernel[(programs,)](
            volume,
            weight,
            bias.contiguous(),
            bias if position is None else position.contiguous(),
            out,
            tokens,
            width_n,
            across,
            down,
            deep,
            *volume.stride(),
            lo,
            hi,
            gain,
            offset,
            HAS_POSITION=position is not None,
            **dict(zip("PQR", patch)),
            PRECISION=dot_precision(weight.dtype),
            **config,
        )
    return out


def _launch_patch_embed3d_backward(
    grad: Tensor, volume: Tensor, patch: Sequence[int], lo: float, hi: float, gain: float, offset: float
) -> Tensor:
    across, down, deep = _grid(volume, patch)
    width_n, k = grad.shape[-1], math.prod(patch)
    grad, tokens = grad.contiguous(), grad.shape[0] * grad.shape[1]
    if not grad.numel():
        return torch.zeros((width_n, k), dtype=grad.dtype, device=grad.device)
    default = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
    if grad.dtype == torch.float32:
        default |= {"BLOCK_M": 32, "BLOCK_K": 64, "num_warps": 8}
    key = f"M{tokens}-K{k}-N{width_n}-{operand_width(grad.dtype)}"
    config = tile("patch_embed3d_bwd", default, volume.device, key)
    programs = triton.cdiv(width_n, config["BLOCK_N"]) * triton.cdiv(k, config["BLOCK_K"])
    processors = torch.cuda.get_device_properties(grad.device).multi_processor_count if grad.is_cuda else 2
    # Shares of the tokens are summed afterwards, not by atomics: the result does not depend on who comes first.
    splits = max(1, min(2 * processors // programs, triton.cdiv(tokens, 4 * config["BLOCK_M"])))
    share = triton.cdiv(triton.cdiv(tokens, splits), config["BLOCK_M"]) * config["BLOCK_M"]
    splits = triton.cdiv(tokens, share)
    partial = torch.empty((splits, width_n, k), dtype=torch.float32, device=grad.device)
    with device_guard(grad):
        _patch_embed3d_bwd_kernel[(programs, splits)](
            grad,
            volume,
            partial,
            tokens,
            width_n,
            across,
            down,
            deep,
            *volume.stride(),
            lo,
            hi,
            gain,
            offset,
            share,
            **dict(zip("PQR", patch)),
            PRECISION=dot_precision(grad.dtype),
            **config,
        )
    return partial.sum(0).to(grad.dtype)


def _fake(
    volume: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    patch: Sequence[int],
    lo: float,
    hi: float,
    gain: float,
    offset: float,
) -> Tensor:
    across, down, deep = _grid(volume, patch)
    return weight.new_empty((volume.shape[0], across * down * deep, weight.shape[0]))


def _fake_backward(
    grad: Tensor, volume: Tensor, patch: Sequence[int], lo: float, hi: float, gain: float, offset: float
) -> Tensor:
    return grad.new_empty((grad.shape[-1], math.prod(patch)))


def _setup_context(ctx, inputs, output) -> None:
    volume, _, bias, position, *ctx.options = inputs
    ctx.bias_dtype, ctx.position_dtype = bias.dtype, None if position is None else position.dtype
    ctx.save_for_backward(volume)


def _backward(ctx, grad):
    (volume,) = ctx.saved_tensors
    dweight = _patch_embed3d_bwd(grad, volume, *ctx.options) if ctx.needs_input_grad[1] else None
    wide = grad.to(torch.float64 if grad.dtype == torch.float64 else torch.float32)
    dbias = wide.sum((0, 1)).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    dposition = wide.sum(0).to(ctx.position_dtype) if ctx.needs_input_grad[3] else None
    return None, dweight, dbias, dposition, None, None, None, None, None


_patch_embed3d_bwd = define_op(
    "patch_embed3d_bwd",
    patch_embed3d_backward_reference,
    _launch_patch_embed3d_backward,
    _fake_backward,
    switch="patch_embed3d",
)
_patch_embed3d = define_op(
    "patch_embed3d",
    patch_embed3d_reference,
    _launch_patch_embed3d,
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)


def patch_embed3d(
    volume: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None = None,
    *,
    patch: Sequence[int] = (4, 16, 16),
    window: tuple[float, float] | None = None,
    slope: float = 1.0,
    intercept: float = 0.0,
) -> Tensor:
    """Turn volumes into patch tokens.

    Args:
        volume: (B, D, H, W) stored voxels or floats, any strides; D, H, W divisible by `patch`.
        weight: (N, p1 * p2 * p3), MONAI's ``patch_embedding.patch_embeddings.1.weight``.
        bias: (N,).
        position: (T, N) position embedding, added where given.
        patch: (p1, p2, p3) voxels.
        window: (lo, hi) in the unit of ``voxel * slope + intercept``, mapped to [0, 1]; None leaves the values as they
            are, for volumes that `ingest_volume` has normalised.
        slope: Value of one stored unit.
        intercept: Value of stored zero.

    Returns:
        (B, T, N) in the dtype of `weight` (of autocast, where it is on), T = (D / p1) (H / p2) (W / p3).

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or the window is empty.
    """
    op = "patch_embed3d"
    check_shape(op, "volume", volume, (None, None, None, None))
    check_dtype(op, "volume", volume, VOXELS)
    check_dtype(op, "weight", weight, FLOATS)
    if volume.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: expected volume without a gradient, as voxels have none here; pass volume.detach()")
    patch = [int(p) for p in patch]
    if len(patch) != 3 or min(patch) < 1 or any(n % p for n, p in zip(volume.shape[1:], patch)):
        shape = tuple(volume.shape[1:])
        raise ValueError(f"{op}: expected (D, H, W) divisible by a patch of 3, got {shape} and {patch}; resample it")
    check_shape(op, "weight", weight, (None, math.prod(patch)))
    check_shape(op, "bias", bias, (weight.shape[0],))
    if position is not None:
        check_shape(op, "position", position, (math.prod(_grid(volume, patch)), weight.shape[0]))
    check_same_device(op, volume, weight, bias, position)
    lo, hi, gain, offset = -math.inf, math.inf, float(slope), float(intercept)
    if slope == 0:
        raise ValueError(f"{op}: expected a slope other than 0, got {slope}; an absent slope is 1")
    if window is not None:
        if not window[1] > window[0]:
            raise ValueError(f"{op}: expected a window (lo, hi) with lo < hi, got {window}")
        lo, hi = sorted((float(edge) - intercept) / slope for edge in window)
        gain, offset = slope / (window[1] - window[0]), (intercept - window[0]) / (window[1] - window[0])
    (weight,) = match_autocast(weight)
    return _patch_embed3d(volume, weight, bias, position, patch, float(lo), float(hi), float(gain), float(offset))


def _variants() -> tuple[Variant, ...]:
    shape = {"tokens": "i32:16", "width_n": "i32:16", "across": "i32:16", "down": "i32:16", "deep": "i32"}
    strides = dict.fromkeys(("v_b", "v_d", "v_h"), "i32:16")
    numbers = dict.fromkeys(("lo", "hi", "gain", "offset"), "fp32")
    sizes = {"v_w": 1, "P": 4, "Q": 16, "R": 16}
    variants = []
    for voxels, dtype, (m, n, k), precision in (
        ("i16", "bf16", (64, 128, 64), "tf32"),
        ("fp32", "bf16", (64, 128, 64), "tf32"),
        ("i16", "fp32", (64, 64, 32), "ieee"),
    ):
        pointers = {f"{name}_ptr": f"*{dtype}:16" for name in ("weight", "bias", "position", "out")}
        signature = {"volume_ptr": f"*{voxels}:16", **pointers, **shape, **strides, **numbers}
        constants = {**sizes, "HAS_POSITION": True, "PRECISION": precision}
        constants |= {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
        wgmma = dtype == "bf16"
        variants.append(Variant(f"fwd-{voxels}-{dtype}", _patch_embed3d_fwd_kernel, signature, constants, 4, 3, wgmma))
        pointers = {"grad_ptr": f"*{dtype}:16", "volume_ptr": f"*{voxels}:16", "partial_ptr": "*fp32:16"}
        signature = {**pointers, **shape, **strides, **numbers, "share": "i32:16"}
        m, n, k = (64, 64, 128) if wgmma else (32, 64, 64)
        constants = {**sizes, "PRECISION": precision, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
        warps, name = 4 if wgmma else 8, f"bwd-{voxels}-{dtype}"
        variants.append(Variant(name, _patch_embed3d_bwd_kernel, signature, constants, warps, 3, wgmma))
    return tuple(variants)


AOT_VARIANTS = _variants()
