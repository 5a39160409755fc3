"""Tile settings: a heuristic default in each kernel file, replaced by what was measured on the GPU at hand.

Measured settings live in ``kernels/configs/<gpu>.json`` and, for a user's own, in ``$MEDVL_SAM2_CONFIGS/<gpu>.json``::

    {"gpu": "NVIDIA H100 80GB HBM3", "kernels": {"patch_embed3d": {"default": {"BLOCK_M": 64, "num_warps": 4}}}}
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

Tile = dict[str, int]
CONFIGS = Path(__file__).resolve().parent / "configs"
CONFIGS_VARIABLE = "MEDVL_SAM2_CONFIGS"

_forced: dict[tuple[str, str | None], Tile] = {}
_asked: dict[str, dict[str, Tile]] | None = None


def gpu_name(device: torch.device | str | None = None) -> str:
    """Name the GPU that `device` (default: the current one) stands for, or ``"cpu"``."""
    device = (
        torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def config_path(gpu: str, folder: Path | None = None) -> Path:
    """Give the file that holds the measured settings of one GPU model."""
    return (folder or Path(os.environ.get(CONFIGS_VARIABLE, CONFIGS))) / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}.json"


@cache
def _measured(gpu: str) -> dict[str, dict[str, Tile]]:
    paths = [path for path in {config_path(gpu), config_path(gpu, CONFIGS)} if path.is_file()]
    if gpu != "cpu" and not paths:
        logger.warning("no measured tile settings for %s, using heuristics; `medvl-sam2 bench kernels --tune`", gpu)
    merged: dict[str, dict[str, Tile]] = {}
    for path in sorted(paths, key=lambda path: path.parent != CONFIGS):
        try:
            for kernel, tiles in json.loads(path.read_text())["kernels"].items():
                merged.setdefault(kernel, {}).update(tiles)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            logger.warning("cannot read tile settings from %s (%s), using heuristics", path, error)
    return merged


def operand_width(dtype: torch.dtype) -> str:
    """Part of a shape class: what fits shared memory and registers with 16-bit operands may not with wider ones."""
    return f"{8 * dtype.itemsize}bit"


def tile(kernel: str, default: Tile, device: torch.device | None = None, key: str = "default") -> Tile:
    """Choose the tile of a launch: forced, else measured on this GPU model, else the heuristic `default`.

    Args:
        kernel: Kernel name, usually the operation's.
        default: Constexpr sizes, ``num_warps`` and ``num_stages`` as the kernel file's heuristic has them.
        device: Device of the launch; only CUDA devices have measured settings.
        key: Shape class inside the kernel (for instance ``"M2048-K1024-N768-16bit"``); falls back to ``"default"``.
    """
    if _asked is not None:
        _asked.setdefault(kernel, {})[key] = default
    forced = _forced.get((kernel, key), _forced.get((kernel, None)))
    if forced is not None:
        return {**default, **forced}
    if device is None or device.type != "cuda":
        return default
    tiles = _measured(gpu_name(device)).get(kernel, {})
    return {**default, **tiles.get(key, tiles.get("default", {}))}


@contextmanager
def force_tile(kernel: str, settings: Tile, key: str | None = None) -> Iterator[None]:
    """Make launches of `kernel` use `settings` while the context is open: all of them, or those of one shape class."""
    before = _forced.get((kernel, key))
    _forced[kernel, key] = settings
    try:
        yield
    finally:
        _forced.pop((kernel, key))
        if before is not None:
            _forced[kernel, key] = before


def tiles_asked(run: Callable[[], Any]) -> dict[str, dict[str, Tile]]:
    """Run once, and give the heuristic tile of each (kernel, shape class) that its launches asked for."""
    global _asked
    _asked = {}
    try:
        run()
        return _asked
    finally:
        _asked = None


def tune(
    kernel: str,
    candidates: Sequence[Tile],
    run: Callable[[], Any],
    measure: Callable[[Callable[[], Any]], float],
    key: str | None = None,
) -> tuple[Tile, dict[str, float]]:
    """Time `run` under each candidate tile and return the fastest with all times; candidates that fail are left out.

    Args:
        kernel: Kernel name as given to `tile`.
        candidates: Settings to try.
        run: Launches the operation once.
        measure: Turns a callable into a time, for instance ``triton.testing.do_bench``.
        key: Shape class to try them on; None for every launch of the kernel.
    """
    times: dict[str, float] = {}
    best: Tile | None = None
    for candidate in candidates:
        with force_tile(kernel, candidate, key):
            try:
                seconds = measure(run)
            # A tile too large for the chip fails in compilation or at launch, each Triton version with its own error.
            except Exception as error:
                logger.info("%s: %s does not run (%s)", kernel, candidate, error)
                continue
        if not times or seconds < min(times.values()):
            best = candidate
        times[json.dumps(candidate)] = seconds
    if best is None:
        raise RuntimeError(f"{kernel}: none of {len(candidates)} tile settings runs on {gpu_name()}")
    return best, times


def write_tuned(gpu: str, kernel: str, settings: Tile, key: str = "default", folder: Path | None = None) -> Path:
    """Keep measured settings for a GPU model, beside those already in its file.

    Returns:
        The file written.
    """
    path = config_path(gpu, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = json.loads(path.read_text()) if path.is_file() else {"gpu": gpu, "kernels": {}}
    document["kernels"].setdefault(kernel, {})[key] = settings
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    _measured.cache_clear()
    return path
