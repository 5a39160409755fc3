"""Cross-entropy over the vocabulary, without ever holding the logits of all positions."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medvl_sam2.kernels._common import is_disabled
from medvl_sam2.model.language import LanguageModel

# Logits held at a time: 256 MB of float32.
_CHUNK = 2**26


@functools.cache
def _liger() -> Callable[..., Any] | None:
    try:
        module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    except ImportError:
        return None
    return module.LigerFusedLinearCrossEntropyLoss()


def text_loss(language: LanguageModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the labelled positions; position t is scored on labels[t + 1].

    On CUDA with liger-kernel installed by its fused linear layer and cross-entropy (switched off by
    `MEDVL_SAM2_DISABLE=linear_cross_entropy`), elsewhere in chunks that are computed again in the backward.

    Args:
        language: The LLM.
        hidden: (B, T, H) last-layer states.
        labels: (B, T), -100 where there is nothing to score.
    """
    scored = labels[:, 1:] != -100
    states, targets = hidden[:, :-1][scored], labels[:, 1:][scored]
    if states.is_cuda and not is_disabled("linear_cross_entropy") and (fused := _liger()) is not None:
        return _fused(fused, language, states, targets)
    vocabulary = language.causal.get_output_embeddings().weight.shape[0]
    rows = max(1, _CHUNK // vocabulary)
    if len(states) <= rows:
        return F.cross_entropy(language.logits(states).float(), targets)
    total = states.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(states.split(rows), targets.split(rows)):
        total = total + checkpoint(_summed, language, part, wanted, use_reentrant=False)
    return total / len(states)


def _summed(language: LanguageModel, states: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(language.logits(states).float(), targets, reduction="sum")


def _fused(fused: Callable[..., Any], language: LanguageModel, states: Tensor, targets: Tensor) -> Tensor:
    weight = language.causal.get_output_embeddings().weight
    # [SEG]'s row trains on its own, beside a frozen vocabulary.
    index = torch.tensor([language.seg_token_id], device=weight.device)
    weight = weight.index_copy(0, index, language.seg_output.to(weight.dtype)[None])
    if torch.is_autocast_enabled(states.device.type):
        dtype = torch.get_autocast_dtype(states.device.type)
        weight, states = weight.to(dtype), states.to(dtype)
    return fused(weight, states, targets)
