"""The presets: `tiny` runs on a laptop CPU with shipped weights, the others take a user's checkpoints by `convert`."""

from medvl_sam2.model.config import (
    LanguageConfig,
    LoRAConfig,
    MedVLConfig,
    ProjectorConfig,
    SegConfig,
    VisionConfig,
    VolumeConfig,
)
from medvl_sam2.model.sam2.config import SAM2Config

# Shapes of the language models inside InternVL2.5 (OpenGVLab model cards and configs).
_QWEN2 = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768, "vocab_size": 151_675}
_INTERNLM2 = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 32768, "vocab_size": 92_554}


def _llm(model_type: str, hidden: int, layers: int, heads: int, kv_heads: int, mlp: int) -> LanguageConfig:
    base = _QWEN2 if model_type == "qwen2" else _INTERNLM2
    shape = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "tie_word_embeddings": False,
    }
    return LanguageConfig(model_type, {**base, **shape}, seg_token_id=base["vocab_size"] - 1)


_LLM = {
    "1b": _llm("qwen2", 896, 24, 14, 2, 4864),
    "2b": _llm("llama", 2048, 24, 16, 8, 8192),
    "4b": _llm("qwen2", 2048, 36, 16, 2, 11008),
    "8b": _llm("llama", 4096, 32, 32, 8, 14336),
}


def _full(name: str, llm: str, sam2: SAM2Config) -> MedVLConfig:
    return MedVLConfig(
        name, VolumeConfig(), VisionConfig(), ProjectorConfig(), _LLM[llm], LoRAConfig(), SegConfig(), sam2
    )


def _tiny() -> MedVLConfig:
    window = (-200.0, 300.0)
    return MedVLConfig(
        name="tiny",
        volume=VolumeConfig(
            size=(48, 80, 80),
            patch=(6, 8, 8),
            window=window,
            slices=48,
            slice_windows=((-1000.0, 200.0), window, (-100.0, 900.0)),
            slice_mean=(0.5, 0.5, 0.5),
            slice_std=(0.25, 0.25, 0.25),
        ),
        vision=VisionConfig(hidden_size=192, layers=4, heads=3, mlp_size=768),
        projector=ProjectorConfig(tokens=200, depth=2),
        language=LanguageConfig(
            model_type="qwen2",
            config={
                "hidden_size": 192,
                "num_hidden_layers": 4,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "intermediate_size": 512,
                "vocab_size": 1024,
                "max_position_embeddings": 2048,
                "rope_theta": 1e4,
                "tie_word_embeddings": True,
            },
            seg_token_id=6,
        ),
        lora=LoRAConfig(rank=32, alpha=64, dropout=0.0),
        # Where Dice was best on phantoms neither trained on nor evaluated on. The threshold helps thin bones most. What
        # is named gains 0.02 without memory and takes an eighth of the time; clicks and boxes alone keep it.
        seg=SegConfig(mask_threshold=-1.0, use_memory=False),
        sam2=SAM2Config.preset("micro"),
    )


PRESETS = ("tiny", "1b-fast", "1b", "2b", "4b", "8b")


def preset(name: str) -> MedVLConfig:
    """Configuration of a preset.

    Args:
        name: One of `PRESETS`.

    Raises:
        ValueError: Unknown name.
    """
    if name == "tiny":
        return _tiny()
    if name == "1b-fast":
        return _full(name, "1b", SAM2Config.preset("tiny", image_size=512))
    if name in _LLM:
        return _full(name, name, SAM2Config.preset("large"))
    raise ValueError(f"preset: expected one of {', '.join(PRESETS)} or a model directory, got {name!r}")
