"""One conformance test for every language backend, held to full forwards of the model that it runs."""

import math
from itertools import chain, zip_longest
from threading import Event

import pytest
import torch
from transformers import AutoTokenizer

from medvl_sam2.engine.language.transformers import TransformersBackend
from medvl_sam2.model.config import LanguageConfig, LoRAConfig
from medvl_sam2.model.export import export_language
from medvl_sam2.model.language import LanguageModel
from medvl_sam2.model.prompts import ABSENT_ANSWER, SEGMENT_ANSWER, ChatTokens

VISUAL = 80
QUESTIONS = ("Segment the liver.", "Is there a pleural effusion?", "What is the size of the left kidney?")
LENGTH = 14


def new_model(chat: ChatTokens, kind: str) -> LanguageModel:
    """A model with LoRA that matters, which says [SEG] several times among other tokens."""
    torch.manual_seed(11)
    shape = {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    config = LanguageConfig(kind, shape, seg_token_id=chat.seg_id)
    model = LanguageModel(config, LoRAConfig(rank=4, alpha=8, dropout=0.0)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1)
        elif parameter.ndim == 2:
            parameter.mul_(4)
    return model


@torch.no_grad()
def states(model: LanguageModel, chat: ChatTokens, visual: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Hidden states (T, H) of a whole conversation in one forward."""
    prefix = chat.prefix()
    embeds = model.embed(torch.tensor([[*prefix, *ids]]))
    # A model of random weights may say the placeholder's token too, which stands for nothing then.
    start = prefix.index(chat.context_id)
    embeds[0, start : start + VISUAL] = visual
    return model.hidden(embeds)[0]


@torch.no_grad()
def greedy(model, chat, visual, ids, length=LENGTH) -> list[int]:
    """Tokens by a full forward for each."""
    said: list[int] = []
    while len(said) < length:
        token = int(model.logits(states(model, chat, visual, [*ids, *said])[-1]).argmax())
        if token == chat.end_id:
            break
        said.append(token)
    return said


@pytest.fixture(scope="module")
def chat(small_model):
    return ChatTokens(AutoTokenizer.from_pretrained(small_model), "You are helpful.", VISUAL)


@pytest.fixture(scope="module")
def visual():
    torch.manual_seed(3)
    return torch.randn(VISUAL, 64) * 0.5


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def kind(request):
    """InternVL2.5's language models: Qwen2, and InternLM2 in Llama's layout."""
    return request.param


@pytest.fixture(scope="module")
def oracle(chat, visual, kind):
    model = new_model(chat, kind)
    questions = [chat.question(question) for question in QUESTIONS]
    said = greedy(model, chat, visual, questions[0], 4)
    hidden = states(model, chat, visual, [*questions[0], *said[:2]])[-1]
    top = model.logits(hidden).max()
    for strength in (1.01, 1.2, 1.5, 2.0, 3.0):
        model.seg_output.data = hidden / hidden.square().sum() * top * strength
        counts = [greedy(model, chat, visual, ids).count(chat.seg_id) for ids in questions]
        if max(counts) >= 2 and min(counts) < LENGTH:
            return model
    pytest.fail("the model never says [SEG] twice; choose another seed")


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def backend(request, chat, oracle, kind, tmp_path_factory):
    if request.param == "transformers":
        model = new_model(chat, kind)
        model.load_state_dict(oracle.state_dict())
        return TransformersBackend(model, chat, "input")
    pytest.importorskip("vllm")
    from medvl_sam2.engine.language.vllm_backend import VLLMBackend

    directory = export_language(oracle, tmp_path_factory.mktemp("exported"))
    # Steps of few tokens, so that prompts are taken in chunks.
    options = {"max_num_batched_tokens": 48, "max_num_seqs": 16, "max_model_len": 512, "seed": 0}
    return VLLMBackend(directory, chat, "input", device=torch.device("cpu"), **options)


@pytest.fixture(params=["input", "predicting"])
def convention(request, backend, monkeypatch):
    monkeypatch.setattr(backend, "convention", request.param)
    return request.param


def check_answer(steps, oracle, chat, visual, ids, convention, length=LENGTH):
    tokens = [step.token for step in steps]
    assert tokens == greedy(oracle, chat, visual, ids, length)
    hidden = states(oracle, chat, visual, [*ids, *tokens])
    start = len(chat.prefix()) + len(ids) - (convention == "predicting")
    for number, step in enumerate(steps):
        assert (step.hidden is not None) == (step.token == chat.seg_id)
        if step.hidden is not None:
            torch.testing.assert_close(step.hidden.cpu().float(), hidden[start + number], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("question", QUESTIONS)
def test_tokens_and_seg_states_equal_full_forwards(backend, oracle, chat, visual, convention, question):
    ids = chat.question(question)
    steps = list(backend.generate(backend.prefix(visual), ids, max_tokens=LENGTH))
    check_answer(steps, oracle, chat, visual, ids, convention)


def test_some_answer_has_several_seg(oracle, chat, visual):
    answers = [greedy(oracle, chat, visual, chat.question(question)) for question in QUESTIONS]
    assert max(answer.count(chat.seg_id) for answer in answers) >= 2
    assert any(set(answer) - {chat.seg_id} for answer in answers)


def test_seg_as_the_last_token_of_the_limit(backend, oracle, chat, visual, convention):
    answers = {question: greedy(oracle, chat, visual, chat.question(question)) for question in QUESTIONS}
    question = next(question for question, answer in answers.items() if chat.seg_id in answer)
    length = answers[question].index(chat.seg_id) + 1
    steps = list(backend.generate(backend.prefix(visual), chat.question(question), max_tokens=length))
    assert steps[-1].hidden is not None
    check_answer(steps, oracle, chat, visual, chat.question(question), convention, length)


def test_three_at_once(backend, oracle, chat, visual, convention):
    prefix = backend.prefix(visual)
    other = visual.flip(0)
    prefixes = [(prefix, visual), (backend.prefix(other), other), (prefix, visual)]
    streams = [
        backend.generate(own, chat.question(question), max_tokens=LENGTH)
        for (own, _), question in zip(prefixes, QUESTIONS)
    ]
    turns = list(zip_longest(*streams))
    for index, ((_, rows), question) in enumerate(zip(prefixes, QUESTIONS)):
        steps = [turn[index] for turn in turns if turn[index] is not None]
        check_answer(steps, oracle, chat, rows, chat.question(question), convention)


def test_questions_together_equal_full_forwards(backend, oracle, chat, visual, convention):
    ids, limits = [chat.question(question) for question in QUESTIONS], [LENGTH, 4, LENGTH - 1]
    rounds = list(backend.generate_all(backend.prefix(visual), ids, max_tokens=limits))
    for steps, question, limit in zip(zip_longest(*rounds), ids, limits):
        check_answer([step for step in steps if step], oracle, chat, visual, question, convention, limit)
    cancel = Event()
    stream = backend.generate_all(backend.prefix(visual), ids, max_tokens=[50] * 3, cancel=cancel)
    next(stream)
    cancel.set()
    assert not any(step for steps in stream for step in steps)


def test_forced_states_and_margins_equal_full_forwards(backend, oracle, chat, visual, convention):
    names = ("liver", "left kidney", "pleural effusion")
    questions = [chat.question(f"Segment the {name}.") for name in names]
    answer = chat.answer(SEGMENT_ANSWER + " And again [SEG].")
    rivals = [chat.answer(ABSENT_ANSWER.format(name=name)) for name in names[:2]] + [None]
    results = backend.forced(backend.prefix(visual), questions, answer, rivals)
    places = [i for i, token in enumerate(answer) if token == chat.seg_id]
    for ids, rival, result in zip(questions, rivals, results):
        hidden = states(oracle, chat, visual, [*ids, *answer])
        start = len(chat.prefix()) + len(ids)
        expected = hidden[[start + place - (convention == "predicting") for place in places]]
        torch.testing.assert_close(result.hidden.cpu().float(), expected, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            assert result.first == int(oracle.logits(hidden[start - 1]).argmax())
        if rival is None:
            assert result.margin == math.inf
            continue
        place = next(i for i, (own, other) in enumerate(zip(answer, rival)) if own != other)
        with torch.no_grad():
            scores = oracle.logits(hidden[start + place - 1])
        assert result.margin == pytest.approx(float(scores[answer[place]] - scores[rival[place]]), abs=1e-3)


def test_cancelled_stream_ends(backend, chat, visual):
    cancel = Event()
    stream = backend.generate(backend.prefix(visual), chat.question("Why?"), max_tokens=100, cancel=cancel)
    first = [next(stream) for _ in range(2)]
    cancel.set()
    assert len(first) == 2 and list(stream) == []


@pytest.fixture
def vllm_backend(backend):
    if backend.name != "vllm":
        pytest.skip("of vLLM alone")
    return backend


def test_a_second_question_finds_the_scan_in_the_cache(vllm_backend, chat, visual):
    prefix = vllm_backend.prefix(visual)
    ids = chat.question(QUESTIONS[1])
    request = vllm_backend._submit(prefix, ids, 1)
    vllm_backend._finish(request)
    block = vllm_backend._engine.vllm_config.cache_config.block_size
    assert request.cached == len(prefix.ids) // block * block > prefix.start
    # The same rows under another salt are another patient's.
    other = vllm_backend._submit(type(prefix)(prefix.ids, prefix.visual, prefix.start, "other"), ids, 1)
    vllm_backend._finish(other)
    assert other.cached == 0


def test_base_and_adapter_share_a_batch(vllm_backend, oracle, chat, visual):
    prefix = vllm_backend.prefix(visual)
    ids = chat.question(QUESTIONS[0])
    streams = [
        vllm_backend.generate(prefix, ids, max_tokens=LENGTH, adapter=adapter) for adapter in (True, False, True)
    ]
    answers = [[step for step in steps if step] for steps in zip(*zip_longest(*streams))]
    for index in (0, 2):
        check_answer(answers[index], oracle, chat, visual, ids, "input")
    with oracle.peft.disable_adapter():
        check_answer(answers[1], oracle, chat, visual, ids, "input")
    assert [s.token for s in answers[0]] != [s.token for s in answers[1]]


@pytest.mark.parametrize("fault", ["short", "wide", "nan", "infinite"])
def test_visual_rows_that_vllm_would_fail_at(vllm_backend, visual, fault):
    bad = {
        "short": visual[:-1],
        "wide": torch.cat([visual, visual], 1),
        "nan": visual * math.nan,
        "infinite": visual / 0,
    }[fault]
    with pytest.raises(ValueError, match="visual"):
        vllm_backend.prefix(bad)


def test_nothing_is_kept_of_requests_that_ended(vllm_backend, chat, visual):
    prefix = vllm_backend.prefix(visual)
    streams = [vllm_backend.generate(prefix, chat.question(question), max_tokens=50) for question in QUESTIONS]
    list(chain(*(next(zip(stream)) for stream in streams)))
    assert len(vllm_backend._requests) == len(vllm_backend._inside.TAPS.requests) == 3
    for stream in streams:
        stream.close()
    assert not vllm_backend._requests and not vllm_backend._inside.TAPS.requests
    vllm_backend._step()
    assert not vllm_backend._engine.has_unfinished_requests()
