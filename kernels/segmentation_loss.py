"""Binary cross-entropy and Dice of every object from mask logits, in one pass over them.

For one object with logits x, targets g and p = sigmoid(x), over P voxels::

    bce  = mean(softplus(x) - x g)
    dice = 1 - (2 sum(p g) + eps) / (sum(p) + sum(g) + eps)

Both need four sums, so the forward reads logits and targets once and writes nothing of their size; the backward reads
them once more and writes the gradient. Plain torch keeps four to six tensors of the logits' size for the same.

    logits, targets: (N, P...) -> bce, dice: (N,) float32
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from medvl_sam2.kernels._aot import Variant
from medvl_sam2.kernels._common import check_dtype, check_same_device, device_guard, tl, triton
from medvl_sam2.kernels._library import define_op
from medvl_sam2.kernels._tuning import tile

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TARGETS = (torch.bool, torch.uint8, *FLOATS)

# Elements of one block of the CPU path: its temporaries (2 MB) stay in cache, its operations outweigh their dispatch.
_CPU_BLOCK = 1 << 17


def segmentation_loss_reference(
    logits: torch.Tensor, targets: torch.Tensor, eps: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the two losses with whole-tensor float32 operations; the oracle."""
    x, g = logits.flatten(1).float(), targets.flatten(1).float()
    bce = F.binary_cross_entropy_with_logits(x, g, reduction="none").mean(1)
    p = x.sigmoid()
    return bce, 1 - (2 * (p * g).sum(1) + eps) / (p.sum(1) + g.sum(1) + eps)


def _blocks(n: int, p: int) -> Iterator[tuple[slice, slice]]:
    rows, columns = max(1, _CPU_BLOCK // p), min(p, _CPU_BLOCK)
    for row in range(0, n, rows):
        for column in range(0, p, columns):
            yield slice(row, row + rows), slice(column, column + columns)


def _losses(sums: torch.Tensor, p: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    entropy, overlap, predicted, wanted = sums
    return entropy / p, 1 - (2 * overlap + eps) / (predicted + wanted + eps)


def _log_likely(prob: torch.Tensor) -> torch.Tensor:
    """Sum log max(p, 1 - p) along rows: one logarithm for 64 factors, none below 1/2, so their product is above 0."""
    likely = (prob - 0.5).abs_().add_(0.5)
    whole = likely.shape[1] // 64 * 64
    total = likely[:, whole:].log().sum(1)
    return total + likely[:, :whole].unflatten(1, (-1, 64)).prod(2).log_().sum(1) if whole else total


def _float_block(tensor: torch.Tensor) -> torch.Tensor:
    # Bytes convert several times faster than booleans.
    return (tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor).float()


def _forward(
    logits: torch.Tensor, targets: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n, p = logits.shape
    sums = logits.new_zeros((4, n), dtype=torch.float32)
    for row, column in _blocks(n, p):
        x, g = logits[row, column].float(), _float_block(targets[row, column])
        prob = x.sigmoid()
        sums[0, row] += x.relu().sum(1) - torch.linalg.vecdot(x, g) - _log_likely(prob)
        sums[1, row] += torch.linalg.vecdot(prob, g)
        sums[2, row] += prob.sum(1)
        sums[3, row] += g.sum(1)
    return *_losses(sums, p, eps), sums


def _backward(
    grad_bce: torch.Tensor,
    grad_dice: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    sums: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    n, p = logits.shape
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    total = sums[2] + sums[3] + eps
    entropy = (grad_bce / p)[:, None]
    constant = (grad_dice * (2 * sums[1] + eps) / total.square())[:, None]
    slope = (-2 * grad_dice / total)[:, None]
    for row, column in _blocks(n, p):
        g = _float_block(targets[row, column])
        prob = logits[row, column].float().sigmoid()
        inner = (g * slope[row]).add_(constant[row]).mul_(prob).mul_(1 - prob)
        grad[row, column] = inner.add_(prob.sub_(g).mul_(entropy[row]))
    return grad


@triton.jit
def _terms(x, g):
    """Give softplus(x) - x g and sigmoid(x), stable at both ends."""
    decay = tl.exp(-tl.abs(x))
    entropy = tl.maximum(x, 0.0) - x * g + tl.log(1.0 + decay)
    return entropy, tl.where(x >= 0, 1.0, decay) / (1.0 + decay)


@triton.jit
def _segmentation_loss_fwd_kernel(
    logits_ptr, targets_ptr, partial_ptr, stride_x, stride_g, P, BLOCK: tl.constexpr, STEPS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    entropy = tl.zeros([BLOCK], tl.float32)
    overlap = tl.zeros([BLOCK], tl.float32)
    predicted = tl.zeros([BLOCK], tl.float32)
    wanted = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        offsets = (part * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < P
        x = tl.load(logits_ptr + row * stride_x + offsets, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(targets_ptr + row * stride_g + offsets, mask=inside, other=0).to(tl.float32)
        e, p = _terms(x, g)
        entropy += tl.where(inside, e, 0.0)
        p = tl.where(inside, p, 0.0)
        overlap += p * g
        predicted += p
        wanted += g
    out = partial_ptr + (row * tl.num_programs(1) + part) * 4
    tl.store(out, tl.sum(entropy, 0))
    tl.store(out + 1, tl.sum(overlap, 0))
    tl.store(out + 2, tl.sum(predicted, 0))
    tl.store(out + 3, tl.sum(wanted, 0))


@triton.jit
def _segmentation_loss_merge_kernel(partial_ptr, bce_ptr, dice_ptr, sums_ptr, n, parts, P, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    term = tl.arange(0, 4)
    total = tl.zeros([4], tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        at = (row * parts + part[:, None]) * 4 + term[None, :]
        total += tl.sum(tl.load(partial_ptr + at, mask=part[:, None] < parts, other=0.0), 0)
    tl.store(sums_ptr + term * n + row, total)
    entropy = tl.sum(tl.where(term == 0, total, 0.0), 0)
    overlap = tl.sum(tl.where(term == 1, total, 0.0), 0)
    both = tl.sum(tl.where(term >= 2, total, 0.0), 0)
    tl.store(bce_ptr + row, entropy / P)
    tl.store(dice_ptr + row, 1.0 - (2.0 * overlap + eps) / (both + eps))


@triton.jit
def _segmentation_loss_bwd_kernel(
    grad_bce_ptr,
    grad_dice_ptr,
    logits_ptr,
    targets_ptr,
    sums_ptr,
    grad_ptr,
    stride_x,
    stride_g,
    n,
    P,
    eps,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    overlap = tl.load(sums_ptr + n + row)
    total = tl.load(sums_ptr + 2 * n + row) + tl.load(sums_ptr + 3 * n + row) + eps
    entropy = tl.load(grad_bce_ptr + row) / P
    grad_dice = tl.load(grad_dice_ptr + row)
    constant = grad_dice * (2.0 * overlap + eps) / (total * total)
    slope = -2.0 * grad_dice / total
    for step in range(STEPS):
        offsets = (part * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < P
        x = tl.load(logits_ptr + row * stride_x + offsets, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(targets_ptr + row * stride_g + offsets, mask=inside, other=0).to(tl.float32)
        _, p = _terms(x, g)
        grad = entropy * (p - g) + (constant + slope * g) * p * (1.0 - p)
        tl.store(grad_ptr + row * P + offsets, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def _settings(logits: torch.Tensor) -> tuple[int, dict[str, int]]:
    n, p = logits.shape
    # Few large objects still have to fill the chip: about 512 programs, of at most 16 steps.
    steps = min(16, max(1, triton.next_power_of_2(triton.cdiv(n * p, 1024 * 512))))
    # CUDA takes 65,535 programs along a grid's second axis.
    steps = max(steps, triton.next_power_of_2(triton.cdiv(p, 1024 * 65_535)))
    default = {"BLOCK": 1024, "STEPS": steps, "num_warps": 4}
    settings = tile("segmentation_loss", default, logits.device, f"STEPS{steps}")
    return triton.cdiv(p, settings["BLOCK"] * settings["STEPS"]), settings


def _launch_forward(
    logits: torch.Tensor, targets: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n, p = logits.shape
    parts, settings = _settings(logits)
    partial = logits.new_empty((n, parts, 4), dtype=torch.float32)
    sums = logits.new_empty((4, n), dtype=torch.float32)
    bce, dice = logits.new_empty(n, dtype=torch.float32), logits.new_empty(n, dtype=torch.float32)
    if n:
        targets = targets.view(torch.uint8) if targets.dtype == torch.bool else targets
        with device_guard(logits):
            _segmentation_loss_fwd_kernel[n, parts](
                logits, targets, partial, logits.stride(0), targets.stride(0), p, **settings
            )
            _segmentation_loss_merge_kernel[(n,)](partial, bce, dice, sums, n, parts, p, eps, BLOCK=256, num_warps=4)
    return bce, dice, sums


def _launch_backward(
    grad_bce: torch.Tensor,
    grad_dice: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    sums: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    n, p = logits.shape
    parts, settings = _settings(logits)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if n:
        targets = targets.view(torch.uint8) if targets.dtype == torch.bool else targets
        with device_guard(logits):
            _segmentation_loss_bwd_kernel[n, parts](
                grad_bce.contiguous(),
                grad_dice.contiguous(),
                logits,
                targets,
                sums,
                grad,
                logits.stride(0),
                targets.stride(0),
                n,
                p,
                eps,
                **settings,
            )
    return grad


def _fake_forward(
    logits: torch.Tensor, targets: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = logits.shape[0]
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n,), (4, n)))


def _fake_backward(
    grad_bce: torch.Tensor,
    grad_dice: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    sums: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_bwd = define_op("segmentation_loss_bwd", _backward, _launch_backward, _fake_backward, switch="segmentation_loss")


def _setup_context(ctx, inputs, output) -> None:
    logits, targets, ctx.eps = inputs
    ctx.save_for_backward(logits, targets, output[2])
    ctx.set_materialize_grads(True)


def _autograd(ctx, grad_bce: torch.Tensor, grad_dice: torch.Tensor, _: torch.Tensor) -> tuple:
    logits, targets, sums = ctx.saved_tensors
    return _bwd(grad_bce, grad_dice, logits, targets, sums, ctx.eps), None, None


_fwd = define_op(
    "segmentation_loss",
    _forward,
    _launch_forward,
    _fake_forward,
    backward=_autograd,
    setup_context=_setup_context,
)


def segmentation_loss(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute binary cross-entropy and Dice loss of every object.

    Dice is of the first power with `eps` above and below, as Sa2VA's (eps 1); M3D's has it below only.

    Args:
        logits: (N, P...) float32, float16 or bfloat16; rows may be strided, a row must be dense to avoid a copy.
        targets: Same shape; bool, uint8 (0 or 1) or a float type with values in 0..1. Never differentiated.
        weight: (N,) factor of both losses, for instance 0 for an object that only pads the batch.
        eps: Smoothing of the Dice quotient.

    Returns:
        bce (N,) and dice (N,), float32.

    Raises:
        ValueError: On shapes, dtypes or devices that do not fit.
    """
    name = "segmentation_loss"
    if logits.ndim < 2 or 0 in logits.shape[1:]:
        raise ValueError(f"{name}: expected logits of shape (N, P...) with P > 0, got {tuple(logits.shape)}")
    if logits.shape != targets.shape:
        raise ValueError(f"{name}: expected targets of shape {tuple(logits.shape)}, got {tuple(targets.shape)}")
    check_dtype(name, "logits", logits, FLOATS)
    check_dtype(name, "targets", targets, TARGETS)
    check_same_device(name, logits, targets, weight)
    if weight is not None and weight.shape != logits.shape[:1]:
        raise ValueError(f"{name}: expected weight of shape {tuple(logits.shape[:1])}, got {tuple(weight.shape)}")
    bce, dice, _ = _fwd(_dense_rows(logits), _dense_rows(targets.detach()), eps)
    return (bce, dice) if weight is None else (bce * weight, dice * weight)


def _dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    rows = tensor.flatten(1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def uncertain_points(
    logits: torch.Tensor,
    num_points: int,
    *,
    oversample: float = 3.0,
    importance: float = 0.75,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw points of every mask, most of them where the logit is nearest to zero (PointRend, as in Sa2VA).

    Args:
        logits: (N, H, W).
        num_points: Points per mask.
        oversample: Candidates drawn uniformly per point kept.
        importance: Share of the points taken from the most uncertain candidates; the rest is uniform.
        generator: Source of randomness on the logits' device.

    Returns:
        (N, num_points, 2) float32, x and y in 0..1 over the mask's extent.
    """
    n = logits.shape[0]
    certain = round(importance * num_points)

    def draw(count: int) -> torch.Tensor:
        return torch.rand(n, count, 2, device=logits.device, generator=generator)

    candidates = draw(max(round(oversample * num_points), certain))
    uncertainty = sample_points(logits.detach(), candidates).abs()
    nearest = uncertainty.topk(certain, dim=1, largest=False, sorted=False).indices
    chosen = candidates.gather(1, nearest[..., None].expand(-1, -1, 2))
    return torch.cat((chosen, draw(num_points - certain)), 1)


def sample_points(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Read maps at points, bilinearly between pixel centres and with zeros outside.

    Args:
        maps: (N, H, W), floating point; differentiable.
        points: (N, P, 2), x and y in 0..1.

    Returns:
        (N, P) in the maps' dtype.
    """
    grid = (2 * points - 1).to(maps.dtype)[:, None]
    return F.grid_sample(maps[:, None], grid, mode="bilinear", align_corners=False)[:, 0, 0]


def point_sampled_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    num_points: int = 12_544,
    oversample: float = 3.0,
    importance: float = 0.75,
    eps: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `segmentation_loss` on points sampled where the masks are uncertain, as Sa2VA trains.

    Args:
        logits: (N, H, W) float32, float16 or bfloat16.
        targets: (N, H, W) bool, uint8 or floating; sampled bilinearly as well, so an edge gives values between 0 and 1.
        weight: (N,) factor of both losses.
        num_points: Points per mask.
        oversample: Uniform candidates per point.
        importance: Share of the points chosen by uncertainty.
        eps: Smoothing of the Dice quotient.
        generator: Source of randomness on the logits' device.

    Returns:
        bce (N,) and dice (N,), float32.

    Raises:
        ValueError: On shapes or dtypes that do not fit, or options out of range.
    """
    name = "point_sampled_loss"
    if logits.ndim != 3 or logits.shape != targets.shape:
        raise ValueError(
            f"{name}: expected logits and targets of one shape (N, H, W), got {tuple(logits.shape)} and "
            f"{tuple(targets.shape)}; flatten slices or volumes into N"
        )
    if num_points < 1 or oversample < 1 or not 0 <= importance <= 1:
        raise ValueError(
            f"{name}: expected num_points >= 1, oversample >= 1 and importance in 0..1, got {num_points}, "
            f"{oversample} and {importance}"
        )
    with torch.no_grad():
        points = uncertain_points(logits, num_points, oversample=oversample, importance=importance, generator=generator)
        wanted = sample_points(targets.float(), points)
    return segmentation_loss(sample_points(logits.float(), points), wanted, weight, eps=eps)


def _variants() -> list[Variant]:
    pairs = {"bf16-u8": ("*bf16:16", "*u8:16"), "fp32-u8": ("*fp32:16", "*u8:16"), "fp32-fp32": ("*fp32:16",) * 2}
    strides = {"stride_x": "i32:16", "stride_g": "i32:16", "P": "i32:16"}
    sizes = {"BLOCK": 1024, "STEPS": 4}
    found = []
    for name, (x, g) in pairs.items():
        pointers = {"logits_ptr": x, "targets_ptr": g}
        forward = {**pointers, "partial_ptr": "*fp32:16", **strides}
        found.append(Variant(f"fwd-{name}", _segmentation_loss_fwd_kernel, forward, sizes))
        gradients = {"grad_bce_ptr": "*fp32:16", "grad_dice_ptr": "*fp32:16", **pointers, "sums_ptr": "*fp32:16"}
        backward = {**gradients, "grad_ptr": x, **strides, "n": "i32", "eps": "fp32"}
        found.append(Variant(f"bwd-{name}", _segmentation_loss_bwd_kernel, backward, sizes))
    outputs = dict.fromkeys(("partial_ptr", "bce_ptr", "dice_ptr", "sums_ptr"), "*fp32:16")
    merge = {**outputs, "n": "i32", "parts": "i32", "P": "i32", "eps": "fp32"}
    return [*found, Variant("merge", _segmentation_loss_merge_kernel, merge, {"BLOCK": 256})]


AOT_VARIANTS = _variants()
