"""Corrections of a mask by further clicks: what follows from them is computed, and nothing else."""

from dataclasses import replace
from threading import Event

import numpy as np
import pytest
import torch
from _scans import decide

from medvl_sam2.engine.cancelling import Cancelled
from medvl_sam2.engine.geometry import InputError
from medvl_sam2.engine.prompting import slice_prompts
from medvl_sam2.engine.runner import SliceRunner
from medvl_sam2.model.config import SegConfig
from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.model.processing import ScanArray
from medvl_sam2.model.sam2 import SAM2, Prompts, VolumeTracker


def steps_of(monkeypatch) -> list[str]:
    """Grows by one for each slice that is segmented."""
    steps = []
    for cls in (SliceRunner, SAM2):
        step = cls.step
        monkeypatch.setattr(cls, "step", lambda *a, step=step, **k: steps.append("slice") or step(*a, **k))
    return steps


def one_slice(session, point) -> tuple[int, Prompts]:
    """The slice of a click, and the click there."""
    (marked,) = slice_prompts(session.volume, session.transform, 64, [point], None, "voxel").prompts.items()
    return marked


@pytest.mark.parametrize("asked", ["click", "text", "both"])
def test_refining_computes_what_follows_from_the_new_click(session, small_model, asked, monkeypatch):
    """Held to the plain tracker, and to its count of slices."""
    decide(monkeypatch, session, margin=1.0)
    steps = steps_of(monkeypatch)
    click, target = (18, 20, 9, 1), None if asked == "click" else "liver"
    found = session.segment(target, points=None if asked == "text" else [click])
    slices = session.transform.slices
    # Words alone look for the start on every slice first, four at a time.
    assert len(steps) == slices + (slices // 4 if asked == "text" else 0)
    # Far from the start, on the side that the other one does not read.
    more = next(p for k in range(18) if one_slice(session, p := (14, 22, k, -1))[0] == 2)
    assert found.start > 2
    steps.clear()
    before = found.logits.clone()
    refined = session.refine(found, [more])
    assert len(steps) == 3 < slices
    assert set(refined.timings) == {"masks"}
    assert torch.equal(found.logits, before)
    assert torch.equal(refined.logits[3:], before[3:])

    embedding = None
    if target is not None:
        (forced,) = session._force([target], session.stages)[1]
        embedding = session._engine.embeddings(forced.hidden)[None]
    model = MedVLSAM2.from_pretrained(small_model)
    images = session._engine.processor.slice_images(ScanArray(session.volume.voxels), session.transform)
    with torch.inference_mode():
        tracker = VolumeTracker(model.sam2, model.sam2.encode_images(images), seg_embeddings=embedding)
        first = Prompts() if asked == "text" else one_slice(session, click)[1]
        tracker.prompt(found.start, first.with_embeddings(embedding))
        for reverse in (False, True):
            list(tracker.run(found.start, reverse=reverse))
        tracker.prompt(2, one_slice(session, more)[1].with_embeddings(embedding))
        list(tracker.run(1, reverse=True))
        logits, scores = tracker.stack()
    np.testing.assert_allclose(refined.scores, scores[:, 0], atol=5e-4)
    expected = logits[:, 0] - model.config.seg.mask_threshold
    torch.testing.assert_close(refined.logits, expected, rtol=2e-3, atol=2e-3)
    assert (refined.logits[2] - before[2]).abs().max() > 0.1

    again = session.refine(refined, [(25, 12, 9, 1)], space="voxel")
    assert again.asked.points == ((click,) if asked != "text" else ()) + (more, (25, 12, 9, 1))
    assert torch.equal(again.logits[2], refined.logits[2]), "the first refinement stays"
    torch.testing.assert_close(session.refine(found.asked, [more]).logits, refined.logits, rtol=0, atol=0)


@pytest.mark.parametrize("gone", ["released", "newer", "no memory", "absent"])
def test_refining_without_what_was_kept_is_asking_with_all_clicks(session, gone, monkeypatch):
    click, more, target = (18, 20, 9, 1), (14, 22, 3, -1), None
    if gone in ("no memory", "absent"):
        decide(monkeypatch, session, margin=1.0 if gone == "no memory" else -1.0)
        with monkeypatch.context() as patch:
            patch.setattr(session._engine.segmenter, "config", SegConfig(use_memory=gone == "absent"))
            found = session.segment("liver")
        assert (found.absent, found.start) == (gone == "absent", None)
        more, target = click, "liver"
    else:
        found = session.segment(None, points=[click])
    if gone == "released":
        session.release()
    elif gone == "newer":
        monkeypatch.setattr("medvl_sam2.engine.scan_work.MAX_FOLLOWED", 1)
        session.segment(None, points=[more[:3]])
    steps = steps_of(monkeypatch)
    refined = session.refine(found, [more])
    assert len(steps) == session.transform.slices
    at_once = session.segment(target, points=[more] if target else [click, more])
    assert torch.equal(refined.logits, at_once.logits)
    assert torch.equal(refined.present, at_once.present)
    assert (refined.name, refined.text, refined.start) == (at_once.name, at_once.text, at_once.start)
    assert refined.asked == replace(at_once.asked, id=refined.asked.id)


def test_what_refining_goes_on_from_counts_and_is_let_go(session):
    session.encode()
    empty = session.nbytes
    found = session.segment(None, points=[(18, 20, 9)])
    followed = session._work._followed[found.asked.id]
    assert session.nbytes - empty == followed.track.nbytes >= found.logits.nbytes
    other = session.refine(found, [(14, 22, 3, -1)])
    assert session.nbytes - empty == 2 * followed.track.nbytes
    session.release()
    assert session.nbytes == 0
    session.encode()
    session._work.keep(other.asked.id, followed)
    assert session.nbytes == empty, "it would hold on to image features that were let go"


def test_cancelled_refining_leaves_the_mask_as_it_was(session, monkeypatch):
    found, cancel = session.segment(None, points=[(18, 20, 9)]), Event()
    expected = session.refine(found, [(14, 22, 9, -1)])
    with monkeypatch.context() as patch:
        step = SliceRunner.step
        patch.setattr(SliceRunner, "step", lambda *a: cancel.set() or step(*a))
        with pytest.raises(Cancelled):
            session.refine(found, [(14, 22, 9, -1)], cancel=cancel)
    assert torch.equal(session.refine(found, [(14, 22, 9, -1)]).logits, expected.logits)


def test_refining_within_a_box_stays_within_it(session):
    found = session.segment(None, box=(8, 8, 5, 28, 30, 11))
    refined = session.refine(found, [(14, 16, 9, 1), (14, 22, 6, -1)])
    planes = session.volume.to_source(refined.mask).any((0, 1))
    assert planes.any()
    assert not planes[:4].any()
    assert not planes[13:].any()
    for points, space, words in (([], None, "a click or more"), ([(1, 1, 1)], "ras", "as in the mask")):
        with pytest.raises(InputError, match=words):
            session.refine(found, points, space=space)
    with pytest.raises(InputError, match="outside"):
        session.refine(found, [(99, 1, 1)])
