"""Puts tilted or unevenly spaced slices on a straight, even grid."""

import numpy as np


def straighten(
    voxels: np.ndarray, heights: np.ndarray, shifts: np.ndarray, gap: float, fill: float
) -> tuple[np.ndarray, np.ndarray]:
    """Resamples parallel slices to even heights, one above the other, by trilinear interpolation.

    The in-plane frame is widened to hold every slice; what no slice covers gets ``fill``.

    Args:
        voxels: (K, J, I) slices in order of height.
        heights: (K,) millimetres along the normal, from 0, rising.
        shifts: (K, 2) where each slice's first pixel lies in the first slice's (i, j) pixels.
        gap: Millimetres between output slices.
        fill: Value outside.

    Returns:
        The new (K', J', I') voxels in the same dtype, and the (2,) place of their first pixel in the first slice's
        (i, j) pixels.
    """
    corner = np.floor(shifts.min(axis=0) + 1e-6)
    extra = np.ceil(shifts.max(axis=0) - corner - 1e-6).astype(int)
    rows, columns = voxels.shape[1] + extra[1], voxels.shape[2] + extra[0]
    count = round(heights[-1] / gap) + 1
    out = np.empty((count, rows, columns), dtype=voxels.dtype)
    for k in range(count):
        # The last output slice may lie up to half a gap beyond the last source slice, and then repeats it.
        height = min(k * gap, heights[-1])
        upper = int(np.clip(np.searchsorted(heights, height), 1, len(heights) - 1)) if len(heights) > 1 else 0
        lower = max(upper - 1, 0)
        span = heights[upper] - heights[lower]
        weight = (height - heights[lower]) / span if span else 0.0
        plane = np.zeros((rows, columns), dtype=np.float32)
        for index, share in ((lower, 1 - weight), (upper, weight)):
            if share > 1e-6:
                plane += np.float32(share) * _place(voxels[index], shifts[index] - corner, (rows, columns), fill)
        out[k] = np.rint(plane) if out.dtype.kind in "iu" else plane
    return out, corner


def _place(plane: np.ndarray, at: np.ndarray, shape: tuple[int, int], fill: float) -> np.ndarray:
    """Lays a slice into a larger frame with its first pixel at the fractional (i, j), bilinearly."""
    frame = np.full((shape[0] + 1, shape[1] + 1), fill, dtype=np.float32)
    whole = np.floor(at + 1e-9).astype(int)
    part = (at - whole).astype(np.float32)
    frame[whole[1] : whole[1] + plane.shape[0], whole[0] : whole[0] + plane.shape[1]] = plane
    for axis, fraction in ((1, part[0]), (0, part[1])):
        if fraction > 1e-6:
            before = np.roll(frame, 1, axis=axis)
            frame = (1 - fraction) * frame + fraction * before
    return frame[: shape[0], : shape[1]]
