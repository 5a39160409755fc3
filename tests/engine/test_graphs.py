"""The loop of a GPU, one graph per step and few of them, run here without one; chains of objects side by side."""

import gc
from contextlib import contextmanager, nullcontext
from itertools import zip_longest
from typing import Any
from weakref import ref

import pytest
import torch
from _slices import CONFIG, EXACT, OURS, assert_equal, embeddings, make_features, points

from medvl_sam2.engine.beside import RECORDING
from medvl_sam2.engine.chains import stretches
from medvl_sam2.engine.graphs import KEPT_LOOPS, LoopShape, StaticLoop, StepGraph, static_loop
from medvl_sam2.engine.propagation import follow_each, propagate
from medvl_sam2.engine.ring_memory import plan_chain
from medvl_sam2.engine.runner import SliceRunner
from medvl_sam2.model.sam2 import SAM2
from medvl_sam2.model.sam2 import propagate as plain_propagate


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
    assert len(loops) == (2 if mode == "independent" else 1), "one for both directions"
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
        cuda_stream = 7

        def wait_stream(self, other: Any) -> None:
            log.append("wait")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextmanager
    def record(graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Any:
        log.append(f"record {capture_error_mode}")
        assert RECORDING.locked() and not gc.isenabled()
        try:
            yield
            if fails:
                raise RuntimeError("operation not permitted when stream is capturing\nand so on")
        finally:
            # As torch's does: the end of a broken recording fails before the stream is put back.
            if fails:
                raise RuntimeError("capture was invalidated")

    usual = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: usual)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: log.append("usual" if stream is usual else "other"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("endAllocateToPool", "releasePool"):
        call = f"_cuda_{name}"
        monkeypatch.setattr(torch._C, call, lambda device, pool, name=name: log.append(f"{name} {pool}"), raising=False)
    monkeypatch.setattr(StepGraph, "_streams", {})
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(StepGraph, "is_refused", False)
    step = StepGraph(lambda: log.append("run"), torch.device("cuda"))
    for _ in range(4):
        step()
    assert log[:5] == ["wait", "run", "wait", "record thread_local", "run"]
    over = ["usual", "endAllocateToPool pool", "releasePool pool"]
    assert log[5:] == (over + ["run"] * 3 if fails else ["replay"] * 3)
    assert step.is_recorded == (not fails)
    assert gc.isenabled() and not RECORDING.locked()
    assert [record.message for record in caplog.records] == fails * [
        "a step cannot be recorded as a CUDA graph (operation not permitted when stream is capturing); "
        "steps are launched anew"
    ]
    # One broken recording ends all: another step does not try.
    log.clear()
    StepGraph(lambda: log.append("run"), torch.device("cuda"))()
    assert log == (["run"] if fails else ["wait", "run", "wait"])


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("mode", ["reference", "independent"])
def test_graph_replay_equals_eager(sam2: SAM2, mode: str) -> None:
    model = SAM2(CONFIG).eval().cuda()
    model.load_state_dict(sam2.state_dict())
    runner, features = SliceRunner(model), make_features(slices=14).to("cuda")
    options = {"start": 5, "mode": mode, **OURS}
    want = propagate(runner, features, {5: points(2).to("cuda")}, static=False, **options)
    for _ in range(2):
        got = propagate(runner, features, {5: points(2).to("cuda")}, **options)
        assert_equal(got, want)
    assert runner.loops and all(loop.step.is_recorded for loop in runner.loops.values())


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
    tracks = follow_each(runner, features, asked, starts=starts, static=static, chunk=3, **options, **OURS)
    logits, scores = torch.cat([t.logits for t in tracks], 1), torch.cat([t.scores for t in tracks], 1)
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


def test_stretches_of_chains_that_end_one_after_another() -> None:
    assert list(stretches([9, 5, 5, 1], static=False)) == [(4, 0, 1), (3, 1, 5), (1, 5, 9)]
    assert list(stretches([9, 5, 5, 1], static=True)) == [(4, 0, 5), (1, 5, 9)]
    assert list(stretches([9, 8, 8, 5, 5, 1], static=True)) == [(6, 0, 5), (4, 5, 8), (1, 8, 9)]
    assert list(stretches([3], static=True)) == [(1, 0, 3)]


@torch.inference_mode()
@pytest.mark.parametrize("mode", ["reference", "independent"])
def test_few_loops_are_recorded_wherever_the_objects_begin(
    runner: SliceRunner, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[LoopShape] = []
    make = StaticLoop.__init__
    monkeypatch.setattr(StaticLoop, "__init__", lambda loop, r, shape: made.append(shape) or make(loop, r, shape))
    runner.forget()
    features, asked = make_features(slices=20), points(5).with_embeddings(embeddings(5))
    counts = []
    # Starts at an end of the scan have one chain less.
    for starts in ([5, 0, 11, 5, 19], [7, 3, 12, 15, 1], [18, 17, 2, 9, 4]):
        follow_each(runner, features, asked, starts=starts, static=True, mode=mode, **OURS)
        counts.append(len(made))
    assert len(set(made)) == len(made) <= 6, "no loop is made twice"
    assert counts[2] == counts[1], "a third request finds all its loops"


def test_evicted_loops_are_freed_at_once(runner: SliceRunner) -> None:
    """Their buffers are gigabytes on a GPU, and Python looks for cycles late."""
    runner.forget()
    shape = LoopShape(
        1, 1, 1, 7, 7, 4, 1, 1, 4, (torch.Size([1, 2, 64]), torch.Size([1, 64, 8, 8]), False), True, None, False
    )
    freed = ref(static_loop(runner, shape).ring)
    gc.disable()
    try:
        for slices in range(5, 5 + KEPT_LOOPS):
            static_loop(runner, shape._replace(slices=slices))
        assert freed() is None and len(runner.loops) == KEPT_LOOPS
    finally:
        gc.enable()
        runner.forget()


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
