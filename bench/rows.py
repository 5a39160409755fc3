"""Rows of the benchmarks that set one part of the model beside its plain form: a check, a race, a table, a CSV file."""

import csv
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from medvl_sam2.bench.kernels import RESULTS, Row, environment
from medvl_sam2.bench.segmenter import gemm_rate, in_turns

logger = logging.getLogger(__name__)


@torch.inference_mode()
def race(
    work: str, sides: Mapping[str, Callable[[], Tensor]], *, flops: float | None = None, rounds: int = 5
) -> list[Row]:
    """Check the sides against the first one, then time them in turns.

    Args:
        work: What is computed, shapes included.
        sides: Name to function; the first is the baseline.
        flops: Floating-point operations that cannot be avoided; gives the floor by the rate of a large product.
        rounds: Times that each side runs; the median counts.

    Returns:
        One dict per side. A side further than 1e-3 (relative root mean square) from the baseline gets no ratio.
    """
    want, *others = (side().double() for side in sides.values())
    errors = [0.0, *(float((got - want).norm() / want.norm()) for got in others)]
    spent = in_turns(list(sides.values()), rounds)
    rate = gemm_rate() if flops else None
    about, base, rows = environment("cpu"), statistics.median(spent[0]), []
    for name, error, seconds in zip(sides, errors, spent):
        median, correct = statistics.median(seconds), error <= 1e-3
        if not correct:
            logger.warning("%s by %s is wrong: relative error %.1e", work, name, error)
        row: Row = {"work": work, "provider": name, "dtype": "float32", "seconds": median}
        row |= {"fastest": min(seconds), "slowest": max(seconds), "rounds": rounds}
        row |= {"ratio": base / median if correct else None, "correct": correct, "error": error}
        row |= {"floor_seconds": flops / rate if flops else None, "gemm_gflops": rate / 1e9 if rate else None}
        rows.append({**row, "over_floor": median * rate / flops if flops else None, **about})
    return rows


def append_csv(rows: Sequence[Row], path: Path | str) -> Path:
    """Append rows of equal keys to a CSV file, by default in ``bench/results/``, and return its path."""
    path = RESULTS / path
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows({key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows)
    return path


def table(rows: Sequence[Row]) -> str:
    """Lay rows of `race` out for reading."""
    lines = [f"{'work':44} {'provider':16} {'s':>9} {'ratio':>7} {'x floor':>8}  error"]
    for row in rows:
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else "-"
        floor = f"{row['over_floor']:.2f}" if row["over_floor"] else "-"
        verdict = f"{row['error']:.1e}" + ("" if row["correct"] else " WRONG")
        lines.append(f"{row['work']:44} {row['provider']:16} {row['seconds']:9.4f} {ratio:>7} {floor:>8}  {verdict}")
    return "\n".join(lines)
