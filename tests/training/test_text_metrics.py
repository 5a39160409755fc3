"""Scores of texts: worked out by hand, and equal to the packages that papers use."""

import json
import math
import shutil

import numpy as np
import pytest

from medvl_sam2.training import text_metrics
from medvl_sam2.training.corpus import synthetic_facts
from medvl_sam2.training.reports import write_report
from medvl_sam2.training.text_metrics import (
    caption_scores,
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


def test_nothing_true_and_nothing_said_is_no_score():
    assert math.isnan(finding_scores([set()], [set()])["f1"].value)


def test_interval_of_an_accuracy_is_near_the_binomial_one():
    rng = np.random.default_rng(0)
    rights = rng.random(400) < 0.8
    got = ratio(rights, np.ones(400))
    half = 1.96 * math.sqrt(got.value * (1 - got.value) / 400)
    assert got.value == rights.mean() and got.count == 400
    assert got.low == pytest.approx(got.value - half, abs=0.008)
    assert got.high == pytest.approx(got.value + half, abs=0.008)


def test_answers_of_one_scan_are_resampled_together():
    rights = np.repeat([True, False] * 10, 20)
    groups = np.repeat(np.arange(20), 20).tolist()
    alone, grouped = ratio(rights, np.ones(400)), ratio(rights, np.ones(400), groups)
    assert alone.value == grouped.value == 0.5
    assert (grouped.high - grouped.low) > 3 * (alone.high - alone.low)


def test_ratio_is_reproducible_and_survives_one_case_and_no_case():
    assert ratio([1, 2, 3], [2, 2, 4]) == ratio([1, 2, 3], [2, 2, 4])
    one = ratio([1], [2])
    assert (one.value, one.low, one.high, one.count) == (0.5, 0.5, 0.5, 1)
    assert math.isnan(ratio([], []).value) and ratio([0], [0]).count == 0
    with pytest.raises(ValueError, match="groups"):
        ratio([1, 1], [1, 1], ["a"])


@pytest.fixture(scope="module")
def metrics():
    for package in ("pycocoevalcap", "rouge_score", "nltk"):
        pytest.importorskip(package)

    def values(hypotheses, references):
        return {name: score.value for name, score in caption_scores(hypotheses, references).items()}

    return values


@pytest.fixture
def without_java(monkeypatch):
    monkeypatch.setattr(text_metrics.shutil, "which", lambda _: None)


def test_equal_texts_score_one(metrics, without_java):
    texts, _ = reports(0)
    scores = metrics(texts, texts)
    for name in ("BLEU-1", "BLEU-4", "ROUGE-1", "ROUGE-L"):
        assert scores[name] == pytest.approx(1, abs=1e-6)
    # pycocoevalcap's CIDEr is ten times a cosine similarity.
    assert scores["CIDEr"] == pytest.approx(10, abs=1e-6)


def test_bleu_rouge_and_nltks_meteor_by_hand(metrics, without_java):
    scores = metrics(["The cat sat."], ["The cat sat on a mat."])
    brevity = math.exp(1 - 6 / 3)
    assert scores["BLEU-1"] == pytest.approx(brevity, rel=1e-6)
    assert scores["BLEU-2"] == pytest.approx(brevity, rel=1e-6)
    assert scores["ROUGE-1"] == pytest.approx(2 * 1 * 0.5 / 1.5)
    precision, recall, beta = 1.0, 0.5, 1.2
    assert scores["ROUGE-L"] == pytest.approx((1 + beta**2) * precision * recall / (recall + beta**2 * precision))
    (meteor,) = (value for name, value in scores.items() if name.startswith("METEOR (NLTK"))
    assert meteor == pytest.approx(precision * recall / (0.9 * precision + 0.1 * recall) * (1 - 0.5 * (1 / 3) ** 3))


def test_scores_fall_with_the_distance_of_the_texts(metrics, without_java):
    texts, reworded = reports(1)
    near, far = metrics(reworded, texts), metrics(texts[1:] + texts[:1], texts)
    for name in near:
        assert 0 < far[name] < near[name] < (10 if name == "CIDEr" else 1)


def test_several_references_take_the_best(metrics, without_java):
    texts, reworded = reports(2)
    both = metrics(texts, list(zip(reworded, texts)))
    assert both["ROUGE-1"] == pytest.approx(1) and both["BLEU-4"] == pytest.approx(1, abs=1e-6)


def test_intervals_resample_whole_scans(metrics, without_java):
    texts, reworded = reports(3)
    one = caption_scores(reworded, texts)
    # The same texts twice over tell nothing new, if each pair counts as one scan.
    twice = caption_scores(reworded * 2, texts * 2, [*range(len(texts))] * 2)
    for name, score in one.items():
        assert score.low < score.value < score.high
        if name != "CIDEr":
            assert twice[name].value == pytest.approx(score.value)
            assert (twice[name].low, twice[name].high) == pytest.approx((score.low, score.high))


def test_mismatched_cases_are_refused(metrics):
    with pytest.raises(ValueError, match="references"):
        metrics(["a"], [])
    with pytest.raises(ValueError, match="references"):
        metrics([], [])


# Captions in the manner of COCO's, whose own are no part of the package.
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


class _NoSpice:
    """SPICE is no score of ours, and downloads its models."""

    def method(self) -> str:
        return "none"

    def compute_score(self, *_: object) -> tuple[float, list[dict]]:
        return 0.0, []


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java")
def test_an_empty_answer_scores_nothing(metrics):
    empty, half = metrics([""], ["a small cyst"]), metrics(["", "a small cyst"], ["a small cyst"] * 2)
    assert empty["METEOR"] == empty["BLEU-1"] == empty["ROUGE-L"] == 0 and 0 < half["METEOR"] < 1


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR and COCO's PTB tokenizer need Java")
def test_scores_equal_pycocoevalcaps_own_example(metrics, tmp_path, monkeypatch):
    """As its example/coco_eval_example.py goes about it: files in COCO's form, COCO's tokenizer, COCOEvalCap."""
    from pycocoevalcap import eval as example
    from pycocotools.coco import COCO

    texts, reworded = reports(3, 4)
    hypotheses = [*texts, *(hypothesis for hypothesis, _ in CAPTIONS)]
    references = [*([report] for report in reworded), *(refs for _, refs in CAPTIONS)]
    said = [(n, text) for n, refs in enumerate(references) for text in refs]
    annotations = [{"id": i, "image_id": n, "caption": text} for i, (n, text) in enumerate(said)]
    images = [{"id": n} for n in range(len(references))]
    truth = {"info": {}, "licenses": [], "type": "captions", "images": images, "annotations": annotations}
    (tmp_path / "captions.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(
        json.dumps([{"image_id": n, "caption": t} for n, t in enumerate(hypotheses)])
    )
    coco = COCO(str(tmp_path / "captions.json"))
    monkeypatch.setattr(example, "Spice", _NoSpice)
    evaluation = example.COCOEvalCap(coco, coco.loadRes(str(tmp_path / "results.json")))
    evaluation.evaluate()
    ours = metrics(hypotheses, references)
    names = {"Bleu_1": "BLEU-1", "Bleu_2": "BLEU-2", "Bleu_3": "BLEU-3", "Bleu_4": "BLEU-4", "ROUGE_L": "ROUGE-L"}
    for theirs, name in {**names, "METEOR": "METEOR", "CIDEr": "CIDEr"}.items():
        assert ours[name] == pytest.approx(evaluation.eval[theirs], rel=1e-9), name
