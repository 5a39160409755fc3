"""Linear layers and matrix products for inference on a CPU, by oneDNN rather than by the BLAS of the torch build.

torch's float32 products go to MKL, which keeps to AVX2 on CPUs of other makers; oneDNN takes AVX-512 wherever it is
(2.2 to 2.5 times as fast on Zen 5, docs/kernels.md) and applies the activation while the result is in the cache. On
Intel's own CPUs MKL is as fast, and PyTorch's attention, which calls it, faster than one made of oneDNN's products.
Its operation has no derivative: where a gradient may be asked for, in other dtypes and on other devices, the plain
layer runs.
"""

import platform
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvl_sam2.kernels._common import is_disabled, register_operation

Activation = Literal["none", "relu", "gelu"]

_FLOAT = torch.float32
ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}


def _describe() -> tuple[str, str]:
    if is_disabled("linear"):
        return "reference", "switched off"
    if not (torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available()):
        return "reference", "torch has no oneDNN"
    return "onednn", "float32 inference on the CPU; the plain layer elsewhere"


register_operation("linear", _describe)


def _blas_suits() -> bool:
    if not torch.backends.mkl.is_available():
        return False
    try:
        with open("/proc/cpuinfo") as file:
            return "GenuineIntel" in file.read()
    except OSError:
        return "GenuineIntel" in platform.processor()


# Whether torch's BLAS uses all of this CPU: MKL does so on its maker's.
_BLAS_SUITS = _blas_suits()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = "none") -> Tensor:
    """``activation(x W^T + b)``.

    Args:
        x: (..., K).
        weight: (N, K), in the layout of ``nn.Linear``.
        bias: (N,) or None.
        activation: "none", "relu" or "gelu" (exact).

    Returns:
        (..., N).
    """
    if _takes(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def product(a: Tensor, b_transposed: Tensor) -> Tensor:
    """Matrix product ``a @ b_transposed.mT`` of two matrices (M, K) and (N, K)."""
    return linear(a, b_transposed) if is_fast(a, b_transposed) else a @ b_transposed.mT


class Linear(nn.Linear):
    """``nn.Linear`` that runs as :func:`linear`, with the same parameters."""

    def forward(self, x: Tensor, activation: Activation = "none") -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return linear(x, self.weight, self.bias, activation)


def is_fast(*operands: Tensor) -> bool:
    """Whether products of these operands are oneDNN's, and the faster for it."""
    return all(_takes(x, x, None) for x in operands) and not _BLAS_SUITS


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if x.device.type != "cpu" or x.dtype != _FLOAT or weight.dtype != _FLOAT or x.numel() == 0:
        return False
    wants_gradient = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    return (
        not wants_gradient
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and _describe()[0] == "onednn"
    )
