"""SAM2 by itself: batches, clips with gradients, half precision, prompts, memories, bad input."""

import pytest
import torch
from torch import Tensor

from medvl_sam2.kernels.axial_rope import rope_linear
from medvl_sam2.model.sam2 import (
    NO_OBJECT,
    SAM2,
    MemoryBank,
    Prompts,
    SAM2Config,
    SliceFeatures,
    VolumeTracker,
    propagate,
)
from medvl_sam2.model.sam2.layers import rope_tables, sine_position

SIZE, SLICES = 64, 5
CONFIG = SAM2Config.preset("micro", image_size=SIZE)
POINTS = torch.tensor([[[10.0, 20.0]], [[40.0, 30.0]], [[50.0, 55.0]]])
LABELS = torch.tensor([[1], [0], [1]])


def make_model(config: SAM2Config = CONFIG) -> SAM2:
    torch.manual_seed(0)
    model = SAM2(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cross_attn_image" in name or "hypernetworks" in name:
                parameter *= 3
    return model


@pytest.fixture(scope="module")
def model() -> SAM2:
    return make_model()


@pytest.fixture(scope="module")
def features(model: SAM2) -> SliceFeatures:
    with torch.no_grad():
        return model.encode_images(torch.randn(SLICES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def seg() -> Tensor:
    return torch.randn(3, 1, CONFIG.d_model, generator=torch.Generator().manual_seed(2))


def run_clip(model: SAM2, images: Tensor, seg: Tensor, points: Prompts | None = None) -> Tensor:
    """A loss over a clip: slice 0 conditions, the others read its memory and each other's."""
    features, bank, losses = model.encode_images(images), MemoryBank(len(images)), []
    for t in range(len(images)):
        prompts = (points or Prompts()).with_embeddings(seg) if t == 0 else Prompts(embeddings=seg)
        out = model.step(features[t], prompts, bank, is_conditioning=t == 0, slice_index=t)
        bank.add(t, out.memory, is_conditioning=t == 0)
        target = (images[t].mean(0) > 0)[None, None, ::4, ::4].float().expand_as(out.low_res_logits)
        losses.append(torch.nn.functional.binary_cross_entropy_with_logits(out.low_res_logits, target))
        losses.append(out.all_ious.square().mean() + out.object_score.square().mean() + out.all_logits.square().mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def test_seg_embedding_changes_the_mask(model: SAM2, features: SliceFeatures, seg: Tensor) -> None:
    for points in (Prompts(), Prompts(POINTS, LABELS)):
        one, other = (
            model.step(features[0], points.with_embeddings(e), None, is_conditioning=True, gate_by_object_score=False)
            for e in (seg, -seg)
        )
        assert (one.low_res_logits - other.low_res_logits).abs().max() > 0.01 * one.low_res_logits.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("gate", [True, False])
def test_batch_of_objects_equals_one_by_one(model: SAM2, features: SliceFeatures, seg: Tensor, gate: bool) -> None:
    prompts = {1: Prompts(POINTS, LABELS)}
    together = propagate(model, features, prompts, start=1, seg_embeddings=seg, gate_by_object_score=gate)
    for b in range(3):
        one = {1: prompts[1][b]}
        alone = propagate(model, features, one, start=1, seg_embeddings=seg[b : b + 1], gate_by_object_score=gate)
        torch.testing.assert_close(together[0][:, b], alone[0][:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together[1][:, b], alone[1][:, 0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_correcting_a_conditioning_slice_replaces_its_memory(model: SAM2, features: SliceFeatures, seg: Tensor) -> None:
    tracker = VolumeTracker(model, features, seg_embeddings=seg)
    tracker.prompt(1, Prompts(POINTS, LABELS))
    list(tracker.run(1))
    first, old = tracker.stack()[1], tracker.bank.conditioning[1]
    corrected = tracker.prompt(1, Prompts(POINTS.flip(0), 1 - LABELS))
    list(tracker.run(1))
    assert torch.equal(tracker.outputs[1].object_score, corrected.object_score)
    assert not torch.equal(tracker.bank.conditioning[1].features, old.features) and 1 not in tracker.bank.tracked
    assert not torch.allclose(tracker.stack()[1][2:], first[2:])


@torch.no_grad()
def test_objects_of_different_slices_share_a_step(model: SAM2, features: SliceFeatures, seg: Tensor) -> None:
    prompts = Prompts(embeddings=seg)
    together = model.step(features[1:4], prompts, None, is_conditioning=True)
    for b in range(3):
        alone = model.step(features[1 + b], prompts[b], None, is_conditioning=True)
        torch.testing.assert_close(together.object_score[b], alone.object_score[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.memory.features[b], alone.memory.features[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_predict_slices_equals_steps_without_memory(model: SAM2, features: SliceFeatures, seg: Tensor) -> None:
    prompts = Prompts(embeddings=seg)
    logits, scores = model.predict_slices(features, prompts, gate_by_object_score=False, max_batch=6)
    assert (logits.shape, scores.shape) == ((SLICES, 3, SIZE // 4, SIZE // 4), (SLICES, 3))
    for t in range(SLICES):
        out = model.step(features[t], prompts, None, is_conditioning=True, gate_by_object_score=False)
        torch.testing.assert_close(logits[t], out.low_res_logits[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores[t], out.object_score[:, 0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_absent_objects_are_gated_in_inference_only(model: SAM2, features: SliceFeatures, seg: Tensor) -> None:
    ours = make_model()
    ours.sam_mask_decoder.pred_obj_score_head.layers[2].bias.fill_(-100.0)
    prompts = Prompts(embeddings=seg)
    out = ours.step(features[0], prompts, None, is_conditioning=True)
    assert (out.low_res_logits == NO_OBJECT).all() and (out.all_logits != NO_OBJECT).all()
    assert torch.equal(out.object_pointer, ours.no_obj_ptr.expand_as(out.object_pointer))
    ours.train()
    assert (ours.step(features[0], prompts, None, is_conditioning=True).low_res_logits != NO_OBJECT).all()


def test_clip_trains_every_part_that_takes_part() -> None:
    model, seg = make_model().train(), torch.randn(2, 1, CONFIG.d_model)
    images = torch.randn(4, 3, SIZE, SIZE)
    with torch.inference_mode():
        propagate(model, model.encode_images(images), start=0, seg_embeddings=seg)
    seg.requires_grad_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = run_clip(model, images, seg)
    before.backward()
    idle = {
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    }
    # Mask hints, clicks and the two embeddings for absent objects have no part in this clip.
    unused = ("mask_downsample.", "sam_prompt_encoder.mask_down", "sam_prompt_encoder.point_", "no_obj", "no_mem_pos")
    assert {name for name in idle if not name.startswith(unused)} == set()
    assert seg.grad.isfinite().all() and seg.grad.any(dim=-1).all()
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        after = run_clip(model, images, seg)
        after.backward()
    assert after < before

    hints = Prompts(POINTS[:2], LABELS[:2], masks=torch.randn(2, 1, SIZE // 4, SIZE // 4))
    run_clip(model, images[:1], seg, hints).backward()
    assert model.sam_prompt_encoder.mask_downscaling[0].weight.grad.any()
    assert model.sam_prompt_encoder.point_embeddings[1].weight.grad.any()


@torch.no_grad()
def test_bfloat16_stays_close(model: SAM2, features: SliceFeatures, seg: Tensor) -> None:
    images = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    options = {"start": 1, "gate_by_object_score": False}
    exact, _ = propagate(model, model.encode_images(images), seg_embeddings=seg, **options)
    with torch.autocast("cpu", torch.bfloat16):
        auto, _ = propagate(model, model.encode_images(images), seg_embeddings=seg, **options)
    half = make_model().to(torch.bfloat16)
    cast, _ = propagate(half, half.encode_images(images.bfloat16()), seg_embeddings=seg.bfloat16(), **options)
    for logits in (auto, cast):
        error = (logits.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error < 0.05


@torch.no_grad()
@pytest.mark.parametrize("preset", ["micro", "tiny"])
def test_step_never_looks_at_values(preset: str) -> None:
    """On the meta device there are no values: whatever would wait for the GPU raises."""
    config = SAM2Config.preset(preset, image_size=SIZE)
    model = SAM2(config).eval().to("meta")
    features = model.encode_images(torch.empty(3, 3, SIZE, SIZE, device="meta"))
    prompts = Prompts(POINTS.to("meta"), LABELS.to("meta"), embeddings=torch.empty(3, 1, config.d_model, device="meta"))
    bank = MemoryBank(3)
    for t in range(3):
        out = model.step(features[t], None if t else prompts, bank, is_conditioning=t == 0, slice_index=t)
        bank.add(t, out.memory, is_conditioning=t == 0)
    assert out.low_res_logits.shape == (3, 1, SIZE // 4, SIZE // 4)


def test_rope_is_a_complex_rotation() -> None:
    size, dim = 5, 16
    x = torch.randn(2, size * size, dim, dtype=torch.float64).float()
    halves = rope_linear(x, torch.eye(dim), None, rope_tables(size, dim, x.device))
    turned = torch.stack(halves.chunk(2, dim=-1), dim=-1).flatten(-2)
    freqs = 10000.0 ** (-torch.arange(0, dim, 4, dtype=torch.float64) / dim)
    places = torch.arange(size * size)
    angles = torch.cat((torch.outer(places % size, freqs), torch.outer(places // size, freqs)), dim=1)
    expected = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned.double(), torch.view_as_real(expected).flatten(-2), rtol=1e-5, atol=1e-5)


def test_tables_made_in_inference_serve_training() -> None:
    with torch.inference_mode():
        table = sine_position(3, 8, torch.device("cpu"))
    weight = torch.ones(8, requires_grad=True)
    (weight * table).sum().backward()
    torch.testing.assert_close(weight.grad, table.sum(0))


def test_config_survives_json_and_rejects_what_does_not_fit() -> None:
    config = SAM2Config.preset("large", "2.0", image_size=512)
    assert SAM2Config.from_dict(config.to_dict()) == config
    assert (config.feature_size, config.mask_size) == (32, 128)
    for name, arguments in {
        "image_size": {"image_size": 500},
        "version": {"version": "3"},
        "d_model": {"d_model": 250},
        "max_conditioning_slices": {"max_conditioning_slices": 1},
    }.items():
        with pytest.raises(ValueError, match=name):
            SAM2Config(**arguments)
    with pytest.raises(ValueError, match="unknown fields.*colour"):
        SAM2Config.from_dict({"colour": 1})
    with pytest.raises(ValueError, match="expected one of.*tiny"):
        SAM2Config.preset("huge")


def test_checkpoint_errors_name_the_keys(model: SAM2) -> None:
    state = model.state_dict()
    del state["no_mem_embed"]
    state |= {"stray": torch.zeros(1), "maskmem_tpos_enc": torch.zeros(7, 1, 1, 64)}
    with pytest.raises(
        ValueError, match=r"missing \['no_mem_embed'\].*left over \['stray'\].*mis-shaped \['maskmem_tpos"
    ):
        model.load_official_state_dict(state)


def test_prompts_join_split_and_reject() -> None:
    joined = Prompts.cat([Prompts(POINTS[:1], LABELS[:1]), Prompts(POINTS[1:].view(1, 2, 2), LABELS[1:].view(1, 2))])
    assert joined.labels.tolist() == [[1, -1], [0, 1]] and joined.num_points == 2
    assert torch.equal(joined[0].points[:, :1], POINTS[:1]) and joined[-1].batch_size == 1
    assert Prompts(boxes=torch.zeros(2, 4)).num_points == 2 and Prompts().batch_size is None
    assert not Prompts(embeddings=torch.zeros(1, 1, 8)).is_from_user and joined.is_from_user
    assert torch.equal(joined.repeat(2).labels, torch.cat((joined.labels, joined.labels)))
    with pytest.raises(ValueError, match="together"):
        Prompts(points=POINTS)
    with pytest.raises(ValueError, match="one batch size"):
        Prompts(POINTS, LABELS, boxes=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="boxes for all objects or none"):
        Prompts.cat([Prompts(boxes=torch.zeros(1, 4)), Prompts(POINTS, LABELS)])


def test_slice_features_slice_and_join(features: SliceFeatures) -> None:
    assert len(features[1]) == 1 and torch.equal(features[-1].vision, features.vision[-1:])
    assert torch.equal(features.select(torch.tensor([3, 0])).high_res[0], features.high_res[0][[3, 0]])
    assert torch.equal(SliceFeatures.cat([features[:2], features[2:]]).vision, features.vision)
    assert features.to(torch.bfloat16).nbytes * 2 == features.nbytes
    assert len(features[0].expand(4)) == 4 and len(features.repeat_interleave(2)) == 2 * SLICES


def test_wrong_use_is_told(model: SAM2, features: SliceFeatures, seg: Tensor) -> None:
    with pytest.raises(ValueError, match="images: expected"):
        model.encode_images(torch.zeros(1, 3, SIZE, SIZE + 32))
    with pytest.raises(ValueError, match="conditioning slice"):
        model.step(features[1], Prompts(embeddings=seg), MemoryBank(SLICES), is_conditioning=False, slice_index=1)
    with pytest.raises(ValueError, match="features: expected one slice"):
        model.step(features[:2], Prompts(embeddings=seg), None, is_conditioning=True)
    with pytest.raises(ValueError, match="given_masks: expected"):
        model.step(features[0], Prompts(given_masks=torch.zeros(3, 1, 8, 8)), None, is_conditioning=True)
    with pytest.raises(ValueError, match="say what to segment"):
        propagate(model, features, start=0)
    with pytest.raises(ValueError, match=f"expected 0 to {SLICES - 1}, got {SLICES}"):
        propagate(model, features, start=SLICES, seg_embeddings=seg)
    with pytest.raises(ValueError, match="mode: expected"):
        propagate(model, features, start=0, seg_embeddings=seg, mode="sideways")
