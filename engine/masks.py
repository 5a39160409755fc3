"""Masks on a scan's own grid: written whole or not at all, with names, and read back from the usual formats."""

import colorsys
import gzip
import io
import os
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel.nifti1 import Nifti1Extension, Nifti1Extensions
from scipy.ndimage import affine_transform, find_objects

from medvl_sam2.engine.files import check_file, replacing
from medvl_sam2.engine.formats import LPS_TO_RAS, NIFTI, RawImage, read_raw, suffix_of
from medvl_sam2.engine.geometry import InputError, Volume, canonical_volume

WRITABLE = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".mha")
# The code TotalSegmentator gives its table; nibabel hands out its bytes, which it does not for Caret's own code 30.
_TABLE_CODE = 0


def check_writable(path: str | os.PathLike) -> None:
    """Finds out before the work begins whether a mask can be written.

    Raises:
        InputError: unknown extension, no such folder, a folder in the way, or no permission.
    """
    path = Path(path)
    if suffix_of(path) not in WRITABLE:
        raise InputError(f"{path}: cannot write this kind of file; end the name in one of {', '.join(WRITABLE)}")
    check_file(path)


def write_mask(path: str | os.PathLike, mask: np.ndarray, volume: Volume, labels: Mapping[int, str]) -> None:
    """Writes a label mask on the grid of the file the volume came from.

    NIfTI keeps the source's shape, affine, sform and qform codes, zooms and units, and gets the names as a label table
    in the header (the XML of Connectome Workbench and TotalSegmentator). ``.seg.nrrd`` is 3D Slicer's segmentation. A
    ``.mha`` header loses letters beyond ASCII at the end of a name. Equal input gives equal bytes. A file that was
    there stays until the new one is complete.

    Args:
        path: .nii.gz, .nii, .seg.nrrd, .nrrd or .mha.
        mask: (Z, Y, X) canonical, bool or integers 0-255; 0 is background.
        volume: The scan.
        labels: Names of the values 1-255; a value present in the mask without a name is called "label N".

    Raises:
        InputError: wrong shape or values, or a place that cannot be written (also a full disk).
    """
    path = Path(path)
    check_writable(path)
    mask = _as_uint8(np.asarray(mask))
    names = _all_names(mask, labels)
    own = volume.to_source(mask)
    try:
        with replacing(path, suffix_of(path)) as part:
            if suffix_of(path) in NIFTI:
                _write_nifti(part, own, volume, names, packed=suffix_of(path) == ".nii.gz")
            else:
                _write_itk(part, own, volume, names)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise InputError(f"{path}: could not be written ({reason}); free space or choose another place") from error


def read_mask(
    path: str | os.PathLike, volume: Volume | None = None, *, segment: str | None = None
) -> tuple[np.ndarray, dict[int, str]]:
    """Reads a label mask into canonical order.

    Args:
        path: NIfTI, NRRD, .seg.nrrd or MetaImage.
        volume: Scan to line up with; a mask on another grid is resampled to it (nearest voxel). None: own grid.
        segment: Name of one segment of a .seg.nrrd; it is returned as value 1.

    Returns:
        (Z, Y, X) uint8, uint16 or int32 labels, and the names the file gives, empty where it gives none.

    Raises:
        InputError: not a mask (fractions, negative values), or segments that overlap and none named.
    """
    path = Path(path)
    raw = read_raw(path)
    names = _header_names(raw, path)
    if segment is not None or raw.voxels.ndim == 4:
        raw.voxels, names = _segments(raw, path, segment)
    values = _as_labels(raw, path)
    own = canonical_volume(values, raw.affine, format="mask", path=path)
    if volume is None or (own.shape == volume.shape and np.allclose(own.affine, volume.affine, atol=1e-3)):
        return own.voxels, names
    return _resample(own, volume), names


def _as_uint8(mask: np.ndarray) -> np.ndarray:
    if mask.dtype.kind not in "biu":
        raise InputError(f"mask: expected bool or integer labels, got {mask.dtype}; threshold or round it first")
    if mask.size and (mask.min() < 0 or mask.max() > 255):
        raise InputError(f"mask: expected labels 0-255, got {mask.min()} to {mask.max()}; renumber them")
    return mask.astype(np.uint8, copy=False)


def _all_names(mask: np.ndarray, labels: Mapping[int, str]) -> dict[int, str]:
    if bad := [value for value in labels if not 1 <= value <= 255]:
        raise InputError(f"labels: expected values 1-255, got {bad}; 0 is the background")
    counts = sum(np.bincount(plane.ravel(), minlength=256) for plane in mask)
    present = np.flatnonzero(counts[1:]) + 1
    names = {int(value): f"label {value}" for value in present} | {int(v): str(n) for v, n in labels.items()}
    return dict(sorted(names.items()))


def _color(value: int) -> tuple[float, float, float]:
    """A colour per label, the golden angle apart, so that neighbours differ."""
    return colorsys.hsv_to_rgb((value * 0.618034) % 1, 0.65 + 0.3 * (value % 2), 0.95)


def _write_nifti(part: Path, own: np.ndarray, volume: Volume, names: dict[int, str], *, packed: bool) -> None:
    source = volume.source
    header, kind = None, nib.Nifti1Image
    if source.header is not None:
        header = source.header.copy()
        kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
        # The scan's own extensions describe its values, and may hold the patient's name.
        header.extensions = Nifti1Extensions()
        header["cal_min"] = header["cal_max"] = 0
        header["descrip"] = header["aux_file"] = header["db_name"] = b""
        header["intent_code"], header["intent_name"] = 0, b""
        header.set_data_dtype(np.uint8)
        header.set_slope_inter(1, 0)
    image = kind(own.reshape(source.shape), source.affine, header)
    if header is None:
        image.header.set_xyzt_units("mm")
        image.set_sform(source.affine, code=1)
        if _orthogonal(source.affine):
            image.set_qform(source.affine, code=1)
    image.header.extensions.append(Nifti1Extension(_TABLE_CODE, _label_table(names)))
    stream = io.BytesIO()
    image.to_stream(stream)
    with part.open("xb") as file:
        if packed:
            # No name and no time in the gzip header: the same mask gives the same bytes.
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=4, mtime=0) as zipped:
                zipped.write(stream.getbuffer())
        else:
            file.write(stream.getbuffer())
        file.flush()
        os.fsync(file.fileno())


def _orthogonal(affine: np.ndarray) -> bool:
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.allclose(axes.T @ axes, np.eye(3), atol=1e-4))


def _label_table(names: dict[int, str]) -> bytes:
    root = ET.Element("CaretExtension")
    info = ET.SubElement(root, "VolumeInformation", Index="0")
    table = ET.SubElement(info, "LabelTable")
    for value, name in names.items():
        red, green, blue = (f"{c:.4f}" for c in _color(value))
        label = ET.SubElement(table, "Label", Key=str(value), Red=red, Green=green, Blue=blue, Alpha="1")
        label.text = name
    ET.SubElement(info, "StudyMetaDataLinkSet")
    ET.SubElement(info, "VolumeType").text = "Label"
    return b'<?xml version="1.0" encoding="UTF-8"?>' + ET.tostring(root, encoding="utf-8")


def _write_itk(part: Path, own: np.ndarray, volume: Volume, names: dict[int, str]) -> None:
    image = sitk.GetImageFromArray(np.ascontiguousarray(own.transpose(2, 1, 0)))
    affine = LPS_TO_RAS @ volume.source.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    for key, value in _segment_fields(own, names).items():
        image.SetMetaData(key, value)
    sitk.WriteImage(image, str(part), useCompression=True)
    # ITK's writers do not always report a full disk.
    if not np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(part))), own.transpose(2, 1, 0)):
        raise OSError("the written file reads back differently")


def _segment_fields(own: np.ndarray, names: dict[int, str]) -> dict[str, str]:
    """Header fields by which 3D Slicer knows a segmentation's segments (one shared layer)."""
    fields = {
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    boxes = find_objects(own)
    for number, (value, name) in enumerate(names.items()):
        prefix = f"Segment{number}_"
        fields[prefix + "ID"] = f"Segment_{value}"
        fields[prefix + "Name"] = " ".join(name.split())
        fields[prefix + "NameAutoGenerated"] = "0"
        fields[prefix + "Color"] = " ".join(f"{c:.4f}" for c in _color(value))
        fields[prefix + "ColorAutoGenerated"] = "1"
        fields[prefix + "LabelValue"] = str(value)
        fields[prefix + "Layer"] = "0"
        # Slicer writes first and last index along i, j and k, and "0 -1" for a segment without voxels.
        box = boxes[value - 1] if value <= len(boxes) else None
        fields[prefix + "Extent"] = " ".join(f"{s.start} {s.stop - 1}" for s in box) if box else "0 -1 0 -1 0 -1"
        fields[prefix + "Tags"] = "Segmentation.Status:inprogress|"
    return fields


def _header_names(raw: RawImage, path: Path) -> dict[int, str]:
    for extension in raw.header.extensions if raw.header is not None else ():
        if b"<LabelTable" in extension.content:
            try:
                labels = ET.fromstring(extension.content.rstrip(b"\0 \n")).iter("Label")
                return {
                    int(label.get("Key")): (label.text or "").strip() for label in labels if label.get("Key") != "0"
                }
            except (ET.ParseError, TypeError, ValueError, LookupError):
                return {}
    return {value: name for name, value, _ in _segment_table(raw, path)}


def _segment_table(raw: RawImage, path: Path) -> list[tuple[str, int, int]]:
    """(name, label value, layer) of each segment a NRRD or MetaImage header lists."""
    table, number = [], 0
    while (name := raw.fields.get(f"Segment{number}_Name")) is not None:
        prefix = f"Segment{number}_"
        numbers = raw.fields.get(prefix + "LabelValue", "1"), raw.fields.get(prefix + "Layer", "0")
        if not all(text.strip().isdecimal() for text in numbers):
            raise InputError(
                f"{path}: segment {name!r} has the value and layer {numbers}; export it from 3D Slicer again"
            )
        table.append((name, int(numbers[0]), int(numbers[1])))
        number += 1
    return table


def _segments(raw: RawImage, path: Path, wanted: str | None) -> tuple[np.ndarray, dict[int, str]]:
    """One named segment as value 1, or all segments of several layers renumbered from 1."""
    table = _segment_table(raw, path)
    listed = ", ".join(repr(name) for name, _, _ in table) or "none"
    layers = raw.voxels if raw.voxels.ndim == 4 else raw.voxels[..., None]
    if not table or max(layer for _, _, layer in table) >= layers.shape[3]:
        raise InputError(f"{path}: does not list its segments; export it from 3D Slicer as .seg.nrrd again")
    if wanted is not None:
        for name, value, layer in table:
            if name.lower() == wanted.strip().lower():
                return (layers[..., layer] == value).astype(np.uint8), {1: name}
        raise InputError(f"{path}: has no segment {wanted!r}; choose from: {listed}")
    merged = np.zeros(layers.shape[:3], np.uint8 if len(table) < 256 else np.uint16)
    for number, (_, value, layer) in enumerate(table, start=1):
        mask = layers[..., layer] == value
        if (merged[mask] != 0).any():
            raise InputError(f"{path}: its segments overlap; name one with segment=... from: {listed}")
        merged[mask] = number
    return merged, {number: name for number, (name, _, _) in enumerate(table, start=1)}


def _as_labels(raw: RawImage, path: Path) -> np.ndarray:
    values = raw.voxels
    if raw.slope != 1 or raw.intercept != 0:
        values = values * np.float64(raw.slope) + raw.intercept
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high < 2**31):
        raise InputError(f"{path}: holds values from {low:g} to {high:g}, so it is not a mask; give whole labels >= 0")
    kind = np.uint8 if high < 256 else np.uint16 if high < 65536 else np.int32
    labels = np.rint(values).astype(kind) if values.dtype.kind == "f" else values.astype(kind, copy=False)
    if values.dtype.kind == "f" and not np.allclose(labels, values, rtol=0, atol=1e-3):
        raise InputError(f"{path}: holds fractions, so it is not a label mask; threshold it first")
    return labels


def _resample(own: Volume, volume: Volume) -> np.ndarray:
    """Takes for each voxel of the scan the nearest voxel of the mask; 0 outside."""
    matrix = np.linalg.inv(own.affine) @ volume.affine
    # Axes are turned from (x, y, z) to the arrays' (z, y, x).
    flipped = matrix[:3, :3][::-1, ::-1]
    return affine_transform(
        own.voxels, flipped, matrix[:3, 3][::-1], output_shape=volume.shape, order=0, mode="grid-constant", cval=0
    )
