"""Sessions: the way from a question or click to answers and masks on the scan's own grid."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
import torch
from _scans import ball, decide

from medvl_sam2.engine.cancelling import Cancelled
from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.geometry import InputError, Volume
from medvl_sam2.engine.language.base import Step
from medvl_sam2.engine.prompting import slice_prompts
from medvl_sam2.engine.segmentation import Segmentation, dice, label_map
from medvl_sam2.engine.text import TextStream, mask_name, requested
from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.model.processing import GridTransform, ScanArray, VolumeProcessor
from medvl_sam2.model.prompts import SEGMENT_ANSWER
from medvl_sam2.model.sam2 import Prompts, propagate


def test_mask_by_name_equals_the_parts_run_one_by_one(session, small_model, monkeypatch):
    model = MedVLSAM2.from_pretrained(small_model)
    scan = ScanArray(session.volume.voxels)
    processor = VolumeProcessor(model.config)
    transform = processor.transform(scan)
    ids = [*model.chat.prefix(), *model.chat.question("Segment the liver."), *model.chat.answer(SEGMENT_ANSWER)]
    ids = torch.tensor([ids])
    with torch.no_grad():
        hidden = model(ids, model.visual_tokens(processor.encoder_grid(scan, transform)[None])).hidden
        embedding = model.seg_prompts(hidden, ids)
        features = model.sam2.encode_images(processor.slice_images(scan, transform))
        _, scores = model.sam2.predict_slices(features, Prompts(embeddings=embedding))
        start = int(scores.argmax())
        logits, scores = propagate(
            model.sam2, features, {start: Prompts(embeddings=embedding)}, start=start, seg_embeddings=embedding
        )
    decide(monkeypatch, session, margin=1.0)
    found = session.segment("liver")
    assert found.start == start
    np.testing.assert_allclose(found.scores, scores[:, 0], atol=2e-4)
    expected = logits[:, 0] - model.config.seg.mask_threshold
    torch.testing.assert_close(found.logits, expected, rtol=1e-3, atol=1e-3)


def test_the_scans_own_work_is_done_once(session):
    first = session.segment("liver", points=[(18, 20, 9)])
    assert {"vision", "prefix", "slices", "language", "masks"} <= set(first.timings)
    second = session.segment("spleen", points=[(18, 20, 9)])
    assert set(second.timings) == {"language", "masks"}
    again = session.segment("liver", points=[(18, 20, 9)])
    torch.testing.assert_close(again.logits, first.logits)


def test_released_session_gives_the_same_answer(session):
    before = session.ask("Is there a nodule?", max_tokens=12).text
    mask = session.segment(None, points=[(18, 20, 9)]).mask
    assert session.nbytes > 0
    session.release()
    assert session.nbytes == 0
    assert session.ask("Is there a nodule?", max_tokens=12).text == before
    assert np.array_equal(session.segment(None, points=[(18, 20, 9)]).mask, mask)


def test_point_is_the_same_in_every_space(session):
    voxel = np.array([20.0, 14.0, 6.0])
    index = session.volume.to_index(voxel, "voxel")
    prompts = {}
    for space in ("voxel", "ras", "lps", "index"):
        point = session.volume.from_index(index, space)
        prompts[space] = slice_prompts(session.volume, session.transform, 64, [tuple(point)], None, space)
    (where,) = prompts["voxel"].prompts
    for other in prompts.values():
        assert list(other.prompts) == [where]
        torch.testing.assert_close(other.prompts[where].points, prompts["voxel"].prompts[where].points)


def test_point_lands_on_its_pixel():
    volume = Volume.from_array(np.zeros((20, 50, 60), np.int16), spacing=(2, 1, 1))
    transform = GridTransform(volume.shape, (4, 10, 20, 16, 50, 60), 6)
    marked = slice_prompts(volume, transform, 80, [(39, 29, 9), (20, 10, 4, -1)], None, "index")
    # Slice n covers planes 4 + 2 n and 5 + 2 n; a pixel is half a voxel: voxel v has its centre at 2 (v - low) + 0.5.
    assert sorted(marked.prompts) == [0, 2]
    assert marked.start == 2
    assert marked.prompts[2].points.tolist() == [[[38.5, 38.5]]]
    assert marked.prompts[2].labels.tolist() == [[1]]
    assert marked.prompts[0].points.tolist() == [[[0.5, 0.5]]]
    assert marked.prompts[0].labels.tolist() == [[0]]


def test_box_reaches_round_its_corner_voxels():
    volume = Volume.from_array(np.zeros((20, 50, 60), np.int16))
    transform = GridTransform(volume.shape, (0, 0, 0, 20, 50, 60), 20)
    marked = slice_prompts(volume, transform, 120, None, (10, 5, 4, 19, 24, 8), "index")
    assert (marked.start, marked.extent) == (6, (4, 8))
    # 60 columns on 120 pixels, 50 rows on 120: the edges lie half a voxel outside the corner centres.
    expected = [10 * 2 - 0.5, 5 * 2.4 - 0.5, 20 * 2 - 0.5, 25 * 2.4 - 0.5]
    torch.testing.assert_close(marked.prompts[6].boxes[0], torch.tensor(expected))


def test_box_limits_the_slices(session):
    # k runs from head to feet in this file.
    found = session.segment("liver", box=(8, 8, 5, 28, 30, 11))
    planes = session.volume.to_source(found.mask).any((0, 1))
    assert planes.any()
    assert not planes[:4].any()
    assert not planes[13:].any()


def test_box_limits_the_sides(session):
    outside = session._engine.segmenter._outside(torch.tensor([15.5, 7.5, 31.5, 63.5]), 16)
    # Four image pixels to a mask pixel: columns 4 to 7 and rows 2 to 15 lie in the box, one more on each side is left.
    assert torch.nonzero(~outside.all(0)).flatten().tolist() == list(range(3, 9))
    assert torch.nonzero(~outside.all(1)).flatten().tolist() == list(range(1, 16))
    found = session.segment("liver", box=(14, 16, 5, 17, 19, 11))
    mask = session.volume.to_source(found.mask)
    inside = np.zeros_like(mask)
    inside[8:24, 10:26] = True
    assert mask.any()
    assert not (mask & ~inside).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"points": [(99, 1, 1)]}, "outside"),
        ({"points": [(1, 1)]}, "three coordinates"),
        ({"points": [(np.nan, 1, 1)]}, "finite"),
        ({"box": (9, 9, 9, 2, 12, 12)}, "upside down"),
        ({"box": (1, 2, 3)}, "six numbers"),
        ({"points": [(18, 20, 9, -1)]}, "label"),
        ({}, "nothing"),
        ({"points": [(1, 1, 1)], "space": "mni"}, "space"),
    ],
)
def test_prompts_that_make_no_sense(session, arguments, words):
    with pytest.raises(InputError, match=words):
        session.segment(None, **arguments)


def test_negative_point_alone_starts_where_the_text_is_found(session):
    by_text = session._engine.segmenter.by_prompts(
        session._work.features(session.stages).result(), {}, None, session._engine.embeddings(torch.ones(1, 1, 64))
    )
    found = session.segment("liver", points=[(1, 1, 2, -1)])
    assert isinstance(by_text.start, int)
    assert found.start is not None


def test_absent_target_has_no_mask(session, monkeypatch):
    decide(monkeypatch, session, margin=-1.0)
    found = session.segment("the gallbladder")
    assert found.absent
    assert found.text == "There is no gallbladder in this scan."
    assert not found.mask.any()
    assert found.volume_ml == 0
    # Whoever points at it is not told that it is absent.
    assert not session.segment("gallbladder", points=[(18, 20, 9)]).absent


def test_several_objects_in_one_request_are_joined(session, monkeypatch):
    chat = session._engine.chat
    ids = chat.answer("Left kidney: [SEG]. Right kidney: [SEG].")[:-1]
    states = iter(torch.randn(2, 64, generator=torch.Generator().manual_seed(5)))
    said = [Step(token, next(states) if token == chat.seg_id else None) for token in ids]
    monkeypatch.setattr(session._engine.language, "generate_all", lambda *_, **__: iter([step] for step in said))
    decide(monkeypatch, session, margin=-1.0, first=ids[0])
    found = session.segment("kidneys")
    states = [step.hidden for step in said if step.hidden is not None]
    parts = [session._by_text(state[None, None], session.stages)[0] for state in states]
    assert found.text.startswith("Left kidney:")
    assert torch.equal(found.present, parts[0].present | parts[1].present)
    inside = [(part.logits > 0) & part.present[:, None, None] for part in parts]
    assert torch.equal(found.gated_logits > 0, inside[0] | inside[1])


def test_chat_gives_text_and_masks_as_they_come(session, monkeypatch):
    chat = session._engine.chat
    ids = chat.answer("Liver: [SEG]. Left kidney: [SEG].")[:-1]
    seen = {}

    def said(prefix, prompts, **_):
        (seen["ids"],) = prompts
        for token in ids:
            yield [Step(token, torch.ones(64) if token == chat.seg_id else None)]

    monkeypatch.setattr(session._engine.language, "generate_all", said)
    events = list(session.chat("Segment the liver and the left kidney.", history=[("Hello", "Yes?")]))
    masks = [event.segmentation for event in events if event.segmentation]
    assert [mask.name for mask in masks] == ["liver", "left kidney"]
    assert "".join(event.text for event in events).replace(" ", "") == "Liver:.Leftkidney:."
    first = next(i for i, event in enumerate(events) if event.segmentation)
    assert any(event.text for event in events[first:]), "text goes on after a mask"
    text = session._engine.tokenizer.decode(seen["ids"])
    assert text.index("Hello") < text.index("Yes?") < text.index("Segment the liver")


def test_chat_streams_the_text_of_ask(session):
    pieces = [event.text for event in session.chat("What is seen?", max_tokens=20)]
    assert "".join(pieces).strip() == session.ask("What is seen?", max_tokens=20).text


@pytest.mark.parametrize("text", ["", "   ", "word " * 3000])
def test_text_that_cannot_be_asked(session, text):
    with pytest.raises(InputError, match="text"):
        session.ask(text)


def test_questions_together_are_answered_as_each_alone(session):
    texts = ["What is seen?", "Is the liver on the left?", "Is there a nodule in the left lung?"]
    choices = [None, ("yes", "no"), None]
    alone = [session.ask(text, own, max_tokens=12) for text, own in zip(texts, choices)]
    together = session.ask_all(texts, choices, max_tokens=12)
    assert [(a.text, a.choice, a.tokens) for a in together] == [(a.text, a.choice, a.tokens) for a in alone]
    assert len({a.text for a in alone}) > 1
    assert session.ask_all([]) == []
    with pytest.raises(InputError, match="text"):
        session.ask_all(["What is seen?", ""])


def test_cancelled_request_leaves_the_session_usable(session, monkeypatch):
    expected, cancel = session.segment("liver", points=[(18, 20, 9)]), Event()
    cancel.set()
    for call in (session.segment_all, session.segment):
        with pytest.raises(Cancelled):
            call(["liver"] if call == session.segment_all else "liver", cancel=cancel)
    session.release()
    cancel.clear()
    encode = session._engine.segmenter.encode

    def give_up(*args):
        cancel.set()
        return encode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(session._engine.segmenter, "encode", give_up)
        with pytest.raises(Cancelled):
            session.segment("liver", points=[(18, 20, 9)], cancel=cancel)
    again = session.segment("liver", points=[(18, 20, 9)])
    torch.testing.assert_close(again.logits, expected.logits)


def test_times_are_each_requests_own(session, engine, monkeypatch):
    word = engine.chat.answer("the")[0]
    monkeypatch.setattr(engine.language, "generate_all", lambda *_, **__: (steps for steps in [[Step(word)]] * 6))
    first = session.segment("liver", points=[(18, 20, 9)])
    before = dict(session.stages)
    stream = session.chat("What is seen?", max_tokens=6)
    next(stream)
    between = session.segment("liver", points=[(18, 20, 9)])
    last = list(stream)[-1]
    assert set(last.timings) == {"language"}
    assert set(between.timings) == {"language", "masks"}
    assert 0 < between.timings["masks"] <= session.stages["masks"] - before["masks"]
    parts = [timings["language"] for timings in (first.timings, between.timings, last.timings)]
    assert sum(parts) <= session.stages["language"]


def test_failed_request_leaves_the_session_usable(session, monkeypatch):
    expected = session.segment(None, points=[(18, 20, 9)]).mask
    with monkeypatch.context() as broken:
        broken.setattr(session._engine.segmenter, "by_prompts", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.segment(None, points=[(18, 20, 9)])
    assert np.array_equal(session.segment(None, points=[(18, 20, 9)]).mask, expected)


def test_threads_get_their_own_answers(engine):
    sessions = [engine.open(ball(seed)) for seed in range(2)]
    jobs = [(s, text) for s in sessions for text in ("Where is the liver?", "Any nodule?", "Which phase?")]
    alone = [s.ask(text, max_tokens=8).text for s, text in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: job[0].ask(job[1], max_tokens=8).text, jobs))
    assert together == alone
    assert len(set(alone)) > 1


def test_cache_is_bounded_and_lets_the_oldest_go(small_model, tmp_path):
    import nibabel as nib

    for name in "abc":
        volume = ball(ord(name))
        nib.save(nib.Nifti1Image(volume.to_source(volume.voxels), volume.source.affine), tmp_path / f"{name}.nii")
    engine = MedVLEngine.from_pretrained(small_model, device="cpu")
    a = engine.open(tmp_path / "a.nii").encode()
    assert engine.open(tmp_path / "a.nii") is a
    engine.cache_bytes = int(a.nbytes * 2.5)
    b = engine.open(tmp_path / "b.nii").encode()
    a = engine.open(tmp_path / "a.nii")
    c = engine.open(tmp_path / "c.nii").encode()
    assert b.nbytes == 0, "the least recently used one was let go"
    assert a.nbytes > 0
    assert c.nbytes > 0
    assert engine.open(tmp_path / "b.nii") is not b
    volume = ball(99)
    nib.save(nib.Nifti1Image(volume.to_source(volume.voxels)[:-1], volume.source.affine), tmp_path / "a.nii")
    assert engine.open(tmp_path / "a.nii") is not a, "a changed file is another scan"
    b.encode()
    assert b.nbytes > 0
    assert a.nbytes == 0, "a session that was let go counts again when it is used"
    held = engine.open(ball(98)).encode()
    assert held.nbytes > 0
    assert c.nbytes == 0, "scans from memory share the bound"


def test_slice_between_present_and_empty_is_shared_half_way():
    volume = Volume.from_array(np.zeros((24, 16, 16), np.int16))
    logits = torch.full((6, 16, 16), -30.0)
    logits[2, 4:8, 4:8] = 500.0
    present = torch.tensor([False, False, True, False, False, False])
    transform = GridTransform(volume.shape, (0, 0, 0, 24, 16, 16), 6)
    found = Segmentation("x", volume, False, "", transform, logits, present)
    # Slice 2 of 6 covers planes 8 to 11 of 24.
    assert np.flatnonzero(found.mask.any((1, 2))).tolist() == [8, 9, 10, 11]
    assert found.mask[9].sum() == 16
    assert found.volume_ml == pytest.approx(4 * 16 / 1000)


def test_surer_object_wins_in_a_label_map():
    volume = Volume.from_array(np.zeros((4, 8, 8), np.int16))
    transform = GridTransform(volume.shape, (0, 0, 0, 4, 8, 8), 4)

    def one(name, columns, value):
        logits = torch.full((4, 8, 8), -5.0)
        logits[:, :, columns] = value
        return Segmentation(name, volume, False, "", transform, logits, torch.ones(4, dtype=torch.bool))

    absent = Segmentation("none", volume, True, "", transform)
    labels = label_map([one("a", slice(0, 5), 1.0), absent, one("b", slice(3, 8), 2.0)])
    assert labels[0, 0].tolist() == [1, 1, 1, 3, 3, 3, 3, 3]
    assert not label_map([absent]).any()


def test_dice_is_the_closed_form():
    a, b = np.zeros((2, 4, 4), bool), np.zeros((2, 4, 4), bool)
    a[0, :2], b[0, 1:3] = True, True
    assert dice(a, b) == pytest.approx(2 * 4 / 16)
    assert dice(a & False, b & False) == 1.0
    assert dice(a, b & False) == 0.0


def test_words_of_a_target():
    assert requested("the left kidney") == ("left kidney", "Segment the left kidney.")
    assert requested("Where is the liver?") == ("liver", "Where is the liver?")
    assert requested("bright round lesion")[1] == "Segment the bright round lesion."
    assert mask_name("I see two. Left kidney:", "Segment both kidneys.") == "left kidney"
    assert mask_name("It is", "Segment the spleen.") == "spleen"


def test_text_stream_waits_for_whole_characters(engine):
    ids = engine.tokenizer.encode("Ärzte – ok", add_special_tokens=False)
    stream = TextStream(engine.tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join([*pieces, stream.flush()]) == "Ärzte – ok"
    assert not any("\ufffd" in piece for piece in pieces)


def test_engine_arguments(small_model):
    for wrong in ({"device": "abacus"}, {"dtype": "int3"}, {"language_backend": "steam"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            MedVLEngine.from_pretrained(small_model, **wrong)
