"""The loss of the paper's stages, as a module, so that it can be spread over devices."""

import torch
from torch import Tensor, nn

from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.training.batches import JointBatch
from medvl_sam2.training.config import LossConfig
from medvl_sam2.training.loop import Losses
from medvl_sam2.training.segmentation import Clips, clip_losses
from medvl_sam2.training.text_loss import text_loss


class JointObjective(nn.Module):
    """Text and segmentation losses of a batch, weighted.

    A batch without objects still runs the trained parts of segmentation, on one blank slice and with weight zero:
    processes that train together must all have gradients for the same parameters (as Sa2VA does for text batches).

    Args:
        model: With the stage's parameters unfrozen.
        weights: Of the terms.
    """

    def __init__(self, model: MedVLSAM2, weights: LossConfig):
        super().__init__()
        self.model = model
        self.weights = weights
        self.segments = any(p.requires_grad for p in [*model.sam2.parameters(), *model.seg_bridge.parameters()])

    def forward(self, batch: JointBatch) -> Losses:
        """Named losses; "loss" is their weighted sum."""
        model, text = self.model, batch.text
        if batch.features is None:
            visual = model.visual_tokens(batch.grid.to(model.vision.cls_token.dtype))
        else:
            visual = model.projector(batch.features.to(model.vision.cls_token.dtype))
        hidden = model(
            text.input_ids, visual, attention_mask=text.attention_mask, position_ids=text.position_ids
        ).hidden
        ce = text_loss(model.language, hidden, text.labels)
        terms = {"ce": ce, "loss": self.weights.ce * ce}
        if batch.clips is not None and len(batch.clips.owner):
            masks = self._masks(batch.clips, model.seg_prompts(hidden, text.input_ids))
            return {**masks, **terms, "loss": terms["loss"] + masks["loss"]}
        if self.segments and self.training:
            idle = self._masks(self._blank(hidden.device), model.seg_bridge(hidden[:1, -1]))
            terms["loss"] = terms["loss"] + 0 * idle["loss"]
        return terms

    def _masks(self, clips: Clips, prompts: Tensor) -> Losses:
        sam2 = self.model.sam2
        features = sam2.encode_images(clips.images.flatten(0, 1).to(sam2.no_mem_embed.dtype))
        if clips.semantic:
            return clip_losses(sam2, features, clips, prompts, self.weights, self.model.config)
        losses = clip_losses(sam2, features, clips, None, self.weights, self.model.config)
        # The [SEG] path takes part in every step, as distributed training needs.
        return {**losses, "loss": losses["loss"] + 0 * prompts.sum()}

    def _blank(self, device: torch.device) -> Clips:
        settings = self.model.config.sam2
        return Clips(
            images=torch.zeros(1, 1, 3, settings.image_size, settings.image_size, device=device),
            owner=torch.zeros(1, dtype=torch.long, device=device),
            targets=torch.zeros(1, 1, settings.mask_size, settings.mask_size, device=device),
            points=torch.zeros(1, 0, 2, device=device),
            point_labels=torch.zeros(1, 0, dtype=torch.int32, device=device),
            semantic=True,
            memory=False,
        )
