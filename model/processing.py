"""From a CT in its own voxels to the model's grids and back.

The encoder grid (D, H, W) and the stack of SAM2 slices both cover one box of the scan: the patient without the air
around. Array indices are canonical, (Z, Y, X) with x to the patient's left, y to posterior and z to superior; points
are (x, y, z) at voxel centres.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from medvl_sam2.kernels.volume_ingest import ingest_volume
from medvl_sam2.model.config import MedVLConfig

Box = tuple[int, int, int, int, int, int]
Size = tuple[int, int, int]


@dataclass(frozen=True)
class GridTransform:
    """Maps between a scan's voxels and grids that cover its box edge to edge.

    Attributes:
        shape: The scan's (Z, Y, X).
        box: (z0, y0, x0, z1, y1, x1), half open.
        slices: Axial slices in the SAM2 stack.
    """

    shape: Size
    box: Box
    slices: int

    def _scale(self, size: Size) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.array(self.box[:3][::-1]), np.array(self.box[3:][::-1])
        return low.astype(float), (high - low) / np.array(size[::-1], float)

    def to_grid(self, points: np.ndarray, size: Size) -> np.ndarray:
        """(N, 3) voxel (x, y, z) -> the same on a grid of `size` (D, H, W) over the box."""
        low, step = self._scale(size)
        return (np.asarray(points, float) + 0.5 - low) / step - 0.5

    def nearest_slice(self, z: float) -> int:
        """Index in the slice stack nearest to voxel plane `z`."""
        grid = self.to_grid(np.array([[0.0, 0.0, z]]), (self.slices, 1, 1))[0, 2]
        return int(np.clip(np.rint(grid), 0, self.slices - 1))


@dataclass(frozen=True)
class ScanArray:
    """A scan as the model floor sees it.

    Attributes:
        voxels: (Z, Y, X) in stored dtype; a strided view is fine.
        slope: HU = voxel * slope + intercept.
        intercept: See `slope`.
    """

    voxels: np.ndarray
    slope: float = 1.0
    intercept: float = 0.0


class VolumeProcessor:
    """Prepares scans for a model.

    Args:
        config: Of the model.
    """

    def __init__(self, config: MedVLConfig):
        self.config = config.volume
        self.image_size = config.sam2.image_size

    def transform(self, scan: ScanArray) -> GridTransform:
        """Find the patient in the scan."""
        box = foreground_box(scan, self.config.foreground_hu)
        return GridTransform(scan.voxels.shape, box, min(self.config.slices, box[3] - box[0]))

    def encoder_grid(self, scan: ScanArray, transform: GridTransform, device: torch.device | None = None) -> Tensor:
        """(1, D, H, W) float32 in 0-1, trilinear; resampled on a device, by default where the voxels are."""
        grid = ingest_volume(
            scan.voxels[_inside(transform.box)],
            self.config.size,
            slope=scan.slope,
            intercept=scan.intercept,
            window=self._window(scan, transform),
            device=device,
        )
        return grid[None]

    def slice_images(
        self,
        scan: ScanArray,
        transform: GridTransform,
        start: int = 0,
        stop: int | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """SAM2 images of slices [start, stop): (n, 3, R, R) float32, normalised per channel; `device` as above."""
        stop = transform.slices if stop is None else stop
        z0, y0, x0, z1, y1, x1 = transform.box
        step = (z1 - z0) / transform.slices
        positions = [z0 + (index + 0.5) * step - 0.5 for index in range(start, stop)]
        # What the slices lie between, so that no more goes to a device.
        low, high = math.floor(positions[0]), math.ceil(positions[-1]) + 1
        planes = ingest_volume(
            scan.voxels[_inside((low, y0, x0, high, y1, x1))],
            (stop - start, self.image_size, self.image_size),
            slope=scan.slope,
            intercept=scan.intercept,
            windows=self.config.slice_windows,
            z_positions=[position - low for position in positions],
            device=device,
        )
        return self.normalise(planes.transpose(0, 1))

    def normalise(self, images: Tensor) -> Tensor:
        """(S, 3, R, R) in 0-1 -> mean and std of the image encoder's training."""
        mean, std = (
            torch.tensor(value, device=images.device).view(1, 3, 1, 1)
            for value in (self.config.slice_mean, self.config.slice_std)
        )
        return (images - mean) / std

    def _window(self, scan: ScanArray, transform: GridTransform) -> tuple[float, float]:
        if self.config.normalisation == "window":
            return self.config.window
        z0, y0, x0, z1, y1, x1 = transform.box
        values = scan.voxels[z0:z1, y0:y1, x0:x1]
        if self.config.normalisation == "percentile":
            # M3D-Seg: voxels above the mean are foreground; its 0.05 and 99.95 percentiles become 0 and 1.
            foreground = values[values > values.mean()]
            # A constant scan has none.
            low, high = np.percentile(foreground if foreground.size else values, (0.05, 99.95))
        else:
            low, high = values.min(), values.max()
        low, high = sorted((float(low) * scan.slope + scan.intercept, float(high) * scan.slope + scan.intercept))
        # Values that do not differ become 0: a step of a whole unit keeps their rounding from being blown up.
        return low, high if high > low + 1e-3 else low + 1


def _inside(box: Box) -> tuple[slice, slice, slice]:
    return tuple(slice(start, stop) for start, stop in zip(box[:3], box[3:]))


def foreground_box(scan: ScanArray, threshold_hu: float) -> Box:
    """Bounding box of the patient: the largest connected region above a threshold, table and air left out.

    Works on every nth voxel (about 3 million at most), so the box may be a step larger than the patient.

    Args:
        scan: The scan.
        threshold_hu: Voxels above belong to the patient.

    Returns:
        (z0, y0, x0, z1, y1, x1), half open; the whole scan when nothing is above the threshold.
    """
    shape = np.array(scan.voxels.shape)
    step = np.maximum(1, np.round(shape / (96, 128, 128))).astype(int)
    coarse = scan.voxels[:: step[0], :: step[1], :: step[2]]
    body = coarse.astype(np.float32) * scan.slope + scan.intercept > threshold_hu
    # In-plane opening parts the table from the back.
    opened = ndimage.binary_opening(body, np.ones((1, 3, 3)))
    labels, count = ndimage.label(opened)
    if not count:
        return (0, 0, 0, *(int(s) for s in shape))
    sizes = np.bincount(labels.ravel())[1:]
    where = ndimage.find_objects(labels)[sizes.argmax()]
    low = [max(0, (s.start - 1) * int(n)) for s, n in zip(where, step)]
    high = [min(int(m), (s.stop + 1) * int(n)) for s, n, m in zip(where, step, shape)]
    return (*low, *high)
