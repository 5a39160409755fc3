"""Requests of a session at the edges of what may be asked: empty, mistaken or given up ones."""

from dataclasses import replace
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medvl_sam2.engine.cancelling import Linked
from medvl_sam2.engine.geometry import InputError, Volume
from medvl_sam2.engine.language.base import Step


@pytest.fixture
def session(engine):
    voxels = np.full((12, 30, 30), -1000, np.int16)
    voxels[2:10, 6:24, 6:24] = 50
    return engine.open(Volume.from_array(voxels, spacing=(3, 2, 2)))


@pytest.mark.parametrize("points", [[], (), np.empty((0, 3))], ids=["list", "tuple", "array"])
def test_no_points_are_as_none_given(session, points, monkeypatch):
    forced = session._engine.language.forced
    monkeypatch.setattr(
        session._engine.language, "forced", lambda *a: [replace(result, margin=-1.0) for result in forced(*a)]
    )
    found = session.segment("gallbladder", points=points)
    assert found.absent
    assert found.text == "There is no gallbladder in this scan."
    with pytest.raises(InputError, match="nothing to segment"):
        session.segment(None, points=points)


def test_points_may_be_an_array(session):
    points = [(14, 15, 6), (13, 15, 6)]
    one, other = (session.segment(None, points=given) for given in (points, np.array(points)))
    assert torch.equal(one.logits, other.logits)


def test_a_bare_text_is_no_list(session):
    for ask, remedy in ((session.segment_all, "segment"), (session.ask_all, "ask")):
        with pytest.raises(InputError, match=rf"expected a list of texts, got 'liver'; .*or call {remedy}"):
            ask("liver")
    with pytest.raises(InputError, match="choices: expected a list of texts, got 'yes'"):
        session.ask("Is there a nodule?", "yes")


def test_more_choices_than_letters(session):
    with pytest.raises(InputError, match="choices: expected at most 26, .* got 27"):
        session.ask("Which?", [f"part {number}" for number in range(27)])


def test_a_listener_who_leaves_sets_no_event_but_his_own(session, monkeypatch):
    chat, seen = session._engine.chat, []

    def said(prefix, prompts, **_):
        yield [Step(chat.seg_id, torch.ones(64))]
        yield [Step(chat.answer("the")[0])]

    def pending(hidden, stages, cancel):
        seen.append(cancel)
        return SimpleNamespace(is_ready=False)

    monkeypatch.setattr(session._engine.language, "generate_all", said)
    monkeypatch.setattr(session._work, "by_text", pending)
    cancel = Event()
    streams = [session.chat("Segment the liver.", cancel=cancel) for _ in range(2)]
    assert all(next(stream).text for stream in streams)
    streams[0].close()
    assert seen[0].is_set()
    assert not cancel.is_set()
    assert not seen[1].is_set(), "the other request goes on"
    cancel.set()
    assert seen[1].is_set()
    streams[1].close()


def test_linked_event_without_another():
    own = Linked(None)
    assert not own.is_set()
    own.set()
    assert own.is_set()
    assert own.wait(0)


def test_an_answer_that_was_cancelled_says_so(session, monkeypatch):
    the = session._engine.chat.answer("the")[0]

    def said(*_, cancel, **__):
        for _ in range(6):
            if cancel is not None and cancel.is_set():
                return
            yield [Step(the)]

    monkeypatch.setattr(session._engine.language, "generate_all", said)
    cancel = Event()
    for limit, finish in ((9, "stop"), (6, "length")):
        assert list(session.chat("What is seen?", max_tokens=limit, cancel=cancel))[-1].finish == finish
    stream = session.chat("What is seen?", max_tokens=9, cancel=cancel)
    next(stream)
    cancel.set()
    last = list(stream)[-1]
    assert (last.finish, last.tokens) == ("cancelled", 1)
