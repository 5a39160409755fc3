"""The trained language model for other runtimes: plain transformers files with [SEG]'s rows inside.

vLLM refuses adapters that carry embeddings, so [SEG]'s input and output row go into the base, whose output matrix is
untied from its embeddings for that; the adapter then holds LoRA on linear layers alone.
"""

import copy
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from medvl_sam2.model.language import LanguageModel

BASE, ADAPTER = "base", "adapter"
EXPORTED = "vllm"
"""Folder inside a model directory in which the engine looks for its exported language model."""
_SOURCE = "source.json"
_SAMPLES = 4096


def export_language(language: LanguageModel, directory: str | Path, *, merge: bool = False) -> Path:
    """Write the language model.

    Args:
        language: The trained LLM; not changed. One whose LoRA is merged already can only be written merged.
        directory: Gets `base/`, unless merged `adapter/` (PEFT), and `source.json`, by which `check_export` knows the
            weights that it was written from.
        merge: Add the LoRA to the base's weights: the fastest for one model, but the base alone is no longer in it.

    Returns:
        The directory.

    Raises:
        ValueError: `merge` is False and the LoRA has been merged.
    """
    directory = Path(directory)
    has_adapter = any("lora_A" in name for name, _ in language.causal.named_parameters())
    if not has_adapter and not merge:
        raise ValueError("merge: expected True for a model whose LoRA is merged already, got False")
    base = directory / BASE
    base.mkdir(parents=True, exist_ok=True)
    state = _base_state(language, merge=merge and has_adapter)
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(language.causal.config)
    config.tie_word_embeddings = False
    config.architectures = [type(language.causal).__name__]
    config.dtype = str(state["lm_head.weight"].dtype).removeprefix("torch.")
    config.save_pretrained(base)
    if not merge:
        language.peft.save_pretrained(directory / ADAPTER, save_embedding_layers=False)
        _strip_training_settings(directory / ADAPTER / "adapter_config.json")
    (directory / _SOURCE).write_text(json.dumps({"fingerprint": fingerprint(language)}) + "\n")
    return directory


def check_export(directory: Path, language: LanguageModel) -> None:
    """Find out whether an exported language model is the one that a model has now.

    Raises:
        ValueError: It was written from other weights, as after further training.
    """
    try:
        written = json.loads((directory / _SOURCE).read_text())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        written = None
    if written != fingerprint(language):
        raise ValueError(
            f"{directory}: expected the language model with the weights of {directory.parent}, got one written from "
            "others; remove the folder ('medvl-sam2 convert --for vllm' writes it anew)"
        )


@torch.no_grad()
def fingerprint(language: LanguageModel) -> str:
    """Digest of a language model's weights.

    All that stages 1 to 3 train (LoRA, the rows of [SEG]) is in it; of other tensors some values are, so that a large
    base takes no time.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(language.state_dict().items()):
        if "lora_" not in name and not name.startswith("seg_"):
            tensor = tensor.flatten()[:: max(1, tensor.numel() // _SAMPLES)]
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _base_state(language: LanguageModel, *, merge: bool) -> dict[str, torch.Tensor]:
    """Weights under the names of the plain transformers model."""
    state = {}
    for name, module in language.causal.named_modules():
        wraps = hasattr(module, "lora_A")
        plain = name.removesuffix(".base_layer")
        if wraps and merge:
            (adapter,) = module.active_adapters
            weight = module.base_layer.weight
            # Summed in the wider of the two types, and rounded once.
            state[f"{name}.weight"] = (weight + module.get_delta_weight(adapter)).to(weight.dtype)
            if module.base_layer.bias is not None:
                state[f"{name}.bias"] = module.base_layer.bias.detach().clone()
            continue
        if "lora_" in name or (merge and name.endswith(".base_layer")):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            state[f"{plain}.{own}"] = parameter.detach().clone()
    seg = language.seg_token_id
    embeddings = language.causal.get_input_embeddings().weight.detach().clone()
    head = language.causal.get_output_embeddings().weight.detach().clone()
    embeddings[seg] = language.seg_input.to(embeddings)
    head[seg] = language.seg_output.to(head)
    state["model.embed_tokens.weight"], state["lm_head.weight"] = embeddings, head
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _strip_training_settings(path: Path) -> None:
    """Leave out what names this machine or only training reads."""
    config = json.loads(path.read_text())
    config |= {"base_model_name_or_path": BASE, "inference_mode": True}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
