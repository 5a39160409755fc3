"""Rows of the benchmarks that set one part of the model beside what one would run otherwise: checks, times, tables."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medvl_sam2.bench.kernels import ENVIRONMENT, Row, environment
from medvl_sam2.bench.place import CPU, Place
from medvl_sam2.bench.timing import gemm_rate, in_turns, timed

logger = logging.getLogger(__name__)

MOST_ERROR, LEAST_DICE = 1e-3, 0.999
# Where the baseline rounds as well: what its own distance from float32 may be, and what Dice may lack beyond twice that
# of the baseline. Random weights decide narrowly which of three masks counts and whether a slice shows an object, so
# that bfloat16 turns whole slices round, on either side.
MOST_OWN_ERROR, LEAST_OWN_DICE, DICE_SLACK = 0.25, 0.8, 0.05
COLUMNS = (
    *("work", "objects", "provider", "dtype", "seconds", "fastest", "slowest", "rounds", "ratio"),
    *("correct", "error", "dice", "floor_seconds", "over_floor", "rate", "per_second", "peak_mb"),
    *ENVIRONMENT,
    "over_new",
)
Distance = Callable[[Any, Any], tuple[float, float | None]]
"""Error and, of masks, Dice of a result against what is wanted."""


@dataclass(frozen=True)
class Check:
    """What a comparison with the baseline found.

    Attributes:
        correct: Whether the two may be called the same.
        error: Relative root mean square difference, or the share of tokens that are wrong.
        dice: Of the masks, where there are some.
    """

    correct: bool
    error: float = 0.0
    dice: float | None = None


def relative_error(got: Tensor, want: Tensor) -> float:
    """Root mean square difference over the root mean square of what is wanted."""
    got, want = (x.detach().double().cpu() for x in (got, want))
    return float((got - want).norm() / want.norm())


def typical_error(got: Tensor, want: Tensor) -> float:
    """Median over masks (..., H, W) of the relative error of each, which single slices turned round do not move."""
    got, want = (x.detach().double().cpu().flatten(-2).flatten(0, -2) for x in (got, want))
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).quantile(0.5))


def checked(found: Mapping[str, Any], distance: Distance, exact: Any = None) -> dict[str, Check]:
    """Compare all sides with the same result.

    Args:
        found: Side to what it gave; the first one is the baseline.
        distance: Of a result from the exact one.
        exact: What float32 gives with the same weights, where the sides round; None takes the baseline's result.

    Returns:
        A check of each side. Against the baseline's result an error may be `MOST_ERROR` and a Dice `LEAST_DICE`.
        Against an exact one a side may be twice as far off as the baseline, and `MOST_ERROR` (`DICE_SLACK`) on top; the
        baseline itself must be within `MOST_OWN_ERROR` and `LEAST_OWN_DICE`. Not a number is wrong.
    """
    base, *_ = found
    distances = {side: distance(got, found[base] if exact is None else exact) for side, got in found.items()}
    own_error, own_dice = distances[base]
    checks = {}
    for side, (error, dice) in distances.items():
        most, least = MOST_ERROR, LEAST_DICE
        if exact is not None and side == base:
            most, least = MOST_OWN_ERROR, LEAST_OWN_DICE
        elif exact is not None:
            most = 2 * own_error + MOST_ERROR
            least = 0.0 if own_dice is None else 2 * own_dice - 1 - DICE_SLACK
        checks[side] = Check(error <= most and (dice is None or dice >= least), error, dice)
    return checks


def judged(
    work: str,
    spent: Mapping[str, Sequence[float]],
    checks: Mapping[str, Check],
    *,
    floor: float | None = None,
    rate: str = "",
    place: Place = CPU,
    **extra: Any,
) -> list[Row]:
    """Rows of one work.

    Args:
        work: What is computed, sizes included.
        spent: Provider to the seconds of its rounds; the first one is the baseline.
        checks: Provider to what its comparison found. The baseline may go without where it is what is compared with.
        floor: Seconds below which nobody can be.
        rate: The machine's rate that the floor was made with, and its unit.
        place: Where the sides ran.
        **extra: Further columns.

    Returns:
        One dict per provider with the keys `COLUMNS`. Where the check failed, its own or the baseline's, `ratio` is
        None.

    Raises:
        ValueError: A side other than the baseline was not checked.
    """
    first, *others = spent
    if missing := [provider for provider in others if provider not in checks]:
        raise ValueError(f"checks: expected one of every side, got none of {missing[0]!r}; compare it before it counts")
    checks = {first: Check(True), **checks}
    base, about, rows = timed(spent[first])["seconds"], environment(place.device), []
    for provider, seconds in spent.items():
        check, times = checks[provider], timed(seconds)
        if not check.correct:
            logger.warning("%s by %s is wrong: error %.1e, Dice %s", work, provider, check.error, check.dice)
        row: Row = {**dict.fromkeys(COLUMNS), "work": work, "provider": provider, "dtype": place.dtype_name, **times}
        sound = check.correct and checks[first].correct
        row |= {"ratio": base / times["seconds"] if sound else None, **vars(check)}
        row |= {"floor_seconds": floor, "over_floor": times["seconds"] / floor if floor else None, "rate": rate}
        rows.append({**row, **extra, **about})
    return rows


@torch.inference_mode()
def race(
    work: str,
    sides: Mapping[str, Callable[[], Tensor]],
    *,
    flops: float | None = None,
    rounds: int = 5,
    place: Place = CPU,
    exact: Tensor | None = None,
) -> list[Row]:
    """Check the sides, then time them in turns.

    Args:
        work: What is computed, sizes included.
        sides: Name to function; the first is the baseline.
        flops: Floating-point operations that cannot be avoided; gives the floor by the rate of a large product.
        rounds: Times that each side runs; the median counts.
        place: Where the sides run.
        exact: See `checked`.

    Returns:
        See `judged`.
    """
    found = {name: side() for name, side in sides.items()}
    checks = checked(found, lambda got, want: (relative_error(got, want), None), exact)
    del found
    spent = dict(zip(sides, in_turns(list(sides.values()), rounds, place.device)))
    if flops is None:
        return judged(work, spent, checks, place=place)
    rate = gemm_rate(device=place.device, dtype=place.dtype)
    return judged(work, spent, checks, floor=flops / rate, rate=f"{rate / 1e9:.0f} GFLOP/s", place=place)


def table(rows: Sequence[Row]) -> str:
    """Lay rows of `judged` out for reading."""
    wide = max(len(row["work"]) for row in rows)
    named = max(len(row["provider"]) for row in rows)
    head = f"{'s':>9} {'spread':>17} {'ratio':>6} {'x floor':>7} {'per s':>7} {'peak MB':>8}  error, Dice"
    lines = [f"{'work':{wide}} {'obj':>3} {'provider':{named}} {head}"]
    for row in rows:
        numbers = (
            (row["ratio"], ">6.2f"),
            (row["over_floor"], ">7.2f"),
            (row["per_second"], ">7.2f"),
            (row["peak_mb"], ">8.0f"),
        )
        cells = " ".join("-".rjust(int(how[1])) if value is None else f"{value:{how}}" for value, how in numbers)
        verdict = f"{row['error']:.1e}" + ("" if row["dice"] is None else f", {row['dice']:.5f}")
        spread = f"{row['fastest']:.4f}-{row['slowest']:.4f}"
        lines.append(
            f"{row['work']:{wide}} {row['objects'] or '':>3} {row['provider']:{named}} {row['seconds']:9.4f} "
            f"{spread:>17} {cells}  {verdict}{'' if row['correct'] else ' WRONG'}"
        )
    for row in rows:
        if row["over_new"]:
            objects = f", {row['objects']} object{'s' if row['objects'] > 1 else ''}" if row["objects"] else ""
            lines.append(f"{row['work']}{objects}: a known scan {row['over_new']:.2f} times as fast as a new one")
    return "\n".join(lines)
