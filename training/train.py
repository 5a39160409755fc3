"""The staged trainer: `medvl-sam2 train`."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.model.presets import preset
from medvl_sam2.training.batches import Batches, JointBatch
from medvl_sam2.training.config import TrainConfig, load_config
from medvl_sam2.training.corpus import text_corpus, train_tokenizer
from medvl_sam2.training.datasets.batches import ManifestBatches
from medvl_sam2.training.datasets.build import build_real
from medvl_sam2.training.loop import Losses, run_phase
from medvl_sam2.training.pretrain import pretrain_language, pretrain_sam2, pretrain_vision
from medvl_sam2.training.segmentation import clip_losses
from medvl_sam2.training.stages import set_trainable
from medvl_sam2.training.store import PhantomStore

logger = logging.getLogger(__name__)

STAGES = ("stage1", "stage2", "stage3")
PHASES = ("language", "vision", "sam2", *STAGES)
# Texts that the tokenizer is made from.
_TOKENIZER_PHANTOMS = 3000


def run(config: str | TrainConfig, out: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Path:
    """Train from nothing to a model directory, or go on where a killed run stopped.

    Args:
        config: Name of a shipped config, YAML file, or a ready config.
        out: Folder of the run: phantoms, checkpoints, logs, and at the end `model/`.
        overrides: `a.b=c` settings on top of the config.

    Returns:
        The model directory.

    Raises:
        ValueError: Bad config.
    """
    config = config if isinstance(config, TrainConfig) else load_config(config, overrides)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if config.threads:
        torch.set_num_threads(config.threads)
    model, batches = build(config, out)
    for phase in STAGES if config.data.source else PHASES:
        run_one(phase, model, batches, config, out)
    model.save_pretrained(out / "model")
    return out / "model"


def build(config: TrainConfig, out: Path) -> tuple[MedVLSAM2, Batches | ManifestBatches]:
    """Model with its tokenizer, and the batches of a run.

    A run on phantoms begins with a fresh model, and renders them if needed; one on real scans with the weights that
    `preset` names.
    """
    torch.manual_seed(config.seed)
    if config.data.source:
        return build_real(config, out)
    settings = preset(config.preset)
    store = PhantomStore(Path(config.data.cache or out / "phantoms"), settings, config.data)
    store.prepare()
    seeds = range(config.data.first_seed, config.data.first_seed + _TOKENIZER_PHANTOMS)
    tokenizer = train_tokenizer(text_corpus(seeds), settings.language.config["vocab_size"])
    model = MedVLSAM2(settings, tokenizer)
    return model, Batches(store, settings, model.chat, config)


def run_one(phase: str, model: MedVLSAM2, batches: Batches | ManifestBatches, config: TrainConfig, out: Path) -> None:
    """Run one phase, or load it where its checkpoint is complete.

    Raises:
        ValueError: Unknown phase.
    """
    if phase not in PHASES:
        raise ValueError(f"phase: expected one of {', '.join(PHASES)}, got {phase!r}")
    pretraining: dict[str, Callable[..., None]] = {
        "language": pretrain_language,
        "vision": pretrain_vision,
        "sam2": pretrain_sam2,
    }
    if phase in pretraining:
        pretraining[phase](model, batches, config, out)
        return
    set_trainable(model, phase)
    run_phase(phase, {"model": model}, batches.stage(phase), _joint_losses(model, config), config, out)


def _joint_losses(model: MedVLSAM2, config: TrainConfig) -> Callable[[JointBatch], Losses]:
    def losses(batch: JointBatch) -> Losses:
        text = batch.text
        output = model(
            text.input_ids,
            model.visual_tokens(batch.grid) if batch.features is None else model.projector(batch.features),
            attention_mask=text.attention_mask,
            position_ids=text.position_ids,
            labels=text.labels,
        )
        terms = {"ce": output.loss, "loss": config.loss.ce * output.loss}
        if batch.clips is not None and len(batch.clips.owner):
            features = model.sam2.encode_images(batch.clips.images.flatten(0, 1))
            prompts = model.seg_prompts(output.hidden, text.input_ids)
            masks = clip_losses(model.sam2, features, batch.clips, prompts, config.loss, model.config)
            terms = {**masks, **terms, "loss": terms["loss"] + masks["loss"]}
        return terms

    return losses
