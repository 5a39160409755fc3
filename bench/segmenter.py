"""Measures the slice runner beside the video predictor of the sam2 package.

Both sides get the same weights, images, prompts, number format and threads, and take turns, so that other load meets
both alike. A row counts from images to masks: image features, prompts on the first slice, and all slices after it. The
masks are compared before any ratio is given. The floor is the work that the runner cannot avoid over the rate of the
fastest large matrix product in the same run.

In bfloat16 the package runs as its authors run it: float32 weights under autocast. On CUDA its predictor for whole
videos, all of whose parts are under torch.compile, is a side of its own.
"""

import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from medvl_sam2.bench.compiling import add_where_possible, swapped
from medvl_sam2.bench.counting import count_flops
from medvl_sam2.bench.kernels import Row
from medvl_sam2.bench.place import CPU, Place
from medvl_sam2.bench.rows import checked, judged, relative_error, typical_error
from medvl_sam2.bench.timing import gemm_rate, in_turns
from medvl_sam2.engine.runner import SliceRunner
from medvl_sam2.engine.slice_features import LazyFeatures, SliceEncoder
from medvl_sam2.engine.volume_track import VolumeTrack
from medvl_sam2.kernels.mask_epilogue import mask_epilogue
from medvl_sam2.model.modeling import cast_weights
from medvl_sam2.model.sam2 import SAM2, Prompts, SAM2Config

VARIANTS = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}
PACKAGE, COMPILED, WHOLE, OURS = "sam2 package", "sam2 package, compiled", "sam2 package, VOS compiled", "ours"


def run(
    *,
    variant: str = "tiny",
    image_size: int = 512,
    slices: int = 16,
    objects: Sequence[int] = (1, 4, 8),
    rounds: int = 5,
    compile: bool = False,
    place: Place = CPU,
) -> list[Row]:
    """Time the sides from images to masks.

    Args:
        variant: Of SAM2.1: "tiny", "small", "base_plus" or "large".
        image_size: Side of a slice in pixels.
        slices: Slices of the volume, followed from the first to the last.
        objects: Numbers of objects, each measured for itself.
        rounds: Times that each side runs; the median counts.
        compile: Measure the package with its image encoder under torch.compile too, where that works here.
        place: Where the sides run. On CUDA, and in bfloat16, they are held to the package in float32 on the CPU.

    Returns:
        One dict per side and number of objects, see `medvl_sam2.bench.rows.judged`.

    Raises:
        ValueError: An unknown variant, or the sam2 package is not installed.
    """
    plain, ours = models(variant, image_size)
    pictures, rows = made_up_images(slices, image_size), []
    rate = gemm_rate(device=place.device, dtype=place.dtype)
    package, sam2, images = plain, ours, pictures
    if place != CPU:
        package, sam2 = placed(deepcopy(plain), place), cast_weights(deepcopy(ours).to(place.device), place.dtype)
        images = pictures.to(place.device)
    # Compiling takes minutes, and serves all numbers of objects.
    whole = cache(partial(_whole_compiled, variant, package, place))
    for count in objects:
        raced = sides(package, sam2, images, count, place)
        # Counted on the CPU, where every operation has a formula.
        flops, exact = count_flops(sides(plain, ours, pictures, count)[OURS]), None
        if place != CPU:
            exact = run_package(plain, pictures, clicks(count, image_size))
        if compile:
            add_where_possible(raced, COMPILED, partial(_encoder_compiled, package, raced[PACKAGE]))
        if place.device.type == "cuda":
            asked = clicks(count, image_size).to(place.device)
            add_where_possible(raced, WHOLE, lambda asked=asked: _followed(whole(), images, asked, place))
        checks = checked(
            {side: masks() for side, masks in raced.items()}, rounded if exact is not None else distance, exact
        )
        spent = dict(zip(raced, in_turns(list(raced.values()), rounds, place.device)))
        work = f"{slices} slices, SAM2.1 {variant} @{image_size}"
        shown = f"{rate / 1e9:.0f} GFLOP/s"
        rows += judged(work, spent, checks, floor=flops / rate, rate=shown, place=place, objects=count)
    return rows


def sides(
    package: nn.Module, sam2: SAM2, images: Tensor, objects: int, place: Place = CPU
) -> dict[str, Callable[[], Tensor]]:
    """The two sides, from images to the masks' logits (S, B, m, m)."""
    asked = clicks(objects, images.shape[-1]).to(place.device)
    # Kept as the engine keeps them: on CUDA the recorded steps are theirs.
    runner, encoder = SliceRunner(sam2), SliceEncoder(sam2)

    def ours() -> Tensor:
        return run_ours(runner, LazyFeatures(encoder, lambda start, stop: images[start:stop], len(images)), asked)

    return {PACKAGE: _followed(package, images, asked, place), OURS: ours}


def _followed(package: nn.Module, images: Tensor, asked: Prompts, place: Place) -> Callable[[], Tensor]:
    def masks() -> Tensor:
        with place.autocast():
            return run_package(package, images, asked)

    return masks


def placed(package: nn.Module, place: Place) -> nn.Module:
    """Move the package's predictor to where it runs; its weights stay float32."""
    # Autocast keeps what it has cast of weights that ask for gradients alone, as those that the package builds do.
    return package.to(place.device).requires_grad_(place.dtype != torch.float32)


def variant_of(config: SAM2Config) -> str | None:
    """The package's name for a configuration; None when it has no such model."""
    sizes = (name for name in VARIANTS if SAM2Config.preset(name, image_size=config.image_size) == config)
    return next(sizes, None)


def models(variant: str, image_size: int) -> tuple[nn.Module, SAM2]:
    """The package's video predictor and our model, with the same random weights that keep every part busy."""
    if variant not in VARIANTS:
        raise ValueError(f"segmenter: expected a variant of {', '.join(VARIANTS)}, got {variant!r}")
    try:
        import hydra  # noqa: F401
        import sam2  # noqa: F401  registers the package's configuration files
    except ImportError as error:
        raise ValueError(f"segmenter: the baseline needs the sam2 package and hydra-core ({error})") from error
    package = _predictor(variant, image_size, ["++model._target_=sam2.sam2_video_predictor.SAM2VideoPredictor"])
    randomise(package)
    ours = SAM2(SAM2Config.preset(variant, image_size=image_size)).eval().requires_grad_(False)
    ours.load_official_state_dict(package.state_dict())
    return package, ours


def _predictor(variant: str, image_size: int, overrides: Sequence[str]) -> nn.Module:
    """A predictor as the package's `build_sam2_video_predictor` makes it, but for filling holes, which alters masks."""
    import hydra

    overrides = [
        *overrides,
        "++model.sam_mask_decoder_extra_args.dynamic_multimask_via_stability=true",
        "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_delta=0.05",
        "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_thresh=0.98",
        "++model.binarize_mask_from_pts_for_mem_enc=true",
        f"++model.image_size={image_size}",
    ]
    config = hydra.compose(config_name=f"configs/sam2.1/sam2.1_hiera_{VARIANTS[variant]}", overrides=overrides)
    return hydra.utils.instantiate(config.model, _recursive_=True).eval().requires_grad_(False)


def _whole_compiled(variant: str, package: nn.Module, place: Place) -> nn.Module:
    """The package's predictor with `vos_optimized=True`: all its parts under torch.compile, with the same weights."""
    overrides = [
        "++model._target_=sam2.sam2_video_predictor.SAM2VideoPredictorVOS",
        "++model.compile_image_encoder=True",
    ]
    # It says on stdout, which belongs to the result, that compiling takes long.
    with redirect_stdout(sys.stderr):
        whole = _predictor(variant, package.image_size, overrides)
    whole.load_state_dict(package.state_dict())
    return placed(whole, place)


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


def clicks(objects: int, size: int) -> Prompts:
    """A click on each object, at places (x, y) of a slice along its diagonal."""
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
def run_ours(runner: SliceRunner, features: LazyFeatures, asked: Prompts) -> Tensor:
    """The same by our runner, labels at the images' size included, as the package's masks are."""
    track = VolumeTrack(runner, features)
    track.prompt(0, asked)
    track.run(0, "forward")
    size = runner.sam2.config.image_size
    mask_epilogue(track.logits, (len(features), size, size))
    return track.logits


def distance(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Root mean square error over that of the logits, and the Dice of all masks together."""
    return relative_error(got, want), dice(got > 0, want > 0)


def rounded(got: Tensor, want: Tensor) -> tuple[float, float]:
    """As `distance` where rounding differs: the error is the median over the slices of all objects."""
    return typical_error(got, want), dice(got > 0, want > 0)


def dice(got: Tensor, want: Tensor) -> float:
    """Overlap of two masks of bool."""
    got, want = got.cpu(), want.cpu()
    return float(2 * (got & want).sum() / (got.sum() + want.sum()).clamp(min=1))


def _encoder_compiled(package: nn.Module, masks: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """With the image encoder compiled, as the package's own option does it."""
    forward = torch.compile(package.image_encoder.forward)

    def side() -> Tensor:
        with swapped(package.image_encoder, forward):
            return masks()

    return side
