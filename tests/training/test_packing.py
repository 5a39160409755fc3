"""Packed turns: each must see the scan and itself alone, as it will when asked at run time."""

import numpy as np
import pytest
import torch

from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.model.presets import preset
from medvl_sam2.training.corpus import text_corpus, train_tokenizer
from medvl_sam2.training.packing import IGNORE, pack

TURNS = [("Is there a nodule?", "Yes."), ("Segment the liver.", "It is [SEG]."), ("Which phase is this?", "Arterial.")]


@pytest.fixture(scope="module")
def model() -> MedVLSAM2:
    torch.manual_seed(0)
    settings = preset("tiny")
    return MedVLSAM2(settings, train_tokenizer(text_corpus(range(40)), 1024)).eval()


def test_packed_turns_equal_turns_asked_alone(model):
    visual = torch.randn(1, model.config.projector.tokens, model.config.language.hidden_size)
    packed = pack(model.chat, [TURNS])
    with torch.no_grad():
        together = model(
            packed.input_ids, visual, attention_mask=packed.attention_mask, position_ids=packed.position_ids
        )
        start = len(model.chat.prefix())
        for question, answer in TURNS:
            ids = [*model.chat.prefix(), *model.chat.question(question), *model.chat.answer(answer)]
            alone = model(torch.tensor([ids]), visual)
            turn = alone.hidden[0, len(model.chat.prefix()) :]
            torch.testing.assert_close(together.hidden[0, start : start + len(turn)], turn, atol=2e-5, rtol=1e-4)
            start += len(turn)


def test_only_answers_are_scored(model):
    packed = pack(model.chat, [TURNS])
    scored = packed.labels[0] != IGNORE
    text = model.tokenizer.decode(packed.labels[0][scored])
    assert text == "".join(f"{answer}<|im_end|>" for _, answer in TURNS)
    assert torch.equal(packed.labels[0][scored], packed.input_ids[0][scored])


def test_padding_does_not_reach_shorter_rows(model):
    visual = torch.randn(2, model.config.projector.tokens, model.config.language.hidden_size)
    both = pack(model.chat, [TURNS[:1], TURNS])
    alone = pack(model.chat, [TURNS[:1]])
    with torch.no_grad():
        long = model(both.input_ids, visual, attention_mask=both.attention_mask, position_ids=both.position_ids)
        short = model(alone.input_ids, visual[:1], attention_mask=alone.attention_mask, position_ids=alone.position_ids)
    length = alone.input_ids.shape[1]
    assert torch.isfinite(long.hidden).all()
    torch.testing.assert_close(long.hidden[:1, :length], short.hidden, atol=2e-5, rtol=1e-4)


def test_positions_continue_from_the_prefix(model):
    packed = pack(model.chat, [TURNS])
    prefix = len(model.chat.prefix())
    starts = np.flatnonzero(packed.position_ids[0].numpy() == prefix)
    assert len(starts) == len(TURNS)
