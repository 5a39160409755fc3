"""Random views of a scan (M3D's augmentation) that never make a left or right in its texts untrue.

A scan in the model's order has the patient's left at high x. A mirror image in x is again such a scan, of a mirrored
patient: every left becomes a right, in labels and words. Turned scans and those mirrored along another axis are not
in that order, so they are made only where nothing is said of sides.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

_OTHER = {"left": "right", "right": "left"}
_SIDE = re.compile(r"(?<![A-Za-z])(left|right)(?=wards?(?![a-z])|sided(?![a-z])|(?![A-Za-z]))", re.I)
# Words that name a side without saying left or right, or use these words for something else.
_UNCLEAR = re.compile(
    r"\b(?:R[UML]L|L[UL]L|LAD|LCX|RCA|LM?CA|LAO|RAO|[LR]VH?|[LR]A|[LR]IMA|[LR][UL]Q|[LR]|[LR][tT]\.?)(?![\w'])"
    r"|(?i:\b(?:dextr\w*|levo\w*|laevo\w*|sinist\w*|situs|(?:counter-?)?clockwise|o'clock)"
    r"|\bright(?:-| )(?:angled?s?|now|away|after|before|answers?|choices?|options?|handed)\b"
    r"|\b(?:all|not) right\b|\bleft (?:in|behind|un\w+|as|out|over|to|alone|with|without)\b"
    r"|\b(?:nothing|is|are|was|were) left(?=[.,;!?]|$)|\bwhich (?:of \w+ )?(?:is|are) right\b)"
)


@dataclass(frozen=True)
class View:
    """A turned or mirrored view.

    Attributes:
        turns: Quarter turns in the axial plane.
        flips: Whether z, y and x run the other way, after the turns.
    """

    turns: int = 0
    flips: tuple[bool, bool, bool] = (False, False, False)

    @property
    def swaps_sides(self) -> bool:
        """Whether left is right in this view of a scan that talks of sides."""
        return self.flips[2]

    def apply(self, array: np.ndarray) -> np.ndarray:
        """(..., D, H, W) seen so; H and W must be equal for odd turns."""
        if self.turns % 2 and array.shape[-1] != array.shape[-2]:
            raise ValueError(f"turns: expected square slices for quarter turns, got {array.shape[-2:]}")
        array = np.rot90(array, self.turns, (-2, -1)) if self.turns else array
        axes = tuple(axis for axis, flip in zip((-3, -2, -1), self.flips) if flip)
        return np.flip(array, axes) if axes else array


@dataclass(frozen=True)
class Chances:
    """How often a view is changed; the defaults are M3D's (LaMed/src/dataset/multi_dataset.py).

    Attributes:
        turn: Chance of one to three quarter turns.
        flip: Chance of each flip.
        intensity: Chance of a change of scale, and again of a shift.
        strength: Largest relative scale, and largest shift as a share of the window.
    """

    turn: float = 0.5
    flip: float = 0.1
    intensity: float = 0.5
    strength: float = 0.1


NONE = Chances(0.0, 0.0, 0.0, 0.0)


def speaks_of_sides(texts: Iterable[str]) -> bool:
    """Whether any text names left or right, or might."""
    return any(_SIDE.search(text) or _UNCLEAR.search(text) for text in texts)


def can_swap_sides(texts: Iterable[str]) -> bool:
    """Whether left and right can be exchanged in every text by exchanging the words."""
    return not any(_UNCLEAR.search(text) for text in texts)


def swap_sides(text: str) -> str:
    """The text about a mirrored patient: every left a right, in the same letter case.

    Raises:
        ValueError: The text may name a side in other words ("RUL", "levoscoliosis", "right angle").
    """
    unclear = _UNCLEAR.search(text)
    if unclear:
        raise ValueError(
            f"text: expected left and right in plain words only, got {unclear[0]!r}; don't mirror its scan"
        )

    def other(found: re.Match[str]) -> str:
        word = _OTHER[found[0].lower()]
        return word.upper() if found[0].isupper() else word.capitalize() if found[0][0].isupper() else word

    return _SIDE.sub(other, text)


def draw_view(texts: Iterable[str], rng: np.random.Generator, chances: Chances) -> View:
    """Draw a view that keeps texts true, once sides are exchanged in them where it `swaps_sides`.

    Args:
        texts: All that may be said of the scan, names of its classes included.
        rng: Draws the same numbers whatever the texts.
        chances: How often.
    """
    turn, *flips = rng.random(4)
    turns = int(rng.integers(1, 4)) if turn < chances.turn else 0
    flips = tuple(bool(draw < chances.flip) for draw in flips)
    texts = list(texts)
    if not speaks_of_sides(texts):
        return View(turns, flips)
    return View(0, (False, False, flips[2] and can_swap_sides(texts)))


@dataclass(frozen=True)
class Intensity:
    """A change of values, relative to a window: factor on the distance from its lower end, offset as a share of it."""

    factor: float = 1.0
    offset: float = 0.0

    def apply(self, hu: Tensor, window: tuple[float, float]) -> Tensor:
        """HU changed; in 0-1 of the window this is MONAI's RandScaleIntensity, then RandShiftIntensity."""
        low, high = window
        return (hu - low) * self.factor + (low + self.offset * (high - low))


def draw_intensity(rng: np.random.Generator, chances: Chances) -> Intensity:
    """Draw a change of scale and one of offset, each with its own chance."""
    scale, shift = rng.random(2) < chances.intensity
    factor, offset = rng.uniform(-chances.strength, chances.strength, 2)
    return Intensity(1.0 + factor * scale, float(offset * shift))
