"""NIfTI, NRRD and MetaImage files as stored voxels with their affine, checked before memory is taken."""

import gzip
import os
import re
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import Opener
from nibabel.spatialimages import HeaderDataError

from medvl_sam2.engine.geometry import LPS_TO_RAS, InputError

NIFTI = (".nii", ".nii.gz")
ITK_READERS = {".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
DEFLATE_LIMIT = 1032
"""Deflate cannot expand by more than this factor, so a header that promises more is false."""

_LONGEST_HEADER = 1 << 20
_MOST_SURPLUS = 64 << 20
_ZLIB_OR_GZIP = 47
_UNPLACED = "the header gives no patient orientation (no {}): left and right are a guess"
_UNREADABLE = (
    ImageFileError,
    HeaderDataError,
    EOFError,
    OSError,
    zlib.error,
    ValueError,
    LookupError,
    RuntimeError,
    MemoryError,
)


@dataclass(eq=False)
class RawImage:
    """An image as its file stores it.

    Attributes:
        voxels: (I, J, K) or, for several values per voxel, (I, J, K, C).
        affine: (4, 4), index (i, j, k) -> RAS millimetres.
        shape: Shape in the file, trailing axes of length 1 kept.
        slope: Value = stored * slope + intercept.
        intercept: See ``slope``.
        header: nibabel header, NIfTI only.
        fields: Text fields of a NRRD or MetaImage header.
        warnings: Sentences about the header.
    """

    voxels: np.ndarray
    affine: np.ndarray
    shape: tuple[int, ...]
    slope: float = 1.0
    intercept: float = 0.0
    header: Any = None
    fields: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def suffix_of(path: Path) -> str:
    """The extension that decides the format, lower case; ".nii.gz" and ".seg.nrrd" count as one."""
    name = path.name.lower()
    for double in (".nii.gz", ".seg.nrrd"):
        if name.endswith(double):
            return double
    return path.suffix.lower()


def read_raw(path: Path) -> RawImage:
    """Reads a NIfTI, NRRD or MetaImage file by its extension.

    Raises:
        InputError: when the file is cut short, damaged, of another format, or not a single 3D image.
    """
    suffix = suffix_of(path)
    if suffix not in NIFTI and suffix.removeprefix(".seg") not in ITK_READERS:
        raise InputError(f"{path}: not an image file; expected .nii, .nii.gz, .nrrd, .seg.nrrd, .mha or .mhd")
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; copy it again")
    return read_nifti(path) if suffix in NIFTI else read_itk(path)


def read_nifti(path: Path) -> RawImage:
    """Reads NIfTI without applying its scale; an uncompressed file is mapped, not loaded."""
    try:
        image = nib.load(path)
        proxy, affine = image.dataobj, image.affine
        units = image.header.get_xyzt_units()[0]
        with Opener(path) as stream:
            stored = type(image.header).from_fileobj(stream, check=False)
    except _UNREADABLE as error:
        raise InputError(f"{path}: not a readable NIfTI file ({_brief(error)}); export it again") from error
    if not isinstance(image, (nib.Nifti1Image, nib.Nifti2Image)):
        raise InputError(f"{path}: is {type(image).__name__}, not NIfTI, and its orientation is not sure; convert it")
    shape = one_frame(proxy.shape, path)
    if not stored["sform_code"] and not (np.abs(stored["pixdim"][1:4]) > 0).all():
        # nibabel would take 1 mm instead.
        sizes = " x ".join(f"{size:g}" for size in stored["pixdim"][1:4])
        raise InputError(f"{path}: the voxel spacing is {sizes} mm; set the true spacing in the header")
    if units not in ("mm", "unknown"):
        raise InputError(f"{path}: the header gives lengths in {units}; save it with millimetres")
    size = proxy.offset + int(np.prod(shape, dtype=object)) * proxy.dtype.itemsize
    check_size(path, size, packed=path.suffix.lower() == ".gz")
    try:
        voxels = _inflate(path, proxy) if path.suffix.lower() == ".gz" else proxy.get_unscaled()
    except _UNREADABLE as error:
        raise InputError(f"{path}: cut short or damaged ({_brief(error)}); copy or download it again") from error
    return RawImage(
        voxels.reshape(shape, order="F"),
        affine,
        tuple(proxy.shape),
        float(proxy.slope),
        float(proxy.inter),
        image.header,
        warnings=_form_warnings(image.header),
    )


def read_itk(path: Path) -> RawImage:
    """Reads NRRD or MetaImage by SimpleITK; several values per voxel stay as a last axis."""
    data, offset, packed = _find_voxels(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(ITK_READERS[path.suffix.lower()])
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        shape = one_frame(reader.GetSize(), path)
        kind = sitk.GetArrayViewFromImage(sitk.Image([1, 1, 1], reader.GetPixelID())).dtype
        size = int(np.prod(shape, dtype=object)) * reader.GetNumberOfComponents() * kind.itemsize
        check_size(path, size, packed=packed, stored=data.stat().st_size - offset)
        if packed and path.suffix.lower() in (".mha", ".mhd"):
            _check_inflated(path, data, offset, size)
        image = reader.Execute()
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"{path}: not readable ({_brief(error)}); check its header, or export it again") from error
    # ITK's arrays are (k, j, i) or (k, j, i, component).
    voxels = sitk.GetArrayFromImage(image)
    components = image.GetNumberOfComponentsPerPixel()
    voxels = voxels.reshape(*shape[::-1], *((components,) if components > 1 else ()))
    dimension = image.GetDimension()
    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(dimension, dimension)[:3, :3]
    affine[:3, :3] = direction * np.array(image.GetSpacing()[:3])
    affine[:3, 3] = image.GetOrigin()[:3]
    fields = _fields(reader)
    voxels = voxels.transpose(2, 1, 0, *range(3, voxels.ndim))
    unplaced = path.suffix.lower() in (".nrrd", ".nhdr") and fields.get("NRRD_space") != "left-posterior-superior"
    warnings = (_UNPLACED.format("space"),) if unplaced else ()
    return RawImage(voxels, LPS_TO_RAS @ affine, tuple(reader.GetSize()), fields=fields, warnings=warnings)


def one_frame(shape: tuple[int, ...], path: Path) -> tuple[int, int, int]:
    """The 3D shape of an image with one frame.

    Raises:
        InputError: for 2D images, several frames, or sizes below 1.
    """
    shape = tuple(int(n) for n in shape)
    if any(n < 1 for n in shape):
        raise InputError(f"{path}: the header gives the size {shape}; it is damaged, export it again")
    if len(shape) < 3:
        raise InputError(f"{path}: a 2D image of size {shape}; give a 3D scan")
    frames = int(np.prod(shape[3:], dtype=object))
    if frames != 1:
        raise InputError(f"{path}: holds {frames} frames (shape {shape}); save the one you want as a 3D file")
    return shape[:3]


def check_size(path: Path, size: int, *, packed: bool, stored: int | None = None) -> None:
    """Refuses a header that promises more bytes than its file can hold or this machine has memory for.

    Args:
        path: The file, for the message.
        size: Bytes the header promises.
        packed: Whether the file may be compressed.
        stored: Bytes on disk; those of ``path`` when None.
    """
    stored = path.stat().st_size if stored is None else stored
    if size > stored * (DEFLATE_LIMIT if packed else 1):
        raise InputError(
            f"{path}: cut short or damaged (its header promises {size:,} bytes, it has {stored:,});"
            " copy or download it again"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise InputError(
            f"{path}: needs {size / 1e9:,.1f} GB, this machine has {memory / 1e9:,.1f} GB; crop or resample the scan"
        )


def _inflate(path: Path, proxy: Any) -> np.ndarray:
    """Reads the voxels of a .nii.gz to its very end, where gzip keeps the checksum that nibabel never reaches."""
    voxels = np.empty(int(np.prod(proxy.shape)), dtype=proxy.dtype)
    target = memoryview(voxels.view(np.uint8))
    with gzip.open(path) as stream:
        stream.read(proxy.offset)
        filled = 0
        while filled < len(target):
            count = stream.readinto(target[filled : filled + (1 << 20)])
            if not count:
                raise EOFError(f"{len(target) - filled} bytes missing")
            filled += count
        surplus = 0
        while block := stream.read(1 << 20):
            surplus += len(block)
            if surplus > _MOST_SURPLUS:
                raise ValueError("goes on long after the last voxel")
    return voxels


def _form_warnings(header: Any) -> tuple[str, ...]:
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if not sform and not qform:
        return (_UNPLACED.format("sform or qform code"),)
    if sform and qform:
        try:
            other = header.get_qform()
        except ValueError:
            return ("the qform of the header is damaged: the sform is used",)
        corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * [*header["dim"][1:4], 1]
        distance = np.linalg.norm(corners @ (header.get_sform() - other).T, axis=1).max()
        if distance > min(header.get_zooms()[:3]):
            return (f"sform and qform of the header disagree by up to {distance:.0f} mm: the sform is used",)
    return ()


def _find_voxels(path: Path) -> tuple[Path, int, bool]:
    """Where a NRRD or MetaImage header keeps its voxels: file, offset in it, and whether they are compressed.

    A header could name any file on the machine; only a plain name in the same folder is let through.
    """
    nrrd = path.suffix.lower() in (".nrrd", ".nhdr")
    packed, place = False, 0
    with path.open("rb") as stream:
        for line in stream.read(_LONGEST_HEADER).splitlines(keepends=True):
            place += len(line)
            key, _, value = re.sub(r"[:=]", "\n", line.decode("latin-1"), count=1).partition("\n")
            key, value = key.strip().lower(), value.strip()
            if (nrrd and not line.strip()) or (key == "elementdatafile" and value.upper() == "LOCAL"):
                return path, place, packed
            if key in ("compresseddata", "encoding"):
                packed = value.lower() not in ("false", "raw")
            if key in ("elementdatafile", "data file", "datafile"):
                if value != Path(value).name or value == "LIST" or not (path.parent / value).is_file():
                    raise InputError(
                        f"{path}: names the voxel file {value!r}; put one plain file beside it, or save it in one piece"
                    )
                return path.parent / value, 0, packed
    raise InputError(f"{path}: not a readable header (it does not end); export the image again")


def _check_inflated(path: Path, data: Path, offset: int, size: int) -> None:
    """Inflates the voxels of a MetaImage once to count them: ITK leaves missing ones as it found the memory."""
    inflater, count = zlib.decompressobj(_ZLIB_OR_GZIP), 0
    with data.open("rb") as stream:
        stream.seek(offset)
        while not inflater.eof and count <= size and (block := inflater.unconsumed_tail or stream.read(1 << 20)):
            count += len(inflater.decompress(block, 1 << 24))
    if count != size:
        raise InputError(
            f"{path}: cut short or damaged ({count} bytes of voxels, not {size}); copy or download it again"
        )


def _fields(reader: sitk.ImageFileReader) -> dict[str, str]:
    """Text fields of a header; those that are not text are left out."""
    fields = {}
    for key in reader.GetMetaDataKeys():
        with suppress(TypeError, UnicodeError):
            fields[key] = reader.GetMetaData(key)
    return fields


def _brief(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].split("): ")[-1][:160] if lines else type(error).__name__
