"""DICOM series as one straight, even volume: finding the series, ordering its slices, and undoing gantry tilt.

Slices are ordered by their position along the slice normal, never by file name or instance number. What cannot be
stacked as it is (tilt, uneven gaps) is resampled with a warning; what would need a guess (missing slices, two phases
mixed) is refused.
"""

import re
import zipfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from medvl_sam2.engine.archives import MAX_FILES, unpacked
from medvl_sam2.engine.geometry import LPS_TO_RAS, InputError
from medvl_sam2.engine.resample import straighten

_IMAGES = ("CT", "MR", "PT", "NM", "OT", "")
_EVEN = 0.05
_SAME = 0.1
_STRAIGHT = 0.1
_WIDEST = 3.5
# Tag (7FE0,0010) with or without its value representation, then the length; the end of encapsulated pixel data.
_PIXEL_DATA = re.compile(rb"\xe0\x7f\x10\x00(?:O[BW]\0\0)?(.{4})", re.DOTALL)
# SOP classes of CT, enhanced CT, MR and PET images, as the file meta header ends them.
_IMAGE_CLASS = re.compile(rb"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(?:2|2\.1|4|128)\0")
_SEQUENCE_END = b"\xfe\xff\xdd\xe0\0\0\0\0"


@dataclass(frozen=True, eq=False)
class Slice:
    """One single-frame DICOM image: its file and the header fields that place it.

    ``position`` (3,) is the centre of the first pixel, ``row`` and ``column`` (3,) are the unit directions of growing
    column and row index, all LPS millimetres; ``size`` and ``pixel`` are the (columns, rows) and their pitch in mm.
    """

    path: Path
    uid: str
    group: tuple
    number: str
    description: str
    modality: str
    localizer: bool
    components: int
    bits: int
    size: tuple[int, int]
    position: np.ndarray
    row: np.ndarray
    column: np.ndarray
    pixel: tuple[float, float]
    tilt: float
    thickness: float

    def fits(self, other: "Slice") -> bool:
        """Whether both can be slices of one grid: size, pitch and directions agree (headers round the latter)."""
        return (
            self.size == other.size
            and np.allclose(self.pixel, other.pixel, rtol=1e-3)
            and np.allclose((self.row, self.column), (other.row, other.column), atol=1e-3)
        )


@dataclass(eq=False)
class Series:
    """A stacked series: voxels (I, J, K) = (column, row, slice), HU already applied, and its RAS affine."""

    voxels: np.ndarray
    affine: np.ndarray
    modality: str | None
    warnings: tuple[str, ...]


def read_dicom(path: Path, series: str | None = None) -> Series:
    """Reads the one series of a folder, a zip or a single file.

    Args:
        path: Folder (searched to its depth), .zip, or one DICOM file (a volume of one slice).
        series: Series UID, number, or description, where there are several.

    Raises:
        InputError: nothing readable, several series and none named, colour images, missing slices, mixed phases.
    """
    if path.is_dir():
        return _stack(choose_series(scan_folder(path, path), path, series), path)
    if zipfile.is_zipfile(path):
        with unpacked(path) as folder:
            return _stack(choose_series(scan_folder(folder, path), path, series), path)
    found = _read_header(path)
    if found is None:
        raise InputError(f"{path}: holds no DICOM image; give a CT slice or the folder of a series")
    result = _stack([found], path)
    result.warnings += ("one DICOM file is one slice: give its folder to read the whole series",)
    return result


def is_dicom(path: Path) -> bool:
    """Whether the file carries the DICOM mark, whatever its name."""
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def is_image(path: Path) -> bool:
    """Whether the reader of a series takes the file in; a damaged image counts, which it then names."""
    try:
        return _read_header(path) is not None
    except InputError:
        return True
    except OSError:
        return False


def scan_folder(folder: Path, path: Path) -> list[Slice]:
    """Headers of all placed DICOM images below a folder; other files are passed over.

    Args:
        folder: Where to look.
        path: What the user named, for messages.
    """
    files = sorted(islice((file for file in folder.rglob("*") if file.is_file()), MAX_FILES + 1))
    if not files:
        raise InputError(f"{path}: the folder is empty; give one that holds a DICOM series")
    if len(files) > MAX_FILES:
        raise InputError(f"{path}: holds more than {MAX_FILES} files; name the folder of one series")
    slices = [found for file in files if (found := _read_header(file)) is not None]
    if not slices:
        raise InputError(
            f"{path}: none of its {len(files)} files is a DICOM image with a position; give the folder of a CT series,"
            " or name a .nii.gz, .nrrd or .mha file itself"
        )
    return slices


def choose_series(slices: list[Slice], path: Path, wanted: str | None) -> list[Slice]:
    """Groups slices into series and picks one.

    Localizers are left out where anything else is there. A series is all images of one UID, number, description,
    orientation, size and pixel pitch.

    Raises:
        InputError: several series fit; the message lists them by name.
    """
    groups: list[list[Slice]] = []
    for item in slices:
        for group in groups:
            if group[0].group == item.group and group[0].fits(item):
                group.append(item)
                break
        else:
            groups.append([item])
    found = groups
    if wanted is None:
        found = [g for g in found if not g[0].localizer] or found
    else:
        key = str(wanted).strip().lower()
        found = [g for g in found if key in (g[0].uid.lower(), g[0].number, g[0].description.lower())]
    if len(found) == 1:
        return found[0]
    listed = "; ".join(sorted(_name(group) for group in (found or groups)))
    if not found:
        raise InputError(f"{path}: has no series {wanted!r}; choose from: {listed}")
    if len({group[0].uid for group in found}) == 1 and found[0][0].uid:
        raise InputError(f"{path}: one series mixes slices that do not fit together ({listed}); split it by folder")
    raise InputError(f"{path}: holds {len(found)} series; name one with series=... from: {listed}")


def _read_header(path: Path) -> Slice | None:
    if path.name == "DICOMDIR" or (path.suffix.lower() not in (".dcm", ".ima", "") and not is_dicom(path)):
        return None
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        with path.open("rb") as stream:
            if _IMAGE_CLASS.search(stream.read(2048)):
                raise InputError(f"{path}: a damaged DICOM image; copy or download the series again") from error
        return None

    def text(tag: str) -> str:
        return reader.GetMetaData(tag).strip(" \0") if reader.HasMetaDataKey(tag) else ""

    def numbers(tag: str) -> list[float]:
        try:
            return [float(part) for part in text(tag).split("\\") if part.strip()]
        except ValueError as error:
            raise InputError(f"{path}: tag ({tag}) is {text(tag)!r}, not numbers; export the series again") from error

    modality = text("0008|0060")
    if modality in ("CT", "MR") and numbers("0028|0008") > [1]:
        raise InputError(f"{path}: multi-frame DICOM; convert it to NIfTI (dcm2niix does) and give that")
    position, axes, pitch = numbers("0020|0032"), numbers("0020|0037"), numbers("0028|0030")
    if modality not in _IMAGES or len(position) != 3 or len(axes) != 6 or len(pitch) != 2:
        return None
    row, column = (_unit(axes[:3], path), _unit(axes[3:], path))
    if abs(row @ column) > 1e-2 or min(pitch) <= 0:
        raise InputError(f"{path}: pixel spacing {pitch} or orientation {axes} is impossible; export the series again")
    size = reader.GetSize()[:2]
    uid, number, description = text("0020|000e"), text("0020|0011"), text("0008|103e")
    return Slice(
        path=path,
        uid=uid,
        # Some writers give each slice a study of its own; the series UID alone is unique by the standard.
        group=(uid or text("0020|000d"), number, description, modality),
        size=(size[0], size[1]),
        number=number,
        description=description,
        modality=modality,
        localizer="LOCALIZER" in text("0008|0008").upper(),
        bits=int((numbers("0028|0100") or [16])[0]),
        components=reader.GetNumberOfComponents(),
        position=np.array(position),
        row=row,
        column=column,
        pixel=(pitch[1], pitch[0]),
        tilt=(numbers("0018|1120") or [0.0])[0],
        thickness=(numbers("0018|0050") or [0.0])[0],
    )


def _unit(vector: list[float], path: Path) -> np.ndarray:
    length = float(np.linalg.norm(vector))
    if not 0.9 < length < 1.1:
        raise InputError(f"{path}: the image orientation is not a direction ({vector}); export the series again")
    return np.array(vector) / length


def _name(group: list[Slice]) -> str:
    first = group[0]
    columns, rows = first.size
    label = " ".join(part for part in (first.number and f"{first.number}:", first.description) if part)
    kind = " localizer" if first.localizer else ""
    uid = f", UID {first.uid}" if first.uid else ""
    return f"'{label or 'unnamed'}' ({first.modality}{kind}, {len(group)} slices of {columns}x{rows}{uid})"


def _stack(slices: list[Slice], path: Path) -> Series:
    first = slices[0]
    normal = np.cross(first.row, first.column)
    normal /= np.linalg.norm(normal)
    slices = sorted(slices, key=lambda item: float(item.position @ normal))
    if any(item.components != 1 for item in slices):
        raise InputError(f"{path}: a colour image (RGB), not a scan in HU; give the original CT series")
    slices = _drop_copies(slices, normal, path)
    heights = np.array([item.position @ normal for item in slices])
    gaps = np.diff(heights)
    gap = float(np.median(gaps)) if len(gaps) else (first.thickness if first.thickness > 0 else 1.0)
    _refuse_missing(heights, gap, path)
    offsets = np.array([item.position - slices[0].position for item in slices])
    sideways = offsets - np.outer(heights - heights[0], normal)
    even = np.linspace(heights[0], heights[-1], len(heights))
    is_even = bool(np.abs(heights - even).max() <= _EVEN * gap)
    is_straight = bool(np.abs(sideways).max() <= _STRAIGHT * min(first.pixel))
    voxels, warnings = _load(slices, path), []
    start = slices[0].position
    if is_even and is_straight:
        if len(gaps):
            gap = (heights[-1] - heights[0]) / len(gaps)
        if abs(first.tilt) > 0.5 and abs(normal[2]) > 0.999:
            warnings.append(f"the header states a gantry tilt of {first.tilt:g} degrees, the slice positions show none")
    else:
        shifts = sideways @ np.stack([first.row, first.column], axis=1) / np.array(first.pixel)
        lowest = float(voxels.min())
        fill = -1024.0 if first.modality == "CT" and lowest < 0 else lowest
        voxels, corner = straighten(voxels, heights - heights[0], shifts, gap, fill)
        start = start + corner[0] * first.pixel[0] * first.row + corner[1] * first.pixel[1] * first.column
        if not is_straight:
            lean = np.degrees(np.arctan2(np.linalg.norm(sideways[-1]), heights[-1] - heights[0]))
            warnings.append(f"gantry tilt ({lean:.1f} degrees): resampled to a straight grid")
        if not is_even:
            listed = ", ".join(f"{g:g}" for g in sorted(set(np.round(gaps, 1))))
            warnings.append(f"uneven slice gaps ({listed} mm): resampled to {gap:.3g} mm")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = first.row * first.pixel[0], first.column * first.pixel[1]
    affine[:3, 2], affine[:3, 3] = normal * gap, start
    return Series(voxels.transpose(2, 1, 0), LPS_TO_RAS @ affine, first.modality or None, tuple(warnings))


def _drop_copies(slices: list[Slice], normal: np.ndarray, path: Path) -> list[Slice]:
    gaps = np.diff([item.position @ normal for item in slices])
    gaps = gaps[gaps > 1e-3]
    closest = max(1e-3, _SAME * float(np.quantile(gaps, 0.75, method="lower"))) if len(gaps) else 1e-3
    kept = slices[:1]
    for item in slices[1:]:
        if (item.position - kept[-1].position) @ normal > closest:
            kept.append(item)
        elif item.path.read_bytes() != kept[-1].path.read_bytes():
            raise InputError(
                f"{path}: two different slices lie at one position ({kept[-1].path.name}, {item.path.name}): several"
                " phases or echoes in one series; separate them and give one"
            )
    return kept


def _refuse_missing(heights: np.ndarray, gap: float, path: Path) -> None:
    """A few gaps of twice the usual one, or any much wider, are lost slices; other mixes were planned."""
    steps = np.diff(heights) / gap if len(heights) > 1 else np.ones(1)
    wide = np.round(steps) >= 2
    whole = np.abs(steps - np.round(steps)) <= _EVEN
    if (wide.any() and whole.all() and wide.mean() < 0.25) or steps.max() > _WIDEST:
        place = int(steps.argmax())
        raise InputError(
            f"{path}: slices are missing: a gap of {steps[place] * gap:.1f} mm after {heights[place]:.1f} mm along the"
            f" slice axis, where {gap:.3g} mm is usual; complete the series"
        )


def _load(slices: list[Slice], path: Path) -> np.ndarray:
    """Pixels of all slices, (K, J, I), rescaled by each slice's own slope and intercept."""
    stack = None
    for k, item in enumerate(slices):
        if not _is_whole(item):
            raise InputError(f"{path}: {item.path.name} is cut short; copy or download the series again")
        try:
            plane = sitk.GetArrayFromImage(sitk.ReadImage(str(item.path), imageIO="GDCMImageIO"))
        except RuntimeError as error:
            raise InputError(f"{path}: the pixels of {item.path.name} cannot be decoded; export it again") from error
        plane = plane.reshape(plane.shape[-2:])
        if plane.dtype == np.float64:
            plane = plane.astype(np.float32)
        elif plane.dtype == np.int32 and plane.min() >= -(1 << 15) and plane.max() < 1 << 15:
            # The decoder widens 16-bit pixels that might, with their intercept, leave 16 bits; CT values never do.
            plane = plane.astype(np.int16)
        if stack is None:
            stack = np.empty((len(slices), *plane.shape), dtype=plane.dtype)
        elif plane.dtype != stack.dtype:
            stack = stack.astype(np.result_type(stack.dtype, plane.dtype))
        stack[k] = plane
    return stack


def _is_whole(item: Slice) -> bool:
    """Whether the pixel data reach to their end; the decoder fills up a file that was cut short and says nothing."""
    content = item.path.read_bytes()
    length = item.size[0] * item.size[1] * item.components * item.bits // 8
    for found in _PIXEL_DATA.finditer(content):
        stated = int.from_bytes(found.group(1), "little")
        if stated == length + length % 2:
            return found.end() + stated <= len(content)
        if stated == 0xFFFFFFFF:
            return content.rfind(_SEQUENCE_END) > found.end()
    return True
