"""Chunks and the fused library against cross-entropy on all logits at once."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medvl_sam2.model.config import LanguageConfig, LoRAConfig
from medvl_sam2.model.language import LanguageModel
from medvl_sam2.training import text_loss as module
from medvl_sam2.training.text_loss import text_loss

VOCABULARY, WIDTH = 37, 16


@pytest.fixture(scope="module")
def language() -> LanguageModel:
    torch.manual_seed(0)
    shape = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 16,
        "vocab_size": VOCABULARY,
    }
    return LanguageModel(LanguageConfig("qwen2", shape, seg_token_id=5), LoRAConfig(rank=2, alpha=4, dropout=0.0))


def whole(language: LanguageModel, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    weight = language.causal.get_output_embeddings().weight.detach().clone()
    weight[5] = 0
    logits = hidden[:, :-1] @ weight.T
    logits[..., 5] = hidden[:, :-1] @ language.seg_output
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def gradients(loss: torch.Tensor, language: LanguageModel, hidden: torch.Tensor) -> list[torch.Tensor]:
    return [loss, *torch.autograd.grad(loss, [hidden, language.seg_output])]


class Liger(nn.Module):
    """Stands for liger-kernel's loss: weight, states and targets in this order."""

    def forward(self, weight: torch.Tensor, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(states @ weight.T, targets)


@pytest.mark.parametrize("way", ["at once", "chunks", "fused"])
def test_loss_and_gradients(way, language, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 9, WIDTH, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
    labels[0, :4] = -100
    labels[1, 3] = 5
    monkeypatch.setattr(module, "_CHUNK", 4 * VOCABULARY if way == "chunks" else 2**20)
    if way == "fused":
        scored = labels[:, 1:] != -100
        loss = module._fused(Liger(), language, hidden[:, :-1][scored], labels[:, 1:][scored])
    else:
        loss = text_loss(language, hidden, labels)
    expected = gradients(whole(language, hidden, labels), language, hidden)
    for ours, theirs in zip(gradients(loss, language, hidden), expected):
        torch.testing.assert_close(ours, theirs)


def test_liger_is_left_alone_on_the_cpu(language, monkeypatch):
    def refuse() -> None:
        raise AssertionError("asked for")

    monkeypatch.setattr(module, "_liger", refuse)
    hidden, labels = torch.randn(1, 5, WIDTH), torch.randint(0, VOCABULARY, (1, 5))
    torch.testing.assert_close(text_loss(language, hidden, labels), whole(language, hidden, labels))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_liger_equals_the_plain_loss(language):
    pytest.importorskip("liger_kernel")
    language = language.cuda()
    hidden = torch.randn(2, 9, WIDTH, device="cuda").requires_grad_()
    labels = torch.randint(0, VOCABULARY, (2, 9), device="cuda")
    expected = gradients(whole(language, hidden, labels), language, hidden)
    for ours, theirs in zip(gradients(text_loss(language, hidden, labels), language, hidden), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
