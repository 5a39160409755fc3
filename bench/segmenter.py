"""Measures the slice runner beside the video predictor of the sam2 package.

Both sides get the same weights, images, prompts, number format and threads, and take turns, so that other load meets
both alike. A row counts from images to masks: image features, prompts on the first slice, and all slices after it. The
masks are compared before any ratio is given. The floor is the work that the runner cannot avoid over the rate of the
fastest large matrix product in the same run.
"""

import ctypes
import math
import multiprocessing
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from medvl_sam2.bench.compiling import add_compiled, swapped
from medvl_sam2.bench.counting import count_flops
from medvl_sam2.bench.kernels import Row, environment
from medvl_sam2.bench.rows import MOST_ERROR, Check, judged, relative_error
from medvl_sam2.bench.timing import gemm_rate, in_turns
from medvl_sam2.engine.runner import SliceRunner
from medvl_sam2.engine.slice_features import LazyFeatures, SliceEncoder
from medvl_sam2.engine.volume_track import VolumeTrack
from medvl_sam2.kernels.mask_epilogue import mask_epilogue
from medvl_sam2.model.sam2 import SAM2, Prompts, SAM2Config

VARIANTS = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}
LEAST_DICE = 0.999
PACKAGE, COMPILED, OURS = "sam2 package", "sam2 package, compiled", "ours"


def run(
    *,
    variant: str = "tiny",
    image_size: int = 512,
    slices: int = 16,
    objects: Sequence[int] = (1, 4, 8),
    rounds: int = 5,
    compile: bool = False,
) -> list[Row]:
    """Time both sides from images to masks.

    Args:
        variant: Of SAM2.1: "tiny", "small", "base_plus" or "large".
        image_size: Side of a slice in pixels.
        slices: Slices of the volume, followed from the first to the last.
        objects: Numbers of objects, each measured for itself.
        rounds: Times that each side runs; the median counts.
        compile: Measure the package with its image encoder under torch.compile too, where that works here.

    Returns:
        One dict per side and number of objects.

    Raises:
        ValueError: An unknown variant, or the sam2 package is not installed.
    """
    package, sam2 = models(variant, image_size)
    images, rate, rows = made_up_images(slices, image_size), gemm_rate(), []
    for count in objects:
        raced = sides(package, sam2, images, count)
        if compile:
            add_compiled(raced, COMPILED, _compiled(package, raced[PACKAGE]))
        found = {side: masks() for side, masks in raced.items()}
        checks = {side: compare(got, found[PACKAGE]) for side, got in found.items()}
        spent = dict(zip(raced, in_turns(list(raced.values()), rounds)))
        work = f"{slices} slices, SAM2.1 {variant} @{image_size}"
        floor = count_flops(raced[OURS]) / rate
        rows += judged(work, spent, checks, floor=floor, rate=f"{rate / 1e9:.0f} GFLOP/s", objects=count)
    return rows


def sides(package: nn.Module, sam2: SAM2, images: Tensor, objects: int) -> dict[str, Callable[[], Tensor]]:
    """The two sides, from images to the masks' logits."""
    asked = _clicks(objects, images.shape[-1])
    return {PACKAGE: lambda: run_package(package, images, asked), OURS: lambda: run_ours(sam2, images, asked)}


def peak_memory(
    *, variant: str = "tiny", image_size: int = 512, slices: Sequence[int] = (32, 128), objects: int = 8
) -> list[Row]:
    """Measure on Linux how far the resident memory of a process rises while a volume is segmented.

    The package is given all images as one tensor, which it needs; ours makes them from 16-bit voxels as it goes.

    Args:
        variant: As in `run`.
        image_size: As in `run`.
        slices: Numbers of slices.
        objects: Number of objects.
    """
    rows = []
    for count in slices:
        found = {}
        for side in (PACKAGE, OURS):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[side] = pool.apply(_rise, (side, variant, image_size, count, objects))
            row = {"work": f"SAM2.1 {variant} @{image_size}", "slices": count, "objects": objects, "provider": side}
            row |= {"peak_mb": found[side] / 1e6, "share": found[side] / found[PACKAGE], "correct": True}
            rows.append({**row, **environment("cpu")})
    return rows


def variant_of(config: SAM2Config) -> str | None:
    """The package's name for a configuration; None when it has no such model."""
    sizes = (name for name in VARIANTS if SAM2Config.preset(name, image_size=config.image_size) == config)
    return next(sizes, None)


def models(variant: str, image_size: int) -> tuple[nn.Module, SAM2]:
    """The package's video predictor and our model, with the same random weights that keep every part busy."""
    if variant not in VARIANTS:
        raise ValueError(f"segmenter: expected a variant of {', '.join(VARIANTS)}, got {variant!r}")
    try:
        import hydra
        import sam2  # noqa: F401  registers the package's configuration files
    except ImportError as error:
        raise ValueError(f"segmenter: the baseline needs the sam2 package and hydra-core ({error})") from error
    # As the package's build_sam2_video_predictor sets it, but for filling holes, which needs CUDA.
    overrides = [
        "++model._target_=sam2.sam2_video_predictor.SAM2VideoPredictor",
        "++model.sam_mask_decoder_extra_args.dynamic_multimask_via_stability=true",
        "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_delta=0.05",
        "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_thresh=0.98",
        "++model.binarize_mask_from_pts_for_mem_enc=true",
        f"++model.image_size={image_size}",
    ]
    config = hydra.compose(config_name=f"configs/sam2.1/sam2.1_hiera_{VARIANTS[variant]}", overrides=overrides)
    package = hydra.utils.instantiate(config.model, _recursive_=True).eval().requires_grad_(False)
    randomise(package)
    ours = SAM2(SAM2Config.preset(variant, image_size=image_size)).eval().requires_grad_(False)
    ours.load_official_state_dict(package.state_dict())
    return package, ours


def randomise(model: nn.Module) -> None:
    """Weights under which masks are neither empty nor full and rounding is not blown up from slice to slice."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        noise = torch.randn(tensor.shape, generator=generator)
        if "gaussian_matrix" in name:
            value = noise
        elif tensor.dim() > 1 and name.endswith("weight") and "embed" not in name and "token" not in name:
            value = noise / math.sqrt(tensor[0].numel())
            if any(part in name for part in ("q_proj", "k_proj", "qkv")):
                value *= 0.5
        elif name.endswith("gamma"):
            value = 0.3 + 0.1 * noise
        elif "norm" in name and name.endswith("weight"):
            value = 1 + 0.1 * noise
        else:
            value = (0.1 if tensor.dim() == 1 else 0.5) * noise
        tensor.data = 0.3 * value if "neck" in name else value
    # Objects present on most slices.
    model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(2.6)


def made_up_images(slices: int, size: int) -> Tensor:
    """Smooth random pictures (S, 3, size, size)."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(slices, 3, 16, 16, generator=generator)
    return nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")


def _clicks(objects: int, size: int) -> Prompts:
    places = torch.linspace(0.2, 0.8, objects) * size
    return Prompts(torch.stack((places, size - places), -1)[:, None], torch.ones(objects, 1, dtype=torch.int32))


def quiet() -> Any:
    """Within it the package shows no progress bars."""
    return patch("sam2.sam2_video_predictor.tqdm", lambda steps, **_: steps)


@torch.inference_mode()
def run_package(package: nn.Module, images: Tensor, asked: Prompts) -> Tensor:
    """Click every object on the first slice and go through; returns the masks' logits (S, B, m, m)."""
    state = state_of(images)
    for item in range(len(asked.points)):
        package.add_new_points_or_box(state, 0, item, points=asked.points[item], labels=asked.labels[item])
    with quiet():
        for _ in package.propagate_in_video(state, start_frame_idx=0):
            pass
    return torch.stack([masks_of(outputs) for outputs in state["output_dict_per_obj"].values()], dim=1)


def state_of(images: Tensor) -> dict[str, Any]:
    """What the package's init_state makes of a folder of pictures."""
    size, device = images.shape[-1], images.device
    state: dict[str, Any] = {"images": images, "num_frames": len(images), "video_height": size, "video_width": size}
    state |= {"offload_video_to_cpu": False, "offload_state_to_cpu": False, "device": device, "storage_device": device}
    state |= {"obj_id_to_idx": OrderedDict(), "obj_idx_to_id": OrderedDict(), "obj_ids": []}
    for name in ("cached_features", "constants", "point_inputs_per_obj", "mask_inputs_per_obj"):
        state[name] = {}
    state |= {"output_dict_per_obj": {}, "temp_output_dict_per_obj": {}, "frames_tracked_per_obj": {}}
    return state


def masks_of(outputs: dict[str, dict[int, dict[str, Tensor]]], name: str = "pred_masks") -> Tensor:
    """Logits (S, m, m) of an object from the package's outputs, or another of its entries, in the slices' order."""
    found = {**outputs["non_cond_frame_outputs"], **outputs["cond_frame_outputs"]}
    return torch.cat([found[t][name][0] for t in sorted(found)])


@torch.inference_mode()
def run_ours(sam2: SAM2, images: Tensor, asked: Prompts) -> Tensor:
    """The same by the runner, labels at the images' size included, as the package's masks are."""
    features = LazyFeatures(SliceEncoder(sam2), lambda start, stop: images[start:stop], len(images))
    return _followed(sam2, features, asked, images.shape[-1])


def _followed(sam2: SAM2, features: LazyFeatures, asked: Prompts, size: int) -> Tensor:
    track = VolumeTrack(SliceRunner(sam2), features)
    track.prompt(0, asked)
    track.run(0, "forward")
    mask_epilogue(track.logits, (len(features), size, size))
    return track.logits


def compare(got: Tensor, want: Tensor) -> Check:
    """Root mean square error over that of the logits, and the Dice of all masks together."""
    error, ours, theirs = relative_error(got, want), got > 0, want > 0
    dice = float(2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()).clamp(min=1))
    return Check(dice >= LEAST_DICE and error <= MOST_ERROR, error, dice)


def _compiled(package: nn.Module, masks: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """With the image encoder compiled, as the package's own option does it."""
    forward = torch.compile(package.image_encoder.forward)

    def side() -> Tensor:
        with swapped(package.image_encoder, forward):
            return masks()

    return side


def _rise(side: str, variant: str, image_size: int, slices: int, objects: int) -> int:
    package, sam2 = models(variant, image_size)
    asked = _clicks(objects, image_size)
    if side == OURS:
        del package
        voxels = (made_up_images(slices, image_size)[:, 0] * 1000).to(torch.int16)
        scaled = LazyFeatures(
            SliceEncoder(sam2),
            lambda start, stop: (voxels[start:stop, None].float() / 1000).expand(-1, 3, -1, -1),
            slices,
        )
    before = reset_peak()
    if side == OURS:
        with torch.inference_mode():
            _followed(sam2, scaled, asked, image_size)
    else:
        run_package(package, made_up_images(slices, image_size), asked)
    return peak() - before


def reset_peak() -> int:
    """Start a new peak of the resident memory, and give what is resident now, in bytes; Linux only."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        # What earlier work freed but the allocator kept would hide as much of the next peak.
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Most bytes that were resident since `reset_peak`."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def table(rows: Sequence[Row]) -> str:
    """Lay rows of `peak_memory` out for reading."""
    lines = [f"{'slices':>6} {'objects':>7} {'provider':13} {'peak MB':>8} {'share':>6}"]
    for row in rows:
        place = f"{row['slices']:6} {row['objects']:7}"
        lines.append(f"{place} {row['provider']:13} {row['peak_mb']:8.0f} {row['share']:6.3f}")
    return "\n".join(lines)
