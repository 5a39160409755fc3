"""Measures the 3D vision transformer beside the same weights with naive attention, as MONAI's ViT computes it."""

from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

from medvl_sam2.bench.compiling import add_where_possible, swapped
from medvl_sam2.bench.counting import count_flops
from medvl_sam2.bench.kernels import Row
from medvl_sam2.bench.place import CPU, Place
from medvl_sam2.bench.rows import race
from medvl_sam2.model.config import VisionConfig, VolumeConfig
from medvl_sam2.model.vision import VisionEncoder

M3D_CLIP = (VolumeConfig(), VisionConfig())
NAIVE = "naive attention"


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention with the whole matrix of scores in memory; (B, H, N, D) each."""
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v


def run(
    *,
    volume: VolumeConfig = M3D_CLIP[0],
    config: VisionConfig = M3D_CLIP[1],
    rounds: int = 5,
    compile: bool = False,
    place: Place = CPU,
) -> list[Row]:
    """Time both sides with random weights.

    Args:
        volume: Grid and patch.
        config: Width and depth; M3D-CLIP's by default.
        rounds: Times that each side runs.
        compile: Measure the baseline under torch.compile too, where that works here.
        place: Where both sides run. On CUDA, and in bfloat16, they are held to float32 on the CPU.

    Returns:
        One dict per side, see `medvl_sam2.bench.rows.race`.
    """
    raced, flops, exact = sides(volume, config, compile=compile, place=place)
    work = f"ViT {config.layers}x{config.hidden_size}, {volume.tokens + 1} tokens"
    return race(work, raced, flops=flops, rounds=rounds, place=place, exact=exact)


def sides(
    volume: VolumeConfig, config: VisionConfig, *, compile: bool = False, place: Place = CPU
) -> tuple[dict[str, Callable[[], Tensor]], float, Tensor | None]:
    """What is raced, its floating-point operations, and what float32 on the CPU gives; None where that is raced.

    Arguments as in `run`.
    """
    torch.manual_seed(0)
    encoder = VisionEncoder(volume, config).eval().requires_grad_(False)
    scan = torch.rand(1, 1, *volume.size)

    def naive() -> Tensor:
        with patch("medvl_sam2.model.vision.attention", naive_attention):
            return encoder(scan)

    # Counted on the CPU, where every operation has a formula.
    flops = count_flops(naive)
    exact = None
    if place != CPU:
        exact = torch.inference_mode()(naive)()
        encoder, scan = encoder.to(place.device, place.dtype), scan.to(place.device, place.dtype)
    raced = {NAIVE: naive, "ours": lambda: encoder(scan)}
    if compile:
        compiled = torch.compile(encoder.forward)

        def naive_compiled() -> Tensor:
            with swapped(encoder, compiled):
                return naive()

        add_where_possible(raced, f"{NAIVE}, compiled", lambda: torch.inference_mode()(naive_compiled))
    return raced, flops, exact
