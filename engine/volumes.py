"""Scans in, masks out: the only place that knows scan file formats.

``read_volume`` takes NIfTI, NRRD, MetaImage, a DICOM folder, a DICOM zip or one DICOM file, and returns a ``Volume`` in
canonical LPS order whose affine is true; ``write_mask`` puts a mask back on the file's own grid.
"""

import os
from pathlib import Path

import numpy as np

from medvl_sam2.engine.dicom import is_dicom, read_dicom
from medvl_sam2.engine.formats import ITK_READERS, NIFTI, read_raw, suffix_of
from medvl_sam2.engine.geometry import InputError, Source, Space, Volume, canonical_volume
from medvl_sam2.engine.masks import check_writable, read_mask, write_mask

__all__ = [
    "InputError",
    "Source",
    "Space",
    "Volume",
    "check_writable",
    "read_mask",
    "read_volume",
    "write_mask",
]

_SAMPLES = 1 << 18
_AIR = -200.0
_SOFT = 500.0


def read_volume(path: str | os.PathLike, *, series: str | None = None) -> Volume:
    """Reads one 3D scan.

    Args:
        path: .nii, .nii.gz, .nrrd, .mha, .mhd, a folder or .zip with a DICOM series, or one DICOM file.
        series: Which DICOM series (UID, number or description), where there are several.

    Returns:
        The volume, with warnings for what a reader should know (not a CT, resampled slices, guessed orientation).

    Raises:
        InputError: one sentence that names the file and the remedy.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; check the path")
        volume = _read(path, series)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}); check the path and its permissions") from error
    volume.warnings += _value_warnings(volume)
    return volume


def _read(path: Path, series: str | None) -> Volume:
    suffix = suffix_of(path) if path.is_file() else ""
    if suffix in NIFTI or suffix in ITK_READERS:
        if series is not None:
            raise InputError(f"{path}: series= chooses among DICOM series, and this is one image; leave it out")
        return _read_image(path, suffix)
    if suffix == ".seg.nrrd":
        raise InputError(f"{path}: a segmentation, not a scan; give the scan, and this file as the mask")
    if path.is_dir() or suffix in (".zip", ".dcm", ".ima") or is_dicom(path):
        found = read_dicom(path, series)
        return canonical_volume(
            found.voxels,
            found.affine,
            format="dicom",
            path=path,
            modality=found.modality,
            warnings=found.warnings,
        )
    raise InputError(
        f"{path}: not a scan; give .nii, .nii.gz, .nrrd, .mha, a DICOM folder, or a .zip with a DICOM series"
    )


def _read_image(path: Path, suffix: str) -> Volume:
    raw = read_raw(path)
    if raw.voxels.ndim != 3:
        raise InputError(f"{path}: holds {raw.voxels.shape[3]} values per voxel (colours or vectors); give a CT in HU")
    return canonical_volume(
        raw.voxels,
        raw.affine,
        format="nifti" if suffix in NIFTI else "nrrd" if suffix in (".nrrd", ".nhdr") else "mha",
        path=path,
        shape=raw.shape,
        slope=raw.slope,
        intercept=raw.intercept,
        header=raw.header,
        warnings=raw.warnings,
    )


def _value_warnings(volume: Volume) -> tuple[str, ...]:
    modality = volume.source.modality
    if modality == "MR":
        return ("MR image: values are not HU",)
    if modality not in (None, "CT", "OT"):
        return (f"{modality} image: values are not HU",)
    step = max(1, int(np.ceil((volume.voxels.size / _SAMPLES) ** (1 / 3))))
    sample = volume.voxels[::step, ::step, ::step].astype(np.float32) * volume.slope + volume.intercept
    low, middle, high = np.percentile(sample, [0.1, 50, 99.9])
    if low > _AIR or middle > _SOFT:
        kind = "CT image" if modality == "CT" else "image"
        return (
            f"{kind} without the values of a CT in HU ({low:.0f} to {high:.0f}, median {middle:.0f}): perhaps an MR"
            " image or one without rescale; results are not to be relied on",
        )
    return ()
