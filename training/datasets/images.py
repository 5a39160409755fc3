"""Voxels and masks of a record, whatever it was published as."""

import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from PIL import Image, UnidentifiedImageError
from scipy import sparse

from medvl_sam2.engine.volumes import InputError, Volume, read_mask, read_volume
from medvl_sam2.training.datasets.base import Mask, Record
from medvl_sam2.training.datasets.m3d_seg import mask_shape

_PICTURES = (".png", ".jpg", ".jpeg")
_BROKEN = (OSError, ValueError, EOFError, KeyError, BadZipFile, zlib.error, UnidentifiedImageError)


@dataclass
class Scan:
    """A record's image.

    Attributes:
        voxels: (Z, Y, X) as stored.
        slope: HU, or a relative value, = voxels * slope + intercept.
        intercept: See `slope`.
        volume: With the affine, where the file has one.
        warnings: Sentences about the file.
    """

    voxels: np.ndarray
    slope: float = 1.0
    intercept: float = 0.0
    volume: Volume | None = None
    warnings: tuple[str, ...] = ()


def read_scan(record: Record, root: Path) -> Scan:
    """Read a record's image.

    Raises:
        InputError: The file is missing or broken; it is named.
    """
    path = root / record.image
    if record.format == "scan":
        volume = read_volume(path)
        intercept = volume.intercept * record.slope + record.intercept
        return Scan(volume.voxels, volume.slope * record.slope, intercept, volume, volume.warnings)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; check the path")
    voxels = _pictures(path) if record.format == "slices" else _array(path, record.format)
    return Scan(voxels, record.slope, record.intercept)


def read_masks(record: Record, root: Path, scan: Scan) -> Iterator[tuple[Mask, np.ndarray]]:
    """Read the masks of a record, each file once.

    Args:
        record: The record.
        root: Of its data set.
        scan: Its image, which masks are lined up with.

    Yields:
        Mask and its (Z, Y, X) bool voxels.

    Raises:
        InputError: A file is missing, broken or of another shape; it is named.
    """
    by_path: dict[str, list[Mask]] = {}
    for mask in record.masks:
        by_path.setdefault(mask.path, []).append(mask)
    for path, masks in by_path.items():
        yield from _file_masks(root / path, masks, scan)


def _file_masks(path: Path, masks: list[Mask], scan: Scan) -> Iterator[tuple[Mask, np.ndarray]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    if path.suffix in (".npz", ".npy"):
        rows = _Sparse(path) if path.suffix == ".npz" else _dense(path)
        for mask in masks:
            channel = mask.channel or 0
            if channel >= rows.shape[0]:
                raise InputError(f"{path}: expected channel {channel}, got {rows.shape[0]} channels")
            found = rows[channel] if mask.value is None else rows[channel] == mask.value
            yield mask, _fitting(path, np.asarray(found, dtype=bool), scan)
        return
    try:
        labels, _ = read_mask(path, scan.volume)
    except InputError as error:
        if "segments overlap" not in str(error):
            raise
        for mask in masks:
            segment, _ = read_mask(path, scan.volume, segment=mask.name)
            yield mask, _fitting(path, segment > 0, scan)
        return
    for mask in masks:
        yield mask, _fitting(path, labels > 0 if mask.value is None else labels == mask.value, scan)


def _fitting(path: Path, mask: np.ndarray, scan: Scan) -> np.ndarray:
    if mask.shape != scan.voxels.shape:
        raise InputError(f"{path}: expected the scan's shape {scan.voxels.shape} (Z, Y, X), got {mask.shape}")
    return mask


class _Sparse:
    """Rows of a scipy CSR mask, made dense one at a time."""

    def __init__(self, path: Path):
        size = mask_shape(path.name)
        try:
            self.rows = sparse.load_npz(path).tocsr()
        except _BROKEN as error:
            raise InputError(f"{path}: not a sparse mask ({error}); download it again") from error
        if self.rows.shape != (size[0], int(np.prod(size[1:]))):
            raise InputError(f"{path}: expected a matrix for {size}, got {self.rows.shape}")
        self.shape = size

    def __getitem__(self, channel: int) -> np.ndarray:
        # Stored (W, H, D); (Z, Y, X) is its transpose.
        return self.rows[[channel]].toarray().reshape(self.shape[1:]).T


def _dense(path: Path) -> np.ndarray:
    masks = _load(path)
    if masks.ndim != 4:
        raise InputError(f"{path}: expected a (C, D, H, W) mask, got shape {masks.shape}")
    return masks


def _array(path: Path, kind: str) -> np.ndarray:
    array = _load(path)
    if array.ndim != 4 or array.shape[0] != 1:
        raise InputError(f"{path}: expected an image of shape (1, D, H, W), got {array.shape}")
    voxels = array[0].T if kind == "m3d-seg" else array[0]
    if voxels.dtype.kind not in "iuf":
        raise InputError(f"{path}: expected numbers, got {voxels.dtype}")
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise InputError(f"{path}: holds NaN or infinite voxels; download it again")
    return voxels


def _load(path: Path) -> np.ndarray:
    try:
        # The header alone is read here; a file cut short is found by numpy when it maps it.
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except _BROKEN as error:
        raise InputError(f"{path}: not a readable .npy file ({error}); download it again") from error


def _pictures(path: Path) -> np.ndarray:
    """(Z, Y, X) uint8 of a folder of slices named by number; those of a rarer size are left out, as M3D does."""
    files = [file for file in path.iterdir() if file.suffix.lower() in _PICTURES] if path.is_dir() else []
    if not files:
        raise InputError(f"{path}: expected a folder of .png or .jpeg slices, got none")
    odd = [file.name for file in files if not re.fullmatch(r"\d+", file.stem)]
    if odd:
        raise InputError(f"{path / odd[0]}: expected slices named by number")
    planes = []
    for file in sorted(files, key=lambda file: int(file.stem)):
        try:
            with Image.open(file) as picture:
                planes.append(np.asarray(picture.convert("L")))
        except _BROKEN as error:
            raise InputError(f"{file}: not a readable picture ({error}); download it again") from error
    common = Counter(plane.shape for plane in planes).most_common(1)[0][0]
    return np.stack([plane for plane in planes if plane.shape == common])
