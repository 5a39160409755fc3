"""What a session gives out: answers, and the pieces of one that is under way."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from medvl_sam2.engine.segmentation import Segmentation


@dataclass(frozen=True)
class Answer:
    """Text that the model wrote.

    Attributes:
        text: Without special tokens.
        choice: Index of the chosen answer of a multiple-choice question, else None.
        tokens: Tokens generated.
        timings: Seconds per stage of this request, all its questions together.
    """

    text: str
    choice: int | None = None
    tokens: int = 0
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatEvent:
    """A piece of an answer as it comes: some text, or a mask.

    Attributes:
        text: What became certain since the last event.
        segmentation: A mask, after the text that led to it.
        finish: "stop", "length" or "cancelled" on the last event (which may carry text too), else None.
        tokens: Tokens generated so far.
        timings: Seconds per stage of this request so far; it grows as the request goes on.
    """

    text: str = ""
    segmentation: Segmentation | None = None
    finish: str | None = None
    tokens: int = 0
    timings: Mapping[str, float] = field(default_factory=dict)
