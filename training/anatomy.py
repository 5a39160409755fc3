"""One patient of the phantom: measures drawn from a seed, and the soft organs as implicit shapes.

Body frame: millimetres, x to the patient's left, y to the back, z to the head; the origin lies in the middle of the
third lumbar vertebra's body. Measures are those of an average adult from anatomy texts; every patient varies them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from medvl_sam2.training.phantom_shapes import WARP_MM, Box, Grid, outline, smooth_max

Shape = Callable[[Grid], np.ndarray]
PHASES = ("non-contrast", "arterial", "portal venous")

# HU per phase: non-contrast, arterial, portal venous.
TISSUE_HU = {
    "aorta": (42, 320, 150),
    "left heart": (42, 300, 150),
    "right heart": (42, 190, 148),
    "veins": (41, 60, 148),
    "myocardium": (46, 105, 108),
    "liver": (57, 68, 110),
    "portal veins": (46, 75, 158),
    "spleen": (47, 118, 122),
    "kidney cortex": (33, 165, 182),
    "kidney medulla": (32, 70, 172),
    "pancreas": (38, 92, 98),
    "adrenal": (26, 62, 70),
    "muscle": (52, 55, 60),
    "wall": (38, 75, 85),
}

_Z = (-330, -230, -200, -150, -100, -60, -20, 40, 95, 150, 200, 250, 290, 320, 350, 375, 400, 440)
PROFILES = {
    "muscle a": (162, 166, 168, 166, 156, 147, 143, 147, 154, 158, 157, 153, 158, 182, 194, 150, 75, 60),
    "muscle b": (92, 94, 95, 96, 101, 104, 107, 110, 116, 119, 120, 114, 105, 93, 80, 66, 56, 52),
    "muscle c": (2, 0, -1, -3, -9, -15, -20, -23, -24, -23, -22, -19, -13, -4, 4, 2, -6, -10),
    "cage a": (52, 62, 74, 94, 112, 126, 130, 134, 139, 140, 135, 122, 104, 85, 60, 36, 12, 10),
    "cage b": (45, 50, 56, 64, 72, 78, 84, 93, 101, 103, 101, 93, 80, 65, 48, 28, 10, 8),
    "cage c": (-20, -20, -20, -24, -28, -34, -34, -32, -32, -31, -30, -25, -17, -7, 8, 14, 16, 16),
}
_SPINE_Z = (-330, -185, -160, -130, -95, -69, -35, 0, 34, 68, 99, 128, 155, 206, 253, 297, 338, 374, 400, 440)
_SPINE_Y = (30, 40, 52, 44, 14, -8, -14, -16, -10, 0, 9, 17, 24, 33, 32, 23, 8, -10, -18, -22)


@dataclass
class Body:
    """All measures of one patient; see `draw_body`.

    Attributes:
        scale: world mm per body mm along x, y, z.
        fat_mm: thickness of the subcutaneous fat at the flank.
        organs: structure name to (shape, bounding box), in body coordinates.
        hu: tissue name to HU for the drawn phase.
        extra: other drawn measures by name.
    """

    seed: int
    sex: str
    phase: str
    scale: np.ndarray
    fat_mm: float
    warp: np.ndarray
    hu: dict[str, float]
    dome_right: float
    dome_left: float
    organs: dict[str, tuple[Shape, Box]] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)

    def profile(self, name: str, z: np.ndarray) -> np.ndarray:
        """Profile along z as float32 of z's shape."""
        return np.interp(z, _Z, PROFILES[name]).astype(np.float32)

    def spine_y(self, z: np.ndarray | float) -> np.ndarray:
        """y of the middle of the vertebral bodies at height z."""
        return np.interp(z, _SPINE_Z, _SPINE_Y).astype(np.float32)

    def warped(self, x: np.ndarray, y: np.ndarray, z: np.ndarray, soft: float, deform: bool = True) -> Grid:
        """Grid on ascending body axes, deformed by the patient's smooth displacement, with the shared fields."""
        x, y, z = (np.asarray(a, np.float32) for a in (x, y, z))
        shape = (len(z), len(y), len(x))
        coordinates = []
        for k, base in enumerate((x[None, None, :], y[None, :, None], z[:, None, None])):
            value = np.broadcast_to(base, shape).copy()
            for amplitude, fx, fy, fz, px, py, pz in self.warp[k] if deform else ():
                plane = np.sin(fz * z + pz)[:, None, None] * np.sin(fy * y + py)[None, :, None] * amplitude
                value += plane.astype(np.float32) * np.sin(fx * x + px).astype(np.float32)[None, None, :]
            coordinates.append(value)
        grid = Grid((x, y, z), *coordinates, soft)
        grid.fields["cage"] = self._cage(grid)
        grid.fields["above"] = self._above_diaphragm(grid)
        return grid

    def _cage(self, grid: Grid) -> np.ndarray:
        z = grid.profile_z
        a, b, c = (self.profile(f"cage {k}", z) for k in "abc")
        return outline(grid, a, b, c, 0.34)

    def _above_diaphragm(self, grid: Grid) -> np.ndarray:
        """Height above the two domes of the diaphragm; they hang deep where they meet the chest wall."""
        wall = np.clip(grid.fields["cage"] * np.float32(1 / 32) + 1, 0, 1)
        wall *= wall
        wall *= 34
        back = (grid.y + np.float32(42)) * np.float32(0.01)
        back *= back
        back *= np.where(grid.profile_y > -42, np.float32(34), np.float32(9))
        x = grid.axes[0]
        right = (grid.x + np.float32(70)) * np.float32(1 / 72)
        right *= right
        right *= np.where(x < -70, np.float32(30), np.float32(15))
        left = (grid.x - np.float32(70)) * np.float32(1 / 72)
        left *= left
        left *= np.where(x > 70, np.float32(30), np.float32(15))
        left += np.float32(self.dome_right - self.dome_left)
        right = -smooth_max(-left, -right, 16)
        right += back
        right += wall
        right += grid.z
        right -= np.float32(self.dome_right)
        return right

    def volume_ml(self, name: str, step: float = 8.0) -> float:
        """Volume of one organ's shape alone, without the deformation."""
        shape, box = self.organs[name]
        axes = [np.arange(box[2 * k] - step, box[2 * k + 1] + step, step) for k in range(3)]
        distance = shape(self.warped(*axes, step, deform=False))
        inside = np.clip(0.5 - distance / step, 0, 1).sum(dtype=np.float64)
        return float(inside * step**3 * np.prod(self.scale) / 1000)

    def fit_volume(self, name: str, build: Callable[[float], tuple[Shape, Box]], target_ml: float) -> None:
        """Choose the scale of an organ so that its volume comes near `target_ml`."""
        size = 1.0
        for _ in range(5):
            self.organs[name] = build(size)
            size *= float(np.clip((target_ml / max(self.volume_ml(name), 1.0)) ** 0.45, 0.6, 1.7))
        self.organs[name] = build(size)


def draw_body(seed: int, rng: np.random.Generator, sex: str, phase: str) -> Body:
    """Draw the frame of a patient: size, fat, deformation, diaphragm and HU of the tissues; organs come later."""
    size = rng.normal(1.03 if sex == "male" else 0.95, 0.035)
    scale = size * np.array([rng.normal(1, 0.045), rng.normal(1, 0.05), rng.normal(1, 0.03)])
    warp = np.zeros((3, 3, 7))
    for axis, amplitude in enumerate((3.2, 3.2, 3.0)):
        for term in range(3):
            wavelength = rng.uniform(110, 320, 3)
            warp[axis, term] = (rng.normal(0, amplitude * 0.6), *(2 * np.pi / wavelength), *rng.uniform(0, 6.3, 3))
        warp[axis, :, 0] *= min(1.0, (WARP_MM - 1) / np.abs(warp[axis, :, 0]).sum())
    column = PHASES.index(phase)
    hu = {name: values[column] * rng.normal(1, 0.07) + rng.normal(0, 3) for name, values in TISSUE_HU.items()}
    if phase == "arterial":
        vessels = rng.uniform(0.75, 1.25)
        for name in ("aorta", "left heart", "right heart"):
            hu[name] *= vessels
    hu["muscle"] -= max(0.0, rng.uniform(-15, 25))
    hu["kidney cortex"], hu["kidney medulla"] = sorted((hu["kidney cortex"], hu["kidney medulla"]), reverse=True)
    if rng.random() < 0.15:
        hu["liver"] -= rng.uniform(8, 25)
    hu["fat"] = rng.normal(-104, 5)
    hu["bone"] = float(np.clip(rng.normal(1, 0.22), 0.55, 1.5))
    hu["lung"] = float(np.clip(rng.normal(-862, 40), -945, -770))
    dome_right = float(np.clip(rng.normal(151, 10), 128, 172))
    return Body(
        seed, sex, phase, scale, float(rng.gamma(2.4, 5.5) + 4), warp, hu, dome_right, dome_right - rng.uniform(4, 18)
    )
