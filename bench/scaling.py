"""How the time of our requests grows: with slices, objects, resolution and questions in a batch.

Each axis is measured in turns and fitted twice: a line (slope per unit, and what is there from the start) and a power
(the exponent, 1 for what grows in proportion).
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from medvl_sam2.bench.e2e import NAMES, Setting, segmented
from medvl_sam2.bench.kernels import Row, environment
from medvl_sam2.bench.timing import fit_line, fit_power, in_turns
from medvl_sam2.engine.geometry import Volume
from medvl_sam2.engine.segmenter import Segmenter
from medvl_sam2.engine.text import requested
from medvl_sam2.model.processing import ScanArray
from medvl_sam2.model.sam2 import SAM2
from medvl_sam2.model.sam2.config import PATCH_STRIDE

AXES = ("slices", "objects", "resolution", "batch")
# Of each answer in a batch.
TOKENS = 8


def run(setting: Setting, *, most: int = 16, slices: int = 8, rounds: int = 5) -> tuple[list[Row], list[Row]]:
    """Measure all axes.

    Args:
        setting: Of `medvl_sam2.bench.e2e.build`.
        most: Largest number of objects and of questions.
        slices: Slices of the scan for objects and resolution; fewer than the model's, to save time.
        rounds: Times that each point runs; the median counts.

    Returns:
        Points with the keys work, axis, x, seconds, per_second; and one fit per axis with the keys work, axis, slope,
        intercept, r2, exponent, exponent_r2. Each is followed by what the time depends on.
    """
    points, fits = [], []
    place = setting.place
    about = environment(place.device)
    work = f"{setting.engine.config.name} @{setting.engine.config.sam2.image_size}"
    for axis, sides in axes(setting, most, slices).items():
        with setting.willing():
            for side in sides.values():
                side()
            spent = in_turns(list(sides.values()), rounds, place.device)
        seconds = [statistics.median(one) for one in spent]
        for x, median in zip(sides, seconds):
            rate = x / median if axis in ("objects", "batch") else None
            points.append({"work": work, "axis": axis, "x": x, "seconds": median, "per_second": rate, **about})
        fits.append({"work": work, "axis": axis, **fitted(list(sides), seconds), **about})
    return points, fits


def fitted(x: Sequence[float], seconds: Sequence[float]) -> Row:
    """Both fits of an axis as columns."""
    line, power = fit_line(x, seconds), fit_power(x, seconds)
    found = {"slope": line.slope, "intercept": line.intercept, "r2": line.r2}
    return {**found, "exponent": power.slope, "exponent_r2": power.r2}


def axes(setting: Setting, most: int, slices: int) -> dict[str, dict[int, Callable[[], object]]]:
    """What is timed at each place of each axis.

    Args:
        setting: See `run`.
        most: See `run`.
        slices: See `run`.
    """
    engine = setting.engine
    allowed = engine.config.volume.slices
    thin = _thin(setting, min(slices, allowed))
    known, scan = engine.open(thin), ScanArray(thin.voxels)
    counts = [2**n for n in range(most.bit_length()) if 2**n <= min(most, len(NAMES))]
    visual = setting.reference.visual_tokens(scan, engine.processor.transform(scan))
    prefix = engine.language.prefix(visual)
    asked = [engine.chat.question(requested(name)[1]) for name in NAMES]

    def answers(count: int) -> list[object]:
        return list(engine.language.generate_all(prefix, asked[:count], max_tokens=[TOKENS] * count))

    return {
        "slices": {
            n: lambda n=n: segmented(engine.open(_thin(setting, n)), NAMES[:1])
            for n in sorted({max(1, allowed // 4), max(1, allowed // 2), allowed})
        },
        "objects": {n: lambda n=n: segmented(known, NAMES[:n]) for n in counts},
        "resolution": _resolutions(setting, min(4, slices)),
        "batch": {n: lambda n=n: answers(n) for n in counts},
    }


def _thin(setting: Setting, slices: int) -> Volume:
    """The scan's first slices."""
    return Volume.from_array(setting.volume.voxels[:slices], spacing=(2.5, 0.8, 0.8))


def _resolutions(setting: Setting, slices: int) -> dict[int, Callable[[], object]]:
    """Image features and one object on random images, at about half, three quarters and all of the model's side."""
    config, sam2, place = setting.engine.config, setting.reference.model.sam2, setting.place
    embedding = torch.randn(1, 1, config.sam2.d_model, generator=torch.Generator().manual_seed(4))
    embedding = embedding.to(place.device, place.dtype)
    sides: dict[int, Callable[[], object]] = {}
    step = math.lcm(32, PATCH_STRIDE * config.sam2.window_spec[0])
    for size in sorted({max(step, step * round(config.sam2.image_size * n / 4 / step)) for n in (2, 3, 4)}):
        other = SAM2(replace(config.sam2, image_size=size)).eval().requires_grad_(False)
        # Moved for what is not in the state; the weights are on their place already, and shared.
        other.load_state_dict(sam2.state_dict(), assign=True)
        other.to(place.device)
        segmenter = Segmenter(other, config.seg)
        images = torch.randn(slices, 3, size, size, generator=torch.Generator().manual_seed(5)).to(place.device)

        def side(segmenter: Segmenter = segmenter, images: torch.Tensor = images) -> object:
            features = segmenter.encode(lambda start, stop: images[start:stop], slices)
            return segmenter.by_text(features, embedding)

        sides[size] = side
    return sides


def table(fits: Sequence[Row]) -> str:
    """Lay the fits out for reading."""
    lines = [f"{'axis':12} {'s per unit':>11} {'s at start':>11} {'R2':>6} {'exponent':>9} {'R2':>6}"]
    for row in fits:
        line = f"{row['axis']:12} {row['slope']:11.5f} {row['intercept']:11.4f} {row['r2']:6.3f}"
        lines.append(f"{line} {row['exponent']:9.2f} {row['exponent_r2']:6.3f}")
    return "\n".join(lines)
