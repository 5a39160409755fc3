"""Paints layers of shapes, back to front, into HU, a structure map and a finding map, and adds a scanner's noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from medvl_sam2.training.anatomy import Shape
from medvl_sam2.training.phantom_shapes import WARP_MM, Box, Grid

Value = float | Callable[[Grid, np.ndarray], np.ndarray]
EVERYWHERE: Box = (-1e4, 1e4, -1e4, 1e4, -1e4, 1e4)
KEEP = -1


@dataclass
class Part:
    """One layer of paint.

    Attributes:
        label: structure label set inside, 0 to clear it, `KEEP` to leave it.
        finding: finding label set inside, 0 to clear it, `KEEP` to leave it.
        inside: structure label the layer is limited to, or 0 for no limit.
        fade: extra width of the edge in mm.
    """

    shape: Shape
    box: Box
    value: Value
    label: int = KEEP
    finding: int = 0
    inside: int = 0
    fade: float = 0.0


def paint(parts: list[Part], grid: Grid, hu: np.ndarray | None, labels: np.ndarray, findings: np.ndarray) -> None:
    """Paint the layers in order; `hu` None paints the maps alone."""
    for part in parts:
        window = grid.window(part.box, WARP_MM + grid.soft + part.fade)
        if window is None:
            continue
        local = grid.crop(window)
        d = part.shape(local)
        solid = d < 0
        if part.inside:
            solid &= labels[window] == part.inside
        if part.label != KEEP:
            labels[window][solid] = part.label
        if part.finding != KEEP:
            findings[window][solid] = part.finding
        if hu is None:
            continue
        value = part.value(local, d) if callable(part.value) else np.float32(part.value)
        d *= np.float32(-1 / (grid.soft + part.fade))
        d += np.float32(0.5)
        np.clip(d, 0, 1, out=d)
        if part.inside:
            d *= labels[window] == part.inside
        target = hu[window]
        target += d * (value - target)


def add_noise(hu: np.ndarray, seed: int, z_mm: np.ndarray, sd: float, smooth: bool) -> None:
    """Add quantum noise in place, the same for a slice however the volume is cut into slabs.

    Args:
        hu: (Z, Y, X) float32.
        z_mm: world z of each slice; with `seed` it decides the slice's noise.
        sd: standard deviation in HU.
        smooth: correlate neighbouring pixels, as a soft reconstruction kernel does.
    """
    for plane, z in zip(hu, z_mm, strict=True):
        rng = np.random.default_rng((seed, 29, round(float(z) * 100) + 10_000_000))
        noise = rng.standard_normal(plane.shape, dtype=np.float32)
        if smooth:
            noise[1:] += noise[:-1]
            noise[:, 1:] += noise[:, :-1]
            noise *= np.float32(0.5)
        noise *= np.float32(sd)
        plane += noise
