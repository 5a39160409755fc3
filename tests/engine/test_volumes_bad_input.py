"""Files that cannot be read: one clear sentence that names the file and the remedy, and no memory taken first."""

import gzip
import resource
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medvl_sam2.engine.volumes import InputError, Volume, read_mask, read_volume

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def refused(path: Path, message: str) -> None:
    """Reading fails with one sentence that starts with the path; nothing else is raised."""
    with pytest.raises(InputError, match=message) as caught:
        read_volume(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert ";" in text, "the remedy stands behind a semicolon"


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = LPS) -> Path:
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def patch(path: Path, offset: int, form: str, *values) -> Path:
    """Overwrites header fields of a .nii or .nii.gz."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as stream:
        content = bytearray(stream.read())
    struct.pack_into(form, content, offset, *values)
    with opened(path, "wb") as stream:
        stream.write(content)
    return path


def scan_voxels(shape: tuple[int, ...] = (20, 21, 22), kind: str = "int16") -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, shape).astype(kind)


def test_missing_file(tmp_path: Path):
    refused(tmp_path / "none.nii.gz", "no such file or folder")
    with pytest.raises(InputError, match="no such file"):
        read_mask(tmp_path / "none.nii.gz")


def test_a_path_the_system_refuses(tmp_path: Path):
    refused(tmp_path / ("a" * 300 + ".nii"), "cannot be opened .*File name too long")


@pytest.mark.parametrize("name", ["notes.txt", "picture.png", "scan", "scan.hdr"])
def test_not_a_scan(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"\x89PNG anything")
    refused(tmp_path / name, "not a scan; give .nii, .nii.gz")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.mhd"])
@pytest.mark.parametrize("content", [b"", b"some text\n" * 100, bytes(1000)])
def test_right_name_wrong_content(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, "empty|not a readable|not readable")


@pytest.mark.parametrize("name", ["a.zip"])
@pytest.mark.parametrize("content", [b"", b"some text\n" * 100])
def test_a_zip_that_is_none(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, "no DICOM image|not a zip")


@pytest.mark.parametrize("kept", [0.05, 0.3, 0.7, 0.95, 0.9995])
def test_truncated_gz(tmp_path: Path, kept: float):
    path = save(tmp_path / "a.nii.gz", scan_voxels())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    refused(path, "cut short or damaged|not a readable NIfTI file")


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.7, 0.9995])
@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha"])
def test_truncated_plain_files(tmp_path: Path, suffix: str, kept: float):
    path = tmp_path / f"a{suffix}"
    if suffix == ".nii":
        save(path, scan_voxels())
    else:
        sitk.WriteImage(sitk.GetImageFromArray(scan_voxels()), str(path), useCompression=False)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    refused(path, "cut short|not a readable|not readable")


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_truncated_compressed_itk_files(tmp_path: Path, suffix: str, kept: float):
    path = tmp_path / f"a{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(scan_voxels()), str(path), useCompression=True)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    refused(path, "cut short|not a readable|not readable")


@pytest.mark.parametrize(("old", "new"), [(b"22 21 20", b"22 21 40"), (b"MET_SHORT", b"MET_FLOAT")])
def test_compressed_mha_with_too_few_voxels(tmp_path: Path, old: bytes, new: bytes):
    """ITK reads these without a word, and fills up with what lay in memory."""
    sitk.WriteImage(sitk.GetImageFromArray(scan_voxels()), str(tmp_path / "a.mha"), useCompression=True)
    assert old in (tmp_path / "a.mha").read_bytes()
    (tmp_path / "a.mha").write_bytes((tmp_path / "a.mha").read_bytes().replace(old, new))
    refused(tmp_path / "a.mha", "cut short or damaged \\(18480 bytes of voxels, not 36960\\)")


@pytest.mark.parametrize("name", ["a.nii", "a.nrrd", "a.mha"])
def test_damaged_headers_raise_nothing_else(tmp_path: Path, name: str):
    rng = np.random.default_rng(0)
    path = tmp_path / name
    sitk.WriteImage(sitk.GetImageFromArray(scan_voxels((4, 5, 6))), str(path))
    whole = path.read_bytes()
    for _ in range(150):
        content = bytearray(whole)
        for place in rng.integers(0, 350, 3):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        try:
            read_volume(path)
        except InputError as error:
            assert str(error).startswith(str(path))
            assert "\n" not in str(error)


def test_one_flipped_bit_in_a_gz_is_seen(tmp_path: Path):
    """nibabel alone stops before the checksum and gives false voxels here."""
    path = save(tmp_path / "a.nii.gz", np.tile(np.arange(-1000, 1000, 10, dtype=np.int16), 60).reshape(20, 20, 30))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert nib.load(path).get_fdata().shape == (20, 20, 30)
    refused(path, "damaged .*; copy or download it again")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_non_finite_voxels(tmp_path: Path, value: float, kind: str):
    voxels = scan_voxels(kind=kind)
    voxels[3, 4, 5] = value
    refused(save(tmp_path / "a.nii.gz", voxels), r"1 of 9240 voxels are NaN or infinite; replace them by a value")
    voxels[:] = value
    refused(save(tmp_path / "a.nii.gz", voxels), "all voxels are NaN or infinite")
    with pytest.raises(InputError, match="all voxels are NaN or infinite"):
        Volume.from_array(voxels)


@pytest.mark.parametrize(("shape", "message"), [((20, 21), "a 2D image"), ((5, 6, 7, 3), "holds 3 frames")])
def test_two_and_four_dimensions(tmp_path: Path, shape: tuple[int, ...], message: str):
    refused(save(tmp_path / "a.nii.gz", scan_voxels(shape)), message)
    sitk.WriteImage(sitk.GetImageFromArray(scan_voxels(shape), isVector=False), str(tmp_path / "a.nrrd"))
    refused(tmp_path / "a.nrrd", "a 2D image|holds 5 frames")
    if len(shape) == 4:
        refused(save(tmp_path / "a.nii.gz", scan_voxels((5, 6, 7, 1, 3))), "holds 3 frames")


def test_colours(tmp_path: Path):
    rgb = np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    refused(save(tmp_path / "a.nii.gz", rgb), "give a grey-value scan, not colours")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True), str(tmp_path / "a.mha"))
    refused(tmp_path / "a.mha", "holds 3 values per voxel")
    refused(save(tmp_path / "c.nii", np.zeros((4, 5, 6), np.complex64)), "complex64, not single numbers")


def test_segmentation_given_as_scan(tmp_path: Path):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6), np.uint8)), str(tmp_path / "a.seg.nrrd"))
    refused(tmp_path / "a.seg.nrrd", "a segmentation, not a scan")


def test_zero_spacing_and_singular_affine(tmp_path: Path):
    flat = LPS.copy()
    flat[:3, 2] = flat[:3, 1]
    path = save(tmp_path / "a.nii.gz", scan_voxels())
    patch(path, 280, "<12f", *flat[:3].ravel())
    refused(path, "the affine is singular")
    patch(path, 280, "<12f", *np.diag([1.0, 0.0, 1.0, 1.0])[:3].ravel())
    refused(path, "the voxel spacing is 1 x 0 x 1 mm; set the true spacing")
    patch(path, 280, "<f", np.nan)
    refused(path, "not a finite 4x4 matrix")
    path = save(tmp_path / "b.nii.gz", scan_voxels())
    patch(path, 252, "<2h", 0, 0)
    patch(path, 76, "<4f", 1, 1, 1, 0)
    refused(path, "the voxel spacing is 1 x 1 x 0 mm")
    with pytest.raises(InputError, match="the voxel spacing is"):
        Volume.from_array(scan_voxels(), spacing=(1, 0, 1))
    with pytest.raises(InputError, match="the affine is singular"):
        Volume.from_array(scan_voxels(), affine=flat)


def test_zero_spacing_in_mha(tmp_path: Path):
    sitk.WriteImage(sitk.GetImageFromArray(scan_voxels()), str(tmp_path / "a.mha"))
    content = (tmp_path / "a.mha").read_bytes()
    (tmp_path / "a.mha").write_bytes(content.replace(b"ElementSpacing = 1 1 1", b"ElementSpacing = 1 0 1"))
    refused(tmp_path / "a.mha", "not readable|voxel spacing")
    (tmp_path / "a.mha").write_bytes(content.replace(b"1 0 0 0 1 0 0 0 1", b"1 0 0 1 0 0 0 0 1"))
    refused(tmp_path / "a.mha", "not readable|singular")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_header_that_promises_terabytes(tmp_path: Path, suffix: str):
    path = save(tmp_path / f"a{suffix}", scan_voxels((4, 5, 6)))
    patch(path, 40, "<8h", 3, 32767, 32767, 32767, 1, 1, 1, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, "its header promises 70,362,[0-9,]+ bytes")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize("compressed", [False, True])
def test_itk_header_that_promises_terabytes(tmp_path: Path, compressed: bool):
    for name, old, new in (("a.nrrd", b"sizes: 22 21 20", b"sizes: 32767 32767 32767"),
                           ("a.mha", b"DimSize = 22 21 20", b"DimSize = 32767 32767 32767")):  # fmt: skip
        path = tmp_path / name
        sitk.WriteImage(sitk.GetImageFromArray(scan_voxels()), str(path), useCompression=compressed)
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))
        refused(path, "its header promises")


def test_more_than_the_memory_of_this_machine(tmp_path: Path, monkeypatch):
    path = save(tmp_path / "a.nii.gz", np.zeros((200, 200, 100), np.int16))
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__)
    refused(path, "needs 0.0 GB, this machine has 0.0 GB; crop or resample the scan")


@pytest.mark.parametrize("sizes", [(3, 0, 5, 5), (3, -4, 5, 5)])
def test_sizes_below_one(tmp_path: Path, sizes: tuple[int, ...]):
    refused(patch(save(tmp_path / "a.nii", scan_voxels((4, 5, 6))), 40, "<4h", *sizes), "damaged|not a readable")


def test_lengths_that_are_not_millimetres(tmp_path: Path):
    image = nib.Nifti1Image(scan_voxels(), LPS)
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "a.nii.gz")
    refused(tmp_path / "a.nii.gz", "lengths in micron; save it with millimetres")


def test_other_neuroimaging_formats(tmp_path: Path):
    nib.save(nib.MGHImage(np.zeros((4, 5, 6), np.float32), LPS), tmp_path / "a.mgz")
    (tmp_path / "a.mgz").rename(tmp_path / "a.nii.gz")
    refused(tmp_path / "a.nii.gz", "not a readable NIfTI file")


def test_headers_without_orientation_or_with_two_are_told(tmp_path: Path):
    path = patch(save(tmp_path / "a.nii.gz", scan_voxels()), 252, "<2h", 0, 0)
    assert "gives no patient orientation" in read_volume(path).warnings[0]
    image = nib.Nifti1Image(scan_voxels(), LPS)
    image.set_sform(LPS, 1)
    image.set_qform(np.diag([1, -1, -1, 1]) @ LPS, 1)
    nib.save(image, tmp_path / "b.nii.gz")
    assert "sform and qform of the header disagree" in read_volume(tmp_path / "b.nii.gz").warnings[0]
    np.testing.assert_allclose(read_volume(tmp_path / "b.nii.gz").source.affine, LPS)


def test_nrrd_without_patient_orientation_is_told(tmp_path: Path):
    head = "NRRD0004\ntype: short\ndimension: 3\nsizes: 22 21 20\nspacings: 1 1 1\nencoding: raw\nendian: little\n\n"
    (tmp_path / "a.nrrd").write_bytes(head.encode() + scan_voxels().tobytes())
    assert "gives no patient orientation (no space)" in read_volume(tmp_path / "a.nrrd").warnings[0]


@pytest.mark.parametrize("secret", ["/etc/hostname", "../secret.raw", "LIST", "none.raw"])
def test_detached_headers_reach_only_the_file_beside_them(tmp_path: Path, secret: str):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.raw").write_bytes(bytes(120))
    voxels = scan_voxels((4, 5, 6)).astype(np.uint8)
    for name, key in (("a.mhd", "ElementDataFile = "), ("a.mha", "ElementDataFile : "), ("a.nhdr", "data file: ")):
        path = tmp_path / "in" / name
        mhd = "ObjectType = Image\nNDims = 3\nDimSize = 6 5 4\nElementType = MET_UCHAR\n"
        nrrd = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 6 5 4\nspacings: 1 1 1\nencoding: raw\n"
        head = nrrd if name == "a.nhdr" else mhd
        path.write_text(f"{head}{key}{secret}\n")
        refused(path, "names the voxel file|not a readable")
        (path.parent / "a b.raw").write_bytes(voxels.tobytes())
        path.write_text(f"{head}{key}a b.raw\n")
        np.testing.assert_array_equal(read_volume(path).to_source(read_volume(path).voxels).transpose(2, 1, 0), voxels)


def test_series_is_for_dicom_only(tmp_path: Path):
    path = save(tmp_path / "a.nii.gz", scan_voxels())
    with pytest.raises(InputError, match="series= chooses among DICOM series"):
        read_volume(path, series="1")


def test_wrong_arrays(tmp_path: Path):
    with pytest.raises(InputError, match=r"expected an array of shape \(Z, Y, X\), got \(3, 4\)"):
        Volume.from_array(np.zeros((3, 4)))
    with pytest.raises(InputError, match="the image is empty"):
        Volume.from_array(np.zeros((3, 0, 4)))
    with pytest.raises(InputError, match="not single numbers"):
        Volume.from_array(np.zeros((3, 4, 5), complex))
    with pytest.raises(InputError, match="expected None beside an affine"):
        Volume.from_array(np.zeros((3, 4, 5)), affine=LPS, spacing=(1, 1, 1))
    with pytest.raises(InputError, match="not a finite 4x4 matrix"):
        Volume.from_array(np.zeros((3, 4, 5)), affine=np.eye(3))
    with pytest.raises(InputError, match="the scale is nan"):
        Volume.from_array(np.zeros((3, 4, 5)), slope=np.nan)


def test_values_that_no_dtype_of_the_kernels_holds(tmp_path: Path):
    voxels = np.ones((4, 5, 6), np.uint64)
    voxels[1, 2, 3] = 2**64 - 1
    sitk.WriteImage(sitk.GetImageFromArray(voxels), tmp_path / "a.nrrd")
    refused(tmp_path / "a.nrrd", "holds the value 18446744073709551615")
    wide = np.ones((4, 5, 6), np.longdouble)
    wide[1, 2, 3] = np.finfo(np.longdouble).max
    if wide.dtype.itemsize > 8:
        with pytest.raises(InputError, match="array: 1 of 120 voxels are NaN or infinite; .*"):
            Volume.from_array(wide)
