"""The whole engine with vLLM as its language backend, against itself with transformers."""

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.model.presets import preset


@pytest.fixture(scope="module")
def directory(small_model, tmp_path_factory):
    """The tiny preset with random weights: the small model's heads are too narrow for vLLM."""
    from transformers import AutoTokenizer

    torch.manual_seed(5)
    model = MedVLSAM2(preset("tiny"), AutoTokenizer.from_pretrained(small_model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            elif "language" in name and parameter.ndim == 2:
                parameter.mul_(4)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


def test_answers_and_masks_are_those_of_transformers(directory, tmp_path):
    voxels = np.random.default_rng(0).normal(-300, 300, (24, 24, 12)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([4, 4, 6, 1])), tmp_path / "ct.nii.gz")
    engines = [
        MedVLEngine.from_pretrained(directory, device="cpu", language_backend=name) for name in ("transformers", "vllm")
    ]
    one, other = (engine.open(tmp_path / "ct.nii.gz") for engine in engines)
    assert other._engine.language.name == "vllm"
    for question in ("What is seen?", "Is there a pleural effusion?"):
        assert other.ask(question, max_tokens=24).text == one.ask(question, max_tokens=24).text
    masks = [session.segment("liver", points=[(12, 12, 6)]) for session in (one, other)]
    assert masks[0].mask.any()
    torch.testing.assert_close(masks[1].logits, masks[0].logits, atol=1e-3, rtol=1e-3)
    found = [session.segment_all(["liver", "left kidney"]) for session in (one, other)]
    assert [mask.absent for mask in found[0]] == [mask.absent for mask in found[1]]
