"""Scores of texts: findings in reports, shares of right answers, and the caption metrics of the literature.

Intervals are percentile bootstraps over scans, not over questions: answers about one scan rise and fall together.
"""

from __future__ import annotations

import functools
import logging
import re
import shutil
from collections.abc import Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np

from medvl_sam2.training.reports import Finding

logger = logging.getLogger(__name__)

_NO_WORD = "qqqq"


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
    count = int((pairs[:, 1] > 0).sum())
    whole, drawn = _resample(pairs, groups, resamples, seed)
    if not count:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    drawn = drawn[drawn[:, 1] > 0]
    return _estimate(whole[0] / whole[1], drawn[:, 0] / drawn[:, 1], count)


def _resample(
    cases: np.ndarray, groups: Sequence[Hashable] | None, resamples: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Sums (K,) of (N, K) cases, and (resamples, K) sums over as many groups, drawn with replacement."""
    sums = cases
    if groups is not None:
        if len(groups) != len(cases):
            raise ValueError(f"groups: expected one for each of {len(cases)} cases, got {len(groups)}")
        index = {group: n for n, group in enumerate(dict.fromkeys(groups))}
        sums = np.zeros((len(index), cases.shape[1]))
        np.add.at(sums, [index[group] for group in groups], cases)
    rng = np.random.default_rng(seed)
    drawn = [sums[rng.integers(len(sums), size=len(sums))].sum(axis=0) for _ in range(resamples if len(sums) else 0)]
    return sums.sum(axis=0), np.array(drawn).reshape(-1, cases.shape[1])


def _estimate(value: float, drawn: np.ndarray, count: int) -> Estimate:
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high), count)


def finding_scores(found: Sequence[AbstractSet[Finding]], truth: Sequence[AbstractSet[Finding]]) -> dict[str, Estimate]:
    """Score the findings of reports; a finding on the wrong side is both missed and made up.

    Args:
        found: For each scan what its report tells (`reports.report_findings`).
        truth: For each scan `reports.facts_findings`.

    Returns:
        Micro "precision", "recall" and "f1", and the F1 of each type ("f1/renal_cyst").

    Raises:
        ValueError: If the numbers of scans differ.
    """
    if len(found) != len(truth):
        raise ValueError(f"found: expected one for each of {len(truth)} scans, got {len(found)}")
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


def caption_scores(
    hypotheses: Sequence[str],
    references: Sequence[str | Sequence[str]],
    groups: Sequence[Hashable] | None = None,
) -> Mapping[str, Estimate]:
    """Score texts by overlap with references: the metrics papers on report generation give.

    BLEU, METEOR, ROUGE-L and CIDEr are pycocoevalcap's, ROUGE-1 (F) is rouge-score's. METEOR runs in Java; without it
    NLTK's implementation takes its place, under its own name, as the two give other numbers.

    Args:
        hypotheses: One text for each case.
        references: For each case its reference, or several.
        groups: The scan of each case.

    Returns:
        "BLEU-1" to "BLEU-4", "ROUGE-1", "ROUGE-L", "METEOR" (or "METEOR (NLTK)", or "METEOR (NLTK, no synonyms)" where
        its WordNet corpus is missing), "CIDEr" (0 for a single case, since every n-gram then occurs in all of them).

    Raises:
        ImportError: If the packages of the `eval` extra are missing.
        ValueError: If the numbers of cases differ or there is none.
    """
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(f"references: expected one for each of {len(hypotheses)} hypotheses, got {len(references)}")
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(f"{error.name}: needed for caption metrics; pip install 'medvl-sam2[eval]'") from error
    listed = [[reference] if isinstance(reference, str) else list(reference) for reference in references]
    ours = {n: [caption_words(text)] for n, text in enumerate(hypotheses)}
    theirs = {n: [caption_words(text) for text in texts] for n, texts in enumerate(listed)}
    counter = BleuScorer(n=4)
    for n in ours:
        counter += (ours[n][0], theirs[n])
    counts, drawn = _resample(np.array([_bleu_counts(case) for case in counter.ctest], float), groups)
    scores = {
        f"BLEU-{n}": _estimate(value, values, len(ours))
        for n, value, values in zip(range(1, 5), _bleu(counts), _bleu(drawn).T)
    }

    def mean(values: Sequence[float]) -> Estimate:
        return ratio(values, np.ones(len(values)), groups)

    rouge = RougeScorer(["rouge1"])
    scores["ROUGE-1"] = mean([rouge.score_multi(theirs[n], ours[n][0])["rouge1"].fmeasure for n in ours])
    scores["ROUGE-L"] = mean(Rouge().compute_score(theirs, ours)[1])
    name, score, each = _meteor(theirs, ours)
    # METEOR of a corpus is no mean: the interval is that of the texts' own scores, about the corpus's.
    found = mean(each)
    shift = score - found.value
    scores[name] = Estimate(score, found.low + shift, found.high + shift, found.count)
    scores["CIDEr"] = mean(Cider().compute_score(theirs, ours)[1])
    return scores


def _bleu_counts(case: Mapping[str, Any]) -> list[float]:
    """Of a case of pycocoevalcap's: its length, that of the nearest reference, n-grams, and those of a reference."""
    length = case["testlen"]
    nearest = min((abs(other - length), other) for other in case["reflen"])[1]
    return [length, nearest, *case["guess"], *case["correct"]]


def _bleu(counts: np.ndarray) -> np.ndarray:
    """(..., 10) summed counts -> (..., 4) BLEU-1 to 4, with pycocoevalcap's guards against zero."""
    length, nearest, guess, correct = counts[..., :1], counts[..., 1:2], counts[..., 2:6], counts[..., 6:]
    precision = np.cumprod((correct + 1e-15) / (guess + 1e-9), axis=-1) ** (1 / np.arange(1, 5))
    return precision * np.exp(np.minimum(0.0, 1 - (nearest + 1e-9) / (length + 1e-15)))


@functools.cache
def _java_meteor() -> Any:
    """pycocoevalcap's METEOR, begun once: its table of paraphrases takes long to read."""
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()


def _meteor(theirs: dict[int, list[str]], ours: dict[int, list[str]]) -> tuple[str, float, list[float]]:
    """Name of the implementation, score of all texts, and of each."""
    if shutil.which("java"):
        try:
            # Its protocol has no empty field: an empty answer becomes a word that matches nothing.
            told = {n: [text or _NO_WORD] for n, (text,) in ours.items()}
            return ("METEOR", *_java_meteor().compute_score(theirs, told))
        except (OSError, ValueError) as error:
            _java_meteor.cache_clear()
            logger.warning("METEOR: Java failed (%s), so NLTK's takes its place", error)
    try:
        from nltk.corpus import wordnet
        from nltk.translate.meteor_score import meteor_score
    except ImportError as error:
        raise ImportError(f"{error.name}: needed for caption metrics; pip install 'medvl-sam2[eval]'") from error
    try:
        wordnet.ensure_loaded()
        name, synonyms = "METEOR (NLTK)", wordnet
    except LookupError:
        name, synonyms = "METEOR (NLTK, no synonyms)", _NoSynonyms()
    split = [([text.split() for text in theirs[n]], ours[n][0].split()) for n in ours]
    each = [meteor_score(refs, words, wordnet=synonyms) for refs, words in split]
    return name, float(np.mean(each)), each
