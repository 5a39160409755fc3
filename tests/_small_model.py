"""A model with all parts at a fraction of the tiny preset's size, with random weights that are far from degenerate."""

from dataclasses import replace
from pathlib import Path

import torch

from medvl_sam2.model.config import MedVLConfig, SegConfig, VisionConfig
from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.model.presets import preset
from medvl_sam2.model.sam2 import SAM2Config
from medvl_sam2.training.corpus import text_corpus, train_tokenizer


def small_config() -> MedVLConfig:
    """Shapes of the small model."""
    tiny = preset("tiny")
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    return replace(
        tiny,
        name="small",
        volume=replace(tiny.volume, size=(8, 32, 32), patch=(4, 8, 8), slices=12),
        vision=VisionConfig(hidden_size=48, layers=2, heads=3, mlp_size=96),
        projector=replace(tiny.projector, tokens=8),
        language=replace(tiny.language, config={**tiny.language.config, **shape, "vocab_size": 512}),
        lora=replace(tiny.lora, rank=4, alpha=8),
        # The preset's are for its own trained weights.
        seg=SegConfig(),
        sam2=SAM2Config.preset("micro", image_size=64),
    )


def write_small_model(directory: Path) -> Path:
    """Write the model's files."""
    torch.manual_seed(7)
    config = small_config()
    model = MedVLSAM2(config, train_tokenizer(text_corpus(range(20)), config.language.config["vocab_size"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As initialised, LoRA adds nothing and the LLM's states are nearly constant.
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            elif "language" in name and parameter.ndim == 2:
                parameter.mul_(4)
            # With a score below zero every mask would be empty.
            elif "pred_obj_score_head" in name and parameter.shape == (1,):
                parameter.add_(2)
    model.save_pretrained(directory)
    return directory
