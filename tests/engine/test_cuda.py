"""Whole requests on CUDA beside the CPU: recorded decoding, SAM2's own thread and stream, several threads at once."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.geometry import Volume
from medvl_sam2.engine.graphs import StepGraph
from medvl_sam2.engine.segmentation import Segmentation

QUESTIONS = ["Is there a nodule in the lung?", "Which organ is enlarged?", "What is the density of the liver in HU?"]
REQUESTS = ["Segment the liver.", "Please segment the spleen and describe it.", "Is the aorta calcified?"]
DEVICE = "cuda"

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def scan() -> Volume:
    """Three balls in a larger one."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (48, 96, 96)), indexing="ij"))
    voxels = np.where((grid**2).sum(0) < 0.9, 40, -1000).astype(np.int16)
    for shift, value in ((-0.4, 120), (0.0, 200), (0.45, -80)):
        voxels[((grid - np.array([0.0, 0.1, shift])[:, None, None, None]) ** 2).sum(0) < 0.03] = value
    return Volume.from_array(voxels, spacing=(3.0, 3.0, 3.0))


@pytest.fixture(scope="module")
def engines() -> dict[str, MedVLEngine]:
    return {device: MedVLEngine.from_pretrained("tiny", device=device, dtype="float32") for device in ("cpu", DEVICE)}


def test_masks_and_answers_are_those_of_the_cpu(engines, scan):
    want, got = (engines[device].open(scan) for device in ("cpu", DEVICE))
    # Twice: the second request replays what the first one recorded.
    for _ in range(2):
        assert [answer.text for answer in got.ask_all(QUESTIONS)] == [answer.text for answer in want.ask_all(QUESTIONS)]
        assert got.report(max_tokens=24).text == want.report(max_tokens=24).text
        for mine, theirs in zip(got.segment_all(["liver", "spleen"]), want.segment_all(["liver", "spleen"])):
            assert mine.absent == theirs.absent and mine.dice(theirs) > 0.995
        # Points run through the memory, forward and back.
        click = {"points": [(48, 52, 24, 1)]}
        assert got.segment("lesion", **click).dice(want.segment("lesion", **click)) > 0.995
    if DEVICE == "cuda":
        assert not StepGraph.is_refused
        loops, decoders = engines[DEVICE].segmenter.runner.loops, engines[DEVICE].language._kept
        assert loops and all(loop.step.is_recorded for loop in loops.values())
        assert decoders and all(rows.step.is_recorded for rows in decoders.values())


def test_requests_of_several_threads_do_not_disturb_each_other(engines, scan):
    """All of them record, replay, encode and segment at once."""
    alone = {words: _said(engines["cpu"], scan, words) for words in REQUESTS}
    engine = engines[DEVICE]
    engine.language.forget()
    engine.segmenter.runner.forget()
    with ThreadPoolExecutor(6) as pool:
        for words, found in zip(2 * REQUESTS, pool.map(lambda words: _said(engine, scan, words), 2 * REQUESTS)):
            assert found[0] == alone[words][0]
            assert len(found[1]) == len(alone[words][1])
            for mine, theirs in zip(found[1], alone[words][1]):
                assert mine.dice(theirs) > 0.995
    assert not StepGraph.is_refused


def test_rotary_frequencies_stay_exact_in_bfloat16():
    engine = MedVLEngine.from_pretrained("tiny", device=DEVICE, dtype="bfloat16")
    kinds = {name: buffer.dtype for name, buffer in engine.language.model.named_buffers() if "inv_freq" in name}
    assert kinds and set(kinds.values()) == {torch.float32}


def _said(engine: MedVLEngine, scan: Volume, words: str) -> tuple[str, list[Segmentation]]:
    events = list(engine.open(scan).chat(words, max_tokens=24))
    return "".join(e.text for e in events), [e.segmentation for e in events if e.segmentation is not None]
