"""A record on the model's grids, as int16 HU: what training reads, and what `data cache` keeps.

The encoder grid is the one the engine makes. The stack holds the SAM2 slices at `stack_side`, from which the image
encoder's size is a resize away. Masks are on the stack: label maps, one layer for each set of classes that do not
overlap.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medvl_sam2.kernels.volume_ingest import ingest_volume
from medvl_sam2.model.config import MedVLConfig
from medvl_sam2.model.processing import Box, GridTransform, ScanArray, VolumeProcessor
from medvl_sam2.training.datasets.base import Record, side_of
from medvl_sam2.training.datasets.images import Scan, read_masks, read_scan

LARGEST_STACK = 512
"""Published CTs are 512 x 512: a larger stack would hold interpolated pixels only."""
_LARGEST_LABEL = 255


@dataclass
class Prepared:
    """A record on the model's grids.

    Attributes:
        grid: (D, H, W) int16 HU, clipped to the encoder's window; relative values span it.
        stack: (S, R, R) int16 HU, clipped to the windows of the slices.
        layers: (L, S, R, R) uint8 label maps.
        names: Class -> (layer, value); classes without a voxel in the stack have none.
        empty: Classes with a mask and no voxel in the whole scan.
        counts: Class -> (S,) pixels on each slice.
    """

    grid: np.ndarray
    stack: np.ndarray
    layers: np.ndarray
    names: dict[str, tuple[int, int]] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    counts: dict[str, np.ndarray] = field(default_factory=dict)


def stack_side(model: MedVLConfig) -> int:
    """Side of the kept slices."""
    return min(model.sam2.image_size, LARGEST_STACK)


def prepare(record: Record, root: Path, model: MedVLConfig) -> Prepared:
    """Read a record and bring it onto the model's grids.

    Args:
        record: The record.
        root: Of its data set.
        model: Gives grids and windows.

    Raises:
        InputError: A file is missing or broken; it is named.
    """
    scan = read_scan(record, root)
    processor = VolumeProcessor(model)
    array = ScanArray(scan.voxels, scan.slope, scan.intercept) if record.hu else _relative(scan, model)
    transform = processor.transform(array) if record.hu else _relative_transform(array, model)
    low, high = model.volume.window
    grid = processor.encoder_grid(array, transform)[0].numpy() * (high - low) + low
    side = stack_side(model)
    prepared = Prepared(_int16(grid), _stack(array, transform, model, side), np.zeros((0, 0, 0, 0), np.uint8))
    _add_masks(prepared, record, root, scan, transform)
    if not record.placed:
        _face(prepared)
    return prepared


def _relative(scan: Scan, model: MedVLConfig) -> ScanArray:
    """Values without a unit, stretched so that their range spans the window: M3D's min-max to 0-1."""
    low, high = model.volume.window
    least, most = float(scan.voxels.min()), float(scan.voxels.max())
    slope = (high - low) / max(most - least, 1e-8)
    return ScanArray(scan.voxels, slope, low - least * slope)


def _relative_transform(scan: ScanArray, model: MedVLConfig) -> GridTransform:
    """Crop to all that is above the least value, as MONAI's CropForeground in M3D's preparation."""
    shown = scan.voxels > scan.voxels.min()
    box: Box = (0, 0, 0, *scan.voxels.shape)
    if shown.any():
        spans = [np.flatnonzero(shown.any(axis)) for axis in ((1, 2), (0, 2), (0, 1))]
        box = (*(int(s[0]) for s in spans), *(int(s[-1]) + 1 for s in spans))
    return GridTransform(scan.voxels.shape, box, min(model.volume.slices, box[3] - box[0]))


def _positions(transform: GridTransform) -> np.ndarray:
    """Native slice coordinate of each slice of the stack, as in `VolumeProcessor.slice_images`."""
    first, step = transform.box[0], (transform.box[3] - transform.box[0]) / transform.slices
    return first + (np.arange(transform.slices) + 0.5) * step - 0.5


def _stack(scan: ScanArray, transform: GridTransform, model: MedVLConfig, side: int) -> np.ndarray:
    low, high = (float(pick(window)) for pick, window in zip((min, max), zip(*model.volume.slice_windows)))
    values = ingest_volume(
        scan.voxels,
        (transform.slices, side, side),
        box=transform.box,
        slope=scan.slope,
        intercept=scan.intercept,
        window=(low, high),
        z_positions=_positions(transform).tolist(),
    )
    return _int16(values.numpy() * (high - low) + low)


def _int16(values: np.ndarray) -> np.ndarray:
    return np.rint(values).astype(np.int16)


def _add_masks(prepared: Prepared, record: Record, root: Path, scan: Scan, transform: GridTransform) -> None:
    z0, y0, x0, z1, y1, x1 = transform.box
    depth, side, _ = prepared.stack.shape
    rows, columns = (
        (low + (np.arange(side) + 0.5) * (high - low) / side).astype(int) for low, high in ((y0, y1), (x0, x1))
    )
    planes = np.clip(np.rint(_positions(transform)).astype(int), z0, z1 - 1)
    layers: list[np.ndarray] = []
    labels: list[int] = []
    seen: set[str] = set()
    for mask, voxels in read_masks(record, root, scan):
        if not voxels.any():
            continue
        seen.add(mask.name)
        shown = voxels[np.ix_(planes, rows, columns)]
        if not shown.any():
            continue
        if mask.name in prepared.names:
            # One class in several files or values: parts of one whole.
            layer, value = prepared.names[mask.name]
            free = layers[layer] == 0
            layers[layer][shown & free] = value
            prepared.counts[mask.name] = (layers[layer] == value).sum((1, 2))
            continue
        layer = next((n for n, used in enumerate(layers) if labels[n] < _LARGEST_LABEL and not used[shown].any()), None)
        if layer is None:
            layer = len(layers)
            layers.append(np.zeros((depth, side, side), np.uint8))
            labels.append(0)
        labels[layer] += 1
        layers[layer][shown] = labels[layer]
        prepared.names[mask.name] = layer, labels[layer]
        prepared.counts[mask.name] = shown.sum((1, 2))
    prepared.empty = sorted({mask.name for mask in record.masks} - seen)
    if layers:
        prepared.layers = np.stack(layers)


def _face(prepared: Prepared) -> None:
    """Turn a scan without a known orientation so that its left-labelled classes lie at high x, as in every other."""
    centres: dict[str, list[float]] = {"left": [], "right": []}
    for name, (layer, value) in prepared.names.items():
        if (side := side_of(name)) is not None:
            centres[side].append(float(np.nonzero(prepared.layers[layer] == value)[2].mean()))
    if not any(centres.values()):
        return
    # With one side alone, the middle of the picture stands for the other.
    middle = prepared.stack.shape[-1] / 2
    if np.mean(centres["left"] or [middle]) < np.mean(centres["right"] or [middle]):
        prepared.grid, prepared.stack, prepared.layers = (
            np.ascontiguousarray(array[..., ::-1]) for array in (prepared.grid, prepared.stack, prepared.layers)
        )
