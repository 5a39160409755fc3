"""Projectors: shapes, parameter counts and a direct evaluation of the Mixer."""

import pytest
import torch
from torch.nn import functional as F

from medvl_sam2.model.config import ProjectorConfig
from medvl_sam2.model.projector import build_projector


@pytest.mark.parametrize(
    ("hidden", "depth", "count"),
    [(896, 2, 5_691_776), (2048, 2, 12_075_008), (4096, 2, 34_891_776), (896, 1, 2_807_552), (2048, 1, 7_086_080)],
)
def test_mixer_has_the_counted_parameters(hidden, depth, count):
    with torch.device("meta"):
        projector = build_projector(ProjectorConfig(depth=depth), 2048, 768, hidden)
    assert sum(p.numel() for p in projector.parameters()) == count


def test_mixer_equals_its_maths_in_double():
    torch.manual_seed(0)
    projector = build_projector(ProjectorConfig(tokens=6, depth=2), 24, 10, 16)
    for p in projector.parameters():
        torch.nn.init.normal_(p, std=0.4)
    x = torch.randn(3, 24, 10)
    y = x.double()
    for layer in projector.mixer:
        w = {name: p.double() for name, p in layer.named_parameters()}
        y = F.layer_norm(y, y.shape[-1:], w["ln1.weight"], w["ln1.bias"])
        y = torch.einsum("bnd,mn->bmd", y, w["mlp1.mm_projector.0.weight"]) + w["mlp1.mm_projector.0.bias"][:, None]
        y = torch.einsum("bnd,mn->bmd", F.gelu(y), w["mlp1.mm_projector.1.1.weight"])
        y = y + w["mlp1.mm_projector.1.1.bias"][:, None]
        y = F.layer_norm(y, y.shape[-1:], w["ln2.weight"], w["ln2.bias"])
        y = y @ w["mlp2.mm_projector.0.weight"].T + w["mlp2.mm_projector.0.bias"]
        y = F.gelu(y) @ w["mlp2.mm_projector.1.1.weight"].T + w["mlp2.mm_projector.1.1.bias"]
    torch.testing.assert_close(projector(x).double(), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixer", "grouped_linear", "pooled"])
def test_every_kind_gives_the_same_tokens(kind):
    projector = build_projector(ProjectorConfig(kind=kind, tokens=6), 24, 10, 16)
    assert projector(torch.randn(2, 24, 10)).shape == (2, 6, 16)


def test_rivals_keep_neighbours_together():
    x = torch.randn(1, 24, 10)
    for kind in ("grouped_linear", "pooled"):
        projector = build_projector(ProjectorConfig(kind=kind, tokens=6), 24, 10, 16)
        changed = x.clone()
        changed[:, 4:8] += 1
        moved = (projector(changed) - projector(x)).abs().sum(-1)[0] > 1e-6
        assert moved.tolist() == [False, True, False, False, False, False]


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match=r"projector\.kind"):
        build_projector(ProjectorConfig(kind="mean"), 24, 10, 16)
    with pytest.raises(ValueError, match=r"projector\.tokens"):
        build_projector(ProjectorConfig(kind="pooled", tokens=7), 24, 10, 16)
    with pytest.raises(ValueError, match=r"projector\.depth"):
        build_projector(ProjectorConfig(tokens=6, depth=3), 24, 10, 6)
