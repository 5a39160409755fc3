"""SAM2 against facebookresearch/sam2 (the `sam2` package) on the same random weights, at a small image size.

Most cases run in float64, where both sides must agree to rounding however the random network amplifies it; the cases
named float32 run the package as it is, memories in bfloat16 included.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvl_sam2.model.sam2 import NO_OBJECT, SAM2, MemoryBank, Prompts, SAM2Config, VolumeTracker, layers, propagate

pytest.importorskip("sam2", reason="the sam2 package is not installed")
hydra = pytest.importorskip("hydra", reason="hydra-core is not installed")

FILES = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}
PARAMETERS = {"tiny": 38_962_498, "small": 46_060_354, "base_plus": 80_850_178, "large": 224_446_642}
POSTPROCESSING = [
    "++model.sam_mask_decoder_extra_args.dynamic_multimask_via_stability=true",
    "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_delta=0.05",
    "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_thresh=0.98",
    "++model.binarize_mask_from_pts_for_mem_enc=true",
]
SLICES, SIZE, KEY = 8, 128, 3
SINGLE = torch.float32
EXACT = {"memory_dtype": None}
POINTS = torch.tensor([[[30.0, 35.0]], [[60.0, 50.0]], [[100.0, 90.0]]])
LABELS = torch.ones(3, 1, dtype=torch.int32)
BOXES = torch.tensor([[15.0, 20.0, 55.0, 60.0], [45.0, 30.0, 80.0, 100.0], [75.0, 75.0, 125.0, 111.0]])


@contextmanager
def float64() -> Iterator[None]:
    """Inside, float32 and bfloat16 mean float64, in the package and in ours."""
    tables = (layers.sine_position, layers.pointer_position, layers.rope_tables)
    default, double = torch.get_default_dtype(), torch.float64
    with pytest.MonkeyPatch.context() as patch:
        for name in ("float", "float32", "bfloat16"):
            patch.setattr(torch, name, double)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        for table in tables:
            table.cache_clear()
        torch.set_default_dtype(double)
        yield
        torch.set_default_dtype(default)
        for table in tables:
            table.cache_clear()


def build_reference(variant: str, version: str, **options: Any) -> nn.Module:
    """The package's own video predictor, from its own configuration files; hole filling (CUDA only) left off."""
    prefix = "sam2.1/sam2.1" if version == "2.1" else "sam2/sam2"
    overrides = ["++model._target_=sam2.sam2_video_predictor.SAM2VideoPredictor", *POSTPROCESSING]
    overrides += [f"++model.{name}={value}" for name, value in {"image_size": SIZE, **options}.items()]
    config = hydra.compose(config_name=f"configs/{prefix}_hiera_{FILES[variant]}", overrides=overrides)
    return hydra.utils.instantiate(config.model, _recursive_=True).eval()


def randomise(model: nn.Module) -> None:
    """Weights that keep every part busy and well conditioned: masks neither empty nor full, scores of both signs.

    With the usual variance in all layers the network amplifies rounding a thousandfold (the package's own outputs
    move by 1e-3 when its input moves by 1e-7), so queries and keys are drawn smaller, but for those that read the
    memory, which have to make the objects differ.
    """
    generator = torch.Generator().manual_seed(0)
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        noise = torch.randn(tensor.shape, generator=generator, dtype=SINGLE).to(tensor.dtype)
        if "gaussian_matrix" in name:
            tensor.data = noise
        elif tensor.dim() > 1 and name.endswith("weight") and "embed" not in name and "token" not in name:
            tensor.data = noise / math.sqrt(tensor[0].numel())
            if any(k in name for k in ("q_proj", "k_proj", "qkv")):
                tensor.data *= 2.0 if "cross_attn_image." in name else 0.5
            if "cross_attn_image.v_proj" in name:
                tensor.data *= 3.0
            if "hypernetworks" in name:
                tensor.data *= 2.0
            if "pred_obj_score_head" in name:
                tensor.data *= 1.4
        elif name.endswith("gamma"):
            tensor.data = 0.3 + 0.1 * noise
        elif "norm" in name and name.endswith("weight"):
            tensor.data = 1 + 0.1 * noise
        elif tensor.dim() == 1:
            tensor.data = 0.1 * noise
        else:
            tensor.data = 0.5 * noise
        if "neck" in name:
            tensor.data *= 0.3
        if name == "sam_mask_decoder.pred_obj_score_head.layers.2.bias":
            tensor.data += 2.6


def make_pair(variant: str, version: str, light: bool = True) -> tuple[nn.Module, SAM2]:
    """The package's model and ours with the same weights; ``light`` leaves out most of the trunk's blocks."""
    few = {"stages": [1, 2, 4, 1], "global_blocks": [4, 6]} if light else {}
    names = {"stages": "image_encoder.trunk.stages", "global_blocks": "image_encoder.trunk.global_att_blocks"}
    reference = build_reference(variant, version, **{names[name]: value for name, value in few.items()})
    randomise(reference)
    ours = SAM2(SAM2Config.preset(variant, version, image_size=SIZE, memory_dropout=0.0, **few))
    ours.load_official_state_dict(reference.state_dict())
    return reference, ours.eval()


def make_images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse, fine = (torch.randn(SLICES, 3, n, n, generator=generator, dtype=SINGLE) for n in (16, SIZE))
    images = F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic") + 0.2 * fine
    return images.to(torch.get_default_dtype())


def reference_state(images: Tensor) -> dict[str, Any]:
    """What the package's `init_state` makes from a folder of JPEG files, made from tensors."""
    device = torch.device("cpu")
    state = {"images": images, "num_frames": len(images), "video_height": SIZE, "video_width": SIZE}
    state |= {"offload_video_to_cpu": False, "offload_state_to_cpu": False, "device": device, "storage_device": device}
    state |= {"obj_id_to_idx": OrderedDict(), "obj_idx_to_id": OrderedDict(), "obj_ids": []}
    empty = ["cached_features", "constants", "point_inputs_per_obj", "mask_inputs_per_obj", "output_dict_per_obj"]
    return state | {k: {} for k in [*empty, "temp_output_dict_per_obj", "frames_tracked_per_obj"]}


def reference_outputs(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Low-resolution logits (S, B, m, m) and object scores (S, B) that the package holds in its state."""
    logits = torch.full((state["num_frames"], len(state["obj_ids"]), SIZE // 4, SIZE // 4), NO_OBJECT)
    scores = torch.full(logits.shape[:2], NO_OBJECT)
    for b, outputs in state["output_dict_per_obj"].items():
        for t, out in {**outputs["non_cond_frame_outputs"], **outputs["cond_frame_outputs"]}.items():
            logits[t, b], scores[t, b] = out["pred_masks"][0, 0], out["object_score_logits"][0, 0]
    return logits, scores


def run_reference(reference: nn.Module, state: dict[str, Any], start: int, directions: str = "both") -> None:
    for reverse in {"both": (False, True), "forward": (False,), "reverse": (True,)}[directions]:
        for _ in reference.propagate_in_video(state, start_frame_idx=start, reverse=reverse):
            pass


def assert_close(actual: Tensor, expected: Tensor, name: str, tolerance: float = 1e-9) -> None:
    """The largest error is at most ``tolerance`` of the largest value; NO_OBJECT only where it is NO_OBJECT."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} for {tuple(expected.shape)}"
    absent = expected == NO_OBJECT
    assert torch.equal(actual == NO_OBJECT, absent), f"{name}: other pixels gated"
    actual, expected = actual.masked_fill(absent, 0), expected.masked_fill(absent, 0)
    assert expected.any(), f"{name}: nothing to compare, every value is gated or zero"
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


def assert_telling(logits: Tensor, scores: Tensor) -> None:
    """The case tests something: some objects present and some absent, masks neither empty nor full, objects differ."""
    present = scores > 0
    assert present.any() and not present.all()
    share = (logits > 0).float().mean((-2, -1))[present]
    assert ((share > 0.02) & (share < 0.98)).float().mean() > 0.7
    assert scores.std(dim=1).max() > 0.1


@pytest.fixture(scope="module")
def tiny() -> SimpleNamespace:
    with float64(), torch.inference_mode():
        reference, ours = make_pair("tiny", "2.1")
        images = make_images()
        return SimpleNamespace(reference=reference, ours=ours, images=images, features=ours.encode_images(images))


@pytest.fixture
def double() -> Iterator[None]:
    with float64():
        yield


@pytest.fixture
def no_init(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are overwritten anyway need no drawing."""
    for name in ("kaiming_uniform_", "trunc_normal_", "uniform_", "normal_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


@pytest.mark.usefixtures("no_init")
@pytest.mark.parametrize("version", ["2.1", "2.0"])
@pytest.mark.parametrize("variant", FILES)
def test_keys_load_strictly_both_ways(variant: str, version: str) -> None:
    reference = build_reference(variant, version, image_size=1024)
    ours = SAM2(SAM2Config.preset(variant, version))
    if version == "2.1":
        assert sum(p.numel() for p in ours.parameters()) == PARAMETERS[variant]
    ours.load_official_state_dict({"model": reference.state_dict()})
    reference.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.usefixtures("double")
@torch.inference_mode()
@pytest.mark.parametrize("variant", ["tiny", "base_plus", "large"])
def test_image_encoder(variant: str) -> None:
    reference, ours = make_pair(variant, "2.1", light=variant != "tiny")
    images = make_images()[:1]
    features, expected = ours.encode_images(images), reference.forward_image(images)["backbone_fpn"]
    for name, x, y in zip(("s0", "s1", "vision"), (*features.high_res, features.vision), expected):
        assert y.std() > 0.1
        assert_close(x, y, name)


def sam_heads(tiny: SimpleNamespace, points: dict | None, masks: Tensor | None, multimask: bool) -> tuple:
    """The package's prompt encoder and mask decoder without memory, for three objects on three slices."""
    features = tiny.features[KEY : KEY + 3]
    masks = None if masks is None else masks.double()
    vision = features.vision + tiny.reference.no_mem_embed[0, :, :, None, None]
    return tiny.reference._forward_sam_heads(vision, points, masks, list(features.high_res), multimask)


HINT = 5 * torch.randn(3, 1, SIZE // 4, SIZE // 4, generator=torch.Generator().manual_seed(2))
CORNERS = {"point_coords": BOXES.view(3, 2, 2), "point_labels": torch.tensor([[2, 3]] * 3)}
CLICKS = torch.tensor([[[30.0, 35.0], [10.0, 15.0], [0.0, 0.0]]] * 3) + torch.arange(3)[:, None, None] * 20
CLICK_LABELS = torch.tensor([[1, 0, 1], [0, 1, -1], [1, 1, 0]])
SINGLE_SLICE = {
    "nothing": (Prompts(embeddings=torch.zeros(3, 0, 256)), None, None, True),
    "point": (Prompts(POINTS, LABELS), {"point_coords": POINTS, "point_labels": LABELS}, None, True),
    "clicks": (Prompts(CLICKS, CLICK_LABELS), {"point_coords": CLICKS, "point_labels": CLICK_LABELS}, None, False),
    "box": (Prompts(boxes=BOXES), CORNERS, None, False),
    "box_point": (
        Prompts(POINTS, LABELS, BOXES),
        {
            "point_coords": torch.cat((CORNERS["point_coords"], POINTS), 1),
            "point_labels": torch.cat((CORNERS["point_labels"], LABELS), 1),
        },
        None,
        False,
    ),
    "mask_hint": (Prompts(masks=HINT), None, HINT, True),
    "mask_hint_other_size": (Prompts(masks=HINT[..., :20, :20]), None, HINT[..., :20, :20], True),
}


@pytest.mark.usefixtures("double")
@torch.inference_mode()
@pytest.mark.parametrize("case", SINGLE_SLICE)
def test_prompts_on_one_slice(tiny: SimpleNamespace, case: str) -> None:
    prompts, points, masks, multimask = SINGLE_SLICE[case]
    out = tiny.ours.step(tiny.features[KEY : KEY + 3], prompts, None, is_conditioning=True)
    _, _, ious, low, _, pointer, score = sam_heads(tiny, points, masks, multimask)
    assert_close(out.low_res_logits, low, "logits")
    assert_close(out.iou, ious.max(dim=1).values, "iou")
    assert_close(out.object_score, score, "object score")
    assert_close(out.object_pointer, pointer, "object pointer")


@pytest.mark.usefixtures("double")
@torch.inference_mode()
@pytest.mark.parametrize("multimask", [True, False])
def test_multimask_can_be_set(tiny: SimpleNamespace, multimask: bool) -> None:
    features = tiny.features[KEY : KEY + 3]
    out = tiny.ours.step(features, Prompts(POINTS, LABELS), None, is_conditioning=True, multimask=multimask)
    points = {"point_coords": POINTS, "point_labels": LABELS}
    multimasks, _, ious, low, *_ = sam_heads(tiny, points, None, multimask)
    assert_close(out.low_res_logits, low, "logits")
    assert (out.all_logits.shape[1], out.all_ious.shape[1]) == (4, 4)
    if multimask:
        gated = torch.where(out.object_score[..., None, None] > 0, out.all_logits[:, 1:], NO_OBJECT)
        assert_close(gated, multimasks, "three masks")
        assert_close(out.all_ious[:, 1:], ious, "three ious")


@pytest.mark.usefixtures("double")
@torch.inference_mode()
@pytest.mark.parametrize("kind", ["point", "clicks"])
def test_propagation_both_ways(tiny: SimpleNamespace, kind: str) -> None:
    prompts = {"point": Prompts(POINTS, LABELS), "clicks": Prompts(CLICKS, CLICK_LABELS)}[kind]
    state = reference_state(tiny.images)
    for b in range(3):
        tiny.reference.add_new_points_or_box(state, KEY, b, points=prompts.points[b], labels=prompts.labels[b])
    run_reference(tiny.reference, state, KEY)
    expected = reference_outputs(state)
    logits, scores = propagate(tiny.ours, tiny.features, {KEY: prompts}, start=KEY, **EXACT)
    assert_close(logits, expected[0], "logits")
    assert_close(scores, expected[1], "object scores")

    apart, apart_scores = propagate(tiny.ours, tiny.features, {KEY: prompts}, start=KEY, mode="independent", **EXACT)
    assert torch.equal(apart[KEY:], logits[KEY:])
    assert not torch.allclose(apart_scores[:KEY], scores[:KEY], rtol=1e-4)


@pytest.mark.usefixtures("double")
@torch.inference_mode()
def test_independent_chains_are_two_states(tiny: SimpleNamespace) -> None:
    expected = []
    for directions in ("forward", "reverse"):
        state = reference_state(tiny.images)
        tiny.reference.add_new_points_or_box(state, KEY, 0, points=POINTS[1], labels=LABELS[1])
        run_reference(tiny.reference, state, KEY, directions)
        expected.append(reference_outputs(state)[0])
    logits, _ = propagate(
        tiny.ours, tiny.features, {KEY: Prompts(POINTS, LABELS)[1]}, start=KEY, mode="independent", **EXACT
    )
    assert_close(logits, torch.cat((expected[1][:KEY], expected[0][KEY:])), "logits")


@pytest.mark.usefixtures("double")
@torch.inference_mode()
@pytest.mark.parametrize("variant, version", [("base_plus", "2.0"), ("tiny", "2.0")])
def test_propagation_of_other_variants(variant: str, version: str) -> None:
    reference, ours = make_pair(variant, version)
    images = make_images()[:4]
    state = reference_state(images)
    for b in range(2):
        reference.add_new_points_or_box(state, 1, b, points=POINTS[b], labels=LABELS[b])
    run_reference(reference, state, 1)
    expected = reference_outputs(state)
    logits, scores = propagate(ours, ours.encode_images(images), {1: Prompts(POINTS, LABELS)[:2]}, start=1, **EXACT)
    assert (expected[1] > 0).any()
    assert_close(logits, expected[0], "logits")
    assert_close(scores, expected[1], "object scores")


@pytest.mark.usefixtures("double")
@torch.inference_mode()
def test_given_masks_strides_and_nearest_conditioning_slices() -> None:
    reference, ours = make_pair("tiny", "2.1")
    reference.memory_temporal_stride_for_eval, reference.max_cond_frames_in_attn = 2, 2
    ours.config = replace(ours.config, memory_stride=2, max_conditioning_slices=2)
    images = make_images()
    grid = torch.arange(SIZE)
    masks = torch.stack([((grid[:, None] - r) ** 2 + (grid - 64) ** 2 < 30**2).float() for r in (45, 80)])
    masks[1] *= 0
    state = reference_state(images)
    for b in range(2):
        reference.add_new_mask(state, 2, b, masks[b])
        for t in (0, 6):
            reference.add_new_points_or_box(state, t, b, points=POINTS[b], labels=LABELS[b])
    run_reference(reference, state, 2)
    expected = reference_outputs(state)

    clicks = Prompts(POINTS, LABELS)[:2]
    prompts = {2: Prompts(given_masks=masks[:, None]), 0: clicks, 6: clicks}
    logits, scores = propagate(ours, ours.encode_images(images), prompts, start=2, **EXACT)
    assert_close(logits, expected[0], "logits")
    assert_close(scores, expected[1], "object scores")


@pytest.mark.usefixtures("double")
@torch.inference_mode()
def test_clicks_one_after_the_other_and_a_correction(tiny: SimpleNamespace) -> None:
    state = reference_state(tiny.images)
    tracker = VolumeTracker(tiny.ours, tiny.features, **EXACT)
    for count in (1, 2):
        points, labels = CLICKS[:1, :count], CLICK_LABELS[:1, :count]
        tiny.reference.add_new_points_or_box(state, KEY, 0, points=points[0], labels=labels[0])
        tracker.prompt(KEY, Prompts(points, labels))
    run_reference(tiny.reference, state, KEY, "forward")
    list(tracker.run(KEY))

    late, mark = torch.tensor([[[64.0, 70.0]]]), torch.tensor([[0]])
    tiny.reference.add_new_points_or_box(state, 4, 0, points=late[0], labels=mark[0])
    corrected = tracker.prompt(4, Prompts(late, mark))
    expected = state["temp_output_dict_per_obj"][0]["non_cond_frame_outputs"][4]
    assert_close(corrected.object_score, expected["object_score_logits"], "object score of the corrected slice")
    assert_close(corrected.object_pointer, expected["obj_ptr"], "object pointer of the corrected slice")

    run_reference(tiny.reference, state, 5, "forward")
    list(tracker.run(5))
    run_reference(tiny.reference, state, KEY, "reverse")
    list(tracker.run(KEY, reverse=True))
    logits, scores = tracker.stack()
    assert_close(logits, reference_outputs(state)[0], "logits")
    assert_close(scores, reference_outputs(state)[1], "object scores")


@pytest.mark.usefixtures("double")
def test_gradients_of_a_training_clip() -> None:
    """Loss and every gradient through a clip of three slices equal the package's in training mode."""
    reference, ours = make_pair("tiny", "2.1")
    for module in reference.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_p"):
            module.dropout_p = 0.0
    reference.train()
    ours.train()
    images = make_images()[:3]
    points = {"point_coords": POINTS[:2], "point_labels": LABELS[:2]}

    encoded = reference.forward_image(images)
    _, vision, positions, sizes = reference._prepare_backbone_features(encoded)
    outputs = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    expected = 0.0
    for t in (1, 0, 2):
        out = reference.track_step(
            t,
            t == 1,
            [x[:, t : t + 1].expand(-1, 2, -1) for x in vision],
            [x[:, t : t + 1].expand(-1, 2, -1) for x in positions],
            sizes,
            points if t == 1 else None,
            None,
            outputs,
            num_frames=3,
        )
        outputs["cond_frame_outputs" if t == 1 else "non_cond_frame_outputs"][t] = out
        expected = expected + (out["pred_masks"].clamp(min=-50) / 10).square().mean() + out["obj_ptr"].square().mean()

    features = ours.encode_images(images)
    bank, actual = MemoryBank(num_slices=3), 0.0
    for t in (1, 0, 2):
        prompts = Prompts(POINTS, LABELS)[:2] if t == 1 else None
        out = ours.step(features[t], prompts, bank, is_conditioning=t == 1, slice_index=t, gate_by_object_score=True)
        bank.add(t, out.memory, is_conditioning=t == 1)
        actual = actual + (out.low_res_logits.clamp(min=-50) / 10).square().mean() + out.object_pointer.square().mean()

    expected.backward()
    actual.backward()
    assert_close(actual[None], expected[None], "loss")
    theirs = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        if theirs[name].grad is None or not theirs[name].grad.any():
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            # Softmax does not see a key's bias: its gradient is zero but for rounding.
            assert_close(parameter.grad + 1e-6, theirs[name].grad + 1e-6, name, 1e-6)
    for name in ("memory_encoder.fuser.layers.0.gamma", "memory_attention.layers.3.cross_attn_image.k_proj.weight"):
        assert theirs[name].grad.any(), name
