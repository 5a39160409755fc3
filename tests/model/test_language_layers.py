"""The LLM's LoRA layers: the fused operation against PEFT's own forward."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

from medvl_sam2.model.language import LoRALinear, _with_own_layers, adapter_config


class Two(nn.Module):
    """Two linear layers, one with a bias."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(13, 11, bias=False), nn.Linear(11, 7)

    def forward(self, x):
        return self.second(self.first(x).relu())


def _layers(dropout: float = 0.0, own: bool = True, device: str = "cpu") -> PeftModel:
    torch.manual_seed(42)
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=["first", "second"])
    model = get_peft_model(Two(), _with_own_layers(config) if own else config).to(device)
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


def _own(model: PeftModel) -> list[LoRALinear]:
    return [part for part in model.modules() if isinstance(part, LoRALinear)]


def test_takes_pefts_place_under_the_same_names():
    ours, theirs = _layers(), _layers(own=False)
    assert len(_own(ours)) == 2 and not _own(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_a_saved_adapter_comes_back_in_layers_of_our_kind(tmp_path):
    model, x = _layers(), torch.randn(4, 13)
    model.save_pretrained(tmp_path)
    base = Two()
    base.load_state_dict(_layers(own=False).unload().state_dict())
    again = PeftModel.from_pretrained(base, tmp_path, config=adapter_config(tmp_path))
    assert len(_own(again)) == 2
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("shape", [(5, 13), (2, 3, 13)], ids=str)
def test_fused_equals_peft_forward_and_backward(shape):
    model = _layers()
    for layer in _own(model):
        x = torch.randn(*shape[:-1], layer.in_features, requires_grad=True)
        assert layer.is_plain(x)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        assert len(leaves) == 3
        got, want = layer.fused(x), layer(x)
        factor = torch.randn_like(want)
        assert_close(got.detach(), want.detach(), rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(*(torch.autograd.grad((y * factor).sum(), leaves) for y in (got, want))):
            assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


def test_fused_under_autocast_has_pefts_dtype():
    layer, x = _own(_layers())[1], torch.randn(6, 11)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.is_plain(x)
        got, want = layer.fused(x), layer(x)
    assert got.dtype == want.dtype == torch.bfloat16
    assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_leaves_to_peft_what_it_does_not_compute():
    model = _layers(dropout=0.5)
    layer, x = _own(model)[0], torch.randn(4, 13)
    assert not layer.train().is_plain(x) and layer.eval().is_plain(x)
    assert not layer.is_plain(x.double()) and not layer.is_plain(x.bfloat16())
    with model.disable_adapter():
        assert not layer.is_plain(x)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"]))
    model.base_model.set_adapter(["default", "other"])
    assert not layer.is_plain(x)
    model.set_adapter("default")
    assert layer.is_plain(x)
    model.merge_adapter()
    assert not layer.is_plain(x)


@pytest.mark.gpu
def test_forward_is_the_fused_one_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    ours, theirs, x = _layers(device="cuda"), _layers(own=False, device="cuda"), torch.randn(5, 13, device="cuda")
    assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert type(_own(ours)[0](x).grad_fn) is not type(theirs.base_model.model.first(x).grad_fn)
