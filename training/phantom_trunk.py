"""The layers below the diaphragm and the bones of one patient, in the order they are painted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from medvl_sam2.training import phantom_bones as bones
from medvl_sam2.training.phantom_findings import FINDINGS
from medvl_sam2.training.phantom_render import KEEP, Part, Value
from medvl_sam2.training.phantom_shapes import Ellipsoid, Grid, Tube, smooth_path

if TYPE_CHECKING:
    from medvl_sam2.training.phantom_layers import Painter


def abdomen_layers(painter: Painter) -> list[Part]:
    """Fluid, muscles, bowel, vessels and organs below the diaphragm, back to front."""
    body, hu, s, rng = painter.body, painter.body.hu, painter.structures, painter.rng
    parts: list[Part] = []
    for f in painter.found:
        if f.type == "ascites":
            parts += [
                Part(*f.extra[key], painter.tissue(f.hu, 3.0), 0, FINDINGS["ascites"]) for key in ("gutters", "pool")
            ]
    parts += _muscles(painter) + _bowel(painter) + _vessels(painter)
    parts += painter.organ("stomach", _stomach_value(painter))
    parts += painter.organ("liver", painter.tissue(hu["liver"], 4))
    parts += _liver_vessels(painter) + painter.finding("liver_lesion")
    parts += painter.organ("pancreas", painter.tissue(hu["pancreas"], 16))
    parts += painter.organ("gallbladder", painter.tissue(rng.normal(10, 5), 2))
    spleen_texture = 22 if body.phase == "arterial" else 4
    parts += painter.organ("spleen", painter.tissue(hu["spleen"], spleen_texture))
    cortex, medulla, contrast = hu["kidney cortex"], hu["kidney medulla"], rng.random() < 0.3

    def kidney(grid: Grid, d: np.ndarray) -> np.ndarray:
        depth = np.clip((-d - 4) * np.float32(0.25) + grid.fields["fine"] * np.float32(0.5), 0, 1)
        return depth * np.float32(medulla - cortex) + np.float32(cortex)

    for name in ("left kidney", "right kidney"):
        if name in painter.plan["removed list"]:
            continue
        shape, box = body.organs[name]
        wide = tuple(np.array(box) + np.array([-7, 7, -7, 7, -7, 7]))
        parts.append(Part(lambda grid, f=shape: f(grid) - np.float32(6), wide, hu["fat"], 0))
        sinus = body.extra[f"{name} sinus"]
        pelvis = Ellipsoid(sinus.center, tuple(0.5 * r for r in sinus.radii), sinus.turn)
        parts.append(Part(sinus, sinus.box, hu["fat"] + 15, 0))
        parts.append(Part(pelvis, pelvis.box, 10.0 if not (contrast and body.phase != "arterial") else 60.0, 0))
        parts += painter.organ(name, kidney)
        parts += painter.finding("renal_cyst", name) + painter.finding("kidney_stone", name)
    parts += painter.organ("inferior vena cava", painter.tissue(hu["veins"] * 0.97, 3))
    for name in ("left adrenal gland", "right adrenal gland"):
        parts += painter.organ(name, painter.tissue(hu["adrenal"], 5))
    parts += painter.organ("aorta", painter.tissue(hu["aorta"], 3)) + painter.finding("aortic_aneurysm")
    gland = (
        Ellipsoid((0.0, -14.0, -212.0), (23, 17, 17))
        if body.sex == "male"
        else Ellipsoid((rng.normal(0, 6), -6.0, -172.0), (27, 21, 30))
    )
    parts.append(Part(gland, gland.box, painter.tissue(hu["wall"], 8), 0))
    bladder, box = body.organs["urinary bladder"]
    wide = tuple(np.array(box) + np.array([-3, 3, -3, 3, -3, 3]))
    parts.append(Part(lambda grid: bladder(grid) - np.float32(2.5), wide, 35.0, s["urinary bladder"]))
    parts.append(Part(bladder, box, painter.tissue(rng.uniform(2, 14), 2), KEEP))
    return parts


def _muscles(painter: Painter) -> list[Part]:
    hu, parts = painter.body.hu, []
    for side in (-1, 1):
        y = [float(painter.body.spine_y(z)) for z in (60, 0, -60)]
        psoas = smooth_path(
            [[side * 26, y[0] + 8, 66], [side * 42, y[1] + 4, 0], [side * 54, y[2] - 8, -60], [side * 72, -42, -120],
             [side * 92, -50, -185], [side * 112, -30, -240]],
            [9, 20, 25, 23, 20, 14], 14,
        )  # fmt: skip
        iliacus = smooth_path([[side * 100, -22, -62], [side * 96, -28, -100], [side * 88, -40, -150]], [9, 17, 16], 8)
        paraspinal = smooth_path(
            [
                [side * 32, painter.body.spine_y(z) + rear, z]
                for z, rear in zip((-105, -60, 0, 60, 120, 200, 300), (42, 60, 70, 68, 56, 48, 46), strict=True)
            ],
            [9, 20, 25, 24, 20, 15, 12],
            14,
            1.35,
        )
        for tube in (psoas, iliacus, paraspinal):
            parts.append(Part(tube, tube.box, painter.tissue(hu["muscle"], 7), 0))
    return parts


def _bowel(painter: Painter) -> list[Part]:
    hu, rng, parts = painter.body.hu, painter.rng, []
    content = float(rng.choice([22.0, 35.0, 160.0], p=[0.5, 0.4, 0.1]))
    for _ in range(17):
        start = np.array([rng.uniform(-78, 92), rng.uniform(-100, -38), rng.uniform(-135, 25)])
        steps = np.cumsum(np.vstack([np.zeros(3), rng.normal(0, 22, (4, 3))]), 0)
        points = np.clip(start + steps, [-92, -106, -160], [100, -28, 35])
        tube = smooth_path(points, np.full(5, rng.uniform(10, 15)), 9)
        gas = rng.random() < 0.12

        def inside(grid: Grid, tube: Tube = tube) -> np.ndarray:
            return np.maximum(tube(grid), grid.fields["cage"] + np.float32(5))

        def value(grid: Grid, d: np.ndarray, gas: bool = gas) -> np.ndarray:
            inner = np.float32(-850) if gas else np.float32(content) + grid.fields["fine"] * 12
            return np.where(d > -2.5, np.float32(hu["wall"]), inner)

        parts.append(Part(inside, tube.box, value, 0))
    duodenum = smooth_path(
        [[-26, -76, 50], [-48, -60, 40], [-50, -46, 5], [-30, -46, -14], [10, -50, -8], [34, -56, 22]],
        [12, 13, 13, 12, 11, 11],
        14,
    )
    parts.append(Part(duodenum, duodenum.box, painter.tissue(hu["wall"] - 10, 16), 0))
    stool = rng.uniform(-60, 40)
    mottle = rng.uniform(20, 420)
    gas_share = rng.normal(0.45, 0.35)

    def colon(grid: Grid, d: np.ndarray) -> np.ndarray:
        inner = np.float32(stool) - np.clip(grid.fields["fine"] - np.float32(0.3), 0, 2) * np.float32(mottle)
        inner = np.where(grid.fields["texture"] - (grid.y + 50) * 0.012 > gas_share, np.float32(-930), inner)
        return np.where(d > -2.5, np.float32(hu["wall"] - 5), inner)

    return parts + painter.organ("colon", colon)


def _stomach_value(painter: Painter) -> Value:
    rng, wall = painter.rng, painter.body.hu["wall"]
    content = float(rng.choice([12.0, 40.0, 280.0], p=[0.45, 0.45, 0.1]))
    mottle = 30.0 if content == 40.0 else 4.0
    level = rng.uniform(-92, -50)

    def value(grid: Grid, d: np.ndarray) -> np.ndarray:
        inner = np.float32(content) + grid.fields["fine"] * np.float32(mottle)
        inner = np.where(grid.y < level, np.float32(-950), inner)
        return np.where(d > -4, np.float32(wall), inner)

    return value


def _vessels(painter: Painter) -> list[Part]:
    hu, y = painter.body.hu, painter.body.spine_y
    paths = [
        (
            [[-6, y(0) - 38, 22], [-4, y(40) - 44, 42], [-22, -62, 62], [-48, -52, 84]],
            [6, 6.5, 7, 7],
            hu["portal veins"],
        ),
        ([[-4, -52, 48], [36, -44, 60], [84, -14, 78]], [5, 4.5, 4], hu["portal veins"]),
        ([[2, y(70) - 32, 78], [6, y(40) - 46, 40], [4, -66, -30]], [5, 4, 3], hu["aorta"]),
    ]
    for side in (-1, 1):
        inner = 4 if side > 0 else -4
        paths += [
            (
                [
                    [inner + 4, y(-36) - 28, -34],
                    [side * 34, -44, -95],
                    [side * 58, -46, -140],
                    [side * 84, -62, -215],
                ],
                [6.5, 5.5, 5, 4.5],
                hu["aorta"],
            ),
            (
                [[-10, y(-44) - 24, -44], [side * 34, -30, -100], [side * 56, -34, -145], [side * 76, -58, -215]],
                [8, 7.5, 7, 6.5],
                hu["veins"],
            ),
            (
                [[side * 8, y(40) - 28, 42], [side * 34, -16, 38], [side * 52, -6, 36]],
                [4.5, 4.5, 4.5],
                hu["veins"] * 1.02,
            ),
        ]
    tubes = [(smooth_path(p, r, 3 * len(p)), value) for p, r, value in paths]
    return [Part(t, t.box, value, 0) for t, value in tubes]


def _liver_vessels(painter: Painter) -> list[Part]:
    hu, rng, parts = painter.body.hu, painter.rng, []
    low, high = np.array(painter.body.organs["liver"][1]).reshape(3, 2).T
    hilum = np.array([-42.0, -50.0, 78.0])
    top = np.array([-28.0, -32.0, high[2] - 26])
    for start, radius, count in ((hilum, 5.5, 7), (top, 5.5, 5)):
        for _ in range(count):
            end = rng.uniform(low + 20, high - 20)
            bend = (start + end) / 2 + rng.normal(0, 9, 3)
            tube = smooth_path([start, bend, end], [radius, radius * 0.65, 1.3], 5)
            parts.append(Part(tube, tube.box, hu["portal veins"], KEEP, KEEP, painter.structures["liver"]))
    return parts


def skeleton_layers(painter: Painter) -> list[Part]:
    """Bones and cartilages, painted last."""
    body, s = painter.body, painter.structures
    dense = body.hu["bone"]

    def bone(inner: float, outer: float, cortex: float) -> Value:
        def value(grid: Grid, d: np.ndarray) -> np.ndarray:
            core = np.float32(inner * dense) + grid.fields["fine"] * np.float32(40)
            return np.where(d > -cortex, np.float32(outer * dense), core)

        return value

    vertebrae, discs, box = bones.spine(body)
    parts = [Part(discs, (-30, 30, -50, 62, box[4], box[5]), painter.tissue(85, 5), 0)]
    for side, word in ((-1, "right"), (1, "left")):
        rib, cartilage, rib_box = bones.ribs(body, side)
        parts.append(Part(cartilage, rib_box, painter.tissue(95, 14), KEEP))
        parts.append(Part(rib, rib_box, bone(230, 700, 2.0), s[f"{word} ribs"]))
        parts.append(Part(*bones.shoulder(side), bone(190, 600, 2.5), 0))
    cord = smooth_path([[0, body.spine_y(z) + 25, z] for z in range(-80, 441, 40)], [7.0] * 14, 14)
    parts.append(Part(vertebrae, box, bone(195, 600, 1.7), s["vertebrae"]))
    parts.append(Part(cord, cord.box, 32.0, KEEP, KEEP))
    parts.append(Part(*bones.sternum(body), bone(140, 430, 1.8), s["sternum"]))
    parts.append(Part(*bones.sacrum(), bone(105, 480, 2.0), s["sacrum"]))
    for side, word in ((-1, "right"), (1, "left")):
        parts.append(Part(*bones.hip_bone(side), bone(205, 750, 2.2), s[f"{word} hip bone"]))
        parts.append(Part(*bones.femur(side), bone(230, 800, 3.0), s[f"{word} femur"]))
    return parts
