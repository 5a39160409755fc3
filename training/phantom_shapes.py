"""Implicit shapes on separable grids: every shape returns its approximate signed distance in millimetres.

Negative is inside. Coordinates are body coordinates: x grows to the patient's left, y to the back, z to the head.
Arrays are ``(Z, Y, X)`` float32. A shape is evaluated on its bounding box alone, so its cost follows its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Box = tuple[float, float, float, float, float, float]
WARP_MM = 9.0


@dataclass
class Grid:
    """Warped coordinates of a separable grid.

    Attributes:
        axes: ascending x, y, z in unwarped body mm, used for bounding boxes and for profiles along one axis.
        x, y, z: the same after the patient's smooth deformation, each (Z, Y, X).
        fields: named arrays (Z, Y, X) computed once per grid and shared by several shapes.
        soft: width in mm over which an edge fades (partial volume).
    """

    axes: tuple[np.ndarray, np.ndarray, np.ndarray]
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    soft: float = 1.0
    fields: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def profile_z(self) -> np.ndarray:
        """Unwarped z as (Z, 1, 1)."""
        return self.axes[2][:, None, None]

    @property
    def profile_y(self) -> np.ndarray:
        """Unwarped y as (1, Y, 1)."""
        return self.axes[1][None, :, None]

    def window(self, box: Box, margin: float = 0.0) -> tuple[slice, slice, slice] | None:
        """Index ranges (Z, Y, X) that hold the box, or None when the grid misses it."""
        slices = []
        for axis, low, high in zip(self.axes, box[::2], box[1::2], strict=True):
            start, stop = axis.searchsorted((low - margin, high + margin))
            if start >= stop:
                return None
            slices.append(slice(start, stop))
        return slices[2], slices[1], slices[0]

    def crop(self, window: tuple[slice, slice, slice]) -> Grid:
        """A view of the grid on the index ranges of `window`."""
        sz, sy, sx = window
        return Grid(
            (self.axes[0][sx], self.axes[1][sy], self.axes[2][sz]),
            self.x[window],
            self.y[window],
            self.z[window],
            self.soft,
            {name: value[window] for name, value in self.fields.items()},
        )


def rotation(rx: float = 0.0, ry: float = 0.0, rz: float = 0.0) -> np.ndarray:
    """Rotation matrix from angles in degrees about x, then y, then z."""
    ax, ay, az = np.deg2rad([rx, ry, rz])
    cx, sx, cy, sy, cz, sz = np.cos(ax), np.sin(ax), np.cos(ay), np.sin(ay), np.cos(az), np.sin(az)
    mx = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    my = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    mz = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return mz @ my @ mx


@dataclass(frozen=True)
class Ellipsoid:
    """An ellipsoid, or with `square` > 0 one with fuller corners.

    Args:
        center: (x, y, z) mm.
        radii: half axes in mm along the rotated axes.
        turn: rotation matrix from the ellipsoid's axes to the body's.
        square: 0 gives a true ellipsoid, 0.5 a rounded box.
    """

    center: tuple[float, float, float]
    radii: tuple[float, float, float]
    turn: np.ndarray | None = None
    square: float = 0.0

    @property
    def box(self) -> Box:
        """Bounding box in body mm."""
        half = np.asarray(self.radii)
        if self.turn is not None:
            reach = np.abs(self.turn) @ half if self.square else np.sqrt((self.turn**2) @ (half**2))
        else:
            reach = half
        c = self.center
        return c[0] - reach[0], c[0] + reach[0], c[1] - reach[1], c[1] + reach[1], c[2] - reach[2], c[2] + reach[2]

    def __call__(self, grid: Grid) -> np.ndarray:
        p = [grid.x - np.float32(self.center[0]), grid.y - np.float32(self.center[1])]
        p.append(grid.z - np.float32(self.center[2]))
        squares = []
        for k, radius in enumerate(self.radii):
            if self.turn is None:
                q = p[k] * np.float32(1 / radius)
            else:
                m = (self.turn[:, k] / radius).astype(np.float32)
                q = p[0] * m[0]
                q += p[1] * m[1]
                q += p[2] * m[2]
            q *= q
            squares.append(q)
        total = squares[0] + squares[1]
        total += squares[2]
        if self.square:
            u, v, w = (np.minimum(q, 3) for q in squares)
            total -= np.float32(self.square) * (u * v + v * w + u * w) * np.float32(0.6)
            np.maximum(total, 0, out=total)
        np.sqrt(total, out=total)
        total -= 1
        total *= np.float32(np.prod(self.radii) ** (1 / 3))
        return total


@dataclass(frozen=True)
class Tube:
    """A tube along a polyline with a radius at each point; `flat` stretches its section along x (flat > 1 is wider)."""

    points: np.ndarray
    radii: np.ndarray
    flat: float = 1.0

    @property
    def box(self) -> Box:
        """Bounding box in body mm."""
        reach = np.asarray(self.radii)[:, None] * np.array([self.flat, 1, 1])
        low, high = (self.points - reach).min(0), (self.points + reach).max(0)
        return low[0], high[0], low[1], high[1], low[2], high[2]

    def __call__(self, grid: Grid) -> np.ndarray:
        out = np.full(grid.x.shape, 99, np.float32)
        margin = WARP_MM + grid.soft
        stretch = np.array([1 / self.flat, 1, 1])
        for a, b, ra, rb in zip(self.points[:-1], self.points[1:], self.radii[:-1], self.radii[1:], strict=True):
            r = max(ra, rb)
            low, high = np.minimum(a, b), np.maximum(a, b)
            fx = r * self.flat
            box = (low[0] - fx, high[0] + fx, low[1] - r, high[1] + r, low[2] - r, high[2] + r)
            window = grid.window(box, margin)
            if window is None:
                continue
            d = (b - a) * stretch
            length2 = float(d @ d) or 1.0
            d = d.astype(np.float32)
            px = (grid.x[window] - np.float32(a[0])) * np.float32(stretch[0])
            py = grid.y[window] - np.float32(a[1])
            pz = grid.z[window] - np.float32(a[2])
            t = px * d[0]
            t += py * d[1]
            t += pz * d[2]
            t *= np.float32(1 / length2)
            np.clip(t, 0, 1, out=t)
            px -= t * d[0]
            py -= t * d[1]
            pz -= t * d[2]
            px *= px
            py *= py
            pz *= pz
            px += py
            px += pz
            np.sqrt(px, out=px)
            px -= np.float32(ra) + t * np.float32(rb - ra)
            np.minimum(out[window], px, out=out[window])
        return out


def smooth_path(points: Sequence[Sequence[float]], radii: Sequence[float], count: int, flat: float = 1.0) -> Tube:
    """A tube along a Catmull-Rom curve through `points`, resampled to `count` points."""
    p = np.asarray(points, float)
    r = np.asarray(radii, float)
    padded = np.vstack([2 * p[0] - p[1], p, 2 * p[-1] - p[-2]])
    u = np.linspace(0, len(p) - 1, count)
    k = np.minimum(u.astype(int), len(p) - 2)
    t = (u - k)[:, None]
    p0, p1, p2, p3 = padded[k], padded[k + 1], padded[k + 2], padded[k + 3]
    curve = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * (p1 - p2) + p3 - p0) * t**3)
    return Tube(curve, np.interp(u, np.arange(len(p)), r), flat)


def outline(grid: Grid, a: np.ndarray, b: np.ndarray, c: np.ndarray, square: float) -> np.ndarray:
    """Signed distance to a rounded ellipse per slice; half axes a, b and centre c (y) are (Z, 1, 1)."""
    u = grid.x / a
    u *= u
    v = (grid.y - c) / b
    v *= v
    np.minimum(u, 3, out=u)
    np.minimum(v, 3, out=v)
    total = u + v
    weight = total + np.float32(1e-6)
    scale = u * a
    scale += v * b
    scale /= weight
    u *= v
    u *= np.float32(square)
    total -= u
    np.sqrt(total, out=total)
    total -= 1
    total *= scale
    return total


def smooth_max(first: np.ndarray, second: np.ndarray, width: float) -> np.ndarray:
    """Intersection of two shapes whose common edge is rounded over `width` mm."""
    blend = np.abs(first - second)
    blend -= np.float32(width)
    np.minimum(blend, 0, out=blend)
    blend *= blend
    blend *= np.float32(0.25 / width)
    blend += np.maximum(first, second)
    return blend


def union(*distances: np.ndarray) -> np.ndarray:
    """Union of shapes on the same grid."""
    return np.minimum.reduce(distances)


def lattice_noise(lattice: np.ndarray, origin: Sequence[float], cell: float, grid: Grid) -> np.ndarray:
    """Linear interpolation of a random lattice (Z, Y, X) with spacing `cell` mm at the grid's unwarped axes."""
    value = lattice
    for axis, coordinates, start in (
        (0, grid.axes[2], origin[2]),
        (1, grid.axes[1], origin[1]),
        (2, grid.axes[0], origin[0]),
    ):
        u = np.clip((coordinates - start) / cell, 0, lattice.shape[axis] - 1.001)
        k = u.astype(np.intp)
        shape = [1, 1, 1]
        shape[axis] = -1
        t = (u - k).astype(np.float32).reshape(shape)
        low = np.take(value, k, axis)
        high = np.take(value, k + 1, axis)
        high -= low
        high *= t
        low += high
        value = low
    return value
