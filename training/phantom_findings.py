"""Findings of the phantom: what is drawn, how it changes the anatomy, and how it is described."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from medvl_sam2.training.anatomy import Body, Shape
from medvl_sam2.training.phantom_shapes import Box, Ellipsoid, Grid, Tube, lattice_noise, rotation

FINDINGS: dict[str, int] = {
    "pleural_effusion": 1,
    "lung_nodule": 2,
    "consolidation": 3,
    "pneumothorax": 4,
    "liver_lesion": 5,
    "renal_cyst": 6,
    "kidney_stone": 7,
    "ascites": 8,
    "aortic_aneurysm": 9,
    "hepatomegaly": 10,
    "splenomegaly": 11,
    "cardiomegaly": 12,
    "absent_organ": 13,
}
MASKED = tuple(FINDINGS)[:9]
CHEST = ("pleural_effusion", "lung_nodule", "consolidation", "pneumothorax", "cardiomegaly", "aortic_aneurysm")
ABDOMEN = (
    "liver_lesion",
    "renal_cyst",
    "kidney_stone",
    "ascites",
    "hepatomegaly",
    "splenomegaly",
    "aortic_aneurysm",
    "absent_organ",
)
ABSENT = ("gallbladder", "spleen", "left kidney", "right kidney")
LATTICE_ORIGIN = (-260.0, -220.0, -380.0)
_COUNTS = (0.2, 0.4, 0.26, 0.1, 0.04)


@dataclass
class Finding:
    """One finding; `shape` is None when it only changes sizes or removes an organ.

    Attributes:
        inside: structure whose voxels the mask is limited to, or None.
        keeps: True when its voxels stay part of the organ.
        hu: HU of its tissue or a function (grid, distance) of it, None when it has none of its own.
    """

    type: str
    side: str | None
    organ: str
    location: str | None = None
    size_mm: float | None = None
    volume_ml: float | None = None
    shape: Shape | None = None
    box: Box | None = None
    inside: str | None = None
    keeps: bool = True
    hu: float | Shape | None = None
    fuzzy_mm: float = 0.0
    extra: dict[str, object] = field(default_factory=dict)


def draw_types(rng: np.random.Generator, region: str) -> list[str]:
    """Types of the findings of one phantom; about a fifth have none."""
    pool = []
    if region != "abdomen" and region != "abdomen and pelvis":
        pool += CHEST
    if region != "thorax":
        pool += [name for name in ABDOMEN if name not in pool]
    count = int(rng.choice(5, p=_COUNTS))
    weights = np.array([0.6 if name == "aortic_aneurysm" else 1.0 for name in pool])
    return [str(name) for name in rng.choice(pool, count, replace=False, p=weights / weights.sum())]


def recoil_shape(finding_type: str, thickness: float) -> Shape:
    """Thickness in mm that an effusion (low, at the back) or a pneumothorax (high, in front) takes from the lung."""

    def shape(grid: Grid) -> np.ndarray:
        if finding_type == "pleural_effusion":
            t = np.clip((grid.y + np.float32(55)) * np.float32(1 / 95), 0, 1)
            t *= np.clip((np.float32(285) - grid.profile_z) * np.float32(1 / 110), 0, 1).astype(np.float32)
        else:
            t = np.clip((np.float32(30) - grid.y) * np.float32(1 / 100), 0, 1)
            t *= np.clip((grid.profile_z - np.float32(120)) * np.float32(1 / 140), 0, 1).astype(np.float32)
        t *= np.float32(thickness)
        return t

    return shape


def _interior_point(
    body: Body, rng: np.random.Generator, name: str, depth: float, accept: Shape | None = None, most: float = 1e9
) -> np.ndarray | None:
    """A random point at least `depth` mm (and at most `most`) inside an organ where `accept` is positive."""
    shape, box = body.organs[name]
    step = 8.0
    grid = body.warped(*(np.arange(box[2 * k], box[2 * k + 1], step) for k in range(3)), step, deform=False)
    d = shape(grid)
    good = (d < -depth) & (d > -most)
    if accept is not None:
        good &= accept(grid) > 0
    iz, iy, ix = np.nonzero(good)
    if iz.size == 0:
        return None
    k = int(rng.integers(iz.size))
    return np.array([grid.axes[0][ix[k]], grid.axes[1][iy[k]], grid.axes[2][iz[k]]]) + rng.uniform(-3, 3, 3)


def _blob(rng: np.random.Generator, center: np.ndarray, diameter: float, scale: np.ndarray) -> Ellipsoid:
    radii = diameter / 2 * np.append(1.0, rng.uniform(0.78, 1.0, 2))
    return Ellipsoid(tuple(center), tuple(radii / scale.mean()), rotation(*rng.uniform(0, 180, 3)))


def _ellipsoid_ml(body: Body, blob: Ellipsoid) -> float:
    return float(4 / 3 * np.pi * np.prod(blob.radii) * np.prod(body.scale) / 1000)


def lobe_field(grid: Grid) -> np.ndarray:
    """Positive in the upper lobe: the oblique fissure falls from the back (z 315) to the front (z 130)."""
    return grid.z - (np.float32(222) + (grid.y + np.float32(25)) * np.float32(1.05))


def _in_lobe(lobe: str) -> Shape:
    if lobe == "upper lobe":
        return lambda grid: np.minimum(lobe_field(grid) - 12, grid.z - 225)
    return lambda grid: np.minimum(-lobe_field(grid) - 12, 240 - grid.z)


def _nodule(body: Body, rng: np.random.Generator, side: str) -> Finding | None:
    lobe = str(rng.choice(["upper lobe", "lower lobe"]))
    size = rng.uniform(14, 34)
    spot = _interior_point(body, rng, f"{side} lung", size / 2 + 4, _in_lobe(lobe), most=40)
    if spot is None:
        return None
    blob = _blob(rng, spot, size, body.scale)
    volume, organ = _ellipsoid_ml(body, blob), f"{side} lung"
    return Finding("lung_nodule", side, organ, lobe, size, volume, blob, blob.box, organ, hu=rng.normal(32, 8))


def _consolidation(body: Body, rng: np.random.Generator, side: str) -> Finding | None:
    organ = f"{side} lung"
    lobe = str(rng.choice(["upper lobe", "lower lobe"]))
    radius = rng.uniform(36, 58)
    lattice = rng.standard_normal((40, 40, 40)).astype(np.float32)
    lung = body.organs[organ][0]
    for _ in range(5):
        spot = _interior_point(body, rng, organ, 4, _in_lobe(lobe), most=25)
        if spot is None:
            return None
        blob = Ellipsoid(tuple(spot), tuple(radius * rng.uniform(0.8, 1.15, 3)), rotation(*rng.uniform(0, 180, 3)), 0.2)

        def shape(grid: Grid, blob: Ellipsoid = blob, origin: np.ndarray = spot - 140) -> np.ndarray:
            d = blob(grid)
            d += lattice_noise(lattice, origin, 7.0, grid) * np.float32(3.5)
            upper = lobe_field(grid)
            return np.maximum(d, -upper if lobe == "upper lobe" else upper, out=d)

        low, high = np.array(blob.box[::2]) - 8, np.array(blob.box[1::2]) + 8
        box = (low[0], high[0], low[1], high[1], low[2], high[2])
        grid = body.warped(*(np.arange(low[k], high[k], 7.0) for k in range(3)), 7.0, deform=False)
        if np.count_nonzero((shape(grid) < 0) & (lung(grid) < 0)) * 0.343 * np.prod(body.scale) > 85:
            break
        radius *= 1.15
    hu = rng.normal(34, 8)
    return Finding("consolidation", side, organ, lobe, None, None, shape, box, organ, hu=hu, fuzzy_mm=6)


def _liver_lesion(body: Body, rng: np.random.Generator, side: str) -> Finding | None:
    lobe = str(rng.choice(["right lobe", "left lobe"], p=[0.65, 0.35]))
    split = np.float32(-18)
    for size in (rng.uniform(22, 60) if lobe == "right lobe" else rng.uniform(20, 36), 24.0):
        accept = (lambda g: split - 18 - g.x) if lobe == "right lobe" else (lambda g: g.x - split - 8)
        spot = _interior_point(body, rng, "liver", size / 2 + 1, accept)
        if spot is not None:
            blob = _blob(rng, spot, size, body.scale)
            hu = body.hu["liver"] - (rng.uniform(42, 70) if body.phase == "portal venous" else rng.uniform(30, 42))
            return Finding(
                "liver_lesion", None, "liver", lobe, size, _ellipsoid_ml(body, blob), blob, blob.box, "liver", hu=hu
            )
    return None


def _kidney_spot(body: Body, rng: np.random.Generator, organ: str, out: float) -> tuple[np.ndarray, str]:
    mid, turn, radii = body.extra[organ]
    pole = str(rng.choice(["upper pole", "lower pole"]))
    lateral = 1 if organ.startswith("left") else -1
    along = (1 if pole == "upper pole" else -1) * radii[2] * rng.uniform(0.5, 0.62)
    local = np.array([lateral * radii[0] * out, rng.uniform(-0.3, 0.3) * radii[1], along])
    return mid + turn @ local, pole


def _renal_cyst(body: Body, rng: np.random.Generator, side: str) -> Finding | None:
    organ = f"{side} kidney"
    size = rng.uniform(20, 60)
    spot, pole = _kidney_spot(body, rng, organ, 0.45 + size / 110)
    blob = _blob(rng, spot, size, body.scale)
    return Finding(
        "renal_cyst", side, organ, pole, size, _ellipsoid_ml(body, blob), blob, blob.box, None, hu=rng.uniform(0, 14)
    )


def _stone(body: Body, rng: np.random.Generator, side: str) -> Finding | None:
    organ = f"{side} kidney"
    size = rng.uniform(10, 20)
    spot, pole = _kidney_spot(body, rng, organ, -0.1)
    blob = _blob(rng, spot, size, body.scale)
    return Finding(
        "kidney_stone",
        side,
        organ,
        pole,
        size,
        _ellipsoid_ml(body, blob),
        blob,
        blob.box,
        None,
        hu=rng.uniform(600, 1200),
    )


def _aneurysm(body: Body, rng: np.random.Generator, region: str) -> Finding:
    tube: Tube = body.extra["aorta"]
    diameter = rng.uniform(46, 72)
    places = {"thorax": ["thoracic"], "abdomen": ["abdominal"], "abdomen and pelvis": ["abdominal"]}
    place = str(rng.choice(places.get(region, ["thoracic", "abdominal"])))
    middle, spread = (rng.uniform(195, 225), 34.0) if place == "thoracic" else (rng.uniform(2, 18), 26.0)
    downward = np.arange(len(tube.points)) > int(np.argmax(tube.points[:, 2]))
    bulge = np.exp(-(((tube.points[:, 2] - middle) / spread) ** 2)) * downward
    normal = float(np.interp(middle, tube.points[::-1, 2], tube.radii[::-1]))
    extra = diameter / 2 / body.scale[:2].mean() - normal
    points = tube.points + np.outer(bulge, [extra * 0.35, -extra * 0.75, 0.0])
    wide = Tube(points, tube.radii + bulge * extra)
    descending = Tube(wide.points[downward], wide.radii[downward])
    body.extra["aorta"] = wide
    body.organs["aorta"] = (wide, wide.box)
    low, high = middle - spread, middle + spread
    reach = extra + normal + 30
    k = np.flatnonzero((points[:, 2] > low) & (points[:, 2] < high) & downward)
    center = points[k].mean(0)
    box = (center[0] - reach, center[0] + reach, center[1] - reach, center[1] + reach, low, high)

    def shape(grid: Grid) -> np.ndarray:
        d = np.maximum(descending(grid), (np.abs(grid.z - np.float32(middle)) - np.float32(spread)) * 4)
        return np.maximum(d, np.abs(grid.x - np.float32(center[0])) - np.float32(reach), out=d)

    thrombus = float(rng.choice([0.0, rng.uniform(4, 14)]))

    def value(grid: Grid, d: np.ndarray) -> np.ndarray:
        return np.where(d > -thrombus, np.float32(min(42.0, body.hu["aorta"])), np.float32(body.hu["aorta"]))

    return Finding("aortic_aneurysm", None, "aorta", place, diameter, None, shape, box, "aorta", hu=value)


_MAKERS = {
    "lung_nodule": _nodule,
    "consolidation": _consolidation,
    "liver_lesion": _liver_lesion,
    "renal_cyst": _renal_cyst,
    "kidney_stone": _stone,
}


def place_findings(
    body: Body, rng: np.random.Generator, types: list[str], plan: dict[str, object], region: str
) -> list[Finding]:
    """Build the findings of the drawn types on a body whose organs are placed.

    Args:
        types: finding types in the order drawn.
        plan: choices made before the organs were placed: sides, removed organs, thickness of fluid.
        region: what the field of view shows.
    """
    found = []
    for kind in types:
        side = str(plan["sides"][kind])
        if kind == "absent_organ":
            found.append(
                Finding(kind, plan["removed"].split()[0] if "kidney" in plan["removed"] else None, plan["removed"])
            )
        elif kind in ("hepatomegaly", "splenomegaly", "cardiomegaly"):
            organ = {"hepatomegaly": "liver", "splenomegaly": "spleen", "cardiomegaly": "heart"}[kind]
            found.append(Finding(kind, None, organ))
        elif kind == "aortic_aneurysm":
            found.append(_aneurysm(body, rng, region))
        elif kind in ("pleural_effusion", "pneumothorax"):
            found.append(Finding(kind, side, f"{side} lung", keeps=False))
        elif kind == "ascites":
            found.append(Finding(kind, None, "peritoneum", keeps=False))
        else:
            made = _MAKERS[kind](body, rng, side)
            if made is not None:
                found.append(made)
    return found


def ascites_shapes(thickness: float) -> dict[str, tuple[Shape, Box]]:
    """Free fluid along the abdominal wall and under the diaphragm ("gutters"), and in the pelvis ("pool")."""

    def gutters(grid: Grid) -> np.ndarray:
        cavity = np.maximum(grid.fields["cage"], grid.fields["above"])
        np.maximum(cavity, -215 - grid.z, out=cavity)
        share = np.clip((np.float32(32) - grid.y) * np.float32(1 / 30), 0, 1)
        return np.maximum(cavity, -cavity - share * np.float32(thickness) - np.float32(4), out=cavity)

    pelvis = Ellipsoid((0.0, -40.0, -150.0), (78.0, 52.0, 62.0))

    def pool(grid: Grid) -> np.ndarray:
        return np.maximum(pelvis(grid), grid.fields["cage"] + np.float32(4))

    return {"gutters": (gutters, (-150, 150, -145, 60, -220, 175)), "pool": (pool, pelvis.box)}
