"""vLLM plugin: registers the causal models whose last hidden states can be read.

Named as an entry point of the group `vllm.general_plugins`, which vLLM calls in every process of its own.
"""

from medvl_sam2.engine.geometry import InputError

MODELS = "medvl_sam2.engine.language.vllm_models"
ARCHITECTURES = {
    "Qwen2ForCausalLM": "SegQwen2ForCausalLM",
    "LlamaForCausalLM": "SegLlamaForCausalLM",
}
"""transformers' architectures and ours in their place; InternLM2 is converted to Llama's layout."""

TAP = f"{MODELS}:SegTap"


def register() -> None:
    """Make the models known to vLLM."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES.values():
        ModelRegistry.register_model(name, f"{MODELS}:{name}")


def architecture(name: str) -> str:
    """Our architecture for one of transformers'.

    Raises:
        InputError: None of ours.
    """
    if name not in ARCHITECTURES:
        raise InputError(f"language_backend: vllm runs {', '.join(ARCHITECTURES)}, not {name}; use transformers")
    return ARCHITECTURES[name]
