"""The exported language model, loaded by plain transformers and PEFT, against the model it came from."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from medvl_sam2.model.export import ADAPTER, BASE, export_language
from medvl_sam2.model.modeling import MedVLSAM2


@pytest.fixture
def model(small_model):
    return MedVLSAM2.from_pretrained(small_model)


@pytest.fixture
def ids(model):
    text = [*model.chat.prefix(), *model.chat.question("Segment the liver."), *model.chat.answer("It is [SEG].")]
    return torch.tensor([text])


@torch.no_grad()
def expected(model, ids):
    hidden = model.language.hidden(model.language.embed(ids))
    return hidden, model.language.logits(hidden)


def check(loaded, model, ids):
    with torch.no_grad():
        output = loaded(ids, output_hidden_states=True)
    hidden, logits = expected(model, ids)
    torch.testing.assert_close(output.hidden_states[-1], hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.logits, logits, atol=1e-4, rtol=1e-4)


def test_base_and_adapter(model, ids, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_language(model.language, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / BASE).eval()
    check(PeftModel.from_pretrained(base, tmp_path / ADAPTER).eval(), model, ids)
    names = load_file(tmp_path / ADAPTER / "adapter_model.safetensors")
    assert names and all("lora_A" in name or "lora_B" in name for name in names), "vLLM takes linear LoRA only"


def test_merged(model, ids, tmp_path):
    export_language(model.language, tmp_path, merge=True)
    assert not (tmp_path / ADAPTER).exists()
    check(AutoModelForCausalLM.from_pretrained(tmp_path / BASE).eval(), model, ids)


def test_model_that_is_merged_already(model, ids, tmp_path):
    hidden, _ = expected(model, ids)
    model.language.peft.merge_and_unload()
    with pytest.raises(ValueError, match="merge"):
        export_language(model.language, tmp_path)
    export_language(model.language, tmp_path, merge=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / BASE).eval()
    with torch.no_grad():
        got = loaded(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(got, hidden, atol=1e-4, rtol=1e-4)
