"""Overlap of masks at a scan's own resolution, on the few voxels that matter of a large grid."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from medvl_sam2.model.processing import GridTransform

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Region:
    """A mask without the empty space around it.

    Attributes:
        shape: (Z, Y, X) of the whole grid.
        box: Where the object lies.
        mask: Bool, of the box's size.
    """

    shape: tuple[int, int, int]
    box: Box
    mask: np.ndarray

    @property
    def voxels(self) -> int:
        """How many the object has."""
        return int(np.count_nonzero(self.mask))

    def whole(self) -> np.ndarray:
        """(Z, Y, X) bool mask."""
        full = np.zeros(self.shape, bool)
        full[self.box] = self.mask
        return full

    def inner_point(self) -> tuple[int, int, int]:
        """Voxel (x, y, z) deep inside the largest axial section."""
        z = int(self.mask.sum((1, 2)).argmax())
        # Beyond the box, as beyond the scan, nothing is inside.
        depth = ndimage.distance_transform_edt(np.pad(self.mask[z], 1))[1:-1, 1:-1]
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        z0, y0, x0 = (side.start for side in self.box)
        return int(x) + x0, int(y) + y0, z + z0

    def tight_box(self) -> tuple[int, int, int, int, int, int]:
        """Voxels (x0, y0, z0, x1, y1, z1) of the box, both ends inside."""
        z, y, x = self.box
        return x.start, y.start, z.start, x.stop - 1, y.stop - 1, z.stop - 1


def bounds(mask: np.ndarray) -> Box | None:
    """Tight box of a (Z, Y, X) bool mask, or None where it is empty."""
    planes = mask.any((1, 2))
    if not planes.any():
        return None
    z = _extent(planes)
    flat = mask[z].any(0)
    return z, _extent(flat.any(1)), _extent(flat.any(0))


def _extent(line: np.ndarray) -> slice:
    where = np.flatnonzero(line)
    return slice(int(where[0]), int(where[-1]) + 1)


def region(mask: np.ndarray) -> Region:
    """The region of a (Z, Y, X) bool mask."""
    box = bounds(mask) or (slice(0, 0),) * 3
    return Region(mask.shape, box, mask[box])


def label_regions(labels: np.ndarray, values: dict[str, int]) -> dict[str, Region]:
    """Regions of the values of a (Z, Y, X) label map that are in it, in one pass over the volume.

    Args:
        labels: Unsigned integers.
        values: Name -> value, from 1 on.
    """
    boxes = ndimage.find_objects(labels, max(values.values(), default=0))
    return {
        name: Region(labels.shape, boxes[value - 1], labels[boxes[value - 1]] == value)
        for name, value in values.items()
        if boxes[value - 1] is not None
    }


def dice(prediction: Region, truth: Region) -> float:
    """2 |A and B| / (|A| + |B|); 1 when both are empty."""
    total = prediction.voxels + truth.voxels
    if not total:
        return 1.0
    box = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(prediction.box, truth.box))
    if any(s.start >= s.stop for s in box):
        return 0.0
    a, b = (each.mask[_inside(box, each.box)] for each in (prediction, truth))
    return 2 * int(np.count_nonzero(a & b)) / total


def _inside(box: Box, outer: Box) -> Box:
    return tuple(slice(s.start - o.start, s.stop - o.start) for s, o in zip(box, outer))


def surface_dice(prediction: Region, truth: Region, spacing: tuple[float, float, float], tolerance: float) -> float:
    """Share of both surfaces that lies within a tolerance of the other (Nikolov et al., arXiv 1809.04430).

    A surface is the voxels of a mask with a neighbour outside it by one of the six faces, each counted alike, as in
    MONAI's `compute_surface_dice`.

    Args:
        prediction: Predicted mask.
        truth: True mask on the same grid.
        spacing: (z, y, x) of a voxel in mm.
        tolerance: In mm.

    Returns:
        0 to 1; 1 when both masks are empty.
    """
    if not prediction.voxels and not truth.voxels:
        return 1.0
    if not prediction.voxels or not truth.voxels:
        return 0.0
    ours, theirs = (_surface(each) * np.asarray(spacing) for each in (prediction, truth))
    near = sum(_near(a, b, tolerance) for a, b in ((ours, theirs), (theirs, ours)))
    return near / (len(ours) + len(theirs))


def _surface(found: Region) -> np.ndarray:
    """(N, 3) indices of the surface voxels on the whole grid."""
    mask = np.pad(found.mask, 1)
    inner = found.mask.copy()
    for axis in range(3):
        for shift in (0, 2):
            window = [slice(1, -1)] * 3
            window[axis] = slice(shift, shift + found.mask.shape[axis])
            inner &= mask[tuple(window)]
    return np.argwhere(found.mask & ~inner) + [s.start for s in found.box]


def _near(points: np.ndarray, others: np.ndarray, tolerance: float) -> int:
    # A hair more than the tolerance: distances that equal it must count whatever their rounding.
    reach = tolerance * (1 + 1e-9)
    distances, _ = cKDTree(others).query(points, distance_upper_bound=reach + 1e-6)
    return int(np.count_nonzero(distances <= reach))


def soft_dice(probabilities: np.ndarray, truth: Region, transform: GridTransform) -> float:
    """M3D's Dice: on probabilities at the model's resolution, 2 sum(p g) / (sum p + sum g + 1) (BAAI-DCAI/M3D).

    It is no overlap of masks, and higher or lower than the hard Dice at the scan's resolution; given beside it because
    published numbers are of this kind.

    Args:
        probabilities: (S, m, m) on the slice stack.
        truth: True mask on the scan's grid; its nearest voxels are taken.
        transform: Between the two.
    """
    size = probabilities.shape
    low, step = np.array(transform.box[:3]), np.array(transform.box[3:]) - transform.box[:3]
    index = [np.floor(low[i] + (np.arange(size[i]) + 0.5) * step[i] / size[i]).astype(int) for i in range(3)]
    # Only the voxels of the stack that fall into the object's box can be true.
    inside = [(index[i] >= truth.box[i].start) & (index[i] < truth.box[i].stop) for i in range(3)]
    if not all(axis.any() for axis in inside):
        return 0.0
    part = truth.mask[np.ix_(*(axis[keep] - s.start for axis, keep, s in zip(index, inside, truth.box)))]
    overlap = float(probabilities[np.ix_(*inside)][part].sum())
    return 2 * overlap / (float(probabilities.sum()) + int(np.count_nonzero(part)) + 1)
