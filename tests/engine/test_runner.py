"""The fast slice runner against the plain loop of model/sam2, on random weights that keep every part busy."""

import logging
import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import zip_longest
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor

from medvl_sam2.engine.cancelling import Cancelled
from medvl_sam2.engine.chains import stretches
from medvl_sam2.engine.graphs import StepGraph
from medvl_sam2.engine.propagation import propagate, propagate_each
from medvl_sam2.engine.ring_memory import plan_chain
from medvl_sam2.engine.runner import SliceRunner
from medvl_sam2.engine.segmenter import Segmenter
from medvl_sam2.engine.slice_features import (
    KEPT_SHARE,
    HostFeatures,
    LazyFeatures,
    SliceEncoder,
    choose_chunk,
    choose_place,
    feature_bytes,
    working_bytes,
)
from medvl_sam2.engine.volume_track import VolumeTrack
from medvl_sam2.model.config import SegConfig
from medvl_sam2.model.sam2 import NO_OBJECT, SAM2, Prompts, SAM2Config, SliceFeatures, VolumeTracker
from medvl_sam2.model.sam2 import propagate as plain_propagate

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


@pytest.fixture(scope="module")
def sam2() -> SAM2:
    return randomise(SAM2(CONFIG))


@pytest.fixture(scope="module")
def runner(sam2: SAM2) -> SliceRunner:
    return SliceRunner(sam2)


@pytest.fixture(scope="module")
def features() -> SliceFeatures:
    return make_features()


def points(objects: int, shift: float = 0.0) -> Prompts:
    places = torch.linspace(20, 100, objects)
    return Prompts(torch.stack((places + shift, 110 - places), -1)[:, None], torch.ones(objects, 1, dtype=torch.int32))


def embeddings(objects: int) -> Tensor:
    return torch.randn(objects, 1, CONFIG.d_model, generator=torch.Generator().manual_seed(3))


def assert_equal(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tolerance: float = 1e-3) -> None:
    """Relative error of the logits slice by slice, of the scores, and the Dice of all masks."""
    (logits, scores), (wanted, wanted_scores) = got, want
    absent = wanted == NO_OBJECT
    assert torch.equal(logits == NO_OBJECT, absent)
    assert (~absent).any(), "every mask is gated: the case tests nothing"
    error = (logits - wanted).masked_fill(absent, 0).abs().flatten(1).amax(1)
    largest = wanted.masked_fill(absent, 0).abs().amax()
    assert (error <= tolerance * largest).all(), f"relative error by slice {(error / largest).tolist()}"
    assert (scores - wanted_scores).abs().max() <= tolerance * wanted_scores[wanted_scores != NO_OBJECT].abs().max()
    ours, theirs = logits > 0, wanted > 0
    assert 2 * (ours & theirs).sum() >= 0.999 * (ours.sum() + theirs.sum())


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


@torch.inference_mode()
@pytest.mark.parametrize("every_slice", [False, True], ids=["clicks", "seg"])
@pytest.mark.parametrize("mode", ["reference", "independent"])
@pytest.mark.parametrize("objects", [1, 5])
def test_equals_the_plain_loop(
    sam2: SAM2, runner: SliceRunner, features: SliceFeatures, objects: int, mode: str, every_slice: bool
) -> None:
    options: dict[str, Any] = {"start": KEY, "mode": mode}
    if every_slice:
        options |= {"seg_embeddings": embeddings(objects), "gate_by_object_score": False}
    prompts = None if every_slice else {KEY: points(objects)}
    want = plain_propagate(sam2, features, prompts, **options, **EXACT)
    got = propagate(runner, features, prompts, **options, **OURS)
    assert_telling(*want)
    assert_equal(got, want)


@torch.inference_mode()
def test_the_last_slice_depends_on_the_prompt(runner: SliceRunner, features: SliceFeatures) -> None:
    one, two = (
        propagate(runner, features, {KEY: points(1, shift)}, start=KEY, gate_by_object_score=False)[0]
        for shift in (0.0, 15.0)
    )
    assert (one[-1] - two[-1]).abs().max() > 0.01 * one[-1].abs().max()


@torch.inference_mode()
def test_memories_are_rounded_as_the_package_keeps_them(sam2: SAM2, runner: SliceRunner) -> None:
    features = make_features(slices=8)
    options = {"start": 3, "seg_embeddings": embeddings(2), "gate_by_object_score": False}
    want, exact = (plain_propagate(sam2, features, **options, memory_dtype=d) for d in (torch.bfloat16, None))
    got = propagate(runner, features, **options)
    assert (got[0] - want[0]).abs().max() < 0.1 * (want[0] - exact[0]).abs().max()


@torch.inference_mode()
@pytest.mark.parametrize("mode", ["reference", "independent"])
def test_several_conditioning_slices_strides_and_projection_anew(sam2: SAM2, mode: str) -> None:
    config = replace(CONFIG, memory_stride=2, max_conditioning_slices=2, max_object_pointers=5)
    model = SAM2(config).eval()
    model.load_state_dict(sam2.state_dict())
    features = make_features(slices=18)
    prompts = {9: points(2), 3: points(2, 5.0), 14: points(2, -5.0), 6: points(2, 8.0)}
    want = plain_propagate(model, features, prompts, start=9, mode=mode, **EXACT)
    runner = SliceRunner(model)
    assert_equal(propagate(runner, features, prompts, start=9, mode=mode, **OURS), want)
    assert_equal(propagate(runner, features, prompts, start=9, mode=mode, keys_bytes=0, chunk=1, **OURS), want)


@torch.inference_mode()
@pytest.mark.parametrize("mode", ["reference", "independent"])
def test_the_static_loop_is_the_same(runner: SliceRunner, mode: str) -> None:
    """What a GPU records as a graph, run without one: no look at the device's values, one set of addresses."""
    features = make_features(slices=14)
    prompts = {5: points(2), 9: points(2, 6.0)}
    options = {"start": 5, "mode": mode, "chunk": 3, **OURS}
    want = propagate(runner, features, prompts, **options)
    runner.loops.clear()
    assert_equal(propagate(runner, features, prompts, static=True, **options), want, tolerance=1e-4)
    loops = list(runner.loops.values())
    assert len(loops) == 2
    other = {5: points(2, 4.0), 9: points(2, 1.0)}
    want = propagate(runner, features, other, keys_bytes=0, **options)
    assert_equal(propagate(runner, features, other, static=True, **options), want, tolerance=1e-4)
    assert list(runner.loops.values()) == loops, "buffers and graphs of a shape are used again"


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_is_run_then_recorded_then_replayed(
    fails: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """CUDA itself is a log here. A step that cannot be recorded is launched each time, and that is said."""
    log: list[str] = []

    class Stream:
        def wait_stream(self, other: Any) -> None:
            log.append("wait")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextmanager
    def record(graph: Any, capture_error_mode: str) -> Any:
        log.append(f"record {capture_error_mode}")
        yield
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand so on")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    step = StepGraph(lambda: log.append("run"), torch.device("cuda"))
    for _ in range(4):
        step()
    assert log[:5] == ["wait", "run", "wait", "record thread_local", "run"]
    assert log[5:] == (["run"] * 3 if fails else ["replay"] * 3)
    assert step.is_recorded == (not fails)
    assert [record.message for record in caplog.records] == fails * [
        "a step cannot be recorded as a CUDA graph (operation not permitted when stream is capturing); "
        "it is launched anew each time"
    ]


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("mode", ["reference", "independent"])
def test_graph_replay_equals_eager(sam2: SAM2, mode: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    model = SAM2(CONFIG).eval().cuda()
    model.load_state_dict(sam2.state_dict())
    runner, features = SliceRunner(model), make_features(slices=14).to("cuda")
    options = {"start": 5, "mode": mode, **OURS}
    want = propagate(runner, features, {5: points(2).to("cuda")}, static=False, **options)
    for _ in range(2):
        got = propagate(runner, features, {5: points(2).to("cuda")}, **options)
        assert_equal(got, want)
    assert all(loop.step.is_recorded for loop in runner.loops.values())


@torch.inference_mode()
@pytest.mark.parametrize("directions", ["forward", "reverse"])
def test_one_direction(sam2: SAM2, runner: SliceRunner, directions: str) -> None:
    features = make_features(slices=10)
    options = {"start": 4, "directions": directions}
    want = plain_propagate(sam2, features, {4: points(1)}, **options, **EXACT)
    got = propagate(runner, features, {4: points(1)}, **options, **OURS)
    assert_equal(got, want)
    assert (got[1] == NO_OBJECT).sum() == (4 if directions == "forward" else 5)


@torch.inference_mode()
@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
@pytest.mark.parametrize("mode", ["reference", "independent"])
def test_objects_with_starts_of_their_own_equal_one_by_one(
    sam2: SAM2, runner: SliceRunner, mode: str, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts, features, asked = [5, 0, 11, 5, 2, 13], make_features(slices=14), points(6)
    options: dict[str, Any] = {"mode": mode, "seg_embeddings": embeddings(6), "gate_by_object_score": False}
    asked = asked.with_embeddings(options["seg_embeddings"])
    rows: list[int] = []
    segment = SliceRunner.segment
    monkeypatch.setattr(SliceRunner, "segment", lambda self, *a: rows.append(a[1].rows) or segment(self, *a))
    runner.loops.clear()
    logits, scores = propagate_each(runner, features, asked, starts=starts, static=static, chunk=3, **options, **OURS)
    monkeypatch.undo()
    for b, start in enumerate(starts):
        own = options | {"seg_embeddings": options["seg_embeddings"][b : b + 1]}
        want = plain_propagate(sam2, features, {start: asked[b]}, start=start, **own, **EXACT)
        assert_equal((logits[:, b : b + 1], scores[:, b : b + 1]), want)
    assert logits.std(1).amax() > 0.1 * logits.abs().amax(), "objects differ, so a mix-up would show"
    ways = [(len(features) - 1 - start, start) for start in starts]
    if not static:
        assert sum(rows) == 6 * 13, "no row idles"
        lots = [[max(way)] if mode == "independent" else [n for n in way if n] for way in ways]
        # A CPU takes the rows of a step in groups of 16 here, so that a step is one call.
        assert len(rows) == sum(map(max, zip_longest(*lots, fillvalue=0)))
    else:
        assert len(rows) <= 2 * 13
        assert len(runner.loops) <= 4, "few shapes are recorded"


def test_stretches_of_chains_that_end_one_after_another() -> None:
    assert list(stretches([9, 5, 5, 1], static=False)) == [(4, 0, 1), (3, 1, 5), (1, 5, 9)]
    assert list(stretches([9, 5, 5, 1], static=True)) == [(4, 0, 5), (1, 5, 9)]
    assert list(stretches([3], static=True)) == [(1, 0, 3)]


@torch.inference_mode()
def test_a_cancelled_run_stops_at_the_next_slice(runner: SliceRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    features, cancel, done = make_features(slices=12), Event(), []
    step = SliceRunner.step

    def stepped(self: SliceRunner, *args: Any) -> Any:
        done.append(1)
        if len(done) == 3:
            cancel.set()
        return step(self, *args)

    want = propagate(runner, features, {5: points(1)}, start=5, **OURS)
    with monkeypatch.context() as patch:
        patch.setattr(SliceRunner, "step", stepped)
        with pytest.raises(Cancelled):
            propagate(runner, features, {5: points(1)}, start=5, cancel=cancel, **OURS)
    assert len(done) == 3
    assert_equal(propagate(runner, features, {5: points(1)}, start=5, **OURS), want, tolerance=0)


@torch.inference_mode()
def test_a_lower_mask_threshold_moves_the_surface_and_nothing_else(sam2: SAM2) -> None:
    features, asked = make_features(slices=6), embeddings(2)
    for found, plain in zip(
        Segmenter(sam2, SegConfig(mask_threshold=-1.5)).by_text(features, asked),
        Segmenter(sam2, SegConfig()).by_text(features, asked),
    ):
        assert torch.equal(found.present, plain.present)
        assert torch.equal(found.logits > 0, plain.logits > -1.5)
        assert (found.logits > 0).sum() > (plain.logits > 0).sum()


@torch.inference_mode()
def test_objects_and_slices_that_do_not_fit_come_in_smaller_batches(
    runner: SliceRunner, sam2: SAM2, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, asked = make_features(slices=6), embeddings(4)
    segmenter = Segmenter(sam2, SegConfig())
    want = segmenter.by_text(features, asked)
    decode, step = SAM2.decode, SliceRunner.step

    def scarce(self: SAM2, image: Tensor, high_res: Any, sparse: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(sparse) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, image, high_res, sparse, *args, **kwargs)

    def scarcer(self: SliceRunner, shared: Any, memory: Any, *args: Any) -> Any:
        if memory.rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, shared, memory, *args)

    segmenter._pairs = segmenter._chunks.size = 64
    monkeypatch.setattr(SAM2, "decode", scarce)
    monkeypatch.setattr(SliceRunner, "step", scarcer)
    with caplog.at_level(logging.WARNING):
        found = segmenter.by_text(features, asked)
    assert [one.start for one in found] == [one.start for one in want]
    for mine, theirs in zip(found, want):
        torch.testing.assert_close(mine.logits, theirs.logits, rtol=1e-3, atol=1e-3)
    messages = [record.message for record in caplog.records]
    assert messages[0] == "out of memory: decoding 3 slices at a time from here on"
    assert "out of memory: 4 objects as batches of 2" in messages
    monkeypatch.setattr(SAM2, "decode", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        segmenter.by_text(features, asked)


@torch.inference_mode()
def test_batch_equals_single() -> None:
    """In float64, where the order in which a machine sums products of another shape does not show."""
    runner = SliceRunner(randomise(SAM2(CONFIG)).double())
    features = make_features(slices=12).to(torch.float64)
    prompts = Prompts(points(5).points.double(), points(5).labels)
    logits, scores = propagate(runner, features, {5: prompts}, start=5, **OURS)
    for b in range(5):
        one = propagate(runner, features, {5: prompts[b]}, start=5, **OURS)
        assert_equal((logits[:, b : b + 1], scores[:, b : b + 1]), one, tolerance=1e-9)


@torch.inference_mode()
@pytest.mark.parametrize("mode", ["reference", "independent"])
def test_rows_in_groups_equal_the_batch(runner: SliceRunner, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features, options = make_features(slices=9), {"start": 4, "mode": mode, **OURS}
    want = propagate(runner, features, {4: points(3)}, **options)
    monkeypatch.setattr("medvl_sam2.engine.runner.CACHED_TOKENS", 2 * CONFIG.feature_size**2)
    assert_equal(propagate(runner, features, {4: points(3)}, **options), want, tolerance=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("clicked", [8, 2, 5])
def test_a_correction_renews_what_follows_from_it(sam2: SAM2, runner: SliceRunner, clicked: int) -> None:
    features, clicks = make_features(slices=24), points(2, 12.0)
    tracker = VolumeTracker(sam2, features, memory_dtype=None)
    tracker.prompt(5, points(2))
    for reverse in (False, True):
        list(tracker.run(5, reverse=reverse))
    track = VolumeTrack(runner, features, **OURS)
    track.prompt(5, points(2))
    track.run(5)
    before = track.logits.clone()
    assert_equal((before, track.scores), tracker.stack())

    tracker.prompt(clicked, clicks)
    if clicked >= 5:
        list(tracker.run(clicked + (clicked > 5)))
    list(tracker.run(5 if clicked >= 5 else clicked - 1, reverse=True))
    renewed = track.correct(clicked, clicks)
    assert_equal((track.logits, track.scores), tracker.stack())
    untouched = [t for t in range(24) if t not in renewed]
    assert torch.equal(track.logits[untouched], before[untouched])
    assert untouched == {8: [5, 6, 7], 2: list(range(3, 24)), 5: []}[clicked]


@torch.inference_mode()
def test_a_far_correction_leaves_the_other_direction_alone(runner: SliceRunner, features: SliceFeatures) -> None:
    track = VolumeTrack(runner, features)
    track.prompt(5, points(1))
    track.run(5)
    assert track.correct(26, points(1, 9.0)) == list(range(26, SLICES))


def test_slots_do_not_grow_with_the_volume() -> None:
    plans = [plan_chain(range(1, n), False, [0], [], n, CONFIG) for n in (16, 200)]
    assert [plan.num_slots for plan in plans] == [7, 7]
    for plan in plans:
        held: dict[int, int] = {slot: slice_ for slice_, slot in plan.loads.items()}
        for step in plan.steps:
            read = {held[slot]: time for slot, time in step.memories}
            expected = {t: step.index - t - 1 for t in range(max(1, step.index - 6), step.index)} | {0: 6}
            assert read == expected
            if step.slot is not None:
                held[step.slot] = step.index


def test_lazy_features_and_a_lack_of_memory(
    sam2: SAM2, runner: SliceRunner, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(10, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        encoder = SliceEncoder(sam2, chunk=8)
        whole = encoder.encode(lambda a, b: images[a:b], 0, 10)
        want = propagate(runner, whole, {4: points(1)}, start=4, **OURS)
        assert_same_features(whole, sam2.encode_images(images))
        encode, sizes = encoder._encode, []

        def scarce(x: Tensor) -> SliceFeatures:
            sizes.append(len(x))
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return encode(x)

        monkeypatch.setattr(encoder, "_encode", scarce)
        with caplog.at_level(logging.WARNING):
            lazy = LazyFeatures(encoder, lambda a, b: images[a:b], 10)
            got = propagate(runner, lazy, {4: points(1)}, start=4, chunk=4, **OURS)
    assert_equal(got, want, tolerance=1e-4)
    assert [record.message for record in caplog.records] == ["out of memory: encoding 2 slices at a time from here on"]
    assert max(sizes[-3:]) == 2
    monkeypatch.setattr(encoder, "_encode", lambda x: (_ for _ in ()).throw(RuntimeError("shape")))
    with pytest.raises(RuntimeError, match="shape"):
        encoder.encode(lambda a, b: images[a:b], 0, 10)


@torch.inference_mode()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_features_on_the_host_give_the_same_masks(sam2: SAM2, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    images = torch.randn(10, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4)).to(device)
    model = SAM2(CONFIG).eval().to(device)
    model.load_state_dict(sam2.state_dict())
    found = {}
    for keep in ("device", "host"):
        segmenter = Segmenter(model, SegConfig(), chunk=4, keep=keep)
        features = segmenter.encode(lambda a, b: images[a:b], 10)
        assert features.nbytes == 10 * feature_bytes(CONFIG, 4)
        found[keep] = segmenter.by_text(features, embeddings(2).to(device))
    assert isinstance(features, HostFeatures) and features[3].vision.device.type == device
    assert features._kept.vision.device.type == "cpu" and features._kept.vision.is_pinned() == (device == "cuda")
    for mine, theirs in zip(found["host"], found["device"]):
        assert mine.start == theirs.start
        assert_equal((mine.logits, mine.scores), (theirs.logits, theirs.scores), tolerance=1e-5)


def test_features_go_to_the_host_where_they_would_crowd_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, each = torch.device("cuda"), feature_bytes(CONFIG, 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * each, 100 * each))
    assert choose_place(CONFIG, cuda, torch.bfloat16, 20 // KEPT_SHARE) == "device"
    assert choose_place(CONFIG, cuda, torch.bfloat16, 20 // KEPT_SHARE + 1) == "host"
    assert choose_place(CONFIG, torch.device("cpu"), torch.float32, 10_000) == "device"


def test_chunks_follow_the_budget() -> None:
    cpu, each = torch.device("cpu"), working_bytes(CONFIG, 4)
    assert choose_chunk(CONFIG, cpu, torch.float32, 3 * each) == 3
    assert choose_chunk(CONFIG, cpu, torch.float32, each // 2) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, f: VolumeTrack(r, f, mode="both"), "mode: expected 'reference' or 'independent', got 'both'"),
        (lambda r, f: VolumeTrack(r, f).run(0), "expected a prompted slice before run"),
        (lambda r, f: VolumeTrack(r, f).logits, "expected a prompted slice, got none"),
        (lambda r, f: VolumeTrack(r, f).prompt(SLICES, points(1)), "slice: expected 0 to 31, got 32"),
        (lambda r, f: VolumeTrack(r, f).correct(1, points(1)), "before a correction"),
        (lambda r, f: propagate(r, f, start=0), "expected prompts or seg_embeddings, got neither"),
        (lambda r, f: propagate(r, f, {0: points(1)}, start=0, directions="up"), "directions: expected"),
    ],
)
def test_errors(runner: SliceRunner, features: SliceFeatures, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(runner, features)
