"""Rows of the benchmarks that set one part of the model beside what one would run otherwise: checks, times, tables."""

import csv
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medvl_sam2.bench.kernels import RESULTS, Row, environment
from medvl_sam2.bench.timing import gemm_rate, in_turns, timed

logger = logging.getLogger(__name__)

MOST_ERROR = 1e-3
COLUMNS = (
    *("work", "objects", "provider", "dtype", "seconds", "fastest", "slowest", "rounds", "ratio"),
    *("correct", "error", "dice", "floor_seconds", "over_floor", "rate", "per_second", "peak_mb"),
    *("gpu", "cpu", "threads", "torch", "triton", "version", "commit", "time"),
)


@dataclass(frozen=True)
class Check:
    """What a comparison with the baseline found.

    Attributes:
        correct: Whether the two may be called the same.
        error: Relative root mean square difference, or the share of tokens that differ.
        dice: Of the masks, where there are some.
    """

    correct: bool
    error: float = 0.0
    dice: float | None = None


def relative_error(got: Tensor, want: Tensor) -> float:
    """Root mean square difference over the root mean square of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def judged(
    work: str,
    spent: Mapping[str, Sequence[float]],
    checks: Mapping[str, Check],
    *,
    floor: float | None = None,
    rate: str = "",
    **extra: Any,
) -> list[Row]:
    """Rows of one work.

    Args:
        work: What is computed, sizes included.
        spent: Provider to the seconds of its rounds; the first one is the baseline.
        checks: Provider to what its comparison with the baseline found; one that is missing counts as right.
        floor: Seconds below which nobody can be.
        rate: The machine's rate that the floor was made with, and its unit.
        **extra: Further columns.

    Returns:
        One dict per provider with the keys `COLUMNS`. Where the check failed, `ratio` is None.
    """
    base, rows = None, []
    for provider, seconds in spent.items():
        check, times = checks.get(provider, Check(True)), timed(seconds)
        base = base or times["seconds"]
        if not check.correct:
            logger.warning("%s by %s is wrong: error %.1e, Dice %s", work, provider, check.error, check.dice)
        row: Row = {**dict.fromkeys(COLUMNS), "work": work, "provider": provider, "dtype": "float32", **times}
        row |= {"ratio": base / times["seconds"] if check.correct else None, **vars(check)}
        row |= {"floor_seconds": floor, "over_floor": times["seconds"] / floor if floor else None, "rate": rate}
        rows.append({**row, **extra, **environment("cpu")})
    return rows


@torch.inference_mode()
def race(
    work: str, sides: Mapping[str, Callable[[], Tensor]], *, flops: float | None = None, rounds: int = 5
) -> list[Row]:
    """Check the sides against the first one, then time them in turns.

    Args:
        work: What is computed, sizes included.
        sides: Name to function; the first is the baseline.
        flops: Floating-point operations that cannot be avoided; gives the floor by the rate of a large product.
        rounds: Times that each side runs; the median counts.

    Returns:
        See `judged`. A side further than 1e-3 from the baseline gets no ratio.
    """
    want, *others = (side() for side in sides.values())
    errors = [0.0, *(relative_error(got, want) for got in others)]
    checks = {name: Check(error <= MOST_ERROR, error) for name, error in zip(sides, errors)}
    spent = dict(zip(sides, in_turns(list(sides.values()), rounds)))
    if flops is None:
        return judged(work, spent, checks)
    rate = gemm_rate()
    return judged(work, spent, checks, floor=flops / rate, rate=f"{rate / 1e9:.0f} GFLOP/s")


def append_csv(rows: Sequence[Row], path: Path | str) -> Path:
    """Append rows to a CSV file, by default in ``bench/results/``, and return its path.

    Raises:
        ValueError: The file has other columns.
    """
    path = RESULTS / path
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    new = not path.is_file()
    if not new:
        with path.open(newline="") as file:
            known = next(csv.reader(file), [])
        if missing := [column for column in columns if column not in known]:
            raise ValueError(f"{path}: expected the columns of this version, {missing[0]!r} is missing; move it away")
        columns = known
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if new:
            writer.writeheader()
        writer.writerows({key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows)
    return path


def write_json(document: Mapping[str, Any], path: Path | str) -> Path:
    """Write a document, by default into ``bench/results/``, and return its path."""
    path = RESULTS / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, default=str) + "\n")
    return path


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
    return "\n".join(lines)
