"""Segmentation requests about phantoms: by name, by description, of a finding, of several at once, of something absent.

Whether something is there is decided at the first token of the answer: "It" (or a name, for several) against "There".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medvl_sam2.model.prompts import ABSENT_ANSWER, SEG, SEGMENT_ANSWER, SEGMENT_REQUEST
from medvl_sam2.training.questions import absent_findings, draw_weighted, hidden_structures, shown_structures
from medvl_sam2.training.reports import facts_findings
from medvl_sam2.training.terms import FINDING_TERMS, PAIRS, STRUCTURE_TERMS, join_words, side_of

REQUEST_TEXTS = (
    SEGMENT_REQUEST.replace("{name}", "{}"),
    "Please segment the {}.",
    "Show the {}.",
    "Outline the {}.",
    "Where is the {}?",
)
"""The phantoms' few wordings; the first is the engine's own for a bare name."""

Target = tuple[str, str, str | None]


@dataclass(frozen=True)
class SegmentationRequest:
    """One request for masks.

    Attributes:
        kind: "name", "description", "finding", "several" or "absent".
        text: What the user writes.
        answer: The true answer, with one [SEG] for each target, in order; none when absent.
        targets: ``("structure", name, side)`` or ``("finding", type, side)``; a structure's side repeats the one in its
            name. What is absent has no target.
        subject: What is asked for, for results by class: a structure or a finding type, "+"-joined when several.
    """

    kind: str
    text: str
    answer: str
    targets: tuple[Target, ...]
    subject: str


def several_answer(names: Sequence[str]) -> str:
    """Return the answer for several targets: "Liver: [SEG]. Spleen: [SEG]."."""
    return " ".join(f"{name[0].upper()}{name[1:]}: {SEG}." for name in names)


def absent_answer(name: str) -> str:
    """Return the answer for something that is not there; `name` without article."""
    plural = name in STRUCTURE_TERMS and STRUCTURE_TERMS[name].plural
    return (ABSENT_ANSWER.replace(" is ", " are ") if plural else ABSENT_ANSWER).format(name=name)


def make_requests(facts: Mapping[str, Any], rng: np.random.Generator) -> list[SegmentationRequest]:
    """Make the segmentation requests of one phantom, in random order.

    Args:
        facts: `Phantom.facts`. Structures barely in view are asked for neither as present nor as absent.
        rng: Chooses targets and wordings.

    Returns:
        About a dozen requests; roughly one in three asks for something absent.
    """
    requests = [*_named(facts, rng), *_findings(facts, rng), *_several(facts, rng), *_absent(facts, rng)]
    return [requests[index] for index in rng.permutation(len(requests))]


def structure_request(
    name: str, rng: np.random.Generator | None = None, described: bool = False
) -> SegmentationRequest:
    """Ask for one structure that is there.

    Args:
        name: A key of `STRUCTURE_TERMS`.
        rng: Draws the wording and a synonym or description; None gives the canonical one.
        described: By description rather than by name.
    """
    term = STRUCTURE_TERMS[name]
    words = term.descriptions if described else term.names
    said = words[0] if rng is None else _word(words, rng, canonical=0.0 if described else 0.5)
    kind = "description" if described else "name"
    return SegmentationRequest(kind, _request_text(said, rng), SEGMENT_ANSWER, (structure_target(name),), name)


def structure_target(name: str) -> Target:
    """Return the target of a structure."""
    return "structure", name, side_of(name)


def _request_text(words: str, rng: np.random.Generator | None) -> str:
    text = REQUEST_TEXTS[0] if rng is None or rng.random() < 0.4 else _word(REQUEST_TEXTS, rng, canonical=0.0)
    plural = re.search(r"\b(?:ribs|vertebrae)\b|^(?:curved )?bones\b", words)
    return (text.replace(" is ", " are ") if plural else text).format(words)


def _word(words: Sequence[str], rng: np.random.Generator, canonical: float = 0.5) -> str:
    return words[0] if rng.random() < canonical else words[int(rng.integers(len(words)))]


def _sample(items: Sequence[Any], count: int, rng: np.random.Generator) -> list[Any]:
    return [items[int(index)] for index in rng.permutation(len(items))[:count]]


def _named(facts: Mapping[str, Any], rng: np.random.Generator) -> Iterator[SegmentationRequest]:
    for name in _sample(shown_structures(facts), 4, rng):
        yield structure_request(name, rng)
    for name in _sample(shown_structures(facts), 2, rng):
        yield structure_request(name, rng, described=True)


def finding_words(kind: str, side: str | None, rng: np.random.Generator, described: bool = False) -> str:
    """Return what a request calls a finding, after "the": "right pleural effusion", "nodule on the left"."""
    term = FINDING_TERMS[kind]
    described = described and bool(term.descriptions) and (side is not None or "{side}" not in term.descriptions[0])
    if described:
        return _word(term.descriptions, rng).format(side=side)
    noun = _word(term.names or (term.noun,), rng)
    if side is None:
        return noun
    return f"{side} {noun}" if rng.random() < 0.7 else f"{noun} on the {side}"


def _findings(facts: Mapping[str, Any], rng: np.random.Generator) -> Iterator[SegmentationRequest]:
    truth = sorted(facts_findings(facts), key=str)
    for kind, side in truth:
        if kind not in FINDING_TERMS or not FINDING_TERMS[kind].masked:
            continue
        alone = sum(other == kind for other, _ in truth) == 1
        said = side if not alone or rng.random() < 0.6 else None
        words = finding_words(kind, said, rng, described=rng.random() < 0.25)
        yield SegmentationRequest(
            "finding", _request_text(words, rng), SEGMENT_ANSWER, (("finding", kind, side),), kind
        )


def _several(facts: Mapping[str, Any], rng: np.random.Generator) -> Iterator[SegmentationRequest]:
    shown = shown_structures(facts)
    names = _sample(shown, 2 if rng.random() < 0.75 else 3, rng)
    if len(names) > 1:
        yield _several_of(names, join_words(["the " + name for name in names]), rng)
    pairs = [plural for plural, both in PAIRS.items() if set(both) <= set(shown)]
    if pairs and rng.random() < 0.5:
        plural = pairs[int(rng.integers(len(pairs)))]
        words = f"both {plural}" if rng.random() < 0.5 else f"the {plural}"
        yield _several_of(PAIRS[plural], words, rng)


def _several_of(names: Sequence[str], words: str, rng: np.random.Generator) -> SegmentationRequest:
    text = REQUEST_TEXTS[int(rng.integers(4))].replace("the {}", words)
    targets = tuple(structure_target(name) for name in names)
    return SegmentationRequest("several", text, several_answer(names), targets, "+".join(names))


def _absent(facts: Mapping[str, Any], rng: np.random.Generator) -> Iterator[SegmentationRequest]:
    hidden = hidden_structures(facts)
    removed = [name for name in hidden if name in facts["removed"]]
    for name in [*removed, *_sample([name for name in hidden if name not in removed], 2, rng)]:
        yield absent_structure_request(name, rng)
    absent = {key: weight for key, weight in absent_findings(facts).items() if FINDING_TERMS[key[0]].masked}
    present = sum(kind in FINDING_TERMS and FINDING_TERMS[kind].masked for kind, _ in facts_findings(facts))
    for kind, side in draw_weighted(rng, absent, max(1, present)):
        words = finding_words(kind, side, rng, described=side is not None and rng.random() < 0.25)
        noun = " ".join(word for word in (side, FINDING_TERMS[kind].noun) if word)
        yield SegmentationRequest("absent", _request_text(words, rng), absent_answer(noun), (), kind)


def absent_structure_request(name: str, rng: np.random.Generator | None = None) -> SegmentationRequest:
    """Ask for a structure that is not there, by name or, at times, by description."""
    term = STRUCTURE_TERMS[name]
    if rng is None:
        words = term.names[0]
    else:
        words = _word(term.descriptions, rng) if rng.random() < 0.2 else _word(term.names, rng)
    return SegmentationRequest("absent", _request_text(words, rng), absent_answer(name), (), name)
