"""MedVL-SAM2: the parts joined, and their files."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from medvl_sam2.model.checkpoint import load_strict, read_state
from medvl_sam2.model.config import MedVLConfig
from medvl_sam2.model.language import LanguageModel, adapter_config
from medvl_sam2.model.presets import PRESETS, preset
from medvl_sam2.model.projector import build_projector
from medvl_sam2.model.prompts import ChatTokens
from medvl_sam2.model.sam2 import SAM2
from medvl_sam2.model.seg_bridge import SegBridge, seg_positions
from medvl_sam2.model.vision import VisionEncoder

WEIGHTS = Path(__file__).resolve().parent / "weights"
_PARTS = "model.safetensors"
_BASE, _ADAPTER = "language", "adapter"
_LLM_KEYS = "language.peft."


@dataclass
class LanguageOutput:
    """Result of a text forward.

    Attributes:
        hidden: (B, T, H) last-layer states after the final norm.
        loss: Mean cross-entropy over the labelled positions, or None.
    """

    hidden: Tensor
    loss: Tensor | None


class MedVLSAM2(nn.Module):
    """3D ViT -> projector -> LLM with LoRA -> [SEG] -> SAM2.

    Args:
        config: Shapes of all parts.
        tokenizer: Needed for conversations; None for shape-only uses.
        language: A ready LLM; built with random weights when None.
    """

    def __init__(
        self,
        config: MedVLConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
        language: LanguageModel | None = None,
    ):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        hidden = config.language.hidden_size
        self.vision = VisionEncoder(config.volume, config.vision)
        self.projector = build_projector(config.projector, config.volume.tokens, config.vision.hidden_size, hidden)
        self.language = language or LanguageModel(config.language, config.lora)
        self.seg_bridge = SegBridge(hidden, config.sam2.d_model)
        self.sam2 = SAM2(config.sam2)

    @property
    def chat(self) -> ChatTokens:
        """Token ids of conversations about one scan."""
        return ChatTokens(self.tokenizer, self.config.language.system, self.config.projector.tokens)

    def visual_tokens(self, volume: Tensor) -> Tensor:
        """(B, 1, D, H, W) in 0-1 -> (B, tokens, H) rows for the LLM."""
        return self.projector(self.vision(volume))

    def sequence(self, input_ids: Tensor, visual: Tensor) -> Tensor:
        """Input embeddings with the visual rows in place of <IMG_CONTEXT>.

        Args:
            input_ids: (B, T), each row with exactly `tokens` placeholders.
            visual: (B, tokens, H).

        Returns:
            (B, T, H).
        """
        embeds = self.language.embed(input_ids)
        place = (input_ids == self.chat.context_id)[..., None].expand_as(embeds)
        return embeds.masked_scatter(place, visual.to(embeds.dtype))

    def forward(
        self,
        input_ids: Tensor,
        visual: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> LanguageOutput:
        """Text forward.

        Args:
            input_ids: (B, T) with <IMG_CONTEXT> placeholders.
            visual: (B, tokens, H) from `visual_tokens`.
            attention_mask: (B, T) padding mask or (B, 1, T, T) additive mask, as in transformers.
            position_ids: (B, T).
            labels: (B, T) target of each position, -100 where none; position t is scored on labels[t + 1].
        """
        hidden = self.language.hidden(
            self.sequence(input_ids, visual), attention_mask=attention_mask, position_ids=position_ids
        )
        loss = None
        if labels is not None:
            # Only labelled positions meet the vocabulary: the logits of the rest would be the largest tensor here.
            scored = labels[:, 1:] != -100
            logits = self.language.logits(hidden[:, :-1][scored]).float()
            loss = nn.functional.cross_entropy(logits, labels[:, 1:][scored])
        return LanguageOutput(hidden, loss)

    def seg_prompts(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """Sparse prompts of all [SEG] tokens in reading order.

        Args:
            hidden: (B, T, H) of `forward`.
            input_ids: (B, T).

        Returns:
            (N, 1, d).
        """
        sample, position = seg_positions(input_ids, self.config.language.seg_token_id, self.config.seg.convention)
        return self.seg_bridge(hidden[sample, position])

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json, model.safetensors, the LLM's base, the LoRA adapter and the tokenizer, in their dtype."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.config.save(directory)
        parts = {k: v.contiguous() for k, v in self.state_dict().items() if not k.startswith(_LLM_KEYS)}
        save_file(parts, directory / _PARTS, metadata={"format": "pt"})
        self.language.peft.save_pretrained(directory / _ADAPTER)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)
        self._save_base(directory / _BASE)

    def _save_base(self, directory: Path) -> None:
        base = {
            key.replace(".base_layer.", "."): value
            for key, value in self.language.causal.state_dict().items()
            if ".lora_" not in key
        }
        config = self.language.causal.config
        if config.tie_word_embeddings:
            base.pop("lm_head.weight")
        directory.mkdir(exist_ok=True)
        config.save_pretrained(directory)
        save_file({k: v.contiguous() for k, v in base.items()}, directory / _PARTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, name: str | Path, dtype: torch.dtype | None = None) -> "MedVLSAM2":
        """Load a preset with shipped weights or a model directory.

        Args:
            name: "tiny", or a directory written by `save_pretrained` or `medvl-sam2 convert`.
            dtype: Of the weights in memory; the files' own when None.

        Raises:
            ValueError: No such model, or the files do not fit the config.
        """
        directory = model_directory(name)
        config = MedVLConfig.load(directory)
        language = LanguageModel(config.language, config.lora, _load_base(directory / _BASE))
        if (directory / _ADAPTER).is_dir():
            language.peft = PeftModel.from_pretrained(
                language.peft.unload(),
                directory / _ADAPTER,
                is_trainable=True,
                config=adapter_config(directory / _ADAPTER),
                autocast_adapter_dtype=False,
            )
        model = cls(config, AutoTokenizer.from_pretrained(directory), language)
        load_strict(model, read_state(directory / _PARTS), str(directory / _PARTS), skip=_LLM_KEYS)
        return (cast_weights(model, dtype) if dtype else model).eval()


def cast_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Round a module's weights to a dtype; returns the module.

    Its buffers stay exact, as the LLM's rotary frequencies and SAM2's Fourier matrix must: in bfloat16 the angle of the
    thousandth token would be off by up to two radians.

    Args:
        module: Changed in place; weights that are tied stay so.
        dtype: Floating.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def _load_base(directory: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(directory)
    state = read_state(directory / _PARTS)
    # transformers' own loading only warns of keys that do not fit.
    base = AutoModelForCausalLM.from_config(config, dtype=next(iter(state.values())).dtype)
    if config.tie_word_embeddings and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    load_strict(base, state, str(directory / _PARTS))
    return base


def model_directory(name: str | Path) -> Path:
    """Where the files of a preset with shipped weights or of a model directory lie.

    Raises:
        ValueError: No such model.
    """
    directory = WEIGHTS / str(name) if str(name) in PRESETS else Path(name)
    if (directory / "config.json").is_file():
        try:
            json.loads((directory / "config.json").read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{directory / 'config.json'}: expected JSON, got {error}") from error
        return directory
    if str(name) in PRESETS:
        preset(str(name))
        raise ValueError(
            f"model: preset {name!r} ships no weights; build a model directory from the public checkpoints with "
            "`medvl-sam2 convert` and give its path"
        )
    raise ValueError(f"model: expected a preset ({', '.join(PRESETS)}) or a model directory, got {str(name)!r}")
