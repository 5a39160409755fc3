"""Measures the 3D vision transformer beside the same weights with naive attention, as MONAI's ViT computes it."""

from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

from medvl_sam2.bench.counting import count_flops
from medvl_sam2.bench.kernels import Row
from medvl_sam2.bench.rows import race
from medvl_sam2.model.config import VisionConfig, VolumeConfig
from medvl_sam2.model.vision import VisionEncoder

M3D_CLIP = (VolumeConfig(), VisionConfig())


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention with the whole matrix of scores in memory; (B, H, N, D) each."""
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v


def run(*, volume: VolumeConfig = M3D_CLIP[0], config: VisionConfig = M3D_CLIP[1], rounds: int = 5) -> list[Row]:
    """Time both sides on the CPU with random weights.

    Args:
        volume: Grid and patch.
        config: Width and depth; M3D-CLIP's by default.
        rounds: Times that each side runs.

    Returns:
        One dict per side, see `medvl_sam2.bench.rows.race`.
    """
    raced, flops = sides(volume, config)
    work = f"ViT {config.layers}x{config.hidden_size}, {volume.tokens + 1} tokens"
    return race(work, raced, flops=flops, rounds=rounds)


def sides(volume: VolumeConfig, config: VisionConfig) -> tuple[dict[str, Callable[[], Tensor]], float]:
    """What is raced, and its floating-point operations; arguments as in `run`."""
    torch.manual_seed(0)
    encoder = VisionEncoder(volume, config).eval().requires_grad_(False)
    scan = torch.rand(1, 1, *volume.size)

    def naive() -> Tensor:
        with patch("medvl_sam2.model.vision.attention", naive_attention):
            return encoder(scan)

    return {"naive attention": naive, "ours": lambda: encoder(scan)}, count_flops(naive)
