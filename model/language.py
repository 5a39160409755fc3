"""The LLM: a transformers causal model with PEFT LoRA, plus the trainable rows of [SEG]."""

import inspect
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedModel

from medvl_sam2.model.config import LanguageConfig, LoRAConfig


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


def _peft_config(lora: LoRAConfig) -> LoraConfig:
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
