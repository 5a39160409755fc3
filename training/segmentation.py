"""Segmentation on clips of slices, with SAM2's memory on, and its loss."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from medvl_sam2.kernels.segmentation_loss import segmentation_loss
from medvl_sam2.model.config import MedVLConfig
from medvl_sam2.model.sam2 import SAM2, MemoryBank, Prompts, SliceFeatures
from medvl_sam2.training.config import LossConfig


@dataclass
class Clips:
    """Clips of consecutive slices and the objects asked for on them.

    Attributes:
        images: (V, T, 3, R, R) normalised.
        owner: (N,) clip of each object.
        targets: (N, T, m, m) share of each mask pixel inside the object, 0-1.
        points: (N, P, 2) prompts on the first slice, in image pixels; P is 0 without spatial prompts.
        point_labels: (N, P): 1 and 0 clicks, 2 and 3 box corners, -1 none.
        semantic: Whether the objects are asked for by language too.
        memory: Carry SAM2's memory from slice to slice; False asks for the objects on every slice anew, which is how
            a text-prompted scan finds its best slice.
    """

    images: Tensor
    owner: Tensor
    targets: Tensor
    points: Tensor
    point_labels: Tensor
    semantic: bool
    memory: bool


def clip_losses(
    sam2: SAM2,
    features: SliceFeatures,
    clips: Clips,
    embeddings: Tensor | None,
    weights: LossConfig,
    settings: MedVLConfig,
) -> dict[str, Tensor]:
    """Run the clips through SAM2 with memory and score every slice.

    Args:
        sam2: The model.
        features: Of all V * T slices, clip by clip.
        clips: Objects and targets.
        embeddings: (N, 1, d) semantic prompts, None for purely spatial prompting.
        weights: Of the terms.
        settings: Of the model: whether the semantic prompt is given on every slice, and how many slices a whole scan
            has, which scales the temporal encoding of SAM2's object pointers.

    Returns:
        "loss" with the weights applied, and its terms: "bce", "dice", "object_score", "iou".
    """
    length = clips.images.shape[1]
    if not clips.memory:
        each = (clips.owner[:, None] * length + torch.arange(length, device=clips.owner.device)).flatten()
        prompts = Prompts(embeddings=embeddings.repeat_interleave(length, 0))
        step = sam2.step(
            features.select(each), prompts, None, is_conditioning=True, encode_memory=False, gate_by_object_score=False
        )
        return _score(step.low_res_logits, step.object_score, step.iou, clips.targets, weights)
    memory = MemoryBank(settings.volume.slices)
    steps = []
    for t in range(length):
        step = sam2.step(
            features.select(clips.owner * length + t),
            _prompts(clips, embeddings, first=t == 0, every_slice=settings.seg.every_slice),
            memory if t else None,
            is_conditioning=t == 0,
            slice_index=t,
            encode_memory=t + 1 < length,
            gate_by_object_score=False,
        )
        if step.memory is not None:
            memory.add(t, step.memory, is_conditioning=t == 0)
        steps.append(step)
    logits, scores, ious = (
        torch.stack([getattr(step, name) for step in steps], 1) for name in ("low_res_logits", "object_score", "iou")
    )
    return _score(logits, scores, ious, clips.targets, weights)


def _prompts(clips: Clips, embeddings: Tensor | None, *, first: bool, every_slice: bool) -> Prompts | None:
    if first:
        spatial = clips.points.shape[1] > 0
        return Prompts(
            points=clips.points if spatial else None,
            labels=clips.point_labels if spatial else None,
            embeddings=embeddings,
        )
    return Prompts(embeddings=embeddings) if embeddings is not None and every_slice else None


def _score(logits: Tensor, scores: Tensor, ious: Tensor, targets: Tensor, weights: LossConfig) -> dict[str, Tensor]:
    # One row per object and slice, object by object.
    logits, targets = logits.reshape(-1, *targets.shape[-2:]).float(), targets.flatten(0, 1)
    # Half a mask pixel is the least that counts as the object being on a slice.
    present = (targets.sum((1, 2)) > 0.5).float()
    bce, dice = segmentation_loss(logits, targets)
    # A purely spatial batch may hold no object that can be marked.
    count = max(1, len(present))
    # SAM2's own training leaves the mask of an absent object free; here it is pushed down by BCE, since a gate that
    # fails should not open on noise.
    terms = {
        "bce": bce.sum() / count,
        "dice": (dice * present).sum() / present.sum().clamp(min=1),
        "object_score": F.binary_cross_entropy_with_logits(scores.flatten().float(), present, reduction="sum") / count,
    }
    with torch.no_grad():
        mask, truth = logits > 0, targets > 0.5
        overlap = (mask & truth).sum((1, 2)) / (mask | truth).sum((1, 2)).clamp(min=1)
    terms["iou"] = ((ious.flatten().float() - overlap).abs() * present).sum() / present.sum().clamp(min=1)
    terms["loss"] = sum(getattr(weights, name) * value for name, value in terms.items())
    return terms
