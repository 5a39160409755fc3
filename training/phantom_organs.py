"""The soft organs of the phantom as implicit shapes, placed in a drawn body."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medvl_sam2.training.anatomy import Body, Shape
from medvl_sam2.training.phantom_shapes import Box, Ellipsoid, Grid, Tube, rotation, smooth_max, smooth_path, union


def _jitter(rng: np.random.Generator, points: list, amount: float) -> np.ndarray:
    return np.asarray(points, float) + rng.normal(0, amount, (len(points), 3))


def lung(body: Body, side: int, recoil: Shape | None = None) -> tuple[Shape, Box]:
    """A lung: the inside of the rib cage above the diaphragm on one side (+1 left) of the mediastinum.

    Args:
        recoil: thickness in mm, per voxel, by which fluid or air has pushed the lung away from the wall.
    """
    middle_y = (-140, -105, -80, -40, -15, 10, 35, 60, 90)
    upper_x = (6, 8, 18, 33, 29, 22, 17, 18, 26)
    lower_x = (5, 6, 12, 17, 14, 10, 10, 14, 24)

    def shape(grid: Grid) -> np.ndarray:
        d = grid.fields["cage"] + np.float32(2.5)
        np.maximum(d, -grid.fields["above"], out=d)
        if recoil is not None:
            d += recoil(grid)
        low = np.interp(grid.profile_y, middle_y, lower_x).astype(np.float32)
        medial = np.interp(grid.profile_y, middle_y, upper_x).astype(np.float32) - low
        medial = low + medial * np.interp(grid.profile_z, (185, 235), (0, 1)).astype(np.float32)
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
        d = union(smooth_max(d, plane, 45), left(grid))
        d = smooth_max(d, grid.fields["cage"] + np.float32(5 + gap), 8)
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
        d = smooth_max(whole(grid), -hollow(grid), 10)
        d = smooth_max(d, grid.fields["cage"] + np.float32(5 + gap), 8)
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

    def add(name: str, *shapes: Ellipsoid | Tube, wall: float | None = None) -> None:
        boxes = np.array([s.box for s in shapes])
        low, high = boxes.min(0), boxes.max(0)

        def shape(grid: Grid) -> np.ndarray:
            d = union(*(s(grid) for s in shapes)) if len(shapes) > 1 else shapes[0](grid)
            return d if wall is None else smooth_max(d, grid.fields["cage"] + np.float32(wall), 6)

        body.organs[name] = (
            shape,
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
        width = rng.uniform(3.8, 4.8)
        limbs = [Tube(np.array([apex, top, top + end]), np.array([width, width, width * 0.8])) for end in limb]
        add(f"{name.split()[0]} adrenal gland", *limbs)

    fundus = Ellipsoid((66 + n(0, 6), -18 + n(0, 8), 104 + n(0, 6)), (34, 38, 38), None, 0.1)
    fill = rng.uniform(0.7, 1.25)
    belly = smooth_path(
        _jitter(rng, [[66, -22, 104], [72, -58, 84], [60, -86, 58], [28, -92, 42], [-6, -84, 44], [-26, -76, 50]], 5),
        [34 * fill, 33 * fill, 28 * fill, 23 * fill, 17, 11],
        12,
    )
    add("stomach", fundus, belly, wall=6)
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
    add("colon", colon, wall=4)
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
