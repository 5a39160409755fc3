"""Which choice an answer means: never the opposite of what it says."""

import pytest

from medvl_sam2.model.choices import chosen
from medvl_sam2.model.prompts import with_choices

SIDES = ("right", "left")
YES_NO = ("no", "yes")
PARTS = ("chest", "chest and abdomen", "abdomen")


@pytest.mark.parametrize(
    ("answer", "choices", "index"),
    [
        # Letters: at the beginning with a mark, or alone.
        ("B. left", SIDES, 1),
        ("A", SIDES, 0),
        ("b", SIDES, 1),
        (" (B) ", SIDES, 1),
        ("A: right", SIDES, 0),
        ("The answer is B.", SIDES, 1),
        ("B) It is on the left, I think.", SIDES, 1),
        ("B. right", SIDES, None),
        ("A. right B. left", SIDES, None),
        ("C. left", SIDES, None),
        ("Z. what", SIDES, None),
        # "A" and "I" are words as well.
        ("A large effusion on the left.", SIDES, 1),
        ("A bright spot, B or C", SIDES, None),
        ("I see it on the right", SIDES, 0),
        # Words: whole ones, of one choice alone.
        ("left", SIDES, 1),
        ("It is left-sided.", SIDES, 1),
        ("right or left", SIDES, None),
        ("upright", SIDES, None),
        ("nodule in the lung", YES_NO, None),
        ("Yes, a nodule in the lung.", YES_NO, 1),
        ("No, there is none", YES_NO, 0),
        ("It is abnormal.", ("normal", "abnormal"), 1),
        ("about 12 cm", ("2 cm", "1 cm"), None),
        ("chest and abdomen", PARTS, 1),
        ("The chest and abdomen are shown.", PARTS, 1),
        ("the chest or the abdomen", PARTS, None),
        ("A. chest and abdomen", PARTS, None),
        ("There is no nodule.", ("nodule", "no nodule"), 1),
        # Denied.
        ("Not the left", SIDES, None),
        ("It isn't on the left.", SIDES, None),
        ("a non-contrast scan", ("contrast", "plain"), None),
        ("", SIDES, None),
        # Letters that are choices themselves.
        ("C", ("C", "N"), 0),
        ("R.", ("L", "R"), 1),
        ("\u212a", ("one", "two"), None),
        ("Left, without a shift of the midline.", SIDES, 1),
        ("No nodule: it is on the right", SIDES, 0),
        ("left", ("left", "Left."), None),
    ],
)
def test_choice_of_an_answer(answer, choices, index):
    assert chosen(answer, choices) == index


def test_a_letter_for_each_choice():
    choices = [f"part {number}" for number in range(26)]
    assert with_choices("Which?", choices).endswith("Y. part 24 Z. part 25")
    assert chosen("Z. part 25", choices) == 25
    with pytest.raises(ValueError, match="choices: expected at most 26, .* got 27"):
        with_choices("Which?", [*choices, "one more"])
