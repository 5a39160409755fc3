"""What is asked about a real scan and answered, drawn from the templates (`training.templates`)."""

from collections.abc import Callable, Sequence
from string import ascii_uppercase

import numpy as np

from medvl_sam2.model.prompts import SEG, with_choices
from medvl_sam2.training.datasets.base import Record, Text
from medvl_sam2.training.datasets.store import RealSample
from medvl_sam2.training.requests import SegmentationRequest, several_answer
from medvl_sam2.training.templates import INTERACTIVE_TEMPLATES, fill
from medvl_sam2.training.terms import STRUCTURE_TERMS, join_words

Turn = tuple[str, str]
Words = Callable[[str], str]
# Share of multiple-choice questions asked without their choices, as M3D asks each question in both ways.
_OPEN = 0.3
# Share of requests by description, of several classes, for something absent, and of marked objects without a name.
_DESCRIBED, _SEVERAL, _ABSENT, _UNNAMED = 0.25, 0.2, 0.25, 0.3
# Ends of plural class names that are not ours.
_PLURALS = ("lungs", "kidneys", "bones", "ribs", "lips", "stones", "tumors", "tumours", "vessels")
# Names of other sets for structures we describe.
_SAME = {"bladder": "urinary bladder", "postcava": "inferior vena cava", "gall bladder": "gallbladder"}
REFERRED = "referred "
"""Begins the names of masks that a referring text points at; they are no classes."""


def text_turn(text: Text, rng: np.random.Generator, words: Words = str) -> Turn:
    """A report, or a question of the data set, with its answer.

    Args:
        text: Of any kind but "referring".
        rng: Draws the wording.
        words: Changes what the data set says (see `augment.swap_sides`), never the template.
    """
    if text.kind == "report":
        return fill("report", rng), words(text.answer)
    question = words(text.question or "")
    if text.kind == "multiple_choice" and text.choices and rng.random() >= _OPEN:
        choices = [words(choice) for choice in text.choices]
        letter = ascii_uppercase[text.choices.index(text.answer)]
        return fill("multiple_choice", rng, with_choices(question, choices)), f"{letter}. {words(text.answer)}"
    kind = "short" if text.kind == "multiple_choice" else text.kind
    return fill(kind, rng, question), words(text.answer)


def text_turns(record: Record, reports: float, questions: int, rng: np.random.Generator, words: Words) -> list[Turn]:
    """Turns about one scan: its report with the given chance, and some of its questions."""
    told = [text for text in record.texts if text.kind == "report"]
    asked = [text for text in record.texts if text.kind not in ("report", "referring")]
    turns = []
    if told and rng.random() < reports:
        turns.append(text_turn(told[int(rng.integers(len(told)))], rng, words))
    for index in rng.permutation(len(asked))[:questions]:
        turns.append(text_turn(asked[int(index)], rng, words))
    return turns


def requests(
    sample: RealSample, count: int, rng: np.random.Generator, words: Words, *, marked: bool = False
) -> list[SegmentationRequest]:
    """Requests for masks of one scan.

    Args:
        sample: The scan.
        count: How many; fewer where it has less to ask for.
        rng: Draws targets and wordings.
        words: See `text_turn`.
        marked: Whether each object comes with a point or box: nothing absent is then asked for, and some requests
            name no class.

    Returns:
        By name, by description, of several, of something absent, or as the data set refers to it. A target is
        ("class", name, None) under the name of its mask.
    """
    record = sample.record
    present = sorted(name for name in sample.names if not name.startswith(REFERRED))
    # A class with voxels that the stack's slices miss is there all the same.
    marked_names = {mask.name for mask in record.masks}
    absent = sorted({name for name in record.classes if name not in marked_names} | set(sample.empty))
    absent = [name for name in absent if not name.startswith(REFERRED)]
    referring = [text for text in record.texts if text.kind == "referring" and text.target.name in sample.names]
    made = []
    for _ in range(count):
        draw = rng.random()
        if referring and (draw < 0.5 or not present):
            text = referring[int(rng.integers(len(referring)))]
            made.append(_request("referring", words(text.question), words(text.answer), (text.target.name,)))
        elif absent and not marked and (rng.random() < _ABSENT or not present):
            made.append(_absent(absent[int(rng.integers(len(absent)))], sample, rng, words))
        elif present:
            made.append(_present(present, sample, rng, words, marked=marked))
    return made


def _present(
    present: Sequence[str], sample: RealSample, rng: np.random.Generator, words: Words, *, marked: bool
) -> SegmentationRequest:
    name = present[int(rng.integers(len(present)))]
    if marked:
        if rng.random() < _UNNAMED:
            return _request("interactive", fill("interactive", rng), fill("seg_answer", rng), (name,))
        said, named = words(name), [text for text in INTERACTIVE_TEMPLATES if "{}" in text]
        text = named[int(rng.integers(len(named)))].format(said)
        return _request("interactive", _plural(text, said), fill("seg_answer", rng), (name,))
    if len(present) > 1 and rng.random() < _SEVERAL:
        chosen = [present[int(i)] for i in rng.permutation(len(present))[: 2 if rng.random() < 0.7 else 3]]
        said = [words(one) for one in chosen]
        text = fill("semantic", rng, join_words([said[0], *("the " + one for one in said[1:])]))
        return _request("several", text.replace(" is the ", " are the "), several_answer(said), tuple(chosen))
    descriptions = descriptions_of(name, sample.terms)
    if descriptions and rng.random() < _DESCRIBED:
        described = words(descriptions[int(rng.integers(len(descriptions)))])
        return _request(
            "description", fill("referring", rng, described), fill("referring_answer", rng, words(name)), (name,)
        )
    said = words(name)
    return _request("name", _plural(fill("semantic", rng, said), said), fill("seg_answer", rng), (name,))


def _absent(name: str, sample: RealSample, rng: np.random.Generator, words: Words) -> SegmentationRequest:
    said = words(name)
    descriptions = descriptions_of(name, sample.terms)
    if descriptions and rng.random() < _DESCRIBED:
        text = fill("referring", rng, words(descriptions[int(rng.integers(len(descriptions)))]))
    else:
        text = _plural(fill("semantic", rng, said), said)
    answer = fill("negative_answer", rng, said)
    if _is_plural(said):
        answer = answer.replace("There is no sign of a", "There is no sign of").replace(
            "There is no " + said, "There are no " + said
        )
    return SegmentationRequest("absent", text, answer, (), name)


def _request(kind: str, text: str, answer: str, names: tuple[str, ...]) -> SegmentationRequest:
    assert answer.count(SEG) == len(names)
    return SegmentationRequest(kind, text, answer, tuple(("class", name, None) for name in names), "+".join(names))


def descriptions_of(name: str, terms: dict[str, list[str]]) -> list[str]:
    """Descriptions of a class, without full stop: M3D's where its dictionary lies beside the data, and ours."""
    side, _, rest = name.partition(" ")
    keys = {name, f"{rest} {side}"} if side in ("left", "right") else {name}
    theirs = [text for key in sorted(keys) for text in terms.get(key, ())]
    ours = STRUCTURE_TERMS.get(_SAME.get(name, name))
    mine = ours.descriptions if ours is not None else ()
    return [text.strip().rstrip(".") for text in (*theirs, *mine)]


def _is_plural(name: str) -> bool:
    term = STRUCTURE_TERMS.get(name)
    return term.plural if term is not None else name.split(" ")[-1] in _PLURALS


def _plural(text: str, name: str) -> str:
    """The request's verb after a plural name."""
    if not name or not _is_plural(name):
        return text
    return (
        text.replace("Where is ", "Where are ")
        .replace(f"The {name} is ", f"The {name} are ")
        .replace("its mask", "their mask")
    )
