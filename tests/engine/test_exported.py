"""The language model exported for vLLM: found beside the weights it was written from, and refused beside others."""

import json
import shutil

import pytest
import torch

from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.geometry import InputError
from medvl_sam2.model.export import EXPORTED, check_export, export_language
from medvl_sam2.model.modeling import MedVLSAM2


@pytest.fixture
def directory(small_model, tmp_path):
    """A model with its language model exported."""
    shutil.copytree(small_model, tmp_path / "model")
    export_language(MedVLSAM2.from_pretrained(small_model).language, tmp_path / "model" / EXPORTED)
    return tmp_path / "model"


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("changed", ["lora_B", "seg_output", "layers.1.mlp.down_proj.base_layer"])
def test_export_knows_its_weights(small_model, tmp_path, changed, merge):
    language = MedVLSAM2.from_pretrained(small_model).language
    export_language(language, tmp_path, merge=merge)
    check_export(tmp_path, MedVLSAM2.from_pretrained(small_model, dtype=torch.float32).language)
    name, parameter = next((name, p) for name, p in language.named_parameters() if changed in name)
    with torch.no_grad():
        # Of LoRA and [SEG] a single value may be all that differs.
        part = parameter.view(-1)[-1:] if "base_layer" not in name else parameter
        part.mul_(1.5)
    with pytest.raises(ValueError, match="written from others; remove the folder"):
        check_export(tmp_path, language)


def test_engine_refuses_a_stale_export(directory, monkeypatch):
    made = []
    monkeypatch.setattr(
        "medvl_sam2.engine.language.vllm_backend._build", lambda folder, *_: made.append(folder) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        MedVLEngine.from_pretrained(directory, device="cpu", language_backend="vllm")
    assert made == [directory / EXPORTED]
    source = directory / EXPORTED / "source.json"
    for stale in (json.dumps({"fingerprint": "of other weights"}), None):
        source.write_text(stale) if stale else source.unlink()
        with pytest.raises(InputError, match=f"{EXPORTED}: expected .* got one written from others"):
            MedVLEngine.from_pretrained(directory, device="cpu", language_backend="vllm")
    assert len(made) == 1
    # Another backend has no use for it.
    MedVLEngine.from_pretrained(directory, device="cpu")


def test_a_folder_with_a_presets_name_is_not_the_preset(tmp_path, monkeypatch):
    (tmp_path / "tiny" / EXPORTED).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(MedVLEngine, "__init__", lambda self, model, *, exported, **_: seen.append(exported))
    MedVLEngine.from_pretrained("tiny")
    assert seen == [None]
