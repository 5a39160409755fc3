"""Bones of the phantom as implicit shapes: spine, ribs, sternum, shoulder girdle, pelvis and femora."""

from __future__ import annotations

import numpy as np

from medvl_sam2.training.anatomy import Body, Shape
from medvl_sam2.training.phantom_shapes import Box, Ellipsoid, Grid, Tube, union

VERTEBRA_Z = np.array(
    [-69, -35, 0, 34, 68, 99, 128, 155, 181, 206, 230, 253, 275, 297, 318, 338, 356, 374, 391, 407, 423, 439],
    np.float32,
)
RIB_SLOPE = (55, 80, 98, 115, 135, 158, 180, 195, 200, 200, 195, 195)
RIB_END = (0.80, 0.78, 0.78, 0.78, 0.78, 0.77, 0.76, 0.72, 0.66, 0.60, 0.46, 0.27)
_SHELL_MM = 5.5


def _vertebra_measures(z: np.ndarray) -> tuple[np.ndarray, ...]:
    """Half width, half depth and half height of the bodies at height z."""
    width = np.interp(z, (-69, 0, 99, 206, 338, 374, 440), (27, 25, 21.5, 17.5, 15.5, 12.5, 11))
    depth = np.interp(z, (-69, 0, 99, 206, 338, 374, 440), (18.5, 18, 17, 16, 11, 8.5, 8))
    height = np.interp(z, (-69, 0, 99, 206, 338, 374, 440), (12.5, 12.8, 11.5, 9.8, 8, 6, 6))
    return tuple(a.astype(np.float32) for a in (width, depth, height))


def spine(body: Body) -> tuple[Shape, Shape, Box]:
    """Vertebrae (bodies, arches and processes), the discs between them, and their bounding box."""
    middles = (VERTEBRA_Z[1:] + VERTEBRA_Z[:-1]) / 2

    def local(grid: Grid) -> tuple[np.ndarray, ...]:
        z = grid.axes[2]
        level = VERTEBRA_Z[np.searchsorted(middles, z)][:, None, None]
        width, depth, height = _vertebra_measures(level)
        dz = grid.z - level
        y = grid.y - body.spine_y(grid.profile_z)
        x = np.abs(grid.x)
        u, v = x / width, y / depth
        radial = np.sqrt(u * u + v * v)
        radial -= 1
        radial *= depth
        return x, y, dz, radial, depth, height

    def vertebrae(grid: Grid) -> np.ndarray:
        x, y, dz, radial, depth, height = local(grid)
        d = np.maximum(radial, np.abs(dz) - height)
        canal = y - (depth + 9)
        ring = np.sqrt(x * x + canal * canal)
        np.maximum(d, 9 - ring, out=d)
        ring -= 12.5
        arch = np.abs(ring) - 3.5
        np.maximum(arch, np.abs(dz + 2) - height * np.float32(0.85), out=arch)
        np.minimum(d, arch, out=d)
        slope = np.where(grid.profile_z > 90, np.float32(0.75), np.float32(0.25))
        rear = y - (depth + 31)
        spinous = np.maximum(np.maximum(x - 3.2, np.abs(rear) - 13), np.abs(dz + rear * slope + 6) - 7)
        np.minimum(d, spinous, out=d)
        reach = np.where(grid.profile_z > 90, np.float32(31), np.float32(40))
        wing = np.abs(y - (depth + 6) - x * np.float32(0.12)) - 4
        wing = np.maximum(np.maximum(wing, np.abs(dz - 2) - 5), np.maximum(x - reach, 12 - x))
        np.minimum(d, wing, out=d)
        pillar = np.hypot(x - 15, y - (depth + 14)) - 5.5
        np.maximum(pillar, np.abs(dz + 3) - height * np.float32(1.05), out=pillar)
        return np.minimum(d, pillar, out=d)

    def discs(grid: Grid) -> np.ndarray:
        return local(grid)[3] + np.float32(0.5)

    return vertebrae, discs, (-46.0, 46.0, -50.0, 100.0, -86.0, 460.0)


def ribs(body: Body, side: int) -> tuple[Shape, Shape, Box]:
    """The twelve ribs of one side (+1 left) in the shell round the rib cage, and their cartilages."""

    def shell(grid: Grid, cartilage: bool) -> np.ndarray:
        out = np.full(grid.x.shape, 99, np.float32)
        offset = grid.fields["cage"] - np.float32(_SHELL_MM)
        reach = 6 + grid.soft
        iz, iy, ix = np.nonzero((offset < reach) & (offset > -reach) & (grid.x * side > -2))
        if iz.size == 0:
            return out
        radial = offset[iz, iy, ix] * np.float32(1.5)
        z, height = grid.z[iz, iy, ix], grid.axes[2]
        a, b, c = (body.profile(f"cage {k}", height)[iz] for k in "abc")
        turn = np.arctan2(np.abs(grid.x[iz, iy, ix]) / a, (grid.y[iz, iy, ix] - c) / b) * np.float32(1 / np.pi)
        best = np.full(z.shape, 99, np.float32)
        for number, (slope, end) in enumerate(zip(RIB_SLOPE, RIB_END, strict=True)):
            head = VERTEBRA_Z[16 - number] + 5
            path = head - slope * turn
            if cartilage:
                if number > 9:
                    break
                rise = (85 if number > 3 else 35) * (turn - end) / (1 - end)
                d = np.hypot((path + slope * (turn - end) + rise - z) * np.float32(0.8), radial) - 6.5
                np.maximum(d, (end - turn) * 300, out=d)
                np.maximum(d, (turn - np.float32(0.97 - max(0, number - 6) * 0.06)) * 300, out=d)
            else:
                d = np.hypot((path - z) * np.float32(0.86), radial) - 6.7
                np.maximum(d, (turn - end) * 300, out=d)
                np.maximum(d, (np.float32(0.075) - turn) * 300, out=d)
            np.minimum(best, d, out=best)
        out[iz, iy, ix] = best
        return out

    box = (-2.0, 165.0, -165.0, 105.0, 20.0, 375.0) if side > 0 else (-165.0, 2.0, -165.0, 105.0, 20.0, 375.0)
    return (lambda grid: shell(grid, False)), (lambda grid: shell(grid, True)), box


def sternum(body: Body) -> tuple[Shape, Box]:
    """Manubrium, body and xiphoid in front of the rib cage."""
    low = 168.0

    def shape(grid: Grid) -> np.ndarray:
        width = np.interp(grid.profile_z, (low, low + 20, low + 50, 280, 292, 320), (6, 12, 16, 15, 22, 25))
        d = np.abs(grid.x) - width.astype(np.float32)
        np.maximum(d, np.abs(grid.fields["cage"] - np.float32(_SHELL_MM)) - np.float32(5.5), out=d)
        np.maximum(d, grid.z - np.float32(322), out=d)
        return np.maximum(d, np.float32(low) - grid.z, out=d)

    return shape, (-30.0, 30.0, -160.0, -40.0, low, 322.0)


def _tube(points: list, radii: list[float], side: int, flat: float = 1.0) -> Tube:
    return Tube(np.asarray(points, float) * [side, 1, 1], np.asarray(radii, float), flat)


def _joined(shapes: list) -> tuple[Shape, Box]:
    boxes = np.array([s.box for s in shapes])
    low, high = boxes.min(0), boxes.max(0)
    return lambda grid: union(*(s(grid) for s in shapes)), (low[0], high[1], low[2], high[3], low[4], high[5])


def sacrum() -> tuple[Shape, Box]:
    """Sacrum and coccyx."""
    return _joined(
        [
            _tube([[0, 10, -90], [0, 28, -108]], [17, 15], 1, 3.0),
            _tube([[0, 28, -108], [0, 48, -138]], [14, 11.5], 1, 2.7),
            _tube([[0, 48, -138], [0, 54, -165]], [11, 9], 1, 2.3),
            _tube([[0, 54, -165], [0, 40, -192]], [7, 4], 1, 1.3),
            *(_tube([[14, 20, -94], [42, 38, -112], [34, 50, -142]], [12, 15, 10], side) for side in (-1, 1)),
            _tube([[0, 44, -98], [0, 68, -118], [0, 72, -150]], [7, 6, 4], 1, 1.5),
        ]
    )


_WING = np.array(
    [[55, -95, 42], [50, -115, 45], [32, -70, 75], [10, -46, 112], [-15, -48, 126], [-38, -58, 132], [-58, -82, 126],
     [-40, -110, 110], [-5, -165, 90], [20, -130, 78], [25, -100, 76],
     [0, -100, 98], [-25, -135, 100], [-20, -80, 118]],
    float,
)  # fmt: skip


def hip_bone(side: int) -> tuple[Shape, Box]:
    """One hip bone: iliac wing as a curved plate, acetabulum as a cup, ischium and pubis as bars."""
    y, z, x = _WING.T
    fit, *_ = np.linalg.lstsq(np.stack([np.ones_like(y), y, z, y * y, y * z, z * z], 1), x, rcond=None)
    fit = fit.astype(np.float32)
    wing_box = (30.0, 145.0, -72.0, 74.0, -185.0, -38.0)
    bars = [
        _tube([[72, 16, -200], [64, 26, -235], [56, 16, -262]], [13, 13, 14], side),
        _tube([[78, -34, -182], [40, -58, -205], [7, -62, -218]], [10, 8, 11], side),
        _tube([[8, -58, -226], [28, -36, -246], [54, 8, -262]], [8, 6.5, 9], side),
        _tube([[88, -2, -150], [60, 38, -112]], [14, 10], side),
    ]
    socket = Ellipsoid((side * 92.0, -6.0, -190.0), (33, 33, 33))
    joint = Ellipsoid((side * 96.0, -8.0, -193.0), (27, 27, 27))

    def wing(grid: Grid) -> np.ndarray:
        yy, zz = grid.y, grid.z
        surface = fit[0] + fit[1] * yy + fit[2] * zz + fit[3] * yy * yy + fit[4] * yy * zz + fit[5] * zz * zz
        thick = np.interp(grid.profile_z, (-180, -140, -100, -60, -45), (13, 8, 5, 4.5, 7)).astype(np.float32)
        d = np.abs(grid.x * np.float32(side) - surface) * np.float32(0.85) - thick
        rim = np.hypot((yy + 2) * np.float32(0.98), (zz + 118) * np.float32(0.92)) - 68
        rim = np.maximum(rim, np.abs(yy) - np.float32(40) - (zz + 178) * np.float32(0.6))
        return np.maximum(d, rim, out=d)

    flipped = wing_box if side > 0 else (-wing_box[1], -wing_box[0], *wing_box[2:])
    whole, box = _joined([*bars, socket])

    def shape(grid: Grid) -> np.ndarray:
        d = whole(grid)
        window = grid.window(flipped, 10)
        if window is not None:
            np.minimum(d[window], wing(grid.crop(window)), out=d[window])
        return np.maximum(d, -joint(grid), out=d)

    low, high = np.minimum(box[::2], flipped[::2]), np.maximum(box[1::2], flipped[1::2])
    return shape, (low[0], high[0], low[1], high[1], low[2], high[2])


def femur(side: int) -> tuple[Shape, Box]:
    """Head, neck, trochanters and upper shaft of one femur."""
    return _joined(
        [
            Ellipsoid((side * 95.0, -8.0, -193.0), (24, 24, 24)),
            _tube([[95, -8, -193], [128, 6, -214]], [16, 17], side),
            _tube([[137, 12, -200], [133, 10, -222], [130, 8, -250], [126, 2, -360]], [13, 19, 16, 14], side),
        ]
    )


def shoulder(side: int) -> tuple[Shape, Box]:
    """Clavicle, scapula and the upper humerus of a raised arm."""
    bars, box = _joined(
        [
            _tube([[20, -82, 322], [60, -84, 336], [105, -50, 352], [145, -8, 362]], [9, 6, 6, 7], side),
            _tube([[150, 26, 320], [152, 20, 345]], [8, 11], side),
            _tube([[84, 80, 312], [130, 58, 338], [158, 18, 360]], [5, 6, 8], side),
            Ellipsoid((side * 172.0, 6.0, 360.0), (23, 23, 25)),
            _tube([[174, 4, 362], [190, -10, 470]], [17, 13], side),
        ]
    )

    def shape(grid: Grid) -> np.ndarray:
        d = bars(grid)
        x = grid.x * np.float32(side)
        blade = np.abs(grid.fields["cage"] - 13 - np.clip(x * np.float32(0.16) - 12, 0, 8)) - np.float32(2.8)
        np.maximum(blade, np.float32(68) - x + np.maximum(262 - grid.profile_z, 0) * np.float32(0.7), out=blade)
        np.maximum(blade, x - 112 - np.maximum(grid.profile_z - 245, 0) * np.float32(0.5), out=blade)
        np.maximum(blade, np.float32(12) - grid.y, out=blade)
        np.maximum(blade, np.abs(grid.z - np.float32(272)) - np.float32(48), out=blade)
        return np.minimum(d, blade, out=d)

    return shape, (min(box[0], side * 60.0), max(box[1], side * 60.0), box[2], max(box[3], 98.0), 222.0, box[5])
