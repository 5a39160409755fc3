"""Floating-point operations that a piece of work cannot avoid, counted while it runs once."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from medvl_sam2.engine.timing import Stages
from medvl_sam2.kernels import axial_rope, memory_attention, mixer, patch_embed3d, window_attention
from medvl_sam2.kernels._common import disable

# Importing them registers the operations that have formulas below.
_ = (axial_rope, memory_attention, mixer, patch_embed3d, window_attention)


def _sdpa(q: Any, k: Any, v: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    full = 2 * math.prod(q) * k[-2] + 2 * math.prod(q[:-1]) * math.prod(v[-2:])
    return full * (k[-2] + 1) // (2 * k[-2]) if causal and q[-2] == k[-2] else full


def _memory_attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(k) * q[1] + 2 * math.prod(v) * q[1]


def _rope_linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _patch_embed3d(volume: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * math.prod(out_shape[:-1]) * math.prod(weight)


def _mixer(x: Any, weights: Any, *_: Any, **__: Any) -> int:
    batch, _, width = x
    across = math.prod(weights[2]) + math.prod(weights[4])
    return 2 * batch * (width * across + weights[4][0] * (math.prod(weights[8]) + math.prod(weights[10])))


def _window_attention(qkv: Any, padding: Any, heads: int, window: int, pool: bool, *_: Any, **__: Any) -> int:
    # Keys of padding tokens count: in SAM2 they are attended to.
    return 4 * math.prod(qkv) // 3 * window**2 // (4 if pool else 1)


FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.medvl_sam2.memory_attention: _memory_attention,
    torch.ops.medvl_sam2.rope_linear: _rope_linear,
    torch.ops.medvl_sam2.patch_embed3d: _patch_embed3d,
    torch.ops.medvl_sam2.mixer: _mixer,
    torch.ops.medvl_sam2.window_attention: _window_attention,
}


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count matrix products, convolutions and attention of what runs inside; what the operations round that is free.

    oneDNN's products are invisible to the counter, so inside the plain ones run.
    """
    with disable("linear"), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        yield counter


@torch.inference_mode()
def count_flops(function: Callable[[], Any]) -> float:
    """Floating-point operations of one call."""
    with counting() as counter:
        function()
    return float(counter.get_total_flops())


class CountedStages(Stages):
    """Stages that also count the operations of each; a time of theirs means nothing.

    Attributes:
        flops: By stage.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.flops: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add time and operations of the block to stage `name`."""
        with super().measure(name), counting() as counter:
            yield
        self.flops[name] = self.flops.get(name, 0.0) + counter.get_total_flops()
