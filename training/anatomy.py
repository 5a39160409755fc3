"""One patient of the phantom: measures drawn from a seed, and the soft organs as implicit shapes.

Body frame: millimetres, x to the patient's left, y to the back, z to the head; the origin lies in the middle of the
third lumbar vertebra's body. Measures are those of an average adult from anatomy texts; every patient varies them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from medvl_sam2.training.phantom_shapes import (
    WARP_MM,
    Box,
    Ellipsoid,
    Grid,
    Tube,
    outline,
    rotation,
    smooth_path,
    union,
)

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
    "muscle a": (162, 166, 168, 166, 156, 147, 142, 146, 154, 158, 158, 156, 160, 172, 176, 120, 75, 60),
    "muscle b": (92, 94, 95, 96, 101, 104, 107, 110, 116, 119, 120, 114, 105, 93, 80, 66, 56, 52),
    "muscle c": (2, 0, -1, -3, -9, -15, -20, -23, -24, -23, -22, -19, -13, -4, 4, 2, -6, -10),
    "cage a": (52, 62, 74, 94, 112, 122, 129, 134, 139, 140, 135, 122, 104, 85, 60, 36, 12, 10),
    "cage b": (45, 52, 60, 72, 82, 86, 90, 96, 101, 103, 101, 93, 80, 65, 48, 28, 10, 8),
    "cage c": (-24, -24, -26, -30, -36, -38, -36, -34, -32, -31, -30, -25, -17, -7, 8, 14, 16, 16),
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
        wall = np.clip(grid.fields["cage"] * np.float32(1 / 42) + 1, 0, 1)
        wall *= wall
        wall *= 34
        back = (grid.y + np.float32(42)) * np.float32(0.01)
        back *= back
        back *= np.where(grid.profile_y > -42, np.float32(34), np.float32(9))
        right = (grid.x + np.float32(70)) * np.float32(1 / 72)
        right *= right
        right *= 30
        left = (grid.x - np.float32(70)) * np.float32(1 / 72)
        left *= left
        left *= 30
        left += np.float32(self.dome_right - self.dome_left)
        right = np.minimum(left, right)
        right += back
        right += wall
        right += grid.z
        right -= np.float32(self.dome_right)
        return right

    def volume_ml(self, name: str, step: float = 7.0) -> float:
        """Volume of one organ's shape alone, without the deformation."""
        shape, box = self.organs[name]
        axes = [np.arange(box[2 * k] - step, box[2 * k + 1] + step, step) for k in range(3)]
        distance = shape(self.warped(*axes, step, deform=False))
        inside = np.clip(0.5 - distance / step, 0, 1).sum(dtype=np.float64)
        return float(inside * step**3 * np.prod(self.scale) / 1000)

    def fit_volume(self, name: str, build: Callable[[float], tuple[Shape, Box]], target_ml: float) -> None:
        """Choose the scale of an organ so that its volume comes near `target_ml`."""
        size = 1.0
        for _ in range(4):
            self.organs[name] = build(size)
            size *= float(np.clip((target_ml / max(self.volume_ml(name), 1.0)) ** 0.4, 0.6, 1.7))
        self.organs[name] = build(size)


def _jitter(rng: np.random.Generator, points: list, amount: float) -> np.ndarray:
    return np.asarray(points, float) + rng.normal(0, amount, (len(points), 3))


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
    hu = {name: values[column] * rng.normal(1, 0.06) + rng.normal(0, 2) for name, values in TISSUE_HU.items()}
    if phase == "arterial":
        vessels = rng.uniform(0.75, 1.25)
        for name in ("aorta", "left heart", "right heart"):
            hu[name] *= vessels
    if rng.random() < 0.15:
        hu["liver"] -= rng.uniform(8, 25)
    hu["fat"] = rng.normal(-104, 5)
    hu["bone"] = rng.normal(1, 0.15)
    hu["lung"] = rng.normal(-850, 30)
    dome_right = rng.normal(152, 8)
    return Body(
        seed, sex, phase, scale, float(rng.gamma(3.0, 7.0) + 4), warp, hu, dome_right, dome_right - rng.uniform(4, 18)
    )


def lung(body: Body, side: int, recoil: Shape | None = None) -> tuple[Shape, Box]:
    """A lung: the inside of the rib cage above the diaphragm on one side (+1 left) of the mediastinum.

    Args:
        recoil: thickness in mm, per voxel, by which fluid or air has pushed the lung away from the wall.
    """
    middle_y = (-140, -105, -80, -40, -15, 10, 35, 60, 90)
    middle_x = (7, 9, 20, 33, 30, 24, 22, 24, 30)

    def shape(grid: Grid) -> np.ndarray:
        d = grid.fields["cage"] + np.float32(2.5)
        np.maximum(d, -grid.fields["above"], out=d)
        if recoil is not None:
            d += recoil(grid)
        medial = np.interp(grid.profile_y, middle_y, middle_x).astype(np.float32)
        np.maximum(d, medial - grid.x * np.float32(side), out=d)
        return d

    box = (4.0, 148.0, -140.0, 86.0, 30.0, 385.0) if side > 0 else (-148.0, -4.0, -140.0, 86.0, 30.0, 385.0)
    return shape, box


def liver(body: Body, center: np.ndarray, size: float, left_lobe: float, gap: float) -> tuple[Shape, Box]:
    """The liver under the right dome; it grows downwards and to the left with `size`."""
    drop = (size - 1) * 55
    right = Ellipsoid(
        (center[0], center[1], center[2] - drop), (74 * size**0.6, 86 * size**0.6, 84 * size), rotation(0, 8, 0), 0.45
    )
    left = Ellipsoid(
        (center[0] + 76, center[1] - 46, center[2] + 26 - drop * 0.6),
        (66 * left_lobe * size**0.7, 42 * size**0.5, 36 * size),
        rotation(0, -14, -12),
        0.2,
    )

    def shape(grid: Grid) -> np.ndarray:
        d = right(grid)
        plane = (grid.x - np.float32(center[0] + 46)) * np.float32(0.8)
        plane += (grid.y - np.float32(center[1] - 12)) * np.float32(0.6)
        np.maximum(d, plane, out=d)
        d = union(d, left(grid))
        np.maximum(d, grid.fields["cage"] + np.float32(5 + gap), out=d)
        return np.maximum(d, grid.fields["above"] + np.float32(3 + gap * 0.5), out=d)

    boxes = np.array([right.box, left.box])
    low, high = boxes.min(0), boxes.max(0)
    return shape, (low[0], high[1], low[2], high[3], low[4], high[5])


def spleen(body: Body, center: np.ndarray, size: float, gap: float) -> tuple[Shape, Box]:
    """The spleen, a crescent against the left posterior chest wall."""
    mid = (center[0], center[1] - (size - 1) * 22, center[2] - (size - 1) * 42)
    whole = Ellipsoid(mid, (36 * size, 52 * size, 46 * size), rotation(18, 0, 28), 0.15)
    hollow = Ellipsoid((mid[0] - 40 * size, mid[1] - 30 * size, mid[2] + 4), (32 * size, 46 * size, 70 * size))

    def shape(grid: Grid) -> np.ndarray:
        d = np.maximum(whole(grid), -hollow(grid))
        np.maximum(d, grid.fields["cage"] + np.float32(5 + gap), out=d)
        return np.maximum(d, grid.fields["above"] + np.float32(4 + gap * 0.5), out=d)

    return shape, whole.box


def heart(body: Body, center: np.ndarray, size: float) -> tuple[Shape, Box]:
    """The heart as a tilted egg that rests on the diaphragm."""
    egg = Ellipsoid(tuple(center), (62 * size, 47 * size, 54 * size), rotation(0, 22, -32), 0.1)

    def shape(grid: Grid) -> np.ndarray:
        return np.maximum(egg(grid), -grid.fields["above"] - np.float32(6))

    return shape, egg.box


def draw_organs(body: Body, rng: np.random.Generator, targets: dict[str, float], gap: float) -> None:
    """Place the soft organs of `body` in ``body.organs``.

    Args:
        targets: volumes in mL to reach for liver, spleen and heart; radius factor profile is for the findings.
        gap: distance in mm by which free fluid keeps liver and spleen from the wall.
    """
    n = rng.normal
    shift = n(0, 5)
    center = np.array([-72 + n(0, 4), -33 + n(0, 4), 76 + (body.dome_right - 152) * 0.7 + n(0, 4)])
    left_lobe = rng.uniform(0.7, 1.15)
    body.fit_volume("liver", lambda s: liver(body, center, s, left_lobe, gap), targets["liver"])
    spleen_center = np.array([110 + n(0, 4), 14 + n(0, 6), 90 + (body.dome_left - 141) * 0.7 + n(0, 7)])
    body.fit_volume("spleen", lambda s: spleen(body, spleen_center, s, gap), targets["spleen"])
    heart_center = np.array([18 + n(0, 5), -74 + n(0, 5), 193 + (body.dome_right - 152) * 0.7 + n(0, 4)])
    body.fit_volume("heart", lambda s: heart(body, heart_center, s), targets["heart"])
    body.extra["heart center"] = heart_center

    def add(name: str, *shapes: Ellipsoid | Tube) -> None:
        boxes = np.array([s.box for s in shapes])
        low, high = boxes.min(0), boxes.max(0)
        body.organs[name] = (
            lambda grid: union(*(s(grid) for s in shapes)) if len(shapes) > 1 else shapes[0](grid),
            (low[0], high[1], low[2], high[3], low[4], high[5]),
        )

    for name, side, z0 in (("left kidney", 1, 42), ("right kidney", -1, 30)):
        mid = np.array([side * (74 + n(0, 5)), 5 + n(0, 5), z0 + shift + n(0, 9)])
        radii = np.array([28, 30, 55]) * rng.normal(1, 0.035) * rng.uniform(0.95, 1.05, 3)
        turn = rotation(12 + n(0, 5), side * -14 + n(0, 5), side * -30 + n(0, 10))
        sinus = Ellipsoid(tuple(mid + turn @ np.array([-side * 20, -4, 0])), (15, 11, 27), turn)
        bean = Ellipsoid(tuple(mid), tuple(radii), turn, 0.1)
        body.organs[name] = (lambda grid, b=bean, s=sinus: np.maximum(b(grid), -s(grid)), bean.box)
        body.extra[name] = (mid, turn, radii)
        body.extra[f"{name} sinus"] = sinus
        x = side * (40 + n(0, 3)) if side > 0 else -34 + n(0, 3)
        top = np.array([x, -18 + n(0, 4), 86 + shift * 0.6 + n(0, 5)])
        apex, limb = top + [0, -8, 14], np.array([[side * 2, 12, -6], [side * -1, -6, -16], [side * 12, 6, -14]])
        width = rng.uniform(3.4, 4.4)
        limbs = [Tube(np.array([apex, top, top + end]), np.array([width, width, width * 0.8])) for end in limb]
        add(f"{name.split()[0]} adrenal gland", *limbs)

    fundus = Ellipsoid((66 + n(0, 6), -18 + n(0, 8), 104 + n(0, 6)), (34, 38, 38), None, 0.1)
    fill = rng.uniform(0.7, 1.25)
    belly = smooth_path(
        _jitter(rng, [[66, -22, 104], [72, -58, 84], [60, -86, 58], [28, -92, 42], [-6, -84, 44], [-26, -76, 50]], 5),
        [34 * fill, 33 * fill, 28 * fill, 23 * fill, 17, 11],
        12,
    )
    add("stomach", fundus, belly)
    swing = n(0, 6)
    add(
        "pancreas",
        smooth_path(
            _jitter(
                rng, [[-32, -52, 18], [-30, -56, 36], [-4, -68, 52], [30, -60, 60], [62, -42, 68], [90, -22, 76]], 4
            )
            + [0, 0, swing],
            [10, 15, 9, 9.5, 10, 8],
            14,
        ),
    )
    neck = center + [14 + n(0, 4), -34 + n(0, 5), -16 + n(0, 5)]
    tip = neck + [-16 + n(0, 5), -24 + n(0, 6), -30 + n(0, 6)]
    bulb = rng.uniform(12, 19)
    add("gallbladder", smooth_path([neck, (neck + tip) / 2, tip], [5, bulb * 0.9, bulb], 6))
    fullness = rng.uniform(0.6, 1.25)
    add(
        "urinary bladder",
        Ellipsoid(
            (n(0, 5), -42 + n(0, 4), -198 + 32 * fullness), (46 * fullness, 38 * fullness, 36 * fullness), None, 0.2
        ),
    )
    colon_points = [
        [-92, -30, -105], [-98, -45, -80], [-108, -30, -30], [-106, -28, 10], [-92, -62, 18], [-58, -104, -2],
        [-10, -110, -18], [40, -108, 2], [80, -80, 38], [108, -18, 62], [120, 8, 30], [118, 4, -25], [108, -10, -80],
        [82, -40, -112], [50, -38, -122], [28, -16, -100], [6, 10, -118], [0, 26, -150], [0, 22, -190], [0, 28, -222],
    ]  # fmt: skip
    width = rng.uniform(0.8, 1.25)
    ripple = 1 + 0.12 * np.sin(np.arange(64) * 2.4 + rng.uniform(0, 6))
    colon = smooth_path(
        _jitter(rng, colon_points, 6),
        [23, 27, 25, 23, 22, 22, 21, 21, 19, 19, 18, 17, 16, 16, 16, 15, 15, 18, 20, 12],
        64,
    )
    colon = Tube(colon.points, colon.radii * ripple * width)
    add("colon", colon)
    body.extra["colon"] = colon
    draw_vessels(body, rng, add)


def draw_vessels(body: Body, rng: np.random.Generator, add: Callable[..., None]) -> None:
    """Aorta, vena cava, trachea and esophagus along the spine and around the heart."""
    n, y = rng.normal, body.spine_y
    hx, hy, hz = body.extra["heart center"]
    aorta_r = rng.uniform(10.0, 12.5)
    arch = hz + 105 + n(0, 4)
    root = [hx - 12, hy + 6, hz + 22]
    down = [
        [22 - t * 9 + n(0, 1.5), y(z) - 20 - t * 9, z]
        for z, t in zip((arch - 35, 220, 175, 130, 90, 50, 10, -36), np.linspace(0, 1, 8), strict=True)
    ]
    points = [root, [hx - 24, hy - 4, hz + 62], [-8, y(arch) - 56, arch - 6], [14, y(arch) - 34, arch], *down]
    radii = np.array([15, 15.5, 14, 12.5, 12, 11.5, 11, 10.5, 10, 9.5, 9, 8.5]) * aorta_r / 11
    body.extra["aorta"] = smooth_path(points, radii, 34)
    add("aorta", body.extra["aorta"])
    ivc = [
        [-12, y(-40) - 28, -44],
        [-20, y(0) - 26, 0],
        [-22, y(40) - 26, 40],
        [-24, y(80) - 26, 80],
        [-28, y(110) - 30, 115],
        [hx - 42, hy + 26, hz - 30],
    ]
    add(
        "inferior vena cava",
        smooth_path(_jitter(rng, ivc, 1.5), np.array([10, 11, 11, 11.5, 12, 12]) * rng.uniform(0.85, 1.15), 14, 1.15),
    )
    top = 300 + n(0, 4)
    carina = hz + 88
    add(
        "trachea",
        smooth_path(
            [[n(0, 2), y(carina) - 38, carina], [n(2, 2), y(340) - 40, 340], [n(0, 2), y(400) - 34, 440]],
            [9, 8.5, 8.5],
            8,
            1.1,
        ),
    )
    body.extra["carina"] = np.array([0.0, float(y(carina)) - 38, carina])
    add(
        "esophagus",
        smooth_path(
            [
                [62, -14, 108],
                [22, y(125) - 38, 128],
                [8, y(165) - 34, 165],
                [4, y(220) - 30, 220],
                [4, y(top) - 26, top],
                [4, y(400) - 22, 440],
            ],
            [9, 8, 8, 7.5, 7, 6.5],
            14,
            1.2,
        ),
    )
