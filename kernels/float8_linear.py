"""Linear layers with weights in float8 (e4m3), for inference on Hopper and later.

    y[m, n] = sx[m] sw[n] sum_k x8[m, k] w8[n, k] + bias[n]

Every output channel of the weight and every row of the input has a scale of its own, its largest value over 448, so
that neither an odd channel nor an odd token costs the others their bits. Two regimes, split at `FEW_ROWS`:

* Many rows (image encoder, prefill): one kernel finds a row's scale and rounds it, then PyTorch's float8 product runs
  at up to twice bfloat16's rate.
* Few rows (decoding): the product waits for the weights alone, which are half the bytes. The input stays as it is, a
  kernel widens the weights on their way into the product: nothing is lost but the weights' rounding.

On other devices the same sums are made from widened operands, which tests and CPUs may run; nothing is won there.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from medvl_sam2.kernels._aot import Variant
from medvl_sam2.kernels._common import (
    check_dtype,
    check_last_stride,
    check_same_device,
    check_shape,
    device_guard,
    dot_precision,
    tl,
    triton,
    why_not_triton,
)
from medvl_sam2.kernels._library import define_op
from medvl_sam2.kernels._tuning import operand_width, tile
from medvl_sam2.kernels.linear import ACTIVATIONS, Activation

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
FEW_ROWS = 16
# The product takes operands in units of 16 bytes.
UNIT = 16
CAPABILITY = (9, 0)


def why_not_float8(device: torch.device) -> str:
    """Say why float8 layers would win nothing on `device`, or return an empty string if they would."""
    if device.type != "cuda":
        return f"there are no float8 products on {device.type}"
    return why_not_triton("float8_linear", device)


def quantise_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of (M, K) to float8; returns it with its (M,) float32 scale, 1 for a row of zeros."""
    wide = x.float()
    largest = wide.abs().amax(-1) if x.shape[-1] else wide.new_zeros(x.shape[:-1])
    scale = torch.where(largest == 0, 1.0, largest / LARGEST)
    return (wide / scale[..., None]).clamp(-LARGEST, LARGEST).to(FLOAT8), scale


def few_rows_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` in float32 with the weight widened; (M, K) -> (M, N) of x's dtype."""
    y = (x.float() @ weight.float().T) * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


@triton.jit
def _quantise_rows_kernel(x_ptr, y_ptr, scale_ptr, K, x_m, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    largest = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row * x_m + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    top = tl.max(largest, 0)
    scale = tl.where(top == 0.0, 1.0, top / 448.0)
    tl.store(scale_ptr + row, scale)
    # The row comes out of the cache this time.
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row * x_m + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        x = tl.minimum(tl.maximum(x / scale, -448.0), 448.0)
        tl.store(y_ptr + row * K + start + k, x.to(tl.float8e4nv), mask=start + k < K)


@triton.jit
def _few_rows_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    x_m,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All rows by BLOCK_N columns a program: the weight is read once, sixteen rows cost what one does."""
    m = tl.arange(0, 16)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_m, in_n = m < M, n < N
    total = tl.zeros([16, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        in_k = start + k < K
        w = tl.load(w_ptr + n[None, :] * K + start + k[:, None], mask=in_k[:, None] & in_n[None, :], other=0.0)
        x = tl.load(x_ptr + m[:, None] * x_m + start + k[None, :], mask=in_m[:, None] & in_k[None, :], other=0.0)
        total = tl.dot(x, w.to(x.dtype), total, input_precision=PRECISION)
    total *= tl.load(scale_ptr + n, mask=in_n, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    at = y_ptr + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(at, total.to(y_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


def _launch_quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=FLOAT8, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x):
        block = min(4096, triton.next_power_of_2(x.shape[1]))
        settings = tile("float8_rows", {"BLOCK_K": block, "num_warps": 4}, x.device, f"K{x.shape[1]}")
        with device_guard(x):
            _quantise_rows_kernel[(len(x),)](x, y, scale, x.shape[1], x.stride(0), **settings)
    return y, scale


def _fake_quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=FLOAT8, device=x.device), x.new_empty(len(x), dtype=torch.float32)


def _launch_few_rows(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    (m, k), n = x.shape, len(weight)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    # Narrow, so that a small layer still asks all of the memory's channels; deep, so that each has much to fetch.
    default = {"BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 4, "num_stages": 3}
    settings = tile("float8_linear", default, x.device, f"N{n}-K{k}-{operand_width(x.dtype)}")
    with device_guard(x):
        _few_rows_kernel[(triton.cdiv(n, settings["BLOCK_N"]),)](
            x,
            weight,
            scale,
            scale if bias is None else bias,
            y,
            m,
            n,
            k,
            x.stride(0),
            HAS_BIAS=bias is not None,
            PRECISION=dot_precision(x.dtype),
            **settings,
        )
    return y


def _fake_few_rows(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(weight))


_op = {"switch": "float8_linear", "capability": CAPABILITY}
_rows = define_op("float8_rows", quantise_rows_reference, _launch_quantise_rows, _fake_quantise_rows, **_op)
_few = define_op("float8_few_rows", few_rows_reference, _launch_few_rows, _fake_few_rows, **_op)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round every row to float8 with a scale of its own.

    Args:
        x: (M, K), bfloat16, float16 or float32, last axis dense.

    Returns:
        (M, K) float8_e4m3fn and (M,) float32 scales: ``x`` is about ``y * scale[:, None]``.

    Raises:
        ValueError: Another shape, dtype or layout.
    """
    check_shape("quantise_rows", "x", x, (None, None))
    check_dtype("quantise_rows", "x", x, FLOATS)
    check_last_stride("quantise_rows", "x", x)
    return _rows(x)


def float8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with the weight in float8; no derivative.

    Args:
        x: (..., K), bfloat16, float16 or float32. Up to `FEW_ROWS` rows stay as they are, more are rounded to float8.
        weight: (N, K) float8_e4m3fn, dense; N and K multiples of 16.
        scale: (N,) float32, as from `quantise_rows`.
        bias: (N,) or None.

    Returns:
        (..., N) of x's dtype; on CUDA many rows are rounded to bfloat16 on the way, which the product gives.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit.
    """
    op = "float8_linear"
    check_dtype(op, "x", x, FLOATS)
    check_dtype(op, "weight", weight, (FLOAT8,))
    check_shape(op, "weight", weight, (None, x.shape[-1]))
    check_shape(op, "scale", scale, (len(weight),))
    if bias is not None:
        check_shape(op, "bias", bias, (len(weight),))
    check_same_device(op, x, weight, scale, bias)
    if len(weight) % UNIT or weight.shape[1] % UNIT or not weight.is_contiguous():
        raise ValueError(f"{op}: expected a dense weight with sides divisible by {UNIT}, got {tuple(weight.shape)}")
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if len(rows) <= FEW_ROWS:
        y = _few(rows, weight, scale, bias) if len(rows) else rows.new_empty(0, len(weight))
    else:
        y = _many_rows(rows, weight, scale, bias)
    return y.view(*x.shape[:-1], len(weight))


def _many_rows(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    rounded, scale_x = quantise_rows(x)
    if why_not_float8(x.device):
        y = few_rows_reference(rounded.float() * scale_x[:, None], weight, scale, None)
    else:
        each = ScalingType.RowWise
        y = F.scaled_mm(rounded, weight.T, scale_x[:, None], each, scale[None], each, output_dtype=torch.bfloat16)
    y = y.to(x.dtype)
    return y if bias is None else y + bias.to(y.dtype)


class Float8Linear(nn.Module):
    """A linear layer whose weight is rounded to float8, in the place of an `nn.Linear`.

    Args:
        linear: The layer; it is not changed.

    Raises:
        ValueError: Its sides are not divisible by 16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if not self.fits(linear):
            sides = f"{linear.in_features} and {linear.out_features}"
            raise ValueError(f"linear: expected sides divisible by {UNIT}, got {sides}; keep this layer as it is")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantise_rows_reference(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @staticmethod
    def fits(linear: nn.Linear) -> bool:
        """Whether the layer's sides suit the product."""
        return linear.in_features % UNIT == 0 and linear.out_features % UNIT == 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float8Linear":
        # A cast of the model is meant for what is left wide.
        weight, scale = self.weight, self.scale
        super()._apply(fn, recurse)
        self.weight, self.scale = weight.to(self.weight.device), scale.to(self.scale.device)
        return self

    def forward(self, x: Tensor, activation: Activation = "none") -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return ACTIVATIONS[activation](float8_linear(x, self.weight, self.scale, self.bias))


def _variants() -> list[Variant]:
    rows = {"x_ptr": "*bf16:16", "y_ptr": "*fp8e4nv:16", "scale_ptr": "*fp32:16", "K": "i32:16", "x_m": "i32:16"}
    found = [Variant("rows-bf16", _quantise_rows_kernel, rows, {"BLOCK_K": 1024}, capability=90)]
    for kind in ("bf16", "fp16"):
        pointers = dict.fromkeys(("x_ptr", "bias_ptr", "y_ptr"), f"*{kind}:16")
        pointers |= {"w_ptr": "*fp8e4nv:16", "scale_ptr": "*fp32:16"}
        numbers = {"M": "i32", **dict.fromkeys(("N", "K", "x_m"), "i32:16")}
        sizes = {"HAS_BIAS": True, "PRECISION": "tf32", "BLOCK_N": 16, "BLOCK_K": 256}
        found.append(Variant(f"few-{kind}", _few_rows_kernel, pointers | numbers, sizes, capability=90))
    return found


AOT_VARIANTS = _variants()
