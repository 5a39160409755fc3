"""SAM2's work in a thread beside the language model's, as on a GPU."""

import threading
from contextlib import contextmanager

import pytest
import torch

from medvl_sam2.engine.beside import Beside
from medvl_sam2.engine.cancelling import check
from medvl_sam2.engine.language.base import Step


class Lane:
    """Two streams in words: what waits for what, and which memory each side is told of."""

    def __init__(self):
        self.for_work, self.for_asker, self.done = [], [], 0

    def leave(self, tensors):
        self.for_work.append([tuple(tensor.shape) for tensor in tensors])
        return len(self.for_work)

    @contextmanager
    def inside(self, mark):
        assert mark == self.done + 1, "the work waits for what was there when it was handed over"
        try:
            yield
        finally:
            self.done += 1

    def mark(self):
        return self.done + 1

    def take(self, tensors, mark):
        self.for_asker.append((mark, {tuple(tensor.shape) for tensor in tensors}))


@pytest.fixture
def beside(engine, monkeypatch):
    """As on a GPU: SAM2's work in a thread, beside a lane that notes what happens."""
    lane = Lane()
    monkeypatch.setattr(engine, "beside", Beside(lane))
    return lane


@pytest.mark.parametrize("by_chat", [False, True])
def test_image_features_are_computed_while_the_language_model_reads(session, engine, beside, monkeypatch, by_chat):
    begun, read = threading.Event(), threading.Event()
    encode, prefix = engine.segmenter.encode, engine.language.prefix

    def encode_when_reading(*args):
        begun.set()
        assert read.wait(20), "the language model waits for the image features"
        return encode(*args)

    def read_when_encoding(visual):
        assert begun.wait(20), "the image features wait for the language model"
        read.set()
        return prefix(visual)

    monkeypatch.setattr(engine.segmenter, "encode", encode_when_reading)
    monkeypatch.setattr(engine.language, "prefix", read_when_encoding)
    if by_chat:
        assert list(session.chat("What is seen?", max_tokens=2))
        assert begun.is_set() and read.is_set()
        return
    found = session.segment("liver", points=[(18, 20, 9)])
    monkeypatch.undo()
    assert {"vision", "prefix", "slices", "language", "masks"} <= set(found.timings)
    features, prompts = beside.for_work
    assert features == []
    assert (1, 1, engine.config.sam2.d_model) in prompts
    # The masks' job takes the features, and the request takes the masks, each behind the mark of what made them.
    assert [mark for mark, _ in beside.for_asker] == [1, 2]
    assert tuple(found.logits.shape) in beside.for_asker[1][1]
    sequential = engine.open(session.volume).segment("liver", points=[(18, 20, 9)])
    torch.testing.assert_close(found.logits, sequential.logits)


def test_masks_are_computed_while_the_text_goes_on(session, engine, beside, monkeypatch):
    chat = engine.chat
    ids = chat.answer("Liver: [SEG]. That is all.")[:-1]
    spoken, by_text = threading.Event(), engine.segmenter.by_text

    def said(prefix, prompts, **_):
        for number, token in enumerate(ids):
            yield [Step(token, torch.ones(64) if token == chat.seg_id else None)]
            if number == len(ids) - 2:
                spoken.set()

    def mask_when_spoken(*args):
        assert spoken.wait(20), "the text waits for the mask"
        return by_text(*args)

    monkeypatch.setattr(engine.language, "generate_all", said)
    monkeypatch.setattr(engine.segmenter, "by_text", mask_when_spoken)
    events = list(session.chat("Segment the liver."))
    kinds = ["mask" if event.segmentation else "text" for event in events]
    assert kinds.count("mask") == 1
    assert kinds.index("mask") > kinds.index("text") + 2
    assert events[-1].finish == "stop"
    (mask,) = [event.segmentation for event in events if event.segmentation]
    assert mask.name == "liver"
    monkeypatch.undo()
    expected = session._by_text(torch.ones(1, 1, 64), session.stages)[0]
    torch.testing.assert_close(mask.logits, expected.logits)


def test_work_beside_that_fails_or_is_left_ends_with_its_request(session, engine, beside, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(engine.segmenter, "encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.segment(None, points=[(18, 20, 9)])
    assert session.segment(None, points=[(18, 20, 9)]).mask.shape == session.volume.shape
    chat, seen = engine.chat, []

    def said(prefix, prompts, **_):
        yield [Step(chat.seg_id, torch.ones(64))]
        yield [Step(chat.answer("the")[0])]

    def slow(features, embeddings, cancel):
        assert cancel.wait(20), "nobody told the mask that the listener has left"
        seen.append(cancel)
        check(cancel)

    monkeypatch.setattr(engine.language, "generate_all", said)
    monkeypatch.setattr(engine.segmenter, "by_text", slow)
    events = session.chat("Segment the liver.")
    assert next(events).text
    events.close()
    engine.beside.start(lambda: None).result()
    assert len(seen) == 1
