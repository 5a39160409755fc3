"""Measures the way from stored voxels to the encoder's grid beside the whole volume cast, windowed and resampled."""

from collections.abc import Callable

import torch
from torch import Tensor

from medvl_sam2.bench.kernels import Row
from medvl_sam2.bench.place import CPU, Place
from medvl_sam2.bench.rows import race
from medvl_sam2.kernels.volume_ingest import ingest_volume

WINDOW = (-1000.0, 1000.0)


def run(
    *,
    native: tuple[int, int, int] = (200, 512, 512),
    grid: tuple[int, int, int] = (32, 256, 256),
    rounds: int = 5,
    place: Place = CPU,
) -> list[Row]:
    """Time both sides, with the scan in the device's memory.

    Args:
        native: (Z, Y, X) of the scan, int16.
        grid: (D, H, W) of the encoder.
        rounds: Times that each side runs.
        place: Whose device both run on; both give float32 anywhere, as the encoder's grid is.

    Returns:
        One dict per side, see `medvl_sam2.bench.rows.race`.
    """
    work = f"{'x'.join(map(str, native))} int16 to {'x'.join(map(str, grid))}"
    return race(work, sides(native, grid, place.device), rounds=rounds, place=Place(place.device))


def sides(
    native: tuple[int, int, int], grid: tuple[int, int, int], device: torch.device = CPU.device
) -> dict[str, Callable[[], Tensor]]:
    """What is raced: sizes as in `run`."""
    generator = torch.Generator().manual_seed(0)
    scan = torch.randint(-1024, 1500, native, dtype=torch.int16, generator=generator).to(device)

    def whole() -> Tensor:
        low, high = WINDOW
        unit = (scan.float().clamp(low, high) - low) / (high - low)
        return torch.nn.functional.interpolate(unit[None, None], size=grid, mode="trilinear")[0, 0]

    return {"whole volume": whole, "ours": lambda: ingest_volume(scan, grid, window=WINDOW)}
