"""The LLM: a transformers causal model with PEFT LoRA, plus the trainable rows of [SEG]."""

import inspect
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora as peft_lora
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedModel

from medvl_sam2.kernels.lora_linear import FLOATS, lora_linear
from medvl_sam2.model.config import LanguageConfig, LoRAConfig


class LoRALinear(peft_lora.Linear):
    """PEFT's linear layer with LoRA, whose plain case is one operation on CUDA: one adapter, unmerged, no dropout.

    PEFT's own forward takes the rest, and every case on a CPU, where its products need no company.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (..., in) to (..., out), as PEFT's."""
        if x.is_cuda and not args and not kwargs and self.is_plain(x):
            return self.fused(x)
        return super().forward(x, *args, **kwargs)

    def is_plain(self, x: Tensor) -> bool:
        """Whether `fused` computes what the layer is asked for."""
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        if self.disable_adapters or self.merged or name not in self.lora_A or name in self.lora_variant:
            return False
        base, down, up = self.base_layer, self.lora_A[name], self.lora_B[name]
        kinds = {tensor.dtype for tensor in (x, base.weight, down.weight, up.weight)}
        return (
            type(base) is nn.Linear
            and not self.fan_in_fan_out
            and up.bias is None
            and (not self.training or isinstance(self.lora_dropout[name], nn.Identity))
            and kinds <= set(FLOATS)
            and (len(kinds) == 1 or torch.is_autocast_enabled(x.device.type))
        )

    def fused(self, x: Tensor) -> Tensor:
        """The layer with its active adapter, by `lora_linear`."""
        name, base = self.active_adapters[0], self.base_layer
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        return lora_linear(x, base.weight, base.bias, down, up, self.scaling[name])


class LanguageModel(nn.Module):
    """Causal LM with LoRA.

    [SEG]'s input embedding and output row are parameters of their own: they train while the vocabulary stays frozen,
    whether or not the model ties its embeddings, and `bake` writes them into the base for other runtimes.

    Args:
        config: Shape of the LLM.
        lora: Adapter on its linear layers.
        base: A loaded causal LM; random weights when None.
    """

    def __init__(self, config: LanguageConfig, lora: LoRAConfig, base: PreTrainedModel | None = None):
        super().__init__()
        if base is None:
            base = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.model_type, **config.config))
        self.seg_token_id = config.seg_token_id
        self.seg_input = nn.Parameter(base.get_input_embeddings().weight[self.seg_token_id].detach().clone())
        self.seg_output = nn.Parameter(base.get_output_embeddings().weight[self.seg_token_id].detach().clone())
        self.peft: PeftModel = get_peft_model(base, _peft_config(lora))

    @property
    def causal(self) -> PreTrainedModel:
        """The transformers model, with the LoRA layers inside."""
        return self.peft.get_base_model()

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, H) input embeddings."""
        rows = self.causal.get_input_embeddings()(input_ids)
        return torch.where((input_ids == self.seg_token_id)[..., None], self.seg_input.to(rows.dtype), rows)

    def hidden(self, inputs_embeds: Tensor, cache: Cache | None = None, **kwargs: Any) -> Tensor:
        """Run the decoder.

        Args:
            inputs_embeds: (B, T, H).
            cache: Keys and values of earlier positions, grown in place; None keeps none.
            **kwargs: `attention_mask`, `position_ids` as in transformers.

        Returns:
            Last-layer hidden states after the final norm (B, T, H).
        """
        decoder = self.causal.model
        # transformers 5.24 calls the argument `cache`, 5.17 `past_key_values`.
        name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
        output = decoder(inputs_embeds=inputs_embeds, **{name: cache}, use_cache=cache is not None, **kwargs)
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) hidden states -> (..., V) logits."""
        logits = self.causal.get_output_embeddings()(hidden)
        seg = (hidden @ self.seg_output.to(hidden.dtype)).to(logits.dtype)
        index = torch.full((*logits.shape[:-1], 1), self.seg_token_id, device=logits.device)
        return logits.scatter(-1, index, seg[..., None])

    @torch.no_grad()
    def bake(self) -> None:
        """Write the [SEG] rows into the base model's embeddings."""
        embeddings, head = self.causal.get_input_embeddings().weight, self.causal.get_output_embeddings().weight
        embeddings[self.seg_token_id] = self.seg_input.to(embeddings.dtype)
        if head is not embeddings:
            head[self.seg_token_id] = self.seg_output.to(head.dtype)


def adapter_config(directory: Path) -> LoraConfig:
    """Configuration of a saved adapter, for layers of our kind: PEFT does not save which kind they are."""
    return _with_own_layers(LoraConfig.from_pretrained(str(directory)))


def _with_own_layers(config: LoraConfig) -> LoraConfig:
    # PEFT's documented hook for layers of one's own.
    config._register_custom_module({nn.Linear: LoRALinear})
    return config


def _peft_config(lora: LoRAConfig) -> LoraConfig:
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return _with_own_layers(config)
