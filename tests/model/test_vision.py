"""The 3D ViT against MONAI's, which M3D-CLIP was trained with."""

from dataclasses import replace

import pytest
import torch

from medvl_sam2.model.config import VisionConfig, VolumeConfig
from medvl_sam2.model.presets import preset
from medvl_sam2.model.vision import VisionEncoder

SHAPE = VolumeConfig(size=(8, 48, 64), patch=(4, 16, 16))
SIZES = VisionConfig(hidden_size=96, layers=3, heads=4, mlp_size=160)


def _random(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        key: torch.randn_like(value) * (0.3 if value.ndim > 1 else 1.0) for key, value in module.state_dict().items()
    }


def test_equals_monai_on_the_same_weights():
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    reference = nets.ViT(
        in_channels=1,
        img_size=SHAPE.size,
        patch_size=SHAPE.patch,
        hidden_size=SIZES.hidden_size,
        mlp_dim=SIZES.mlp_size,
        num_layers=SIZES.layers,
        num_heads=SIZES.heads,
        proj_type="perceptron",
        classification=True,
        spatial_dims=3,
        qkv_bias=False,
    ).eval()
    ours = VisionEncoder(SHAPE, SIZES).eval()
    state = _random(ours)
    ours.load_state_dict(state)
    # Newer releases have weights that M3D's pinned one had not; they take no part without cross-attention.
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("cross_attn" in key or "classification_head" in key for key in missing)
    volume = torch.rand(2, 1, *SHAPE.size)
    with torch.no_grad():
        reference.classification_head = torch.nn.Identity()
        _, hidden = reference(volume)
        expected = reference.norm(hidden[-1])[:, 1:]
        got = ours(volume)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_m3d_clip_has_138_tensors_and_87_million_parameters():
    settings = preset("1b")
    with torch.device("meta"):
        vision = VisionEncoder(settings.volume, settings.vision)
    assert len(vision.state_dict()) == 138
    assert sum(value.numel() for value in vision.state_dict().values()) == 87_389_184
    assert settings.volume.tokens == 2048


def test_another_grid_is_refused():
    vision = VisionEncoder(SHAPE, SIZES)
    with pytest.raises(ValueError, match=r"expected shape \(B, 1, 8, 48, 64\)"):
        vision(torch.zeros(1, 1, 8, 64, 64))
    with pytest.raises(ValueError, match=r"volume\.patch"):
        replace(SHAPE, size=(9, 48, 64))
