"""Clips of slices with the objects asked for on them, and the points and boxes that mark them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from medvl_sam2.model.config import MedVLConfig
from medvl_sam2.model.processing import VolumeProcessor
from medvl_sam2.training.segmentation import Clips


@dataclass(frozen=True)
class PromptKind:
    """Prompts of one step, the same for all its objects.

    Attributes:
        semantic: Whether they are asked for by language too.
        points: Points per object: 0, 1 (click) or 2 (box corners).
        memory: See `Clips`.
    """

    semantic: bool
    points: int
    memory: bool = True


# Share of each kind of step. Those without memory take half the time of the others, and the masks that they teach serve
# all. Purely spatial ones belong to every stage that trains the mask decoder: without them it forgets clicks and boxes.
_KINDS = (
    (PromptKind(True, 0, memory=False), 0.35),
    (PromptKind(True, 0), 0.13),
    (PromptKind(True, 1), 0.13),
    (PromptKind(True, 2), 0.13),
    (PromptKind(False, 1), 0.13),
    (PromptKind(False, 2), 0.13),
)


def prompt_kind(rng: np.random.Generator) -> PromptKind:
    """Draw the prompts of a step."""
    return _KINDS[int(rng.choice(len(_KINDS), p=[share for _, share in _KINDS]))][0]


def make_clip(
    hu: Tensor,
    masks: list[np.ndarray],
    prompts: list[tuple[np.ndarray, np.ndarray]],
    kind: PromptKind,
    processor: VolumeProcessor,
    model: MedVLConfig,
) -> Clips:
    """One clip.

    Without language an object that is not on the first slice cannot be asked for, and is left out.

    Args:
        hu: (T, R, R) HU at the image encoder's size.
        masks: Of each object, (T, r, r) bool; r may be smaller than R.
        prompts: Of each object, in the pixels of its mask; see `spatial_prompt`.
        kind: Of the prompts.
        processor: Of the model.
        model: Its config.
    """
    if not kind.semantic:
        shown = [bool(mask[0].any()) for mask in masks]
        masks, prompts = ([part for part, here in zip(parts, shown) if here] for parts in (masks, prompts))
    size, side = model.sam2.mask_size, model.sam2.image_size
    channels = torch.stack([windowed(hu, window) for window in model.volume.slice_windows], 1)
    shares = [F.adaptive_avg_pool2d(torch.from_numpy(mask).float(), size) for mask in masks]
    scales = [side / mask.shape[-1] for mask in masks]
    points = np.array([spots * scale for (spots, _), scale in zip(prompts, scales)])
    labels = np.array([label for _, label in prompts])
    return Clips(
        images=processor.normalise(channels),
        owner=torch.zeros(len(masks), dtype=torch.long),
        targets=torch.stack(shares) if shares else torch.zeros(0, len(hu), size, size),
        points=torch.tensor(points, dtype=torch.float32).view(len(masks), kind.points, 2),
        point_labels=torch.tensor(labels, dtype=torch.int32).view(len(masks), kind.points),
        semantic=kind.semantic,
        memory=kind.memory,
    )


def spatial_prompt(mask: np.ndarray, points: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Mark an object on one slice as a user would.

    Args:
        mask: (R, R) bool.
        points: 1 for a click, 2 for a loose box, 0 for neither.
        rng: Draws place and looseness.

    Returns:
        (points, 2) x and y in the mask's pixels, and (points,) SAM2 labels, -1 where the object is not on the slice.
    """
    if not points or not mask.any():
        return np.zeros((points, 2)), np.full(points, -1)
    rows, columns = np.nonzero(mask)
    if points == 1:
        # Users click well inside: the deepest of a few random pixels.
        tries = rng.integers(len(rows), size=8)
        centre = np.array([columns.mean(), rows.mean()])
        spots = np.stack([columns[tries], rows[tries]], 1)
        near = np.abs(spots - centre).sum(1).argmin() if rng.random() < 0.7 else 0
        return spots[near : near + 1] + 0.5, np.array([1])
    low = np.array([columns.min(), rows.min()], float)
    high = np.array([columns.max(), rows.max()], float) + 1
    noise = rng.normal(0, 0.04, (2, 2)) * (high - low) + rng.normal(0, 0.7, (2, 2))
    if rng.random() < 0.5:
        # A 3D box is as wide as the object anywhere, so loose on most of its slices.
        noise += rng.uniform(0, 0.4, (2, 2)) * (high - low) * np.array([[-1.0], [1.0]])
    return np.stack([low + noise[0], high + noise[1]]), np.array([2, 3])


def windowed(hu: Tensor, window: tuple[float, float]) -> Tensor:
    """HU -> 0-1."""
    return ((hu - window[0]) / (window[1] - window[0])).clamp(0, 1)


def join_clips(clips: list[Clips], kind: PromptKind) -> Clips:
    """One batch of the clips of several scans."""
    return Clips(
        images=torch.stack([clip.images for clip in clips]),
        owner=torch.cat([clip.owner + i for i, clip in enumerate(clips)]),
        targets=torch.cat([clip.targets for clip in clips]),
        points=torch.cat([clip.points for clip in clips]),
        point_labels=torch.cat([clip.point_labels for clip in clips]),
        semantic=kind.semantic,
        memory=kind.memory,
    )
