"""The fast slice runner against the plain loop of model/sam2, on random weights that keep every part busy."""

import logging
from dataclasses import replace
from itertools import groupby, islice
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _slices import (
    CONFIG,
    EXACT,
    KEY,
    OURS,
    SLICES,
    assert_equal,
    assert_telling,
    embeddings,
    exact_points,
    make_features,
    points,
    randomise,
)
from torch import Tensor

from medvl_sam2.engine.cancelling import Cancelled
from medvl_sam2.engine.propagation import propagate
from medvl_sam2.engine.runner import SliceRunner
from medvl_sam2.engine.segmenter import Segmenter
from medvl_sam2.engine.volume_track import VolumeTrack
from medvl_sam2.model.config import SegConfig
from medvl_sam2.model.sam2 import NO_OBJECT, SAM2, Prompts, SliceFeatures, VolumeTracker
from medvl_sam2.model.sam2 import propagate as plain_propagate


@torch.inference_mode()
@pytest.mark.parametrize(("every_slice", "gate"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("mode", ["reference", "independent"])
@pytest.mark.parametrize("objects", [1, 5])
def test_equals_the_plain_loop(
    sam2: SAM2, runner: SliceRunner, features: SliceFeatures, objects: int, mode: str, every_slice: bool, gate: bool
) -> None:
    options: dict[str, Any] = {"start": KEY, "mode": mode, "gate_by_object_score": gate}
    if every_slice:
        options["seg_embeddings"] = embeddings(objects)
    prompts = None if every_slice else {KEY: points(objects)}
    want = plain_propagate(sam2, features, prompts, **options, **EXACT)
    got = propagate(runner, features, prompts, **options, **OURS)
    assert_telling(*want)
    assert_equal(got, want)
    # Far from the start errors have grown most; without the gate nothing hides them there.
    assert gate or (want[0][[0, -1]] != NO_OBJECT).all()


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
@pytest.mark.parametrize("directions", ["forward", "reverse"])
def test_one_direction(sam2: SAM2, runner: SliceRunner, directions: str) -> None:
    features = make_features(slices=10)
    options = {"start": 4, "directions": directions}
    want = plain_propagate(sam2, features, {4: points(1)}, **options, **EXACT)
    got = propagate(runner, features, {4: points(1)}, **options, **OURS)
    assert_equal(got, want)
    assert (got[1] == NO_OBJECT).sum() == (4 if directions == "forward" else 5)


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
@pytest.mark.parametrize("by", ["text", "click"])
def test_recorded_loops_make_room_before_a_request_fails(
    sam2: SAM2, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    features, asked = make_features(slices=6), embeddings(1)
    segmenter = Segmenter(sam2, SegConfig())

    def find() -> Tensor:
        if by == "text":
            return segmenter.by_text(features, asked)[0].logits
        return segmenter.by_prompts(features, {2: points(1)}, 2, None).logits

    want, step = find(), SliceRunner.step

    def crowded(self: SliceRunner, *args: Any) -> Any:
        if self.loops:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *args)

    closed: list[str] = []
    held = SimpleNamespace(step=SimpleNamespace(close=lambda: closed.append("closed")))
    monkeypatch.setattr(SliceRunner, "step", crowded)
    segmenter.runner.loops["one"] = held
    torch.testing.assert_close(find(), want)
    assert closed == ["closed"] and "once more without the loops" in caplog.text
    # Without any to let go of there is nothing more to try.
    monkeypatch.setattr(SliceRunner, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        find()


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
@pytest.mark.parametrize("clicked", [(9, 7), (7, 9), (2, 3), (3, 8), (5, 8)], ids=str)
def test_a_second_correction_keeps_the_first(exact_sam2: SAM2, clicked: tuple[int, int]) -> None:
    """The plain tracker, led past the corrected slices by hand, which it would else track over."""
    runner, features = SliceRunner(exact_sam2), make_features(slices=16).to(torch.float64)
    start, done = 5, set()
    asked = dict(zip(clicked, (exact_points(2, 12.0), exact_points(2, -9.0))))
    track, tracker = VolumeTrack(runner, features, **OURS), VolumeTracker(exact_sam2, features, memory_dtype=None)
    track.prompt(start, exact_points(2))
    tracker.prompt(start, exact_points(2))
    track.run(start)
    for reverse in (False, True):
        list(tracker.run(start, reverse=reverse))
    for index, clicks in asked.items():
        tracker.prompt(index, clicks)
        done.add(index)
        ahead = range(16 if index < start else index + (index > start), 16)
        behind = range(start - 1 if index >= start else index - 1, -1, -1)
        for way, reverse in ((ahead, False), (behind, True)):
            # From one corrected slice to the next; a run goes on from where it was left.
            for _, part in groupby(way, lambda t: t in done - {start}):
                if (part := list(part))[0] not in done - {start}:
                    list(islice(tracker.run(part[0], reverse=reverse), len(part)))
        before = track.logits.clone()
        renewed = track.correct(index, clicks)
        assert_equal((track.logits, track.scores), tracker.stack(), tolerance=1e-9)
        assert renewed == sorted({index, *ahead, *behind} - (done - {index}))
        untouched = [t for t in range(16) if t not in renewed]
        assert torch.equal(track.logits[untouched], before[untouched])
    other = VolumeTrack(runner, features, **OURS)
    other.prompt(start, exact_points(2))
    other.run(start)
    other.correct(clicked[1], asked[clicked[1]])
    assert not torch.allclose(track.logits[clicked[0]], other.logits[clicked[0]], atol=0.1), "the first one is lost"
    # Nor does a new run forget them.
    kept = track.logits.clone()
    track.run(start)
    assert torch.equal(track.logits[list(done)], kept[list(done)])


@torch.inference_mode()
@pytest.mark.parametrize("mode", ["reference", "independent"])
def test_corrections_of_several_slices_are_carried_on_once(exact_sam2: SAM2, mode: str) -> None:
    runner, features = SliceRunner(exact_sam2), make_features(slices=16).to(torch.float64)
    asked = {12: exact_points(1, 12.0), 9: exact_points(1, -9.0)}
    track = VolumeTrack(runner, features, mode=mode, **OURS)
    track.prompt(5, exact_points(1))
    track.run(5)
    first, renewed = track.logits.clone(), track.fork()
    assert renewed.correct_all(asked)[-7:] == list(range(9, 16))
    tracker = VolumeTracker(exact_sam2, features, memory_dtype=None)
    tracker.prompt(5, exact_points(1))
    for reverse in (False, True)[: 1 + (mode == "reference")]:
        list(tracker.run(5, reverse=reverse))
    for t in (9, 12):
        tracker.prompt(t, asked[t])
        # The memory of a prompted slice is made when the next run begins.
        next(tracker.run(5))
    list(islice(tracker.run(10), 2))
    list(tracker.run(13))
    logits, scores = tracker.stack()
    assert_equal((renewed.logits[5:], renewed.scores[5:]), (logits[5:], scores[5:]), tolerance=1e-9)
    assert torch.equal(track.logits, first), "the track that was forked stays as it is"
    assert track.correct(2, exact_points(1, 4.0)) == [0, 1, 2]


@torch.inference_mode()
def test_independent_chains_with_nowhere_to_go(runner: SliceRunner, features: SliceFeatures) -> None:
    track = VolumeTrack(runner, features[:6], mode="independent")
    track.prompt(2, points(1))
    track.run(2)
    before = track.logits.clone()
    assert track.correct(5, points(1, 5.0)) == [5]
    assert torch.equal(track.logits[:5], before[:5]) and not torch.equal(track.logits[5], before[5])
    alone = VolumeTrack(runner, features[:1], mode="independent")
    alone.prompt(0, points(1))
    alone.run(0)
    assert alone.logits.shape[0] == 1


@torch.inference_mode()
def test_a_far_correction_leaves_the_other_direction_alone(runner: SliceRunner, features: SliceFeatures) -> None:
    track = VolumeTrack(runner, features)
    track.prompt(5, points(1))
    track.run(5)
    assert track.correct(26, points(1, 9.0)) == list(range(26, SLICES))


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
