"""Questions about phantoms with their true answers, and the scorer of short and multiple-choice ones.

Yes and no are equally often right within each phantom, and the false ones are chosen near the truth (the other side of
the same finding, a finding that looks alike), so a constant answer or a guess from the wording earns nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

import numpy as np

from medvl_sam2.model.choices import chosen, normalised
from medvl_sam2.model.prompts import with_choices
from medvl_sam2.training.reports import facts_findings, finding_phrase, removed_organs, with_article, write_report
from medvl_sam2.training.terms import (
    CLEAR_VIEW,
    ENLARGED,
    FINDING_TERMS,
    FULL_VIEW,
    OFTEN_HIDDEN,
    PHASES,
    PLACES,
    REGION_WORDS,
    SIDES,
    STRUCTURE_TERMS,
    fraction_in_view,
    place_word,
    sections_of,
    side_of,
    size_word,
    without_side,
)

LOOK_ALIKES: tuple[frozenset[str], ...] = (
    frozenset({"pleural_effusion", "consolidation", "pneumothorax"}),
    frozenset({"consolidation", "lung_nodule"}),
    frozenset({"renal_cyst", "kidney_stone"}),
    frozenset({"renal_cyst", "liver_lesion"}),
    frozenset({"ascites", "pleural_effusion"}),
)
REMOVABLE = ("gallbladder", "spleen", "left kidney", "right kidney")
NONE_OF_THESE = "none of these"


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        kind: "short", "long" or "multiple_choice".
        topic: What it asks after: finding, shown, removed, enlarged, side, phase, region, location, size, describe.
        text: The question without choices.
        answer: The true answer as the model should write it; "B. left" for multiple choice.
        choices: The choices in their order, for multiple choice.
    """

    kind: str
    topic: str
    text: str
    answer: str
    choices: tuple[str, ...] | None = None

    @property
    def prompt(self) -> str:
        """The text as the model reads it, choices included."""
        return with_choices(self.text, self.choices) if self.choices else self.text


def make_questions(facts: Mapping[str, Any], rng: np.random.Generator) -> list[Question]:
    """Make the questions of one phantom, in random order.

    Args:
        facts: `Phantom.facts`.
        rng: Chooses which questions are asked and how the choices are shuffled.

    Returns:
        About twenty questions of all three kinds.
    """
    questions = [*_yes_no(facts, rng), *_short(facts, rng), *_multiple_choice(facts, rng), *_long(facts, rng)]
    return [questions[index] for index in rng.permutation(len(questions))]


def answer_is_right(question: Question, text: str) -> bool:
    """Score a short or multiple-choice answer.

    A short one must equal the truth after normalising, not only contain it; a yes or no must be the first word, without
    its opposite later. A choice is read as the engine reads it (`chosen`): a letter with another text is wrong.

    Args:
        question: A short or multiple-choice question.
        text: The answer to score.

    Raises:
        ValueError: For a long question, which has no single right answer.
    """
    if question.kind == "long":
        raise ValueError("question: expected kind short or multiple_choice, got long; use the text metrics instead")
    if question.kind == "multiple_choice":
        assert question.choices is not None
        picked = chosen(text, question.choices)
        return picked is not None and ascii_uppercase[picked] == question.answer[0]
    truth, given = normalised(question.answer), normalised(text)
    if truth in ("yes", "no"):
        words = re.findall(r"[a-z]+", text.lower())
        return bool(words) and words[0] == truth and ("yes" if truth == "no" else "no") not in words[1:]
    return given == truth


def _pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _verb(name: str) -> str:
    return "Are" if STRUCTURE_TERMS[name].plural else "Is"


def finding_noun(key: tuple[str, str | None]) -> str:
    """Return a finding as words, side first: "left pleural effusion", "ascites"."""
    return " ".join(word for word in (key[1], FINDING_TERMS[key[0]].noun) if word)


def absent_findings(facts: Mapping[str, Any]) -> dict[tuple[str, str | None], float]:
    """Return the findings a phantom could show and does not, weighted by their likeness to the truth.

    A sided type that is wholly absent appears with side None and with each side, which share one weight; of a type seen
    on one side, the other side is absent. Enlargements need the organ wholly in view; nothing is asked of an organ that
    was removed or lies outside the field of view.
    """
    truth = facts_findings(facts)
    types = {kind for kind, _ in truth}
    absent: dict[tuple[str, str | None], float] = {}
    for kind, term in FINDING_TERMS.items():
        if term.section not in sections_of(facts) or (kind, None) in truth:
            continue
        near = any(kind in group and types & (group - {kind}) for group in LOOK_ALIKES)
        least = FULL_VIEW if kind in ENLARGED else CLEAR_VIEW
        sides = SIDES if term.sided else (None,)
        seen = [side for side in sides if fraction_in_view(facts, term.organs[0].format(side=side)) >= least]
        keys = [(kind, side) for side in seen if (kind, side) not in truth]
        if term.sided and kind not in types and len(seen) == 2:
            keys += [(kind, None)] * 2
        for key in keys:
            absent[key] = absent.get(key, 0.0) + (2.0 if kind in types or near else 1.0) / len(keys)
    return absent


def draw_weighted(rng: np.random.Generator, weights: Mapping[Any, float], count: int) -> list[Any]:
    """Draw up to `count` different keys with chances in proportion to their weights."""
    keys = list(weights)
    chances = np.array([weights[key] for key in keys], dtype=float)
    picked = rng.choice(len(keys), size=min(count, len(keys)), replace=False, p=chances / chances.sum()) if keys else []
    return [keys[int(index)] for index in picked]


def shown_structures(facts: Mapping[str, Any]) -> list[str]:
    """Return the structures well in view."""
    return [name for name in STRUCTURE_TERMS if fraction_in_view(facts, name) >= CLEAR_VIEW]


def hidden_structures(facts: Mapping[str, Any]) -> list[str]:
    """Return the structures without a single voxel in view: outside it, or removed."""
    return [name for name in STRUCTURE_TERMS if name not in facts["structures"]]


def _doubtful(shown: Sequence[str]) -> dict[str, float]:
    """Weights that prefer structures other scans do not show: of the rest, the name alone gives the answer."""
    return {name: 1.0 if name in OFTEN_HIDDEN else 0.1 for name in shown}


def _yes_no(facts: Mapping[str, Any], rng: np.random.Generator) -> list[Question]:
    pools = {"yes": _claims(facts, rng, true=True), "no": _claims(facts, rng, true=False)}
    for topic in ("finding", "enlarged", "removed"):
        for pool in pools.values():
            rng.shuffle(pool[topic])
        count = min(3, len(pools["yes"][topic]))
        pools["yes"][topic] = pools["yes"][topic][:count]
        spare = 1 if topic == "finding" else int(rng.random() < 0.05)
        pools["no"][topic] = pools["no"][topic][: max(count, spare)]
    texts = {
        key: [(topic, t) for topic in pool if topic != "shown" for t in pool[topic]] for key, pool in pools.items()
    }
    spare = {key: pool["shown"] for key, pool in pools.items()}
    wanted = 1 + max(len(texts["yes"]), len(texts["no"]))
    wanted = min(wanted, *(len(texts[key]) + len(spare[key]) for key in texts))
    questions = []
    for key, pairs in texts.items():
        pairs = pairs[:wanted] + [("shown", text) for text in spare[key][: max(0, wanted - len(pairs))]]
        questions += [Question("short", topic, text, f"{_capital(key)}.") for topic, text in pairs]
    return questions


def _claims(facts: Mapping[str, Any], rng: np.random.Generator, true: bool) -> dict[str, list[str]]:
    """Texts of yes/no questions by topic, whose answer is yes (``true``) or no."""
    removed = removed_organs(facts)
    if true:
        keys = sorted((key for key in facts_findings(facts) if key[0] in FINDING_TERMS), key=str)
        keys = [(kind, side if rng.random() < 0.5 else None) for kind, side in keys]
        organs = removed
        structures = draw_weighted(rng, _doubtful(shown_structures(facts)), 8)
    else:
        keys = draw_weighted(rng, absent_findings(facts), 8)
        organs = [name for name in REMOVABLE if fraction_in_view(facts, name) >= CLEAR_VIEW]
        structures = draw_weighted(rng, dict.fromkeys(hidden_structures(facts), 1.0), 8)
    keys = list(dict.fromkeys(keys))
    return {
        "finding": [f"Is there {with_article(finding_noun(key))}?" for key in keys if key[0] not in ENLARGED],
        "enlarged": [f"Is the {ENLARGED[kind]} enlarged?" for kind, _ in keys if kind in ENLARGED],
        "removed": [f"Has the {organ} been removed?" for organ in organs],
        "shown": [f"{_verb(name)} the {name} shown?" for name in structures],
    }


def _sided_findings(facts: Mapping[str, Any]) -> dict[str, str]:
    """Types of sided findings with the word for where they are."""
    sides: dict[str, set[str]] = {}
    for kind, side in sorted(facts_findings(facts), key=str):
        if kind in FINDING_TERMS and side:
            sides.setdefault(kind, set()).add(side)
    return {kind: "both sides" if len(found) == 2 else found.copy().pop() for kind, found in sides.items()}


def _single_places(facts: Mapping[str, Any]) -> dict[str, str]:
    """Types with exactly one finding whose place is known, with that place in words."""
    places = {}
    for kind in {finding["type"] for finding in facts["findings"]} - {"absent_organ"}:
        found = [finding for finding in facts["findings"] if finding["type"] == kind]
        if len(found) == 1 and kind in PLACES and place_word(found[0]) in PLACES[kind]:
            side = found[0]["side"] if FINDING_TERMS[kind].sided else None
            places[kind] = " ".join(word for word in (side, place_word(found[0])) if word)
    return dict(sorted(places.items()))


def _short(facts: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Question]:
    yield Question("short", "phase", _pick(rng, _PHASE_TEXTS), f"{_capital(facts['phase'])}.")
    yield Question("short", "region", _pick(rng, _REGION_TEXTS), f"{_capital(REGION_WORDS[facts['region']])}.")
    for kind, side in _sided_findings(facts).items():
        yield Question("short", "side", f"On which side is the {FINDING_TERMS[kind].noun}?", f"{_capital(side)}.")
    for kind, place in _single_places(facts).items():
        yield Question("short", "location", _place_text(kind), f"{_capital(place)}.")
    for finding in facts["findings"]:
        alone = sum(other["type"] == finding["type"] for other in facts["findings"]) == 1
        if alone and finding["type"] in FINDING_TERMS and (size := _clear_size(finding)):
            text = f"Is the {FINDING_TERMS[finding['type']].noun} small or large?"
            yield Question("short", "size", text, f"{_capital(size)}.")
    enlarged = [organ for kind, organ in ENLARGED.items() if (kind, None) in facts_findings(facts)]
    if len(enlarged) == 1:
        yield Question("short", "enlarged", "Which organ is enlarged?", f"{_capital(enlarged[0])}.")
    removed = removed_organs(facts)
    if len(removed) == 1:
        yield Question("short", "removed", "Which organ has been removed?", f"{_capital(removed[0])}.")
        if side := side_of(removed[0]):
            yield Question("short", "side", f"Which {without_side(removed[0])} is missing?", f"{_capital(side)}.")


def _place_text(kind: str) -> str:
    noun, places = FINDING_TERMS[kind].noun, PLACES[kind]
    return f"Is the {noun} {places[0]} or {places[1]}?" if kind == "aortic_aneurysm" else f"Where is the {noun}?"


def _clear_size(finding: Mapping[str, Any]) -> str:
    """The size word, or "" where the finding is so near the border that the images cannot decide."""
    term = FINDING_TERMS[finding["type"]]
    for limit, key in ((term.large_mm, "size_mm"), (term.large_ml, "volume_ml")):
        if limit is not None and finding.get(key) is not None:
            margin = 0.1 if key == "size_mm" else 0.15
            return size_word(finding) if abs(finding[key] / limit - 1) >= margin else ""
    return ""


_PHASE_TEXTS = ("Which contrast phase is this?", "In which phase was this scan taken?")
_REGION_TEXTS = ("Which part of the body is shown?", "Which region does this scan cover?")


def _choice(
    topic: str, text: str, right: str, wrong: Sequence[str], rng: np.random.Generator, count: int = 3
) -> Question:
    wrong = [wrong[int(index)] for index in rng.permutation(len(wrong))[:count]]
    choices = [right, *wrong]
    choices = [choices[int(index)] for index in rng.permutation(len(choices))]
    answer = f"{ascii_uppercase[choices.index(right)]}. {right}"
    return Question("multiple_choice", topic, text, answer, tuple(choices))


def _multiple_choice(facts: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Question]:
    yield _choice(
        "phase", "Which contrast phase is this?", facts["phase"], [p for p in PHASES if p != facts["phase"]], rng
    )
    words = list(REGION_WORDS.values())
    region = REGION_WORDS[facts["region"]]
    yield _choice("region", "Which region is shown?", region, [word for word in words if word != region], rng)
    yield from _choose_finding(facts, rng)
    for kind, side in _sided_findings(facts).items():
        sides = ("left", "right", "both sides")
        text = f"On which side is the {FINDING_TERMS[kind].noun}?"
        yield _choice("side", text, side, [word for word in sides if word != side], rng)
    for kind, place in _single_places(facts).items():
        if FINDING_TERMS[kind].sided:
            places = [f"{side} {word}" for side in SIDES for word in PLACES[kind]]
            yield _choice("location", _place_text(kind), place, [word for word in places if word != place], rng)
    shown, hidden = shown_structures(facts), hidden_structures(facts)
    if len(shown) >= 3 and hidden:
        few = draw_weighted(rng, _doubtful(shown), 3)
        yield _choice("shown", "Which structure is not shown?", _pick(rng, hidden), few, rng)
    if len(hidden) >= 3 and shown:
        yield _choice("shown", "Which structure is shown?", draw_weighted(rng, _doubtful(shown), 1)[0], hidden, rng)
    removed = removed_organs(facts)
    others = [organ for organ in REMOVABLE if fraction_in_view(facts, organ) >= CLEAR_VIEW]
    if len(removed) == 1 and len(others) >= 2:
        yield _choice("removed", "Which organ has been removed?", removed[0], others, rng)
    enlarged = [organ for kind, organ in ENLARGED.items() if (kind, None) in facts_findings(facts)]
    normal = [ENLARGED[kind] for kind, _ in absent_findings(facts) if kind in ENLARGED]
    if len(enlarged) <= 1 and len(normal) >= 2 and (enlarged or rng.random() < 0.3):
        wrong = [*normal, NONE_OF_THESE] if enlarged else normal
        yield _choice("enlarged", "Which organ is enlarged?", (enlarged or [NONE_OF_THESE])[0], wrong, rng)


def _choose_finding(facts: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Question]:
    truth = sorted((key for key in facts_findings(facts) if key[0] in FINDING_TERMS), key=str)
    absent = {
        key: weight for key, weight in absent_findings(facts).items() if key[1] or not FINDING_TERMS[key[0]].sided
    }
    wrong = [finding_noun(key) for key in draw_weighted(rng, absent, 3)]
    if len(wrong) < 2:
        return
    if truth:
        others = [*wrong[:2], NONE_OF_THESE] if rng.random() < 0.3 else wrong
        yield _choice("finding", "Which finding is present?", finding_noun(_pick(rng, truth)), others, rng)
    if not truth or rng.random() < 0.2:
        yield _choice("finding", "Which finding is present?", NONE_OF_THESE, wrong, rng)


def _long(facts: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Question]:
    impression = write_report(facts, np.random.default_rng(0)).rsplit("Impression: ", 1)[1]
    text = _pick(rng, ("Summarize this scan.", "What is the impression?"))
    yield Question("long", "describe", text, impression)
    for text, names, types, normal in _DESCRIBED:
        if all(fraction_in_view(facts, name) < CLEAR_VIEW and name not in removed_organs(facts) for name in names):
            continue
        found: dict[str, list[Mapping[str, Any]]] = {}
        for finding in facts["findings"]:
            if finding["type"] in types:
                found.setdefault(finding["type"], []).append(finding)
        parts = [f"The {name} has been removed." for name in removed_organs(facts) if name in names]
        for kind in (kind for kind in types if kind in found):
            big = f"The {ENLARGED[kind]} is enlarged." if kind in ENLARGED else ""
            parts.append(big or _capital(finding_phrase(found[kind])) + ".")
        yield Question("long", "describe", text, " ".join(parts) or normal)


_DESCRIBED: tuple[tuple[str, tuple[str, ...], tuple[str, ...], str], ...] = (
    (
        "Describe the lungs.",
        ("left lung", "right lung"),
        ("consolidation", "lung_nodule", "pleural_effusion", "pneumothorax"),
        "The lungs are clear. No pleural effusion.",
    ),
    ("Describe the heart.", ("heart",), ("cardiomegaly",), "The heart is normal in size."),
    ("Describe the aorta.", ("aorta",), ("aortic_aneurysm",), "The aorta is normal."),
    ("Describe the liver.", ("liver",), ("hepatomegaly", "liver_lesion"), "The liver is normal. No liver lesion."),
    (
        "Describe the kidneys.",
        ("left kidney", "right kidney"),
        ("renal_cyst", "kidney_stone"),
        "The kidneys are normal. No renal cyst or kidney stone.",
    ),
    ("Describe the spleen.", ("spleen",), ("splenomegaly",), "The spleen is normal in size."),
)
