"""`medvl-sam2 convert`: public checkpoints of the three parts into one model directory.

The 3D ViT comes from M3D-CLIP, the LLM from InternVL2.5 (or its Qwen2.5 alone), SAM2 from facebookresearch/sam2. The
projector, the LoRA adapter and the [SEG] bridge have no public weights: they start as for training.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaTokenizerFast, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from medvl_sam2.model.checkpoint import State, load_strict, read_state
from medvl_sam2.model.config import (
    LanguageConfig,
    LoRAConfig,
    MedVLConfig,
    ProjectorConfig,
    SegConfig,
    VisionConfig,
    VolumeConfig,
)
from medvl_sam2.model.language import LanguageModel
from medvl_sam2.model.modeling import MedVLSAM2, cast_weights
from medvl_sam2.model.prompts import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, SEG, TURN_END, TURN_START
from medvl_sam2.model.sam2 import SAM2Config

_VIT_PREFIX, _LLM_PREFIX = "vision_encoder.", "language_model."
_SAM2_VARIANTS = ("tiny", "small", "base_plus", "large")
# transformers' config arguments that make the LLM's shape.
_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
)


def convert(
    *,
    vit: str | Path,
    llm: str | Path,
    sam2: str | Path,
    out: str | Path,
    image_size: int = 1024,
    name: str = "converted",
    dtype: torch.dtype = torch.bfloat16,
) -> MedVLConfig:
    """Build a model directory.

    Args:
        vit: M3D-CLIP: `pretrained_ViT.bin` or `model.safetensors`.
        llm: Folder of InternVL2.5 or of a Qwen2 model: config.json, safetensors, tokenizer.
        sam2: `sam2_hiera_*.pt` or `sam2.1_hiera_*.pt`.
        out: Model directory to write.
        image_size: Side of SAM2's input in pixels: 1024, or 512 for speed.
        name: Kept in the config.
        dtype: Of the written weights.

    Returns:
        The config of the written model.

    Raises:
        ValueError: A file is missing or damaged, or its keys do not fit; all faults of a file are listed at once.
    """
    language, lm, tokenizer = read_language(Path(llm))
    sam2_state = read_state(sam2)
    config = MedVLConfig(
        name,
        VolumeConfig(),
        VisionConfig(),
        ProjectorConfig(),
        language,
        LoRAConfig(),
        SegConfig(),
        sam2_config(sam2_state, image_size, str(sam2)),
    )
    model = MedVLSAM2(config, tokenizer, LanguageModel(language, config.lora, lm))
    load_strict(model.vision, vision_state(read_state(vit)), str(vit))
    load_strict(model.sam2, sam2_state, str(sam2))
    cast_weights(model, dtype).save_pretrained(out)
    return config


def vision_state(state: State) -> State:
    """The 3D ViT of M3D-CLIP: all of a ViT file, or the vision part of the whole CLIP."""
    if not any(key.startswith(_VIT_PREFIX) for key in state):
        return state
    return {key.removeprefix(_VIT_PREFIX): value for key, value in state.items() if key.startswith(_VIT_PREFIX)}


def sam2_config(state: State, image_size: int, source: str) -> SAM2Config:
    """Variant and version of an official SAM2 checkpoint, told by its shapes and keys.

    Raises:
        ValueError: No official variant has this shape.
    """
    patch = state.get("image_encoder.trunk.patch_embed.proj.weight")
    blocks = len({key.split(".")[3] for key in state if key.startswith("image_encoder.trunk.blocks.")})
    version = "2.1" if "no_obj_embed_spatial" in state else "2.0"
    for variant in _SAM2_VARIANTS:
        config = SAM2Config.preset(variant, version, image_size=image_size)
        if patch is not None and (config.embed_dim, sum(config.stages)) == (len(patch), blocks):
            return config
    raise ValueError(
        f"{source}: expected a SAM2 checkpoint ({', '.join(_SAM2_VARIANTS)}), "
        f"got width {None if patch is None else len(patch)} with {blocks} blocks"
    )


def read_language(folder: Path) -> tuple[LanguageConfig, PreTrainedModel, Tokenizer]:
    """The LLM of an InternVL2.5 (or Qwen2) folder with a row for [SEG].

    Raises:
        ValueError: Not such a folder, or keys that do not fit its config.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: expected a model folder with config.json, got none")
    whole = json.loads((folder / "config.json").read_text())
    settings = whole.get("llm_config", whole)
    kind = settings.get("model_type") or ""
    if kind not in ("qwen2", "internlm2"):
        raise ValueError(f"{folder}: expected a Qwen2 or InternLM2 language model, got {kind!r}")
    state = read_state(folder)
    if any(key.startswith(_LLM_PREFIX) for key in state):
        state = {key.removeprefix(_LLM_PREFIX): value for key, value in state.items() if key.startswith(_LLM_PREFIX)}
    if kind == "internlm2":
        state = internlm2_to_llama(state, settings["num_attention_heads"], settings["num_key_value_heads"])
    tokenizer, seg_is_new = _tokenizer(folder)
    seg_id = tokenizer.convert_tokens_to_ids(SEG)
    if seg_is_new:
        state = _with_seg_row(state, seg_id)
    shape: dict[str, Any] = {key: settings[key] for key in _SHAPE if key in settings}
    shape |= {
        "vocab_size": len(state["model.embed_tokens.weight"]),
        "tie_word_embeddings": "lm_head.weight" not in state,
    }
    language = LanguageConfig("llama" if kind == "internlm2" else "qwen2", shape, seg_token_id=seg_id)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(language.model_type, **shape))
    if shape["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    load_strict(model, state, str(folder))
    return language, model, tokenizer


def internlm2_to_llama(state: State, heads: int, kv_heads: int) -> State:
    """Lay InternLM2's weights out as Llama's.

    InternLM2 keeps queries, keys and values in one matrix, group by group: the queries that share a key, the key, the
    value (`(h gs d) z` with gs = heads / kv_heads + 2).

    Args:
        state: InternLM2's tensors.
        heads: Query heads.
        kv_heads: Key and value heads.
    """
    names = {
        "model.tok_embeddings.": "model.embed_tokens.",
        "output.": "lm_head.",
        ".attention.wo.": ".self_attn.o_proj.",
        ".feed_forward.w1.": ".mlp.gate_proj.",
        ".feed_forward.w2.": ".mlp.down_proj.",
        ".feed_forward.w3.": ".mlp.up_proj.",
        ".attention_norm.": ".input_layernorm.",
        ".ffn_norm.": ".post_attention_layernorm.",
    }
    laid: State = {}
    for key, value in state.items():
        if ".attention.wqkv." in key:
            for part, rows in zip("qkv", split_wqkv(value, heads, kv_heads)):
                laid[key.replace(".attention.wqkv.", f".self_attn.{part}_proj.")] = rows
            continue
        for old, new in names.items():
            key = key.replace(old, new)
        laid[key] = value
    return laid


def split_wqkv(wqkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(kv_heads * (heads / kv_heads + 2) * d, H) -> queries (heads * d, H), keys and values (kv_heads * d, H)."""
    queries = heads // kv_heads
    groups = wqkv.unflatten(0, (kv_heads, queries + 2, -1))
    q, k, v = groups[:, :queries], groups[:, queries], groups[:, queries + 1]
    return q.flatten(0, 2).contiguous(), k.flatten(0, 1).contiguous(), v.flatten(0, 1).contiguous()


def _with_seg_row(state: State, seg_id: int) -> State:
    """A row for [SEG], the mean of the others, as M3D-LaMed starts its new tokens."""
    state = dict(state)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        if key not in state:
            continue
        rows = state[key]
        mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
        if seg_id < len(rows):
            rows[seg_id] = mean[0]
        else:
            state[key] = torch.cat([rows, mean.expand(seg_id + 1 - len(rows), -1)])
    return state


def _tokenizer(folder: Path) -> tuple[Tokenizer, bool]:
    """The folder's tokenizer with every token that conversations need, and whether [SEG] had to be added."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        # InternLM2's own class is code beside the weights; its SentencePiece model is read as Llama's.
        if not (folder / "tokenizer.model").is_file():
            raise ValueError(f"{folder}: expected tokenizer files, got {str(error).splitlines()[0]}") from error
        tokenizer = LlamaTokenizerFast.from_pretrained(folder)
    known = tokenizer.get_vocab()
    needed = (TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE_CONTEXT, SEG)
    tokenizer.add_tokens([token for token in needed if token not in known], special_tokens=True)
    return tokenizer, SEG not in known
