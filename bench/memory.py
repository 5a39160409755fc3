"""Measures how far memory rises while a volume is segmented, beside the video predictor of the sam2 package."""

import multiprocessing
from collections.abc import Sequence

import numpy as np
import torch

from medvl_sam2.bench.kernels import Row, environment
from medvl_sam2.bench.place import CPU, Place, watched
from medvl_sam2.bench.rows import checked
from medvl_sam2.bench.segmenter import (
    OURS,
    PACKAGE,
    clicks,
    distance,
    made_up_images,
    models,
    placed,
    rounded,
    run_ours,
    run_package,
)
from medvl_sam2.engine.runner import SliceRunner
from medvl_sam2.engine.slice_features import LazyFeatures, SliceEncoder
from medvl_sam2.model.modeling import cast_weights


def run(
    *,
    variant: str = "tiny",
    image_size: int = 512,
    slices: Sequence[int] = (32, 128),
    objects: int = 8,
    place: Place = CPU,
) -> list[Row]:
    """Measure each side in a process of its own: the memory of the device on CUDA, else the resident memory.

    The package is given all images as one tensor, which it needs; ours makes them from 16-bit voxels as it goes. Both
    sides give their masks, which are compared before a share is given.

    Args:
        variant: As in `medvl_sam2.bench.segmenter.run`.
        image_size: As there.
        slices: Numbers of slices.
        objects: Number of objects.
        place: Where both sides run. On CUDA, and in bfloat16, they are held to the package in float32 on the CPU.

    Returns:
        One dict per side and number of slices; `share` is the memory of the side over the package's, None where the
        masks are wrong.

    Raises:
        ValueError: No sam2 package, or a CPU under another system than Linux, which tells no peak.
    """
    if watched(lambda: None, place.device)[1] is None:
        raise ValueError("memory: expected Linux or a CUDA device, whose peaks are known; run it there")
    rows = []
    for count in slices:
        measured = {side: _measured(side, variant, image_size, count, objects, place) for side in (PACKAGE, OURS)}
        masks = {side: torch.from_numpy(logits) for side, (_, logits) in measured.items()}
        if place == CPU:
            checks = checked(masks, distance)
        else:
            _, exact = _measured(PACKAGE, variant, image_size, count, objects, CPU)
            checks = checked(masks, rounded, torch.from_numpy(exact))
        base, about = measured[PACKAGE][0], environment(place.device)
        for side, (rise, _) in measured.items():
            sound = checks[side].correct and checks[PACKAGE].correct
            row = {"work": f"SAM2.1 {variant} @{image_size}", "slices": count, "objects": objects, "provider": side}
            row |= {"peak_mb": rise / 1e6, "share": rise / base if sound else None, "correct": checks[side].correct}
            later = {"dtype": place.dtype_name, "error": checks[side].error, "dice": checks[side].dice}
            rows.append({**row, **about, **later})
    return rows


def _measured(*given: object) -> tuple[int | None, np.ndarray]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_rise, given)


def _rise(
    side: str, variant: str, image_size: int, slices: int, objects: int, place: Place
) -> tuple[int | None, np.ndarray]:
    """Bytes by which memory rises for one side, where that is known, and its logits (S, B, m, m)."""
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    package, sam2 = models(variant, image_size)
    asked = clicks(objects, image_size).to(place.device)
    voxels = (made_up_images(slices, image_size)[:, 0] * 1000).to(torch.int16)

    def images(start: int, stop: int) -> torch.Tensor:
        return (voxels[start:stop, None].float() / 1000).expand(-1, 3, -1, -1)

    if side == OURS:
        del package
        cast_weights(sam2.to(place.device), place.dtype)
        source = LazyFeatures(SliceEncoder(sam2), images, slices)
        found, rise = watched(lambda: run_ours(SliceRunner(sam2), source, asked), place.device)
    else:
        placed(package, place)

        def theirs() -> torch.Tensor:
            with place.autocast():
                return run_package(package, images(0, slices).contiguous().to(place.device), asked)

        found, rise = watched(theirs, place.device)
    return rise, found.float().cpu().numpy()


def table(rows: Sequence[Row]) -> str:
    """Lay rows of `run` out for reading."""
    lines = [f"{'slices':>6} {'objects':>7} {'provider':13} {'peak MB':>8} {'share':>6}  error, Dice"]
    for row in rows:
        share = "-" if row["share"] is None else f"{row['share']:.3f}"
        place = f"{row['slices']:6} {row['objects']:7}"
        verdict = f"{row['error']:.1e}, {row['dice']:.5f}{'' if row['correct'] else ' WRONG'}"
        lines.append(f"{place} {row['provider']:13} {row['peak_mb']:8.0f} {share:>6}  {verdict}")
    return "\n".join(lines)
