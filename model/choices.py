"""Which choice of a multiple-choice question an answer means: the one matcher of the runtime and of the evaluation."""

import re
from collections.abc import Sequence

from medvl_sam2.model.prompts import LETTERS

_WORD = re.compile(r"\w+")
_TERM = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
_LEAD = re.compile(r"^\s*(?:the )?(?:correct |right )?(?:answer|option|choice)(?: is)?\s*:?\s*", re.IGNORECASE)
# The article "A" has no mark behind it.
_LETTER = re.compile(r"\(?([A-Za-z])(?:[.):]+|\s*$)\s*(.*)$", re.DOTALL)
_DENIAL = re.compile(r"\b(?:no|not|non|none|neither|nor|never|without|cannot)\b|n['\u2019]t\b")
_CLAUSE = re.compile(r"[.,;:!?]")
_FILLER = {"the", "a", "an", "it", "is", "on", "in", "of", "side", "phase", "at", "this", "sides"}
_SAME = {"thorax": "chest", "noncontrast": "non-contrast", "bilateral": "both", "unenhanced": "non-contrast"}


def normalised(text: str) -> str:
    """A short answer without case, punctuation and filler, in the words that the model is taught."""
    words = _TERM.findall(text.lower())
    return " ".join(_SAME.get(word, word) for word in words if word not in _FILLER)


def chosen(answer: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that an answer means; None where that is not sure.

    Args:
        answer: Counts by a letter at its beginning, alone or with a mark behind it ("B", "b)", "B. left", "The answer
            is B."), unless another text follows; or by the words of exactly one choice, which nothing denies.
        choices: In their order.
    """
    text = _LEAD.sub("", answer.strip())
    letter = _LETTER.match(text)
    if letter is None:
        return _by_words(text, choices)
    index, rest = LETTERS.index(letter[1].upper()), letter[2]
    if index >= len(choices):
        return None if normalised(rest) else _by_words(text, choices)
    return index if not normalised(rest) or _by_words(rest, choices) == index else None


def _by_words(text: str, choices: Sequence[str]) -> int | None:
    plain, said = [normalised(choice) for choice in choices], normalised(text)
    if said and plain.count(said) == 1:
        return plain.index(said)
    text = text.lower()
    wanted = [_words(choice) for choice in choices]
    # The longest first, so that "chest and abdomen" is not taken for "chest" as well.
    parts = [r"\W+".join(words.split()) for words in sorted(wanted, key=len, reverse=True) if words]
    pattern = re.compile(rf"\b(?:{'|'.join(parts)})\b" if parts else r"(?!)")
    found = {_words(match[0]) for match in pattern.finditer(text)}
    named = [index for index, words in enumerate(wanted) if words in found]
    # "No nodule, it is on the left" denies another thing.
    denied = any("\0" in clause and _DENIAL.search(clause) for clause in _CLAUSE.split(pattern.sub("\0", text)))
    return named[0] if len(named) == 1 and not denied else None


def _words(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))
