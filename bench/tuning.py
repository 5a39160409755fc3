"""Searches the tiles of the kernels on the GPU at hand (``medvl-sam2 bench kernels --tune``)."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medvl_sam2.bench.kernels import DTYPES, MODES, Row, bind, difference, results
from medvl_sam2.bench.operations import Case, cases, chosen
from medvl_sam2.kernels._common import why_not_triton
from medvl_sam2.kernels._tuning import Tile, gpu_name, tiles_asked, write_tuned
from medvl_sam2.kernels._tuning import tune as tune_tile


def tune(
    operations: Sequence[str] | None = None, *, dtype: str = "bfloat16", folder: Path | None = None, rounds: int = 3
) -> list[Row]:
    """Search tiles of every kernel on the GPU at hand, and keep those that are faster and right.

    Each shape class of each kernel is searched by itself, from its heuristic outwards one setting at a time.

    Args:
        operations: As in `run`.
        dtype: As in `run`.
        folder: Where ``<gpu>.json`` is written; ``kernels/configs`` by default.
        rounds: Steps away from the heuristic at most.

    Returns:
        One dict per kernel and shape class: operation, kernel, key, tile, heuristic_ms, tuned_ms, and file where the
        tile was kept.

    Raises:
        ValueError: There is no GPU that the kernels run on, or no such operation.
    """
    if reason := why_not_triton("tuning"):
        raise ValueError(f"bench kernels --tune: needs an NVIDIA GPU that runs the Triton kernels ({reason})")
    from triton.testing import do_bench

    device, found = torch.device("cuda"), []
    for name in chosen(operations):
        torch.manual_seed(42)
        for case in cases(name, small=False, device=device, dtype=DTYPES[dtype]):
            for mode in MODES if case.trained else MODES[:1]:
                run_once = bind(case.ours, case, mode)
                want = results(case.ours, case, mode)

                def measure(
                    run_once: Callable[[], Any], case: Case = case, mode: str = mode, want: list[Tensor] = want
                ) -> float:
                    for mine, true in zip(results(case.ours, case, mode), want, strict=True):
                        if difference(mine, true) > 1e-2 * max(1.0, float(true.abs().max())):
                            raise ValueError("a wrong result")
                    return do_bench(run_once, quantiles=(0.5,))

                for kernel, classes in tiles_asked(run_once).items():
                    for key, heuristic in classes.items():
                        if any((row["kernel"], row["key"]) == (kernel, key) for row in found):
                            continue
                        row = _search(kernel, key, heuristic, run_once, measure, rounds)
                        row["operation"] = name
                        if row["tuned_ms"] < 0.98 * row["heuristic_ms"]:
                            row["file"] = str(write_tuned(gpu_name(device), kernel, row["tile"], key, folder))
                        found.append(row)
    return found


def _search(
    kernel: str, key: str, heuristic: Tile, run_once: Callable, measure: Callable[..., float], rounds: int
) -> Row:
    best, first = heuristic, None
    for _ in range(rounds):
        better, times = tune_tile(kernel, list(_neighbours(best)), run_once, measure, key)
        # A heuristic that does not run on this GPU is slower than anything.
        first = first if first is not None else times.get(json.dumps(heuristic), math.inf)
        if better == best:
            break
        best = better
    return {"kernel": kernel, "key": key, "tile": best, "heuristic_ms": first, "tuned_ms": min(times.values())}


def _neighbours(tile: Tile) -> Iterator[Tile]:
    """The tile itself, and those that differ in one setting: a size halved or doubled, one stage more or less."""
    yield tile
    for name, value in tile.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        options = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        for option in options:
            if option >= 1 and (name != "num_warps" or option <= 16):
                yield {**tile, name: option}


def table(rows: Sequence[Row]) -> str:
    """Lay rows of `tune` out for reading."""
    lines = [f"{'kernel':22} {'shape class':32} {'ms before':>10} {'after':>9}  tile"]
    for row in rows:
        kept = " ".join(f"{name} {value}" for name, value in row["tile"].items()) if "file" in row else "as it was"
        lines.append(f"{row['kernel']:22} {row['key']:32} {row['heuristic_ms']:10.4f} {row['tuned_ms']:9.4f}  {kept}")
    return "\n".join(lines)
