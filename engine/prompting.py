"""A user's points and boxes, from any space of the scan to pixels of SAM2's slices."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from medvl_sam2.engine.geometry import InputError, Space, Volume
from medvl_sam2.model.processing import GridTransform
from medvl_sam2.model.sam2 import Prompts

Point = Sequence[float]
Box = Sequence[float]


@dataclass(frozen=True)
class SlicePrompts:
    """Prompts of one object by slice.

    Attributes:
        prompts: Points and boxes of each prompted slice, batch 1.
        start: Slice to start from: of the first positive point or the middle of the box; None with negative points
            alone.
        extent: First and last slice that a box allows, or None.
    """

    prompts: dict[int, Prompts]
    start: int | None
    extent: tuple[int, int] | None = None


def slice_prompts(
    volume: Volume,
    transform: GridTransform,
    image_size: int,
    points: Sequence[Point] | None,
    box: Box | None,
    space: Space,
) -> SlicePrompts:
    """Snap 3D prompts to the slice stack.

    Args:
        volume: The scan.
        transform: Its slice stack.
        image_size: Side of a SAM2 image in pixels.
        points: (i, j, k) or (i, j, k, label); label above zero marks the object, else the background; default +1.
        box: (i0, j0, k0, i1, j1, k1), both corners inside the box.
        space: Of both: "voxel" (the file's own index), "ras" or "lps" millimetres.

    Raises:
        InputError: A point outside the volume, a box upside down or outside, or numbers missing.
    """
    size = (transform.slices, image_size, image_size)
    marks: dict[int, list[tuple[float, float, int]]] = {}
    start = None
    for point in () if points is None else points:
        x, y, z, label = _point(volume, point, space)
        index = transform.nearest_slice(z)
        (px, py, _), *_ = transform.to_grid(np.array([[x, y, z]]), size)
        marks.setdefault(index, []).append((*np.clip((px, py), 0, image_size - 1), label))
        if label and start is None:
            start = index
    corners, extent = None, None
    if box is not None:
        low, high = _box(volume, box, space)
        corners = np.clip(transform.to_grid(np.array([low, high]), size)[:, :2], -0.5, image_size - 0.5).reshape(4)
        extent = transform.nearest_slice(low[2] + 0.5), transform.nearest_slice(high[2] - 0.5)
        start = transform.nearest_slice((low[2] + high[2]) / 2)
        marks.setdefault(start, [])
    prompts = {}
    for index, on_slice in marks.items():
        given = {}
        if on_slice:
            values = torch.tensor(on_slice, dtype=torch.float32)
            given = {"points": values[None, :, :2], "labels": values[None, :, 2].int()}
        if corners is not None and index == start:
            given["boxes"] = torch.tensor(corners, dtype=torch.float32)[None]
        prompts[index] = Prompts(**given)
    return SlicePrompts(prompts, start, extent)


def _point(volume: Volume, point: Point, space: Space) -> tuple[float, float, float, int]:
    if len(point) not in (3, 4):
        raise InputError(
            f"point {_show(point)}: expected three coordinates and perhaps a label, got {len(point)} values"
        )
    index = volume.to_index(np.asarray(point[:3], float), space)
    if not volume.contains(index):
        raise InputError(
            f"point {_show(point)}: outside the volume, which spans {_span(volume, space)} in {space} space"
        )
    return (*index.tolist(), int(len(point) == 3 or point[3] > 0))


def _box(volume: Volume, box: Box, space: Space) -> tuple[np.ndarray, np.ndarray]:
    """Canonical (x, y, z) edges of the box, clipped to the volume."""
    if len(box) != 6:
        raise InputError(f"box {_show(box)}: expected six numbers (two corners), got {len(box)}")
    first, second = np.asarray(box[:3], float), np.asarray(box[3:], float)
    if (first > second).any():
        raise InputError(f"box {_show(box)}: upside down; give the lower corner first, on every axis")
    corners = volume.to_index(_corners(first, second), space)
    low, high = corners.min(0) - 0.5, corners.max(0) + 0.5
    end = np.array(volume.shape[::-1]) - 0.5
    if (high <= -0.5).any() or (low >= end).any():
        raise InputError(f"box {_show(box)}: outside the volume, which spans {_span(volume, space)} ({space})")
    return np.maximum(low, -0.5), np.minimum(high, end)


def _corners(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """All eight corners (8, 3) of a box: where axes turn against each other, two opposite ones do not span it."""
    return np.array(list(product(*zip(low, high))), float)


def _show(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _span(volume: Volume, space: Space) -> str:
    ends = volume.from_index(_corners(np.zeros(3), np.array(volume.shape[::-1]) - 1), space)
    return f"{_show(ends.min(0).round(1))} to {_show(ends.max(0).round(1))}"
