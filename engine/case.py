"""What was found on one scan, as the montage and the page show it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medvl_sam2.engine.geometry import Volume

# Told apart by eye on grey, also with red-green blindness (after Okabe and Ito, lightened for a dark ground).
COLORS = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 200, 140),
    (240, 228, 66),
    (204, 121, 167),
    (255, 105, 60),
    (120, 130, 255),
    (160, 220, 90),
    (230, 230, 230),
    (200, 90, 230),
)


@dataclass(eq=False)
class ShownObject:
    """One request for a mask and what came of it.

    Attributes:
        name: Of the object.
        how: What it was asked by: "name", "description", "point", "box".
        request: The words of the request.
        answer: The model's words.
        mask: (Z, Y, X) bool; None when the model said that it is absent.
        volume_ml: Volume of the mask.
        dice: Overlap with the truth, None where there is none.
        absent_in_truth: The truth holds no such object; None where that is unknown.
    """

    name: str
    how: str
    request: str
    answer: str
    mask: np.ndarray | None
    volume_ml: float = 0.0
    dice: float | None = None
    absent_in_truth: bool | None = None

    @property
    def outcome(self) -> str:
        """Dice, or what happened instead, in a few words."""
        if self.absent_in_truth:
            return "rightly no mask" if self.mask is None else "a mask of something absent"
        if self.mask is None:
            return "called absent, Dice 0.00" if self.dice is not None else "called absent"
        return f"{self.volume_ml:.1f} mL" if self.dice is None else f"Dice {self.dice:.3f}"

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the mask."""
        return {
            "name": self.name,
            "by": self.how,
            "request": self.request,
            "answer": self.answer,
            "masked": self.mask is not None,
            "volume_ml": round(self.volume_ml, 2),
            "dice": None if self.dice is None else round(self.dice, 4),
            "absent_in_truth": self.absent_in_truth,
        }


@dataclass(frozen=True)
class Exchange:
    """A question, the model's answer, and the true one where it is known."""

    kind: str
    question: str
    answer: str
    truth: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return vars(self).copy()


@dataclass(eq=False)
class Case:
    """One scan with everything said and found about it.

    Attributes:
        title: What the scan is.
        volume: The scan.
        window: HU shown as black and white.
        report: The model's report.
        true_report: The truth's, where there is one.
        exchanges: Questions and answers.
        objects: Masks.
        seconds: Time per stage.
        crop: Part of the axial slices to show, (y0, x0, y1, x1), half open; all when None.
    """

    title: str
    volume: Volume
    window: tuple[float, float]
    report: str
    true_report: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    objects: list[ShownObject] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    crop: tuple[int, int, int, int] | None = None

    def color(self, index: int) -> tuple[int, int, int]:
        """Colour of an object."""
        return COLORS[index % len(COLORS)]

    @property
    def shown(self) -> tuple[slice, slice]:
        """Rows and columns of the axial slices to show."""
        y0, x0, y1, x1 = self.crop or (0, 0, *self.volume.shape[1:])
        return slice(y0, y1), slice(x0, x1)

    def gray(self, z: int) -> np.ndarray:
        """Shown part of an axial slice as uint8 in the case's window."""
        return to_gray(self.volume.hu(z)[self.shown], self.window)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without voxels."""
        return {
            "title": self.title,
            "shape": list(self.volume.shape),
            "spacing_mm": [round(s, 4) for s in self.volume.spacing],
            "warnings": list(self.volume.warnings),
            "report": self.report,
            "true_report": self.true_report,
            "questions": [exchange.to_dict() for exchange in self.exchanges],
            "objects": [shown.to_dict() for shown in self.objects],
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
        }


def to_gray(hu: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """HU to 0-255 within a window."""
    low, high = window
    return (np.clip((hu - low) / (high - low), 0, 1) * 255).astype(np.uint8)
