"""A small SAM2 with random weights that keep every part busy, slices for it, and how results are compared."""

import math

import torch
from torch import Tensor

from medvl_sam2.model.sam2 import NO_OBJECT, SAM2, Prompts, SAM2Config, SliceFeatures

SLICES, KEY, SIZE = 32, 12, 128
CONFIG = SAM2Config.preset(
    "micro",
    image_size=SIZE,
    embed_dim=16,
    d_model=64,
    mem_dim=16,
    memory_layers=3,
    memory_ffn=128,
    decoder_mlp=128,
    multimask_output=True,
    dynamic_multimask=True,
)


def randomise(model: SAM2) -> SAM2:
    """Weights under which masks are neither empty nor full, objects come and go, and memories make a difference."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        noise = torch.randn(tensor.shape, generator=generator)
        if "gaussian_matrix" in name:
            tensor.data = noise
        elif tensor.dim() > 1 and name.endswith("weight") and "embed" not in name and "token" not in name:
            tensor.data = noise / math.sqrt(tensor[0].numel())
            if any(k in name for k in ("q_proj", "k_proj", "qkv")):
                tensor.data *= 1.2 if "cross_attn_image." in name else 0.5
            if "cross_attn_image.v_proj" in name:
                tensor.data *= 2.0
        elif name.endswith("gamma"):
            tensor.data = 0.3 + 0.1 * noise
        elif "norm" in name and name.endswith("weight"):
            tensor.data = 1 + 0.1 * noise
        else:
            tensor.data = (0.1 if tensor.dim() == 1 else 0.5) * noise
    model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(0.5)
    return model.eval()


def make_features(config: SAM2Config = CONFIG, slices: int = SLICES) -> SliceFeatures:
    generator = torch.Generator().manual_seed(1)
    side, dim = config.feature_size, config.d_model

    def draw(channels: int, scale: int) -> Tensor:
        # Neighbouring slices resemble each other, as in a scan.
        slow, fast = (torch.randn(n, channels, scale * side, scale * side, generator=generator) for n in (1, slices))
        return slow + 0.5 * fast

    return SliceFeatures(draw(dim, 1), (draw(dim // 8, 4), draw(dim // 4, 2)))


def points(objects: int, shift: float = 0.0) -> Prompts:
    places = torch.linspace(20, 100, objects)
    return Prompts(torch.stack((places + shift, 110 - places), -1)[:, None], torch.ones(objects, 1, dtype=torch.int32))


def exact_points(objects: int, shift: float = 0.0) -> Prompts:
    """The same for a model in float64, in which chains of corrections do not blow rounding up to what can be seen."""
    plain = points(objects, shift)
    return Prompts(plain.points.double(), plain.labels)


def embeddings(objects: int) -> Tensor:
    return torch.randn(objects, 1, CONFIG.d_model, generator=torch.Generator().manual_seed(3))


def assert_equal(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tolerance: float = 1e-3) -> None:
    """Relative errors of every object's logits, at the ends by their own size, and of the scores; each Dice."""
    (logits, scores), (wanted, wanted_scores) = got, want
    absent = wanted == NO_OBJECT
    assert torch.equal(logits == NO_OBJECT, absent)
    assert (~absent).any(), "every mask is gated: the case tests nothing"
    error = (logits - wanted).masked_fill(absent, 0).abs().amax((-2, -1))
    largest = wanted.masked_fill(absent, 0).abs().amax((-2, -1))
    assert (error <= tolerance * largest.amax(0)).all(), f"relative errors {(error / largest.amax(0)).tolist()}"
    # Errors grow from slice to slice, so the ends are where they tell.
    assert (error <= tolerance * largest)[[0, -1]].all(), f"relative errors {(error / largest)[[0, -1]].tolist()}"
    assert (scores - wanted_scores).abs().max() <= tolerance * wanted_scores[wanted_scores != NO_OBJECT].abs().max()
    ours, theirs = logits > 0, wanted > 0
    both, all_ = (ours & theirs).sum((0, 2, 3)), ours.sum((0, 2, 3)) + theirs.sum((0, 2, 3))
    assert (2 * both >= 0.999 * all_).all(), f"Dice {(2 * both / all_).tolist()}"


def assert_same_features(got: SliceFeatures, want: SliceFeatures) -> None:
    for mine, theirs in zip((got.vision, *got.high_res), (want.vision, *want.high_res)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def assert_telling(logits: Tensor, scores: Tensor) -> None:
    present = scores > 0
    assert present.any()
    share = (logits > 0).float().mean((-2, -1))[present]
    assert ((share > 0.02) & (share < 0.98)).float().mean() > 0.5


EXACT = {"memory_dtype": None}
OURS = {"storage_dtype": None}
