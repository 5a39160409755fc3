"""One segmented object, in the scan's own voxels."""

import os
import secrets
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from medvl_sam2.engine.geometry import InputError, Space, Volume
from medvl_sam2.engine.masks import read_mask, write_mask
from medvl_sam2.kernels.mask_epilogue import mask_epilogue
from medvl_sam2.model.processing import GridTransform

if TYPE_CHECKING:
    from collections.abc import Sequence

_CLAMP = 10.0


@dataclass(frozen=True)
class Asked:
    """What a mask was asked for by, its refinements included.

    Attributes:
        target: Words, or None.
        points: Clicks (i, j, k) or (i, j, k, label).
        box: (i0, j0, k0, i1, j1, k1), or None.
        space: Of points and box.
        id: Of the mask; under it a session keeps what a refinement goes on from.
    """

    target: str | None = None
    points: tuple[tuple[float, ...], ...] = ()
    box: tuple[float, ...] | None = None
    space: Space = "voxel"
    id: str = field(default_factory=lambda: f"mask_{secrets.token_hex(8)}")


@dataclass(eq=False)
class Segmentation:
    """Mask of one object, with what the model said about it.

    Attributes:
        name: What was asked for.
        volume: The scan.
        absent: The model answered that there is no such thing; the mask is empty then.
        text: The model's answer.
        transform: Between the scan's voxels and the slice stack.
        logits: (S, m, m) mask logits of the slice stack; None when absent.
        present: (S,) slices that hold the object; None when absent.
        scores: Object-score logit of each slice; empty when absent.
        start: Slice of the stack where the memory started; None without memory.
        timings: Seconds per stage of this request.
        asked: What it was asked for by; `VolumeSession.refine` goes on from there.
    """

    name: str
    volume: Volume
    absent: bool
    text: str
    transform: GridTransform
    logits: Tensor | None = None
    present: Tensor | None = None
    scores: list[float] = field(default_factory=list)
    start: int | None = None
    timings: dict[str, float] = field(default_factory=dict)
    asked: Asked = field(default_factory=Asked)

    @property
    def gated_logits(self) -> Tensor | None:
        """(S, m, m) logits in -10 to 10 with slices that do not hold the object at -10; None when absent."""
        if self.logits is None:
            return None
        # Bounded, so that between a slice with the object and one without the surface lies half way.
        logits = self.logits.float().clamp(-_CLAMP, _CLAMP)
        return torch.where(self.present[:, None, None], logits, -_CLAMP)

    @cached_property
    def mask(self) -> np.ndarray:
        """(Z, Y, X) bool in canonical order, on the scan's own grid."""
        if self.absent:
            return np.zeros(self.volume.shape, bool)
        return label_map([self]).astype(bool)

    @property
    def volume_ml(self) -> float:
        """Volume in millilitres."""
        return float(np.count_nonzero(self.mask) * self.volume.voxel_ml)

    def dice(self, other: "Segmentation | np.ndarray | str | os.PathLike", label: int | None = None) -> float:
        """Dice overlap on the scan's own grid.

        Args:
            other: A segmentation of the same scan, a (Z, Y, X) canonical array, or a mask file, which is brought to
                the scan's grid when it lies on another.
            label: Value that counts in `other`; everything above zero when None.

        Returns:
            2 |A and B| / (|A| + |B|); 1 when both are empty.

        Raises:
            InputError: The other mask cannot be read or has another shape.
        """
        if isinstance(other, Segmentation):
            other = other.mask
        elif not isinstance(other, np.ndarray):
            other, _ = read_mask(other, self.volume)
        if other.shape != self.volume.shape:
            raise InputError(f"other: expected a mask of shape {self.volume.shape}, got {other.shape}")
        return dice(self.mask, other > 0 if label is None else other == label)

    def save(self, path: str | os.PathLike) -> None:
        """Write the mask on the grid of the scan's own file, as label 1.

        Raises:
            InputError: The place cannot be written.
        """
        write_mask(path, self.mask, self.volume, {1: self.name})


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice of two bool arrays; 1 when both are empty."""
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return 1.0 if total == 0 else float(2 * np.count_nonzero(a & b) / total)


def label_map(segmentations: "Sequence[Segmentation]") -> np.ndarray:
    """Join objects of one scan: (Z, Y, X) uint8, object n as label n; where objects meet the surer one wins.

    Raises:
        InputError: More objects than a label map holds.
    """
    if len(segmentations) > 255:
        raise InputError(
            f"names: expected at most 255 for one label map, got {len(segmentations)}; write several files"
        )
    first = segmentations[0]
    shown = [(value, s.gated_logits) for value, s in enumerate(segmentations, 1) if not s.absent]
    if not shown:
        return np.zeros(first.volume.shape, np.uint8)
    return (
        mask_epilogue(
            torch.stack([logits for _, logits in shown], dim=1),
            first.volume.shape,
            box=first.transform.box,
            label_values=[value for value, _ in shown],
        )
        .cpu()
        .numpy()
    )
