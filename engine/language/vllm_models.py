"""Inside vLLM: models that keep their last hidden states, and the place that tells whose row is whose.

vLLM calls `compute_logits` after the CUDA graph, on one row per sampled position, and then every logits processor on
the rows' logits. The model keeps a reference to the rows, and the processor sorts them by request and token. Nothing is
computed, copied or waited for; rows stay on the device.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

KEY, SCORES = "medvl_sam2_key", "medvl_sam2_scores"
"""Extra arguments of a request that wants its rows: its key, and the two tokens whose difference is wanted."""


@dataclass
class Tapped:
    """What was read of one request.

    Attributes:
        rows: (H,) hidden state by number of tokens generated before it.
        margin: Logit of the first token of `SCORES` less that of the second, after the prompt.
    """

    rows: dict[int, Tensor] = field(default_factory=dict)
    margin: Tensor | None = None


class Taps:
    """Rows of all requests in flight, in the process that runs the model."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.requests: dict[str, Tapped] = {}

    def open(self, key: str) -> Tapped:
        """Begin to keep rows of a request."""
        return self.requests.setdefault(key, Tapped())

    def drop(self, key: str) -> None:
        """Forget a request."""
        self.requests.pop(key, None)


TAPS = Taps()


class _KeepsRows:
    """Keeps the rows that logits are made of."""

    def compute_logits(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """See vLLM's model interface."""
        TAPS.rows = hidden_states
        return super().compute_logits(hidden_states, *args, **kwargs)


class SegQwen2ForCausalLM(_KeepsRows, Qwen2ForCausalLM):
    """Qwen2 that keeps the rows it makes logits of."""


class SegLlamaForCausalLM(_KeepsRows, LlamaForCausalLM):
    """Llama that keeps the rows it makes logits of."""

    # vLLM would wrap Llama's embeddings for LoRA, which fails where a prompt mixes ids and embeddings: it embeds the
    # ids alone, but counts adapters over all rows. Our adapters hold linear layers only.
    embedding_modules: dict[str, str] = {}


class SegTap(LogitsProcessor):
    """Knows which row of a step belongs to which request and token; changes no logits.

    Args:
        vllm_config: See vLLM.
        device: See vLLM.
        is_pin_memory: See vLLM.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self._slots: dict[int, tuple[Tapped, list[int], tuple[int, int] | None]] = {}

    def is_argmax_invariant(self) -> bool:
        """vLLM leaves out processors that keep the argmax when it decodes greedily; this one must run."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests as they come, move and go in the batch."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._slots.pop(index, None)
        for index, params, _, output_ids in batch_update.added:
            self._slots.pop(index, None)
            extra = params.extra_args or {}
            tapped = TAPS.requests.get(extra.get(KEY))
            if tapped is not None:
                self._slots[index] = (tapped, output_ids, extra.get(SCORES))
        for source, target, direction in batch_update.moved:
            one, other = self._slots.pop(source, None), self._slots.pop(target, None)
            if one is not None:
                self._slots[target] = one
            if other is not None and direction == MoveDirectionality.SWAP:
                self._slots[source] = other

    def apply(self, logits: Tensor) -> Tensor:
        """Sort the step's rows; a prompt taken in chunks overwrites its own until the last one."""
        for index, (tapped, output_ids, scores) in self._slots.items():
            count = len(output_ids)
            # A copy: the next step reuses the graph's output memory.
            tapped.rows[count] = TAPS.rows[index].clone()
            if scores is not None and count == 0:
                tapped.margin = logits[index, scores[0]].float() - logits[index, scores[1]].float()
        return logits
