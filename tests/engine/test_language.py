"""The transformers backend against transformers' own generation and against a training-style forward."""

from threading import Event

import pytest
import torch
from torch import nn

from medvl_sam2.engine.language.transformers import TransformersBackend
from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.model.prompts import ABSENT_ANSWER, SEGMENT_ANSWER

QUESTION = "Is there a pleural effusion?"


@pytest.fixture
def model(small_model):
    return MedVLSAM2.from_pretrained(small_model)


@pytest.fixture
def visual(model):
    torch.manual_seed(3)
    return torch.randn(model.config.projector.tokens, model.config.language.hidden_size) * 0.5


def backend_of(model, convention="input", merge=True):
    return TransformersBackend(model.language, model.chat, convention, merge=merge)


@torch.no_grad()
def training_hidden(model, visual, ids):
    """Hidden states (T, H) of the whole conversation in one forward, as in training."""
    ids = torch.tensor([ids])
    return model(ids, visual[None]).hidden[0]


def script(monkeypatch, model, tokens):
    """Make the model say `tokens`, whatever its states are."""
    coming = iter(tokens)
    size = model.language.causal.config.vocab_size
    monkeypatch.setattr(
        model.language, "logits", lambda hidden: nn.functional.one_hot(torch.tensor(next(coming)), size)
    )


def test_tokens_equal_transformers_generate(model, visual):
    ids = model.chat.question(QUESTION)
    whole = torch.tensor([[*model.chat.prefix(), *ids]])
    with torch.no_grad():
        expected = model.language.causal.generate(
            inputs_embeds=model.sequence(whole, visual[None]),
            attention_mask=torch.ones_like(whole),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=model.chat.end_id,
            pad_token_id=0,
            # The [SEG] row is a parameter beside the tied head that generate uses.
            suppress_tokens=[model.chat.seg_id],
        )[0].tolist()
    with torch.no_grad():
        model.language.seg_output.zero_()
    backend = backend_of(model)
    steps = list(backend.generate(backend.prefix(visual), ids, max_tokens=24))
    assert [step.token for step in steps] == [token for token in expected if token != model.chat.end_id]
    assert len(steps) == 24 or model.chat.end_id in expected


def test_merged_lora_equals_unmerged(small_model, visual):
    states = []
    for merge in (False, True):
        model = MedVLSAM2.from_pretrained(small_model)
        backend = backend_of(model, merge=merge)
        (result,) = backend.forced(
            backend.prefix(visual), [model.chat.question(QUESTION)], model.chat.answer(SEGMENT_ANSWER), [None]
        )
        states.append(result.hidden)
        adapters = [name for name, _ in model.language.named_modules() if name.endswith("lora_A.default")]
        assert bool(adapters) == (not merge)
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("convention", "back"), [("input", 0), ("predicting", 1)])
def test_forced_state_equals_training_forward(model, visual, convention, back):
    questions = [model.chat.question(text) for text in ("Segment the liver.", "Segment the left kidney, please.")]
    answer = model.chat.answer(SEGMENT_ANSWER)
    expected = []
    for question in questions:
        ids = [*model.chat.prefix(), *question, *answer]
        expected.append(training_hidden(model, visual, ids)[ids.index(model.chat.seg_id) - back])
    backend = backend_of(model, convention)
    results = backend.forced(backend.prefix(visual), questions, answer, [None, None])
    for result, state in zip(results, expected):
        torch.testing.assert_close(result.hidden[0], state, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)


@pytest.mark.parametrize(("convention", "back"), [("input", 0), ("predicting", 1)])
def test_generated_state_equals_training_forward(model, visual, convention, back, monkeypatch):
    question = model.chat.question(QUESTION)
    answer = model.chat.answer("Liver: [SEG]. Left kidney: [SEG][SEG]")
    script(monkeypatch, model, answer)
    backend = backend_of(model, convention)
    steps = list(backend.generate(backend.prefix(visual), question, max_tokens=len(answer) - 1))
    tokens = [step.token for step in steps]
    assert tokens == answer[:-1]
    ids = [*model.chat.prefix(), *question, *tokens]
    hidden = training_hidden(model, visual, ids)
    start = len(ids) - len(tokens)
    for place, step in enumerate(steps):
        assert (step.hidden is not None) == (step.token == model.chat.seg_id)
        if step.hidden is not None:
            torch.testing.assert_close(step.hidden, hidden[start + place - back], rtol=1e-5, atol=1e-5)


def test_margin_is_the_log_odds_of_a_full_forward(model, visual):
    question = model.chat.question("Segment the spleen.")
    answer = model.chat.answer(SEGMENT_ANSWER)
    rival = model.chat.answer(ABSENT_ANSWER.format(name="spleen"))
    ids = [*model.chat.prefix(), *question]
    with torch.no_grad():
        odds = model.language.logits(training_hidden(model, visual, ids)[-1]).log_softmax(-1)
    backend = backend_of(model)
    (result,) = backend.forced(backend.prefix(visual), [question], answer, [rival])
    assert result.margin == pytest.approx(float(odds[answer[0]] - odds[rival[0]]), abs=1e-4)


def test_prefix_is_reused_unchanged(model, visual):
    backend = backend_of(model)
    prefix = backend.prefix(visual)
    before = [layer.keys.clone() for layer in prefix.cache.layers]
    other = model.chat.question("Segment the liver.")
    ids = model.chat.question(QUESTION)
    list(backend.generate(prefix, other, max_tokens=8))
    backend.forced(prefix, [other, ids], model.chat.answer(SEGMENT_ANSWER), [None, None])
    reused = [step.token for step in backend.generate(prefix, ids, max_tokens=12)]
    fresh = [step.token for step in backend.generate(backend.prefix(visual), ids, max_tokens=12)]
    assert reused == fresh
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(prefix.cache.layers, before))


def test_interleaved_streams_do_not_mix(model, visual):
    backend = backend_of(model)
    prefix = backend.prefix(visual)
    texts = [model.chat.question(text) for text in (QUESTION, "Where is the liver?")]
    alone = [[step.token for step in backend.generate(prefix, ids, max_tokens=10)] for ids in texts]
    streams = [backend.generate(prefix, ids, max_tokens=10) for ids in texts]
    mixed = [[], []]
    for _ in range(10):
        for stream, tokens in zip(streams, mixed):
            if (step := next(stream, None)) is not None:
                tokens.append(step.token)
    assert mixed == alone


@pytest.fixture(scope="module")
def tiny():
    # In float32 everywhere: in 16 bits, which some CPUs choose, products of other shapes round otherwise.
    model = MedVLSAM2.from_pretrained("tiny", torch.float32)
    torch.manual_seed(5)
    visual = torch.randn(model.config.projector.tokens, model.config.language.hidden_size) * 0.3
    return backend_of(model), visual


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_questions_together_equal_each_alone(tiny, static, monkeypatch):
    """With trained weights, whose answers end at places of their own; `static` is what a GPU records, without one."""
    backend, visual = tiny
    chat = backend.chat
    texts = (
        "Segment the liver.",
        "Is there a pleural effusion?",
        "Write a report of this CT scan.",
        "Which phase is it? Choices: A. arterial B. portal venous C. non-contrast",
    )
    ids, limits = [chat.question(text) for text in texts], [20, 24, 24, 5]
    assert len({len(question) for question in ids}) > 2
    prefix = backend.prefix(visual)
    before = [layer.keys.clone() for layer in prefix.cache.layers]
    alone = [list(backend.generate(prefix, q, max_tokens=n)) for q, n in zip(ids, limits)]
    monkeypatch.setattr(backend, "static", static)
    for _ in range(1 + static):
        rounds = list(backend.generate_all(prefix, ids, max_tokens=limits))
        together = [[step for step in steps if step] for steps in zip(*rounds)]
        assert [[s.token for s in steps] for steps in together] == [[s.token for s in steps] for steps in alone]
        for mine, theirs in zip(together, alone):
            for step, other in zip(mine, theirs):
                assert (step.hidden is None) == (other.hidden is None)
                if step.hidden is not None:
                    torch.testing.assert_close(step.hidden, other.hidden, rtol=1e-3, atol=1e-3)
    assert len({len(steps) for steps in alone}) > 1, "answers end at places of their own"
    assert any(step.hidden is not None for steps in alone for step in steps), "one of them has a [SEG]"
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(prefix.cache.layers, before))
    assert len(backend._kept) == static, "buffers of a shape are used again"


def test_length_limit_and_cancel(model, visual):
    backend = backend_of(model)
    prefix, ids = backend.prefix(visual), model.chat.question(QUESTION)
    assert len(list(backend.generate(prefix, ids, max_tokens=5))) == 5
    cancel = Event()
    stream = backend.generate(prefix, ids, max_tokens=50, cancel=cancel)
    next(stream)
    cancel.set()
    assert len(list(stream)) <= 1


def test_end_of_turn_stops_and_is_not_given_out(model, visual):
    backend = backend_of(model)
    prefix, ids = backend.prefix(visual), model.chat.question(QUESTION)
    third = [step.token for step in backend.generate(prefix, ids, max_tokens=3)][-1]

    class Ends(type(model.chat)):
        end_id = third

    backend.chat = Ends(model.tokenizer, model.config.language.system, model.config.projector.tokens)
    tokens = [step.token for step in backend.generate(prefix, ids, max_tokens=50)]
    assert third not in tokens
    assert len(tokens) <= 2
