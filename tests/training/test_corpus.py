import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from medvl_sam2.model.prompts import ChatTokens
from medvl_sam2.training.corpus import SPECIAL_TOKENS, chat_text, synthetic_facts, text_corpus, train_tokenizer
from medvl_sam2.training.questions import make_questions
from medvl_sam2.training.reports import write_report
from medvl_sam2.training.requests import make_requests
from medvl_sam2.training.terms import STRUCTURE_TERMS


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(text_corpus(range(400)))


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_special_tokens_have_fixed_ids(tokenizer):
    assert len(tokenizer) == 1024
    expected = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "[SEG]"]
    assert list(SPECIAL_TOKENS) == expected
    assert [tokenizer.convert_tokens_to_ids(token) for token in expected] == list(range(7))
    assert all(ids(tokenizer, token) == [n] for n, token in enumerate(expected))
    assert tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 2


def test_seg_is_one_token_inside_text(tokenizer):
    found = ids(tokenizer, "Liver: [SEG]. Spleen:[SEG].")
    assert found.count(6) == 2
    assert tokenizer.decode(ids(tokenizer, "It is [SEG].")) == "It is [SEG]."
    assert tokenizer.decode(ids(tokenizer, "It is [SEG]."), skip_special_tokens=True) == "It is ."


def test_digits_are_single_tokens(tokenizer):
    tokens = tokenizer.tokenize("12345 mm, 3.25")
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("12345325")


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(ids(tokenizer, text)) == text


@pytest.mark.parametrize(
    "text", ["e\u0301 é ﬁ Ⅷ", "肝臓 печень 🫁", "  two  spaces \n\n\t tab", "a .b , c ! don't 've", "\x00\x7f"]
)
def test_texts_that_normalisers_break_round_trip(tokenizer, text):
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_common_words_are_one_token_and_structures_few(tokenizer):
    for word in (" left", " right", " liver", " kidney", " lung", " the", "Segment", "Yes", "No", "It", "There"):
        assert len(ids(tokenizer, word)) == 1, word
    lengths = {name: len(ids(tokenizer, " " + name)) for name in STRUCTURE_TERMS}
    assert max(lengths.values()) <= 4, lengths


def test_reports_and_questions_are_short(tokenizer):
    reports, questions = [], []
    for seed in range(9000, 9200):
        rng = np.random.default_rng(seed)
        facts = synthetic_facts(rng)
        reports.append(len(ids(tokenizer, write_report(facts, rng))))
        questions += [len(ids(tokenizer, q.prompt)) for q in make_questions(facts, rng)]
        questions += [len(ids(tokenizer, r.text)) for r in make_requests(facts, rng)]
    assert 40 < np.mean(reports) < 110
    assert np.percentile(reports, 99) < 140
    assert np.mean(questions) < 12


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    text = "Segment the left kidney, 12 mm.\nIt is [SEG].<|im_end|>"
    for loaded in (PreTrainedTokenizerFast.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert ids(loaded, text) == ids(tokenizer, text)
        assert loaded.decode(ids(loaded, text)) == text
        assert [loaded.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(7))
        assert loaded.eos_token == "<|im_end|>" and loaded.pad_token == "<|endoftext|>"
        assert loaded.chat_template == tokenizer.chat_template


def test_training_is_deterministic(tokenizer):
    assert train_tokenizer(text_corpus(range(400))).get_vocab() == tokenizer.get_vocab()


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="263"):
        train_tokenizer(["text"], vocab_size=200)


def test_chat_text_is_the_template_and_the_engines_pieces(tokenizer):
    turns = [("Is there ascites?", "No."), ("Segment the liver.", "It is [SEG].")]
    text = chat_text(turns, system="You read CT scans.")
    messages = [{"role": "system", "content": "You read CT scans."}]
    for user, assistant in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    generation = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(generation) and generation.endswith("assistant\n")

    chat = ChatTokens(tokenizer, "You read CT scans.", visual_tokens=0)
    pieces = chat.question(turns[0][0]) + chat.answer(turns[0][1])
    pieces += chat.question(turns[1][0], first=False) + chat.answer(turns[1][1])
    assert pieces == ids(tokenizer, text.split("user\n", 1)[1].removesuffix("\n"))


def test_corpus_is_deterministic_and_holds_every_kind_of_turn():
    texts = list(text_corpus(range(40)))
    assert texts == list(text_corpus(range(40)))
    assert texts[: len(list(text_corpus(range(10))))] == list(text_corpus(range(10)))
    joined = "".join(texts)
    for piece in ("[SEG]", "There is no ", "Choices: A. ", "Impression: ", "Yes.", "No."):
        assert piece in joined
    assert "<img>" not in joined
    assert all(text.count("<|im_start|>") == text.count("<|im_end|>") for text in texts)


def test_corpus_takes_the_given_facts_and_refuses_evaluation_seeds():
    facts = synthetic_facts(np.random.default_rng(1)) | {"phase": "arterial"}
    texts = list(text_corpus([5], facts_of=lambda seed: facts))
    assert sum("arterial" in text.lower() for text in texts) == len(texts)
    with pytest.raises(ValueError, match="1000000"):
        next(itertools.islice(text_corpus([1_000_000]), 1))
