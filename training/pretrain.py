"""Pre-training of the parts, where the paper starts from public checkpoints.

The full model begins with M3D-CLIP, InternVL2.5 and SAM2, trained elsewhere. The `tiny` preset has no such parts, so
each learns its trade on phantoms first: SAM2 on clicks, boxes and class prompts, the LLM on facts without images, the
3D ViT with the projector on what scans and patches hold (in place of image-report pairs). The heads made here are
thrown away.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.model.sam2 import SliceFeatures
from medvl_sam2.model.seg_bridge import seg_positions
from medvl_sam2.training import checkpoint
from medvl_sam2.training.batches import CLASSES, Batches, ClassBatch, LanguageBatch, VisionBatch
from medvl_sam2.training.config import TrainConfig
from medvl_sam2.training.distributed import World
from medvl_sam2.training.facts import FACTS, fact_places
from medvl_sam2.training.loop import Losses, run_phase
from medvl_sam2.training.packing import IGNORE
from medvl_sam2.training.phantom import STRUCTURES
from medvl_sam2.training.segmentation import clip_losses

# Patches are mostly of a few large structures; a logit offset of this much starts every class as rare.
_RARE_LOGIT = -4.0
# Weight of the dense term beside the promptable one.
_DENSE_WEIGHT = 0.5
# A finding fills few patches of few scans; unweighted, organs are all that the ViT learns.
_FINDINGS_WEIGHT, _FACTS_WEIGHT = 10.0, 0.1
_NAMING_WEIGHT = 2.0
_FACT_STD = 0.1
# SAM2 from nothing: BCE is a mean over pixels, and calls a small structure right that is left out. Dice does not.
_DICE_WEIGHT = 2.0


class _LanguageObjective(nn.Module):
    """The LLM without a scan: it reads facts off the rows where visual tokens will be, and names what [SEG] stands for.

    The first token of every sentence of an answer counts once more: yes or no, there or not, which letter, and whether
    a report's next sentence tells of a finding are decided there, and a mean over all tokens is mostly of what follows.

    InternVL2.5's LLM has learnt to read visual tokens before the paper begins. This one learns it on rows that are sums
    of learnt vectors of facts, each fact in places of its own, told as unsurely as the 3D ViT will tell it. From the
    same facts written out as a text, it learns hardly anything in the same time.

    A small LLM has no reason of its own to carry the name of the organ to the constant token [SEG], and the masks' loss
    takes thousands of steps to teach it. So the bridge learns here to hand over SAM2's class prompts.
    """

    def __init__(self, model: MedVLSAM2, class_prompts: Tensor):
        super().__init__()
        self.language, self.bridge = model.language.causal, model.seg_bridge
        self.seg_id, self.convention = model.config.language.seg_token_id, model.config.seg.convention
        self.context_id = model.chat.context_id
        self.heads = nn.Embedding(len(FACTS), model.config.language.hidden_size)
        nn.init.normal_(self.heads.weight, std=_FACT_STD)
        # Part of every row. The LLM normalises rows, so that one with nothing but a doubt would else be a certainty.
        self.ground = nn.Parameter(torch.randn(model.config.language.hidden_size) * _FACT_STD)
        self.register_buffer("class_prompts", class_prompts, persistent=False)
        words = model.tokenizer.batch_decode([[token] for token in range(len(model.tokenizer))])
        ends = torch.tensor([word.rstrip().endswith((".", ":")) for word in words])
        self.register_buffer("ends", ends, persistent=False)

    def forward(self, batch: LanguageBatch) -> Losses:
        text = batch.text
        embeds = self.language.get_input_embeddings()(text.input_ids)
        told = (self.ground + batch.rows @ self.heads.weight).to(embeds.dtype)
        hidden = self.language.model(
            inputs_embeds=embeds.masked_scatter((text.input_ids == self.context_id)[..., None], told),
            attention_mask=text.attention_mask,
            position_ids=text.position_ids,
            use_cache=False,
        ).last_hidden_state
        scored = text.labels[:, 1:] != IGNORE
        logits = self.language.get_output_embeddings()(hidden[:, :-1][scored]).float()
        losses = F.cross_entropy(logits, text.labels[:, 1:][scored], reduction="none")
        before = text.labels[:, :-1]
        starts = (before == IGNORE) | self.ends[before.clamp(min=0)]
        ce, first = losses.mean(), losses[starts[scored]].mean()
        prompts = self.bridge(hidden[seg_positions(text.input_ids, self.seg_id, self.convention)])[:, 0].float()
        naming = F.mse_loss(prompts, self.class_prompts[batch.classes])
        return {"loss": ce + first + _NAMING_WEIGHT * naming, "ce": ce, "first": first, "naming": naming}


def pretrain_language(
    model: MedVLSAM2, batches: Batches, config: TrainConfig, out: Path, world: World | None = None
) -> None:
    """Train the whole LLM and the [SEG] bridge without scans. SAM2 comes first: it gives the names.

    Raises:
        ValueError: SAM2 has not been pre-trained.
    """
    named = checkpoint.load(out / "checkpoints" / "sam2.pt")
    if named is None:
        if config.language.steps:
            raise ValueError("sam2: expected it to be trained before language, found no checkpoint; give sam2.steps")
        return
    causal = model.language.causal
    class_prompts = named["parameters"]["heads.classes.weight"]
    # LoRA is zero and stays so: its products would take a third of every step.
    with model.language.peft.disable_adapter():
        for name, parameter in causal.named_parameters():
            parameter.requires_grad_(".lora_" not in name)
        model.seg_bridge.requires_grad_(True)
        run_phase("language", _LanguageObjective(model, class_prompts), batches.language, config, out, world)
    with torch.no_grad():
        model.language.seg_input.copy_(causal.get_input_embeddings().weight[model.language.seg_token_id])
        model.language.seg_output.copy_(causal.get_output_embeddings().weight[model.language.seg_token_id])


class _VisionObjective(nn.Module):
    """The 3D ViT with a head for what each patch holds, and the projector, whose tokens shall tell the scan's facts.

    M3D-CLIP has been aligned with reports before the paper begins. Here the alignment is with what the LLM has learnt
    to read: each visual token shall be the sum of its facts' vectors, times how sure the encoder is of them.
    """

    def __init__(self, model: MedVLSAM2, fact_vectors: Tensor, ground: Tensor):
        super().__init__()
        self.vision, self.projector = model.vision, model.projector
        self.patch_head = nn.Linear(model.config.vision.hidden_size, 8 * len(CLASSES))
        nn.init.constant_(self.patch_head.bias, _RARE_LOGIT)
        places = torch.from_numpy(fact_places(model.config.projector.tokens).copy())
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("fact_vectors", fact_vectors.float(), persistent=False)
        self.register_buffer("ground", ground.float(), persistent=False)

    def forward(self, batch: VisionBatch) -> Losses:
        tokens = self.vision(batch.grid.to(self.vision.cls_token.dtype), batch.tokens)
        # Summed over classes: a mean would let the many empty ones drown the few that are there.
        held = F.binary_cross_entropy_with_logits(self.patch_head(tokens).float(), batch.patches, reduction="none")
        dense = held.mean((0, 1)).view(8, len(CLASSES)).mean(0)
        organs, findings = dense[: len(STRUCTURES)].sum(), dense[len(STRUCTURES) :].sum()
        terms = {"organs": organs, "findings": findings}
        loss = organs + _FINDINGS_WEIGHT * findings
        if batch.facts is None:
            # Every parameter takes part in every step, as distributed training needs.
            return {"loss": loss + 0.0 * sum(p.sum() for p in self.projector.parameters()), **terms}
        wanted = self.ground + (batch.facts[:, None] * self.places) @ self.fact_vectors
        unit = self.fact_vectors.square().sum(-1).mean()
        facts = (self.projector(tokens).float() - wanted).square().sum((1, 2)).mean() / unit
        return {"loss": loss + _FACTS_WEIGHT * facts, **terms, "facts": facts}


def pretrain_vision(
    model: MedVLSAM2, batches: Batches, config: TrainConfig, out: Path, world: World | None = None
) -> None:
    """Train the 3D ViT on the content of patches and scans, and the projector to tell it. The LLM comes before.

    Raises:
        ValueError: The LLM has not been pre-trained.
    """
    read = checkpoint.load(out / "checkpoints" / "language.pt")
    if read is None:
        if config.vision.steps:
            raise ValueError(
                "language: expected it to be trained before vision, found no checkpoint; give language.steps"
            )
        return
    model.vision.requires_grad_(True)
    model.projector.requires_grad_(True)
    learnt = read["parameters"]
    objective = _VisionObjective(model, learnt["heads.weight"], learnt["ground"])
    run_phase("vision", objective, batches.vision, config, out, world)


class _SAM2Heads(nn.Module):
    """Class prompts, and a dense classifier on the image features that teaches them anatomy on every pixel."""

    def __init__(self, width: int):
        super().__init__()
        self.classes = nn.Embedding(len(CLASSES), width)
        self.coarse = nn.Conv2d(width, 64, 1)
        self.middle = nn.Conv2d(width // 4, 64, 1)
        self.fine = nn.Conv2d(width // 8, 64, 1)
        self.out = nn.Conv2d(64, len(CLASSES) + 1, 1)

    def forward(self, features: SliceFeatures) -> Tensor:
        fine, middle = features.high_res
        x = self.middle(middle) + F.interpolate(self.coarse(features.vision), scale_factor=2.0)
        x = self.fine(fine) + F.interpolate(x, scale_factor=2.0, mode="bilinear")
        return self.out(F.gelu(x))


class _SAM2Objective(nn.Module):
    """All of SAM2 with its heads."""

    def __init__(self, model: MedVLSAM2, config: TrainConfig):
        super().__init__()
        self.sam2 = model.sam2
        self.heads = _SAM2Heads(model.config.sam2.d_model)
        self.weights, self.settings = replace(config.loss, dice=_DICE_WEIGHT), model.config

    def forward(self, batch: ClassBatch) -> Losses:
        clips = batch.clips
        features = self.sam2.encode_images(clips.images.flatten(0, 1).to(self.sam2.no_mem_embed.dtype))
        embeddings = self.heads.classes(batch.classes)[:, None] if clips.semantic else None
        terms = clip_losses(self.sam2, features, clips, embeddings, self.weights, self.settings)
        dense = F.cross_entropy(self.heads(features).float(), batch.dense.flatten(0, 1))
        return {**terms, "loss": terms["loss"] + _DENSE_WEIGHT * dense, "dense": dense}


def pretrain_sam2(
    model: MedVLSAM2, batches: Batches, config: TrainConfig, out: Path, world: World | None = None
) -> None:
    """Train all of SAM2, memory included, on promptable segmentation of clips."""
    model.sam2.requires_grad_(True)
    run_phase("sam2", _SAM2Objective(model, config), batches.sam2, config, out, world)
