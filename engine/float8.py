"""Float8 weights for the layers that gain from them, kept only if a scan's masks and answers stay what they were."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from medvl_sam2.engine.geometry import InputError, Volume
from medvl_sam2.engine.scan_work import ScanWork
from medvl_sam2.engine.segmentation import dice
from medvl_sam2.engine.session import VolumeSession
from medvl_sam2.engine.timing import Stages
from medvl_sam2.kernels.float8_linear import Float8Linear
from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.model.prompts import REPORT_REQUEST

if TYPE_CHECKING:
    from medvl_sam2.engine.engine import MedVLEngine

logger = logging.getLogger(__name__)

# Of the report that is compared.
_REPORT_TOKENS = 256


@dataclass(frozen=True)
class Float8Check:
    """What float8 weights changed on a scan.

    Attributes:
        dice: Overlap of each mask with the one before.
        tokens: Share of the report's tokens that the model would still say next.
        kept: Whether all of it was within the bounds, and float8 stays.
    """

    dice: dict[str, float]
    tokens: float
    kept: bool


class Float8Layers:
    """The layers in question, in both forms: those of the LLM's blocks, and of SAM2's image encoder the third stage's.

    Most of the encoder's blocks lie there. Their qkv layers are part of the window attention and stay, as do narrow
    layers elsewhere, the embeddings and the output over the vocabulary.

    Args:
        model: With its LoRA merged; its linear layers are replaced in place.
    """

    def __init__(self, model: MedVLSAM2) -> None:
        self._places = [(owner, name, layer, Float8Linear(layer)) for owner, name, layer in _candidates(model)]

    def use(self, is_float8: bool) -> None:
        """Put one form or the other in place."""
        for owner, name, plain, narrow in self._places:
            setattr(owner, name, narrow if is_float8 else plain)


def _candidates(model: MedVLSAM2) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    trunk = model.sam2.image_encoder.trunk
    first, last = trunk.stage_ends[1] + 1, trunk.stage_ends[2]
    for root in (*model.language.causal.model.layers, *trunk.blocks[first : last + 1]):
        for owner in root.modules():
            for name, layer in owner.named_children():
                if isinstance(layer, nn.Linear) and name != "qkv" and Float8Linear.fits(layer):
                    yield owner, name, layer


def use_float8(
    engine: "MedVLEngine",
    model: MedVLSAM2,
    volume: Volume,
    targets: Sequence[str],
    *,
    least_dice: float,
    least_tokens: float,
) -> Float8Check:
    """See `MedVLEngine.use_float8`."""
    masks, (question, report) = _masks(engine, volume, targets), _report(engine, volume)
    if not any(mask.any() for mask in masks.values()):
        raise InputError(f"targets: expected one that the model finds in the scan, got {', '.join(targets)}")
    layers = Float8Layers(model)
    layers.use(True)
    engine.forget()
    try:
        now = _masks(engine, volume, targets)
        prefix = ScanWork(engine, volume).prefix(Stages(engine.device))
        said = engine.language.predicted(prefix, question, report)
        overlap = {name: dice(mask, now[name]) for name, mask in masks.items()}
        tokens = float(np.mean([a == b for a, b in zip(said, report)]))
        kept = min(overlap.values()) >= least_dice and tokens >= least_tokens
    except BaseException:
        layers.use(False)
        engine.forget()
        raise
    if not kept:
        layers.use(False)
        engine.forget()
        logger.warning("float8: Dice %.4f, tokens %.3f; the weights stay as they were", min(overlap.values()), tokens)
    return Float8Check(overlap, tokens, kept)


def _masks(engine: "MedVLEngine", volume: Volume, targets: Sequence[str]) -> dict[str, np.ndarray]:
    found = VolumeSession(engine, volume).segment_all(targets)
    return {target: one.mask for target, one in zip(targets, found)}


def _report(engine: "MedVLEngine", volume: Volume) -> tuple[list[int], list[int]]:
    """The question's tokens and those of the report that the model writes."""
    prefix = ScanWork(engine, volume).prefix(Stages(engine.device))
    question = engine.chat.question(REPORT_REQUEST)
    limit = min(_REPORT_TOKENS, engine.room - len(question))
    return question, [step.token for step in engine.language.generate(prefix, question, max_tokens=limit)]
