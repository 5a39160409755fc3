import re

import numpy as np
import pytest

from medvl_sam2.model.prompts import ABSENT_ANSWER, SEG, SEGMENT_ANSWER, SEGMENT_REQUEST
from medvl_sam2.training.corpus import synthetic_facts
from medvl_sam2.training.reports import facts_findings
from medvl_sam2.training.requests import (
    absent_structure_request,
    make_requests,
    several_answer,
    structure_request,
)
from medvl_sam2.training.templates import TEMPLATES, fill
from medvl_sam2.training.terms import FINDING_TERMS, STRUCTURE_TERMS

# Of every answer for something absent, and of no other answer.
FIRST_WORD = ABSENT_ANSWER.split()[0] + " "


def facts_and_requests(seed):
    rng = np.random.default_rng(seed)
    facts = synthetic_facts(rng)
    return facts, make_requests(facts, rng)


CASES = [facts_and_requests(seed) for seed in range(800)]
ALL = [request for _, requests in CASES for request in requests]


def test_same_seed_same_requests():
    assert facts_and_requests(5) == facts_and_requests(5)


def test_kinds_and_share_of_absent_ones():
    kinds = [request.kind for request in ALL]
    assert set(kinds) == {"name", "description", "finding", "several", "absent"}
    assert 0.2 < kinds.count("absent") / len(kinds) < 0.45
    assert {r.subject for r in ALL if r.kind == "name"} == set(STRUCTURE_TERMS)
    assert {r.subject for r in ALL if r.kind == "description"} == set(STRUCTURE_TERMS)
    masked = {kind for kind, term in FINDING_TERMS.items() if term.masked}
    assert {r.subject for r in ALL if r.kind == "finding"} == masked
    assert {r.subject for r in ALL if r.kind == "absent"} >= masked


def test_one_seg_for_each_target_and_none_for_absent():
    for request in ALL:
        assert request.answer.count(SEG) == len(request.targets)
        assert (len(request.targets) == 0) == (request.kind == "absent")
        assert (len(request.targets) > 1) == (request.kind == "several")
        assert request.answer.startswith(FIRST_WORD) == (request.kind == "absent")
        if len(request.targets) == 1:
            assert request.answer == SEGMENT_ANSWER


def test_present_targets_are_in_view_and_absent_ones_are_not_there():
    for facts, requests in CASES:
        truth = facts_findings(facts)
        for request in requests:
            for what, name, side in request.targets:
                if what == "structure":
                    assert facts["structures"][name]["fraction"] >= 0.3
                else:
                    assert (name, side) in truth
            if request.kind == "absent" and request.subject in STRUCTURE_TERMS:
                assert request.subject not in facts["structures"]
            elif request.kind == "absent":
                named = re.search(r"\b(left|right)\b", request.text)
                assert (request.subject, named and named[1]) not in truth
                assert named or request.subject not in {kind for kind, _ in truth}


def test_removed_organs_are_asked_for():
    for facts, requests in CASES:
        absent = {request.subject for request in requests if request.kind == "absent"}
        assert set(facts["removed"]) <= absent


def test_sides_in_text_answer_and_target_agree():
    for request in ALL:
        if request.kind in ("several", "absent"):
            continue
        ((_, name, side),) = request.targets
        said = set(re.findall(r"\b(left|right)\b", request.text))
        if name in STRUCTURE_TERMS and side:
            assert said == {side}, request
        elif name in FINDING_TERMS:
            assert said <= {side}, request


def test_finding_without_side_in_text_is_the_only_one_of_its_type():
    for facts, requests in CASES:
        for request in requests:
            if request.kind == "finding" and FINDING_TERMS[request.subject].sided:
                count = sum(kind == request.subject for kind, _ in facts_findings(facts))
                assert count == 1 or re.search(r"\b(left|right)\b", request.text)


def test_canonical_request_is_the_engines_own():
    request = structure_request("left kidney")
    assert request.text == SEGMENT_REQUEST.format(name="left kidney") == "Segment the left kidney."
    assert request.targets == (("structure", "left kidney", "left"),)
    assert structure_request("liver").targets == (("structure", "liver", None),)
    absent = absent_structure_request("left ribs")
    assert absent.answer == "There are no left ribs in this scan."
    assert absent_structure_request("liver").answer == "There is no liver in this scan."


def test_several_answer_names_each_target_before_its_token():
    assert several_answer(("liver", "left kidney")) == "Liver: [SEG]. Left kidney: [SEG]."
    for request in ALL:
        if request.kind == "several":
            names = re.findall(r"([^.:]+): \[SEG\]", request.answer)
            assert [name.strip().lower() for name in names] == [name.lower() for _, name, _ in request.targets]


def test_grammar_of_plural_structures():
    for request in ALL:
        assert not re.search(r"\bis the (?:\w+ )*(?:ribs|vertebrae)\b", request.text), request
        assert not re.search(r"\bare the (?:left |right )?(?:lung|kidney|liver|spine|femur)\b", request.text), request


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates_format_and_are_distinct(kind):
    texts = TEMPLATES[kind]
    assert len(texts) == len(set(texts)) >= 6
    for text in texts:
        assert text.endswith("{}") or text[-1] in ".?"
        assert text.count("{}") <= 1
        assert text.count(SEG) == (1 if kind.endswith("answer") and kind != "negative_answer" else 0)
        assert "{}" in text or kind in ("report", "interactive", "seg_answer")
    drawn = {fill(kind, np.random.default_rng(seed), "left kidney") for seed in range(400)}
    assert len(drawn) == len(texts)


def test_templates_are_many_enough_and_answers_begin_apart():
    assert len(TEMPLATES["report"]) >= 20 and len(TEMPLATES["semantic"]) >= 20
    assert all(text.startswith(FIRST_WORD) for text in TEMPLATES["negative_answer"])
    positive = [*TEMPLATES["seg_answer"], *TEMPLATES["referring_answer"]]
    assert not any(text.startswith(FIRST_WORD) for text in positive)


def test_fill_refuses_an_unknown_kind_and_a_missing_name():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="semantics"):
        fill("semantics", rng, "liver")
    with pytest.raises(ValueError, match="name"):
        fill("semantic", rng)
    assert all("{}" not in fill("interactive", np.random.default_rng(seed)) for seed in range(50))
