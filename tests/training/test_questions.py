import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from medvl_sam2.training.corpus import synthetic_facts
from medvl_sam2.training.questions import Question, answer_is_right, make_questions
from medvl_sam2.training.reports import facts_findings, report_findings
from medvl_sam2.training.terms import ENLARGED, FINDING_TERMS, STRUCTURE_TERMS


def facts_and_questions(seed):
    rng = np.random.default_rng(seed)
    facts = synthetic_facts(rng)
    return facts, make_questions(facts, rng)


CASES = [facts_and_questions(seed) for seed in range(600)]
ALL = [question for _, questions in CASES for question in questions]


def test_same_seed_same_questions():
    assert facts_and_questions(3) == facts_and_questions(3)


def test_all_kinds_and_topics_occur():
    assert {q.kind for q in ALL} == {"short", "long", "multiple_choice"}
    for kind in ("short", "multiple_choice"):
        topics = {q.topic for q in ALL if q.kind == kind}
        assert topics >= {"finding", "shown", "removed", "enlarged", "side", "phase", "region", "location"}
    assert all(10 <= len(questions) <= 50 for _, questions in CASES)


def test_yes_and_no_balance_within_each_phantom():
    for _, questions in CASES:
        answers = Counter(q.answer for q in questions if q.answer in ("Yes.", "No."))
        assert answers["Yes."] == answers["No."] > 0


def test_no_wording_gives_its_answer_away():
    counts = defaultdict(Counter)
    for question in ALL:
        if question.topic == "finding" and question.answer in ("Yes.", "No."):
            counts[question.text][question.answer] += 1
    frequent = {text: count for text, count in counts.items() if count.total() >= 40}
    assert len(frequent) > 10
    for text, count in frequent.items():
        assert 0.2 < count["Yes."] / count.total() < 0.85, (text, count)


def independent_answer(facts, text):
    """Yes/no from the facts alone, by another way than the generator's."""
    text = text.lower().rstrip("?")
    if match := re.fullmatch(r"is there (?:an? )?(?:(left|right) )?(.+)", text):
        kind = match[2].replace(" ", "_")
        return any(f["type"] == kind and match[1] in (None, f["side"]) for f in facts["findings"])
    if match := re.fullmatch(r"is the (heart|liver|spleen) enlarged", text):
        names = {"heart": "cardiomegaly", "liver": "hepatomegaly", "spleen": "splenomegaly"}
        return any(f["type"] == names[match[1]] for f in facts["findings"])
    if match := re.fullmatch(r"has the (.+) been removed", text):
        return match[1] in facts["removed"]
    match = re.fullmatch(r"(?:is|are) the (.+) shown", text)
    return match[1] in facts["structures"]


def test_yes_no_answers_agree_with_the_facts():
    for facts, questions in CASES:
        for question in questions:
            if question.answer in ("Yes.", "No."):
                assert independent_answer(facts, question.text) == (question.answer == "Yes."), question


def test_opposite_side_is_asked_as_a_near_miss():
    near = 0
    for facts, questions in CASES:
        for kind, side in facts_findings(facts):
            if side and kind in FINDING_TERMS:
                other = {"left": "right", "right": "left"}[side]
                near += any(q.answer == "No." and f"{other} {FINDING_TERMS[kind].noun}" in q.text for q in questions)
    assert near > 100


def test_sides_and_places_agree_with_the_facts():
    for facts, questions in CASES:
        for q in questions:
            if q.kind != "short" or q.topic not in ("side", "location"):
                continue
            said = q.answer.lower().rstrip(".")
            if q.text.endswith("missing?"):
                assert f"{said} kidney" in facts["removed"]
                continue
            kind = next(kind for kind, term in FINDING_TERMS.items() if f"the {term.noun} " in q.text.replace("?", " "))
            found = [f for f in facts["findings"] if f["type"] == kind]
            sides = {f["side"] for f in found if f["side"]}
            if q.topic == "side":
                assert said == ("both sides" if len(sides) == 2 else sides.pop())
            else:
                (only,) = found
                assert said == " ".join(filter(None, (only["side"], only["location"])))


def test_multiple_choice_has_one_right_choice_in_every_place():
    places = Counter()
    for question in ALL:
        if question.kind != "multiple_choice":
            continue
        assert 3 <= len(question.choices) == len(set(question.choices)) <= 4, question
        letter, text = question.answer.split(". ", 1)
        assert question.choices["ABCD".index(letter)] == text
        assert f"{letter}. {text}" in question.prompt
        places[letter] += 1
        right = [c for c in question.choices if answer_is_right(question, c)]
        assert right == [text]
    assert min(places.values()) / places.total() > 0.15


def test_every_choice_of_finding_but_the_right_one_is_false():
    for facts, questions in CASES:
        truth = {
            " ".join(filter(None, (s, FINDING_TERMS[k].noun))) for k, s in facts_findings(facts) if k in FINDING_TERMS
        }
        for question in questions:
            if question.kind == "multiple_choice" and question.topic == "finding":
                right = question.answer[3:]
                true_choices = truth & set(question.choices)
                assert true_choices == ({right} if right != "none of these" else set())


def test_long_answers_say_only_what_is_true():
    for facts, questions in CASES:
        truth = facts_findings(facts)
        for question in questions:
            if question.kind == "long":
                assert report_findings(question.answer) <= truth, question
            if question.text == "Summarize this scan.":
                assert report_findings(question.answer) == truth


def test_nothing_is_asked_of_an_organ_out_of_view():
    for facts, questions in CASES:
        for question in questions:
            match = re.match(r"Is the (heart|liver|spleen) enlarged", question.text)
            if match and question.answer == "No.":
                assert facts["structures"][match[1]]["fraction"] >= 0.9
    assert set(ENLARGED.values()) <= set(STRUCTURE_TERMS)


@pytest.mark.parametrize("question", [q for q in ALL if q.kind != "long"][:200], ids=lambda q: q.topic)
def test_the_true_answer_is_right_and_empty_or_echo_wrong(question):
    assert answer_is_right(question, question.answer)
    assert answer_is_right(question, f"  {question.answer.upper()} ")
    assert not answer_is_right(question, "")
    assert not answer_is_right(question, question.prompt)


SHORT = Question("short", "finding", "Is there a left pleural effusion?", "Yes.")
NO = Question("short", "finding", "Is there ascites?", "No.")
SIDE = Question("short", "side", "On which side is the renal cyst?", "Left.")
REGION = Question("short", "region", "Which part of the body is shown?", "Chest and abdomen.")
CHOICE = Question("multiple_choice", "side", "On which side?", "B. left", ("right", "left", "both sides"))
FINDING = Question(
    "multiple_choice", "finding", "Which finding is present?", "A. left pleural effusion",
    ("left pleural effusion", "right pleural effusion", "ascites", "none of these"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("question", "text", "right"),
    [
        (SHORT, "yes", True), (SHORT, "Yes, there is a left pleural effusion.", True), (SHORT, "No.", False),
        (SHORT, "Yes or no.", False), (SHORT, "Yes. No.", False), (SHORT, "It is yes", False),
        (SHORT, "Yesterday", False), (NO, "No ascites.", True), (NO, "Not sure", False), (NO, "None", False),
        (NO, "Normal", False),
        (SIDE, "left side", True), (SIDE, "On the left.", True), (SIDE, "Left and right.", False),
        (SIDE, "right", False), (SIDE, "not left", False), (SIDE, "left kidney and right kidney", False),
        (REGION, "The chest and abdomen", True), (REGION, "thorax and abdomen", True), (REGION, "chest", False),
        (REGION, "Chest, abdomen and pelvis.", False),
        (CHOICE, "B", True), (CHOICE, "b)", True), (CHOICE, "(B) left", True), (CHOICE, "left", True),
        (CHOICE, "The answer is B.", True), (CHOICE, "Answer: B. left", True), (CHOICE, "B. right", False),
        (CHOICE, "A", False), (CHOICE, "A. right B. left C. both sides", False), (CHOICE, "left or right", False),
        (CHOICE, "A, B and C", False), (CHOICE, "Both", False), (CHOICE, "D. left", False), (CHOICE, "B or C", False),
        (FINDING, "a left pleural effusion", True), (FINDING, "A pleural effusion", False), (FINDING, "A", True),
        (FINDING, "right pleural effusion", False), (FINDING, "A. left pleural effusion, ascites", False),
        (FINDING, "A bright spot, B or C", False), (FINDING, "pleural effusion", False),
    ],
)  # fmt: skip
def test_answer_scoring_is_strict(question, text, right):
    assert answer_is_right(question, text) is right


def test_long_answers_are_not_scored_as_right_or_wrong():
    with pytest.raises(ValueError, match="long"):
        answer_is_right(Question("long", "describe", "Describe the liver.", "Normal."), "Normal.")
