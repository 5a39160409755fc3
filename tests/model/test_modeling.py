"""The joined model: files, the [SEG] rows and the [SEG] convention."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from medvl_sam2.model.config import MedVLConfig, SegConfig
from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.model.presets import PRESETS, preset
from medvl_sam2.model.seg_bridge import seg_positions


@pytest.fixture(scope="module")
def model(small_model) -> MedVLSAM2:
    return MedVLSAM2.from_pretrained(small_model)


def _hidden(model: MedVLSAM2, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[*model.chat.prefix(), *model.chat.question("Segment the liver."), *model.chat.answer(text)]])
    torch.manual_seed(0)
    visual = torch.randn(1, model.config.projector.tokens, model.config.language.hidden_size)
    with torch.no_grad():
        return ids, model(ids, visual).hidden


def test_saved_and_loaded_models_are_equal(model, tmp_path):
    model.save_pretrained(tmp_path / "again")
    again = MedVLSAM2.from_pretrained(tmp_path / "again")
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    ids, hidden = _hidden(model, "It is [SEG].")
    torch.testing.assert_close(_hidden(again, "It is [SEG].")[1], hidden, rtol=0, atol=0)
    assert again.config == model.config


def test_lora_takes_part(model):
    _, hidden = _hidden(model, "It is [SEG].")
    with model.language.peft.disable_adapter():
        _, without = _hidden(model, "It is [SEG].")
    assert (hidden - without).abs().max() > 1e-3


def test_seg_rows_stand_in_for_the_vocabulary_s(model):
    seg = model.config.language.seg_token_id
    ids = torch.tensor([[seg, seg + 1]])
    hidden = torch.randn(1, 2, model.config.language.hidden_size)
    with torch.no_grad():
        model.language.seg_input.add_(1.0)
        model.language.seg_output.mul_(-2.0)
        rows, logits = model.language.embed(ids), model.language.logits(hidden)
        plain = model.language.causal.get_output_embeddings()(hidden)
        torch.testing.assert_close(rows[0, 0], model.language.seg_input)
        torch.testing.assert_close(logits[..., seg], hidden @ model.language.seg_output)
        others = [i for i in range(logits.shape[-1]) if i != seg]
        assert torch.equal(logits[..., others], plain[..., others])
        assert torch.equal(rows[0, 1], model.language.causal.get_input_embeddings().weight[seg + 1])
        model.language.seg_input.sub_(1.0)
        model.language.seg_output.div_(-2.0)


@pytest.mark.parametrize("convention", ["input", "predicting"])
def test_the_convention_picks_the_position(model, convention, monkeypatch):
    ids, hidden = _hidden(model, "It is [SEG]. And [SEG].")
    where = (ids[0] == model.config.language.seg_token_id).nonzero()[:, 0]
    assert len(where) == 2
    monkeypatch.setattr(model, "config", replace(model.config, seg=SegConfig(convention=convention)))
    expected = hidden[0, where if convention == "input" else where - 1]
    torch.testing.assert_close(model.seg_prompts(hidden, ids), model.seg_bridge(expected))


def test_positions_keep_reading_order_over_samples():
    ids = torch.tensor([[0, 9, 0, 9], [9, 0, 0, 0]])
    sample, position = seg_positions(ids, 9, "input")
    assert sample.tolist() == [0, 0, 1] and position.tolist() == [1, 3, 0]


def test_loss_is_the_mean_over_labelled_positions(model):
    ids, hidden = _hidden(model, "It is [SEG].")
    labels = torch.full_like(ids, -100)
    labels[0, -3:] = ids[0, -3:]
    torch.manual_seed(0)
    visual = torch.randn(1, model.config.projector.tokens, model.config.language.hidden_size)
    with torch.no_grad():
        loss = model(ids, visual, labels=labels).loss
        log_probability = model.language.logits(hidden[0, -4:-1]).double().log_softmax(-1)
    torch.testing.assert_close(loss.double(), -log_probability[range(3), ids[0, -3:]].mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = preset(name)
    assert MedVLConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="expected one of tiny"):
        preset("3b")
    with pytest.raises(ValueError, match="expected a preset"):
        MedVLSAM2.from_pretrained("no/such/place")
    with pytest.raises(ValueError, match="ships no weights"):
        MedVLSAM2.from_pretrained("1b")


@pytest.mark.parametrize("part", ["model.safetensors", "language/model.safetensors"])
def test_keys_that_do_not_fit_are_one_error(model, part, tmp_path):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / part)
    gone = sorted(state)[0]
    state["stray.weight"] = state.pop(gone)
    save_file(state, tmp_path / part)
    with pytest.raises(ValueError) as error:
        MedVLSAM2.from_pretrained(tmp_path)
    assert f"missing {gone}" in str(error.value) and "left over stray.weight" in str(error.value)


def test_a_broken_config_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["vision"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="vision"):
        MedVLSAM2.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: expected JSON"):
        MedVLSAM2.from_pretrained(tmp_path)


def test_rounding_the_weights_leaves_the_buffers_exact(small_model):
    plain, rounded = (MedVLSAM2.from_pretrained(small_model, dtype=dtype) for dtype in (None, torch.bfloat16))
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    buffers = dict(plain.named_buffers())
    assert any("inv_freq" in name for name in buffers) and any("gaussian" in name for name in buffers)
    for name, buffer in rounded.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
