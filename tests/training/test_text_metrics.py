import math
import shutil

import numpy as np
import pytest

from medvl_sam2.training.corpus import synthetic_facts
from medvl_sam2.training.questions import Question
from medvl_sam2.training.reports import write_report
from medvl_sam2.training.text_metrics import (
    accuracy,
    answer_scores,
    caption_scores,
    caption_words,
    finding_scores,
    ratio,
)

EFFUSION, OTHER, CYST = ("pleural_effusion", "left"), ("pleural_effusion", "right"), ("renal_cyst", "left")


def reports(seed, count=12):
    """Pairs of wordings of the same facts, and one report of other facts."""
    rng = np.random.default_rng(seed)
    facts = [synthetic_facts(rng) for _ in range(count)]
    return [write_report(f, np.random.default_rng(1)) for f in facts], [
        write_report(f, np.random.default_rng(2)) for f in facts
    ]


def test_finding_f1_by_hand():
    truth = [{EFFUSION, CYST}, {CYST}, set()]
    predicted = [{EFFUSION, CYST}, {OTHER}, {EFFUSION}]
    scores = finding_scores(predicted, truth)
    assert scores["precision"].value == pytest.approx(2 / 4)
    assert scores["recall"].value == pytest.approx(2 / 3)
    assert scores["f1"].value == pytest.approx(2 * 2 / (4 + 3))
    assert scores["f1/renal_cyst"].value == pytest.approx(2 / 3)
    assert scores["f1/pleural_effusion"].value == pytest.approx(2 / 4)


def test_wrong_side_is_missed_and_made_up():
    scores = finding_scores([{OTHER}], [{EFFUSION}])
    assert scores["precision"].value == scores["recall"].value == scores["f1"].value == 0


def test_findings_are_read_from_reports():
    scores = finding_scores(["Left pleural effusion. No renal cyst.", "No abnormal finding."], [{EFFUSION}, {CYST}])
    assert (scores["precision"].value, scores["recall"].value) == (1, 0.5)


def test_nothing_true_and_nothing_said_is_no_score():
    assert math.isnan(finding_scores([set()], [set()])["f1"].value)


def test_interval_of_an_accuracy_is_near_the_binomial_one():
    rng = np.random.default_rng(0)
    rights = rng.random(400) < 0.8
    got = accuracy(rights)
    half = 1.96 * math.sqrt(got.value * (1 - got.value) / 400)
    assert got.value == rights.mean() and got.count == 400
    assert got.low == pytest.approx(got.value - half, abs=0.008)
    assert got.high == pytest.approx(got.value + half, abs=0.008)


def test_answers_of_one_scan_are_resampled_together():
    rights = np.repeat([True, False] * 10, 20)
    groups = np.repeat(np.arange(20), 20).tolist()
    alone, grouped = accuracy(rights), accuracy(rights, groups)
    assert alone.value == grouped.value == 0.5
    assert (grouped.high - grouped.low) > 3 * (alone.high - alone.low)


def test_ratio_is_reproducible_and_survives_one_case_and_no_case():
    assert ratio([1, 2, 3], [2, 2, 4]) == ratio([1, 2, 3], [2, 2, 4])
    one = ratio([1], [2])
    assert (one.value, one.low, one.high, one.count) == (0.5, 0.5, 0.5, 1)
    assert math.isnan(ratio([], []).value) and ratio([0], [0]).count == 0
    with pytest.raises(ValueError, match="groups"):
        ratio([1, 1], [1, 1], ["a"])


def test_answer_scores_by_kind_and_topic():
    questions = [
        Question("short", "side", "Which side?", "Left."),
        Question("short", "phase", "Which phase?", "Arterial."),
        Question("multiple_choice", "side", "Which side?", "A. left", ("left", "right", "both sides")),
        Question("long", "describe", "Describe the liver.", "Normal."),
    ]
    scores = answer_scores(questions, ["left", "Venous", "B", "anything"], groups=[1, 1, 2, 2])
    assert {key: score.value for key, score in scores.items()} == {
        "short": 0.5, "short/side": 1, "short/phase": 0, "multiple_choice": 0, "multiple_choice/side": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="answers"):
        answer_scores(questions, ["left"])


@pytest.fixture(scope="module")
def metrics():
    for package in ("pycocoevalcap", "rouge_score", "nltk"):
        pytest.importorskip(package)
    return caption_scores


def test_equal_texts_score_one(metrics):
    texts, _ = reports(0)
    scores = metrics(texts, texts)
    for name in ("BLEU-1", "BLEU-4", "ROUGE-1", "ROUGE-L"):
        assert scores[name] == pytest.approx(1, abs=1e-6)
    # pycocoevalcap's CIDEr is ten times a cosine similarity.
    assert scores["CIDEr"] == pytest.approx(10, abs=1e-6)


def test_bleu_rouge_and_meteor_by_hand(metrics):
    scores = metrics(["The cat sat."], ["The cat sat on a mat."])
    brevity = math.exp(1 - 6 / 3)
    assert scores["BLEU-1"] == pytest.approx(brevity, rel=1e-6)
    assert scores["BLEU-2"] == pytest.approx(brevity, rel=1e-6)
    assert scores["ROUGE-1"] == pytest.approx(2 * 1 * 0.5 / 1.5)
    precision, recall, beta = 1.0, 0.5, 1.2
    assert scores["ROUGE-L"] == pytest.approx((1 + beta**2) * precision * recall / (recall + beta**2 * precision))
    (meteor,) = (value for name, value in scores.items() if name.startswith("METEOR"))
    assert meteor == pytest.approx(precision * recall / (0.9 * precision + 0.1 * recall) * (1 - 0.5 * (1 / 3) ** 3))


def test_scores_fall_with_the_distance_of_the_texts(metrics):
    texts, reworded = reports(1)
    near, far = metrics(reworded, texts), metrics(texts[1:] + texts[:1], texts)
    for name in near:
        assert 0 < far[name] < near[name] < (10 if name == "CIDEr" else 1)


def test_several_references_take_the_best(metrics):
    texts, reworded = reports(2)
    both = metrics(texts, list(zip(reworded, texts)))
    assert both["ROUGE-1"] == pytest.approx(1) and both["BLEU-4"] == pytest.approx(1, abs=1e-6)


def test_mismatched_cases_are_refused(metrics):
    with pytest.raises(ValueError, match="references"):
        metrics(["a"], [])
    with pytest.raises(ValueError, match="references"):
        metrics([], [])


# Captions in the manner of COCO's example, so that its own tokenizer and ours can be compared on more than reports.
CAPTIONS = [
    (
        "A man is riding a wave on a surfboard.",
        ["A surfer rides a large wave.", "Man on surf-board riding a wave, alone!"],
    ),
    ("Two dogs play with a ball; one jumps.", ["Two dogs are playing with a red ball.", "The dogs jump for a ball."]),
    (
        "A plate of food and a glass of wine.",
        ["A table with a plate of food and wine.", "Dinner: steak, salad and wine."],
    ),
]


@pytest.mark.skipif(shutil.which("java") is None, reason="COCO's PTB tokenizer needs Java")
def test_scores_equal_pycocoevalcap_with_its_own_tokenizer(metrics):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts, reworded = reports(3)
    hypotheses = [*texts, *(hypothesis for hypothesis, _ in CAPTIONS)]
    references = [*([r] for r in reworded), *(refs for _, refs in CAPTIONS)]
    tokenizer = PTBTokenizer()
    ours = tokenizer.tokenize({n: [{"caption": text}] for n, text in enumerate(hypotheses)})
    theirs = tokenizer.tokenize({n: [{"caption": t} for t in refs] for n, refs in enumerate(references)})
    assert [ours[n][0] for n in ours] == [caption_words(text) for text in hypotheses]
    scores = metrics(hypotheses, references)
    for name, value in zip(("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"), Bleu(4).compute_score(theirs, ours, verbose=0)[0]):
        assert scores[name] == pytest.approx(value, rel=1e-9)
    assert scores["ROUGE-L"] == pytest.approx(Rouge().compute_score(theirs, ours)[0], rel=1e-9)
    assert scores["CIDEr"] == pytest.approx(Cider().compute_score(theirs, ours)[0], rel=1e-9)
