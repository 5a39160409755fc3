"""Scores of texts: findings in reports, shares of right answers, and the caption metrics of the literature.

Intervals are percentile bootstraps over scans, not over questions: answers about one scan rise and fall together.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from medvl_sam2.training.questions import Question, answer_is_right
from medvl_sam2.training.reports import Finding, report_findings


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % bootstrap interval and the number of cases behind it; NaN where there is no case."""

    value: float
    low: float
    high: float
    count: int


def ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Estimate a ratio of sums, as an accuracy, a mean or a micro F1 is one.

    Args:
        numerators: One number per case.
        denominators: One number per case; cases with 0 count for nothing.
        groups: The scan of each case; whole scans are resampled. By default each case is a scan of its own.
        resamples: Bootstrap resamples.
        seed: Of the resampling, so that a score has one interval.

    Raises:
        ValueError: If the lengths differ.
    """
    pairs = np.stack([np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)], axis=-1)
    if groups is not None:
        if len(groups) != len(pairs):
            raise ValueError(f"groups: expected one for each of {len(pairs)} cases, got {len(groups)}")
        index = {group: n for n, group in enumerate(dict.fromkeys(groups))}
        sums = np.zeros((len(index), 2))
        np.add.at(sums, [index[group] for group in groups], pairs)
    else:
        sums = pairs
    count = int((pairs[:, 1] > 0).sum())
    if not count:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    rng = np.random.default_rng(seed)
    drawn = np.array([sums[rng.integers(len(sums), size=len(sums))].sum(axis=0) for _ in range(resamples)])
    drawn = drawn[drawn[:, 1] > 0]
    top, bottom = sums.sum(axis=0)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
    return Estimate(float(top / bottom), float(low), float(high), count)


def accuracy(rights: Sequence[bool], groups: Sequence[Hashable] | None = None) -> Estimate:
    """Return the share of right answers."""
    return ratio(np.asarray(rights, dtype=float), np.ones(len(rights)), groups)


def answer_scores(
    questions: Sequence[Question], answers: Sequence[str], groups: Sequence[Hashable] | None = None
) -> dict[str, Estimate]:
    """Score short and multiple-choice answers.

    Args:
        questions: Long ones are passed over.
        answers: One text for each question.
        groups: The scan of each question.

    Returns:
        By kind ("short"), and by kind and topic ("short/side").

    Raises:
        ValueError: If there are more or fewer answers than questions.
    """
    if len(questions) != len(answers):
        raise ValueError(f"answers: expected one for each of {len(questions)} questions, got {len(answers)}")
    rights: dict[str, list[tuple[bool, Hashable]]] = {}
    for n, (question, answer) in enumerate(zip(questions, answers)):
        if question.kind != "long":
            case = answer_is_right(question, answer), groups[n] if groups is not None else n
            for key in (question.kind, f"{question.kind}/{question.topic}"):
                rights.setdefault(key, []).append(case)
    return {key: accuracy([r for r, _ in cases], [g for _, g in cases]) for key, cases in sorted(rights.items())}


def finding_scores(
    predicted: Sequence[AbstractSet[Finding] | str], truth: Sequence[AbstractSet[Finding]]
) -> dict[str, Estimate]:
    """Score the findings of reports; a finding on the wrong side is both missed and made up.

    Args:
        predicted: For each scan the findings, or the report to read them from.
        truth: For each scan `facts_findings`.

    Returns:
        Micro "precision", "recall" and "f1", and the F1 of each type ("f1/renal_cyst").

    Raises:
        ValueError: If the numbers of scans differ.
    """
    if len(predicted) != len(truth):
        raise ValueError(f"predicted: expected one for each of {len(truth)} scans, got {len(predicted)}")
    found = [report_findings(each) if isinstance(each, str) else each for each in predicted]
    both = np.array([len(f & t) for f, t in zip(found, truth)])
    said, real = np.array([len(f) for f in found]), np.array([len(t) for t in truth])
    scores = {"precision": ratio(both, said), "recall": ratio(both, real), "f1": ratio(2 * both, said + real)}
    for kind in sorted({kind for each in (*found, *truth) for kind, _ in each}):
        of_kind = [({x for x in f if x[0] == kind}, {x for x in t if x[0] == kind}) for f, t in zip(found, truth)]
        scores[f"f1/{kind}"] = ratio([2 * len(f & t) for f, t in of_kind], [len(f) + len(t) for f, t in of_kind])
    return scores


class _NoSynonyms:
    """Stands in for WordNet where its corpus is not installed."""

    @staticmethod
    def synsets(word: str) -> list:
        return []


def caption_words(text: str) -> str:
    """Lower the case and drop punctuation, as COCO's PTB tokenizer does for plain prose, but without Java."""
    return " ".join(re.findall(r"[^\W_]+(?:[-./'][^\W_]+)*|%", text.lower()))


def caption_scores(hypotheses: Sequence[str], references: Sequence[str | Sequence[str]]) -> Mapping[str, float]:
    """Score texts by overlap with references: the metrics papers on report generation give.

    BLEU, ROUGE-L and CIDEr are pycocoevalcap's, ROUGE-1 (F) is rouge-score's, METEOR is NLTK's. METEOR matches synonyms
    only where NLTK's WordNet corpus is installed; without it the score bears another name.

    Args:
        hypotheses: One text for each case.
        references: For each case its reference, or several.

    Returns:
        "BLEU-1" to "BLEU-4", "ROUGE-1", "ROUGE-L", "METEOR" or "METEOR without synonyms", "CIDEr" (0 for a single case,
        since every n-gram then occurs in all of them).

    Raises:
        ImportError: If the packages of the `eval` extra are missing.
        ValueError: If the numbers of cases differ or there is none.
    """
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(f"references: expected one for each of {len(hypotheses)} hypotheses, got {len(references)}")
    try:
        from nltk.corpus import wordnet
        from nltk.translate.meteor_score import meteor_score
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(f"{error.name}: needed for caption metrics; pip install 'medvl-sam2[eval]'") from error
    listed = [[reference] if isinstance(reference, str) else list(reference) for reference in references]
    ours = {n: [caption_words(text)] for n, text in enumerate(hypotheses)}
    theirs = {n: [caption_words(text) for text in texts] for n, texts in enumerate(listed)}
    scores = dict(zip(("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"), Bleu(4).compute_score(theirs, ours, verbose=0)[0]))
    rouge = RougeScorer(["rouge1"])
    scores["ROUGE-1"] = np.mean([rouge.score_multi(theirs[n], ours[n][0])["rouge1"].fmeasure for n in ours])
    scores["ROUGE-L"] = Rouge().compute_score(theirs, ours)[0]
    try:
        wordnet.ensure_loaded()
        name, synonyms = "METEOR", wordnet
    except LookupError:
        name, synonyms = "METEOR without synonyms", _NoSynonyms()
    split = [([text.split() for text in theirs[n]], ours[n][0].split()) for n in ours]
    scores[name] = np.mean([meteor_score(refs, words, wordnet=synonyms) for refs, words in split])
    scores["CIDEr"] = Cider().compute_score(theirs, ours)[0]
    return {key: float(value) for key, value in scores.items()}
