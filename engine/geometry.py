"""A scan in memory: stored voxels in one documented orientation, and the way back to the file's own grid.

Inside the project a volume is ``(Z, Y, X)`` in the closest LPS orientation: x grows to the patient's left, y to the
back, z to the head, so ``voxels[k]`` looks like an axial image on a radiologist's screen. The conversion happens once,
here, as a permutation and flips of a view: no voxel is interpolated and none is copied.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

Space = Literal["voxel", "ras", "lps", "index"]
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_FLATTEST = 1e-3


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence with the file or argument and the remedy."""


@dataclass(frozen=True, eq=False)
class Source:
    """Where a volume came from, and all that is needed to write masks on the file's own grid.

    Attributes:
        path: File or folder that was read; None for arrays.
        format: "nifti", "dicom", "nrrd", "mha" or "array".
        shape: Shape in the file's own index order (i, j, k), with any trailing axes of length 1 kept.
        affine: (4, 4), own index (i, j, k) -> RAS millimetres.
        orientation: (3, 2) nibabel orientation that takes own axes to canonical LPS axes.
        header: nibabel header of a NIfTI file, else None.
        modality: DICOM modality ("CT", "MR", ...) where the file tells it, else None.
    """

    path: Path | None
    format: str
    shape: tuple[int, ...]
    affine: np.ndarray
    orientation: np.ndarray
    header: Any = None
    modality: str | None = None

    @property
    def name(self) -> str:
        """The path as the user gave it, for messages."""
        return "array" if self.path is None else str(self.path)


@dataclass(eq=False)
class Volume:
    """A 3D scan in canonical LPS order.

    Attributes:
        voxels: (Z, Y, X) in the stored dtype, native byte order; a view that may have negative strides (copy a slice
            before handing it to ``torch.from_numpy``). What the kernels do not read (bool, uint32, uint64, long double)
            is held in another dtype, with the same values.
        slope: HU = voxels * slope + intercept.
        intercept: See ``slope``.
        affine: (4, 4), canonical index (x, y, z) -> RAS millimetres; may be oblique or sheared.
        source: The file and its own grid.
        warnings: Sentences a user should see ("MR image: values are not HU").
    """

    voxels: np.ndarray
    slope: float
    intercept: float
    affine: np.ndarray
    source: Source
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_array(
        cls,
        voxels: np.ndarray,
        *,
        spacing: tuple[float, float, float] | None = None,
        affine: np.ndarray | None = None,
        slope: float = 1.0,
        intercept: float = 0.0,
        modality: str | None = None,
    ) -> "Volume":
        """Wraps an array that has no file.

        Args:
            voxels: (Z, Y, X) values; in the order of ``affine`` when one is given, else already canonical LPS.
            spacing: (z, y, x) millimetres of an LPS array; 1 mm when neither this nor ``affine`` is given.
            affine: (4, 4), array index (x, y, z) -> RAS millimetres, any orientation.
            slope: HU = voxels * slope + intercept.
            intercept: See ``slope``.
            modality: DICOM modality, if known.

        Raises:
            InputError: for a wrong shape, non-finite voxels or an impossible geometry.
        """
        voxels = np.asarray(voxels)
        if voxels.ndim != 3:
            raise InputError(f"voxels: expected an array of shape (Z, Y, X), got {voxels.shape}; pass one 3D scan")
        if affine is None:
            z, y, x = (1.0, 1.0, 1.0) if spacing is None else spacing
            affine = LPS_TO_RAS @ np.diag([x, y, z, 1.0])
        elif spacing is not None:
            raise InputError("spacing: expected None beside an affine, which already holds the spacing; drop one")
        return canonical_volume(
            voxels.transpose(2, 1, 0), affine, format="array", slope=slope, intercept=intercept, modality=modality
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Z, Y, X)."""
        return self.voxels.shape

    @property
    def spacing(self) -> tuple[float, float, float]:
        """(z, y, x) millimetres between voxel centres."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres (right for sheared grids too)."""
        return float(abs(np.linalg.det(self.affine[:3, :3])) / 1000)

    def hu(self, z: int) -> np.ndarray:
        """Axial slice ``z`` as (Y, X) float32 in Hounsfield units (or in the file's units where it isn't a CT)."""
        values = self.voxels[z].astype(np.float32)
        if self.slope != 1:
            values *= np.float32(self.slope)
        if self.intercept != 0:
            values += np.float32(self.intercept)
        return values

    def to_index(self, points: np.ndarray, space: Space = "voxel") -> np.ndarray:
        """Maps points to canonical voxel indices.

        Args:
            points: (N, 3) or (3,). "voxel": the file's own (i, j, k), which for DICOM, NRRD and MHA is (column, row,
                slice in order of position); "ras" / "lps": world millimetres; "index": canonical already.
            space: Which of these.

        Returns:
            Canonical (x, y, z), float64, same shape as ``points``; integers are voxel centres.

        Raises:
            InputError: for a wrong shape, non-finite numbers or an unknown space.
        """
        return _transform(self._into_index(space), points)

    def from_index(self, points: np.ndarray, space: Space = "voxel") -> np.ndarray:
        """Inverse of ``to_index``: canonical (x, y, z) to the given space."""
        return _transform(np.linalg.inv(self._into_index(space)), points)

    def contains(self, points: np.ndarray, space: Space = "index") -> np.ndarray:
        """Tells for each point, (N, 3) or (3,), whether it lies in a voxel of the volume. Returns (N,) or () bool."""
        index = self.to_index(points, space)
        return np.all((index >= -0.5) & (index < np.array(self.shape[::-1]) - 0.5), axis=-1)

    def to_source(self, mask: np.ndarray) -> np.ndarray:
        """Turns a canonical (Z, Y, X) array into the file's own (i, j, k) order; a view."""
        if mask.shape != self.shape:
            raise InputError(f"mask: expected shape {self.shape} (Z, Y, X) like the scan, got {mask.shape}")
        back = ornt_transform(axcodes2ornt("LPS"), io_orientation(self.source.affine))
        return apply_orientation(mask.transpose(2, 1, 0), back)

    def _into_index(self, space: str) -> np.ndarray:
        if space == "index":
            return np.eye(4)
        if space == "voxel":
            return np.linalg.inv(inv_ornt_aff(self.source.orientation, self.source.shape[:3]))
        if space == "ras":
            return np.linalg.inv(self.affine)
        if space == "lps":
            return np.linalg.inv(self.affine) @ LPS_TO_RAS
        raise InputError(f'space: expected "voxel", "ras", "lps" or "index", got {space!r}')


def canonical_volume(
    voxels: np.ndarray,
    affine: np.ndarray,
    *,
    format: str,
    path: Path | None = None,
    shape: tuple[int, ...] | None = None,
    slope: float = 1.0,
    intercept: float = 0.0,
    header: Any = None,
    modality: str | None = None,
    warnings: tuple[str, ...] = (),
) -> Volume:
    """Builds a ``Volume`` from an array in the file's own order, as a view.

    Args:
        voxels: (I, J, K) stored values.
        affine: (4, 4), index (i, j, k) -> RAS millimetres.
        format: See ``Source``.
        path: See ``Source``.
        shape: Shape in the file; that of ``voxels`` when None.
        slope: HU = voxels * slope + intercept.
        intercept: See ``slope``.
        header: See ``Source``.
        modality: See ``Source``.
        warnings: See ``Volume``.

    Raises:
        InputError: for an empty array, non-numbers, NaN or infinite voxels, integers beyond int64, zero spacing or a
            singular affine.
    """
    name = "array" if path is None else str(path)
    affine = np.array(affine, dtype=np.float64)
    check_affine(affine, name)
    if 0 in voxels.shape:
        raise InputError(f"{name}: the image is empty (shape {voxels.shape}); give a scan with at least one voxel")
    if voxels.dtype.kind not in "biuf":
        raise InputError(f"{name}: voxels are {voxels.dtype}, not single numbers; give a grey-value scan, not colours")
    if not voxels.dtype.isnative:
        voxels = voxels.astype(voxels.dtype.newbyteorder("="))
    voxels = _readable(voxels, name)
    if not (np.isfinite(slope) and np.isfinite(intercept) and slope != 0):
        raise InputError(f"{name}: the scale is {slope} and the offset {intercept}; correct them in the header")
    orientation = ornt_transform(io_orientation(affine), axcodes2ornt("LPS"))
    canonical = apply_orientation(voxels, orientation).transpose(2, 1, 0)
    _check_finite(canonical, name)
    source = Source(path, format, shape or voxels.shape, affine, orientation, header, modality)
    to_own = inv_ornt_aff(orientation, voxels.shape)
    return Volume(canonical, float(slope), float(intercept), affine @ to_own, source, tuple(warnings))


def check_affine(affine: np.ndarray, name: str) -> None:
    """Raises ``InputError`` unless the (4, 4) affine is finite, and has non-zero spacing and three distinct axes."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise InputError(f"{name}: the affine is not a finite 4x4 matrix; repair the header before use")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not (spacing > 1e-6).all():
        sizes = " x ".join(f"{s:g}" for s in spacing)
        raise InputError(f"{name}: the voxel spacing is {sizes} mm; set the true spacing in the header")
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < _FLATTEST:
        raise InputError(f"{name}: the affine is singular (its axes lie in one plane); repair the header before use")


def _readable(voxels: np.ndarray, name: str) -> np.ndarray:
    """The voxels in a dtype that the kernels read."""
    kind, size = voxels.dtype.kind, voxels.dtype.itemsize
    if kind == "b":
        return voxels.view(np.uint8)
    if kind == "f" and size > 8:
        # Too large a value becomes infinite, and is refused as such.
        with np.errstate(over="ignore"):
            return voxels.astype(np.float64)
    if kind == "u" and size > 2:
        highest = int(voxels.max())
        for signed in (np.int32, np.int64):
            if highest <= np.iinfo(signed).max:
                return voxels.astype(signed)
        raise InputError(f"{name}: holds the value {highest}, which no CT has; correct the voxels and save it as int16")
    return voxels


def _check_finite(voxels: np.ndarray, name: str) -> None:
    if voxels.dtype.kind != "f":
        return
    bad = sum(plane.size - int(np.count_nonzero(np.isfinite(plane))) for plane in voxels)
    if bad:
        share = "all" if bad == voxels.size else f"{bad} of {voxels.size}"
        raise InputError(
            f"{name}: {share} voxels are NaN or infinite; replace them by a value (-1024 HU is air) and save it again"
        )


def _transform(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    points = np.asarray(points, dtype=np.float64)
    if points.ndim not in (1, 2) or points.shape[-1] != 3:
        raise InputError(f"points: expected (N, 3) numbers, got shape {points.shape}")
    if not np.isfinite(points).all():
        raise InputError("points: expected finite numbers, got NaN or infinity")
    return points @ matrix[:3, :3].T + matrix[:3, 3]
