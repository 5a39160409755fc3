"""DICOM series made by pydicom: order, rescale, tilt, gaps, choice of series, and everything that must be refused."""

import io
import shutil
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medvl_sam2.engine.volumes import InputError, read_volume, write_mask

ROWS, COLUMNS = 24, 20
PITCH = (1.5, 1.25)
AXES = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def write_slice(path: Path, stored: np.ndarray, position, *, series: str = "1.2.3", axes=AXES, pitch=PITCH, **tags):
    """One CT slice; ``stored`` (rows, columns) int16, HU = stored * 2 - 1000 unless ``tags`` say otherwise."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID, data.SeriesInstanceUID = "1.2", series
    data.Modality, data.SeriesNumber, data.SeriesDescription = "CT", 3, "made"
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.ImagePositionPatient = [f"{v:.6f}" for v in position]
    data.ImageOrientationPatient = [f"{v:.8f}" for v in axes]
    data.PixelSpacing = list(pitch)
    data.SliceThickness, data.RescaleSlope, data.RescaleIntercept = 5, 2, -1000
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 1
    data.Rows, data.Columns = stored.shape[:2]
    for key, value in tags.items():
        setattr(data, key, value)
    data.PixelData = stored.tobytes()
    pydicom.dcmwrite(path, data, enforce_file_format=True)


def write_series(folder: Path, heights, *, seed: int = 0, **tags) -> np.ndarray:
    """Axial slices at the given z, in shuffled file order; returns the stored (slice, row, column) in order of z."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    stored = rng.integers(0, 1000, (len(heights), ROWS, COLUMNS)).astype(np.int16)
    for name, k in enumerate(rng.permutation(len(heights))):
        write_slice(folder / f"{name:03d}.dcm", stored[k], (-10, -20, heights[k]), **tags)
    return stored


def test_slices_are_ordered_by_position_and_rescaled(tmp_path: Path):
    stored = write_series(tmp_path / "ct", np.arange(7) * 2.5 - 30)
    volume = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(volume.voxels, stored * 2 - 1000)
    assert volume.spacing == pytest.approx((2.5, 1.5, 1.25))
    np.testing.assert_allclose(volume.from_index([0, 0, 0], "lps"), [-10, -20, -30])
    np.testing.assert_allclose(volume.from_index([3, 4, 5], "lps"), [-10 + 3 * 1.25, -20 + 4 * 1.5, -30 + 5 * 2.5])
    assert volume.warnings == ()


def test_each_slice_has_its_own_rescale(tmp_path: Path):
    for k in range(3):
        stored = np.full((ROWS, COLUMNS), 100, np.int16)
        write_slice(tmp_path / f"{k}", stored, (0, 0, k), RescaleSlope=k + 1, RescaleIntercept=-1000 - 0.5 * (k == 2))
    volume = read_volume(tmp_path)
    assert [volume.hu(k)[0, 0] for k in range(3)] == [-900, -800, -700.5]


def test_sagittal_series_is_turned_to_axial(tmp_path: Path):
    # Columns run to the back, rows to the feet, slices from right to left.
    stored = np.arange(3 * ROWS * COLUMNS).reshape(3, ROWS, COLUMNS).astype(np.int16)
    for k in range(3):
        write_slice(tmp_path / f"{k}", stored[k], (4 * k, -9, 50), axes=(0, 1, 0, 0, 0, -1))
    volume = read_volume(tmp_path)
    assert volume.shape == (ROWS, COLUMNS, 3)
    assert volume.spacing == pytest.approx((1.5, 1.25, 4))
    np.testing.assert_array_equal(volume.voxels, (stored * 2 - 1000).transpose(1, 2, 0)[::-1])
    # Own order is (column, row, slice), slices along row direction x column direction, here to the right.
    np.testing.assert_allclose(volume.to_index([5, 7, 0], "voxel"), [2, 5, ROWS - 1 - 7])
    np.testing.assert_allclose(volume.from_index([2, 5, ROWS - 1 - 7], "lps"), [8, -9 + 5 * 1.25, 50 - 7 * 1.5])


def ball(lps: np.ndarray) -> np.ndarray:
    """A smooth blob of 1000 HU over air, sigma 9 mm."""
    return 1000 * np.exp(-((lps - [5.0, -3.0, 20.0]) ** 2).sum(axis=-1) / (2 * 9.0**2)) - 1024


@pytest.mark.parametrize("tilt", [-22.0, 0.0, 12.0])
@pytest.mark.parametrize("uneven", [False, True])
def test_tilted_and_uneven_slices_of_a_known_object(tmp_path: Path, tilt: float, uneven: bool):
    angle = np.radians(tilt)
    axes = np.array([1, 0, 0, 0, np.cos(angle), -np.sin(angle)])
    table = np.cumsum([0, *([2.0] * 11), *([3.5 if uneven else 2.0] * 9)])
    rows, columns = np.mgrid[:80, :80]
    for k, z in enumerate(table):
        position = np.array([-48.0, -48.0, z + 48 * np.sin(angle)])
        lps = position + columns[..., None] * axes[:3] * 1.2 + rows[..., None] * axes[3:] * 1.2
        stored = np.rint((ball(lps) + 1024) * 10).astype(np.int16)
        write_slice(
            tmp_path / f"{k}", stored, position, axes=axes, pitch=(1.2, 1.2), RescaleSlope=0.1, RescaleIntercept=-1024
        )
    volume = read_volume(tmp_path)
    assert ("gantry tilt" in str(volume.warnings)) == (tilt != 0)
    assert ("uneven slice gaps" in str(volume.warnings)) == uneven
    unit = volume.affine[:3, :3] / np.array(volume.spacing[::-1])
    np.testing.assert_allclose(unit.T @ unit, np.eye(3), atol=1e-6)
    index = np.argwhere(np.ones(volume.shape[::-1]))
    found = volume.voxels[tuple(index[:, ::-1].T)]
    expected = ball(volume.from_index(index, "lps"))
    # The last slice may repeat the last source slice up to half a gap away.
    error = np.abs(found - expected)[index[:, 2] < volume.shape[0] - 1].max()
    # Linear interpolation errs by at most step^2 / 8 times the curvature, 1000 / 9^2 per mm^2, along each axis.
    steps = (1.2 if tilt else 0.0, 3.5 if uneven else 0.0)
    assert error < 0.1 + sum(step**2 for step in steps) / 8 * 1000 / 81


def test_mask_of_a_series_is_written_at_its_place(tmp_path: Path):
    write_series(tmp_path / "ct", np.arange(6) * 3.0)
    volume = read_volume(tmp_path / "ct")
    mask = np.zeros(volume.shape, np.uint8)
    mask[4, 7, 11] = 1
    write_mask(tmp_path / "m.nii.gz", mask, volume, {1: "spot"})
    image = nib.load(tmp_path / "m.nii.gz")
    assert image.shape == (COLUMNS, ROWS, 6)
    (place,) = nib.affines.apply_affine(image.affine, np.argwhere(np.asarray(image.dataobj)))
    np.testing.assert_allclose(place, [10 - 11 * 1.25, 20 - 7 * 1.5, 12.0], atol=1e-5)
    assert (image.header["sform_code"], image.header["qform_code"]) == (1, 1)
    np.testing.assert_allclose(image.header.get_qform(), image.header.get_sform(), atol=1e-5)


def test_several_series_are_listed_and_chosen_by_name(tmp_path: Path):
    write_series(tmp_path / "a", [0, 1, 2], series="1.2.1", SeriesNumber=2, SeriesDescription="Chest lung")
    other = write_series(tmp_path / "b", [0, 1], series="1.2.2", SeriesNumber=5, SeriesDescription="Abdomen", seed=3)
    with pytest.raises(InputError, match=r"holds 2 series; name one.*'2: Chest lung' \(CT, 3 slices.*'5: Abdomen'"):
        read_volume(tmp_path)
    for name in ("1.2.2", "5", "abdomen"):
        np.testing.assert_array_equal(read_volume(tmp_path, series=name).voxels, other * 2 - 1000)
    with pytest.raises(InputError, match="has no series 'Head'; choose from"):
        read_volume(tmp_path, series="Head")


def test_files_without_preamble_are_read(tmp_path: Path):
    stored = write_series(tmp_path / "ct", [0, 1, 2])
    for file in (tmp_path / "ct").iterdir():
        data = pydicom.dcmread(file)
        bare = pydicom.dataset.Dataset(data)
        bare.save_as(file, implicit_vr=True, little_endian=True, enforce_file_format=False)
        assert file.read_bytes()[128:132] != b"DICM"
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").voxels, stored * 2 - 1000)
    assert read_volume(tmp_path / "ct/000.dcm").shape == (1, ROWS, COLUMNS)


@pytest.mark.parametrize("suffix", ["", ".1.840.77", ".IMA"])
def test_names_do_not_matter(tmp_path: Path, suffix: str):
    stored = write_series(tmp_path / "ct", [0, 1, 2])
    for file in list((tmp_path / "ct").iterdir()):
        file.rename(file.with_suffix(suffix))
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").voxels, stored * 2 - 1000)


def test_run_length_encoding_is_decoded(tmp_path: Path):
    stored = write_series(tmp_path / "ct", [0, 1, 2])
    for file in (tmp_path / "ct").iterdir():
        data = pydicom.dcmread(file)
        data.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
        data.save_as(file)
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").voxels, stored * 2 - 1000)


@pytest.mark.parametrize(("bits", "sign", "offset"), [(12, 0, -1024), (16, 0, -1024), (16, 1, 0), (12, 0, 0)])
def test_pixel_formats_of_scanners(tmp_path: Path, bits: int, sign: int, offset: int):
    rng = np.random.default_rng(0)
    low, high = (-2000, 3000) if sign else (0, 1 << 12)
    stored = rng.integers(low, high, (3, ROWS, COLUMNS))
    for k in range(3):
        tags = {"BitsStored": bits, "HighBit": bits - 1, "PixelRepresentation": sign, "RescaleSlope": 1}
        write_slice(tmp_path / f"{k}", stored[k].astype(np.uint16), (0, 0, k), RescaleIntercept=offset, **tags)
    np.testing.assert_array_equal(read_volume(tmp_path).voxels.astype(int), stored + offset)


def test_localizer_beside_a_series_is_passed_over(tmp_path: Path):
    stored = write_series(tmp_path / "a", [0, 1, 2], series="1.2.1")
    write_series(tmp_path / "b", [0], series="1.2.2", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    (tmp_path / "a" / "README.txt").write_text("not an image")
    (tmp_path / "a" / "notes").write_text("not an image either")
    np.testing.assert_array_equal(read_volume(tmp_path).voxels, stored * 2 - 1000)


def test_copies_of_a_slice_count_once(tmp_path: Path):
    stored = write_series(tmp_path / "ct", [0, 1, 2])
    shutil.copy(tmp_path / "ct/000.dcm", tmp_path / "ct/copy.dcm")
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").voxels, stored * 2 - 1000)


def test_one_file_is_one_slice_with_a_warning(tmp_path: Path):
    stored = write_series(tmp_path, [4.0, 9.0])
    volume = read_volume(tmp_path / "000.dcm")
    assert volume.shape == (1, ROWS, COLUMNS)
    assert volume.spacing[0] == 5
    assert "give its folder" in volume.warnings[0]
    assert (volume.voxels[0] == stored * 2 - 1000).all(axis=(1, 2)).sum() == 1


def test_mr_and_pet_are_told(tmp_path: Path):
    write_series(tmp_path / "mr", [0, 1], Modality="MR")
    write_series(tmp_path / "pt", [0, 1], Modality="PT")
    assert read_volume(tmp_path / "mr").warnings == ("MR image: values are not HU",)
    assert read_volume(tmp_path / "pt").warnings == ("PT image: values are not HU",)


def test_stated_tilt_without_tilted_positions_is_told(tmp_path: Path):
    write_series(tmp_path, [0, 1, 2], GantryDetectorTilt=15)
    assert "tilt of 15 degrees, the slice positions show none" in read_volume(tmp_path).warnings[0]


def test_zip_reads_like_its_folder(tmp_path: Path):
    write_series(tmp_path / "ct", [0, 2, 4])
    shutil.make_archive(str(tmp_path / "ct"), "zip", tmp_path / "ct")
    folder, packed = read_volume(tmp_path / "ct"), read_volume(tmp_path / "ct.zip")
    np.testing.assert_array_equal(folder.voxels, packed.voxels)
    np.testing.assert_array_equal(folder.affine, packed.affine)


def test_missing_slices_are_refused(tmp_path: Path):
    write_series(tmp_path, [0, 2, 4, 6, 12, 14, 16, 18])
    with pytest.raises(InputError, match="slices are missing: a gap of 6.0 mm after 6.0 mm .* where 2 mm is usual"):
        read_volume(tmp_path)


def test_a_stray_slice_far_away_is_refused(tmp_path: Path):
    write_series(tmp_path, [0, 1, 2, 1e6])
    with pytest.raises(InputError, match="slices are missing"):
        read_volume(tmp_path)


def test_two_phases_in_one_series_are_refused(tmp_path: Path):
    write_series(tmp_path / "a", [0, 1, 2])
    write_series(tmp_path / "b", [0, 1, 2], seed=1)
    with pytest.raises(InputError, match="two different slices lie at one position"):
        read_volume(tmp_path)


def test_phases_a_hair_apart_are_refused(tmp_path: Path):
    write_series(tmp_path / "a", [0, 1, 2])
    write_series(tmp_path / "b", [0.02, 1.02, 2.02], seed=1)
    with pytest.raises(InputError, match="two different slices lie at one position"):
        read_volume(tmp_path)


def test_slices_of_two_sizes_in_one_series_are_refused(tmp_path: Path):
    write_series(tmp_path, [0, 1, 2])
    write_slice(tmp_path / "other", np.zeros((8, 8), np.int16), (0, 0, 3))
    with pytest.raises(InputError, match="one series mixes slices that do not fit together"):
        read_volume(tmp_path)


def test_colour_images_are_refused(tmp_path: Path):
    tags = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    bits = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelRepresentation": 0}
    for k in range(2):
        write_slice(tmp_path / f"{k}.dcm", np.zeros((8, 8, 3), np.uint8), (0, 0, k), **tags, **bits)
    with pytest.raises(InputError, match="colour image"):
        read_volume(tmp_path)


def test_multi_frame_ct_is_refused_with_the_way_out(tmp_path: Path):
    write_slice(tmp_path / "a.dcm", np.zeros((16, 8), np.int16), (0, 0, 0), Rows=8, NumberOfFrames=2)
    with pytest.raises(InputError, match="multi-frame DICOM; convert it to NIfTI"):
        read_volume(tmp_path)


def test_impossible_spacing_and_directions_are_refused(tmp_path: Path):
    write_series(tmp_path / "a", [0, 1], pitch=(0, 1))
    with pytest.raises(InputError, match="pixel spacing .* is impossible"):
        read_volume(tmp_path / "a")
    write_series(tmp_path / "b", [0, 1], axes=(1, 0, 0, 1, 0, 0))
    with pytest.raises(InputError, match="orientation .* is impossible"):
        read_volume(tmp_path / "b")
    write_series(tmp_path / "c", [0, 1], axes=(0, 0, 0, 0, 1, 0))
    with pytest.raises(InputError, match="not a direction"):
        read_volume(tmp_path / "c")


def test_empty_and_foreign_folders_are_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="the folder is empty"):
        read_volume(tmp_path / "empty")
    (tmp_path / "empty" / "a.dcm").write_bytes(b"nothing")
    with pytest.raises(InputError, match="none of its 1 files is a DICOM image"):
        read_volume(tmp_path / "empty")
    with pytest.raises(InputError, match="holds no DICOM image"):
        read_volume(tmp_path / "empty" / "a.dcm")


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("victim", ["000.dcm", "001.dcm", "002.dcm"])
def test_cut_short_slice_is_refused(tmp_path: Path, victim: str, kept: float):
    write_series(tmp_path, [0, 1, 2])
    whole = (tmp_path / victim).read_bytes()
    (tmp_path / victim).write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(InputError, match=f"{victim}.*(cut short|damaged)"):
        read_volume(tmp_path)


@pytest.mark.parametrize("lost", [4, 5000])
def test_cut_short_compressed_slice_is_refused(shared_data: Path, tmp_path: Path, lost: int):
    for file in sorted((shared_data / "ts_dicom_upper_abdomen/dicom").iterdir())[:3]:
        shutil.copy(file, tmp_path)
    victim = sorted(tmp_path.iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:-lost])
    with pytest.raises(InputError, match=f"{victim.name}.*(cut short|damaged)"):
        read_volume(tmp_path)


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../evil.dcm", "/etc/evil.dcm", "a/../../evil.dcm", "..\\evil.dcm"])
def test_zip_entries_that_leave_the_folder_are_refused(tmp_path: Path, name: str):
    with pytest.raises(InputError, match="points outside the archive"):
        read_volume(archive(tmp_path / "x.zip", {name: b"x"}))
    assert not list(tmp_path.parent.glob("evil*"))


def test_zip_links_are_refused(tmp_path: Path):
    link = zipfile.ZipInfo("link.dcm")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match="points outside the archive"):
        read_volume(tmp_path / "x.zip")


def test_zip_bombs_are_refused_before_unpacking(tmp_path: Path):
    path = archive(tmp_path / "bomb.zip", {f"{k}.dcm": bytes(40 << 20) for k in range(4)})
    assert path.stat().st_size < 1 << 20
    with pytest.raises(InputError, match="beyond the limit"):
        read_volume(path)


def test_zips_that_lie_or_are_damaged_are_refused(tmp_path: Path):
    path = archive(tmp_path / "a.zip", {"a.dcm": bytes(range(256)) * 40})
    content = bytearray(path.read_bytes())
    content[60:80] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged or encrypted"):
        read_volume(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError):
        read_volume(path)
    with pytest.raises(InputError, match="the folder is empty|none of its"):
        read_volume(archive(tmp_path / "empty.zip", {}))


def test_dicom_in_a_zip_in_memory_names(tmp_path: Path):
    write_series(tmp_path / "ct", [0, 1])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        # Two folders with equal file names, as archives of whole studies have.
        for number, file in enumerate(sorted((tmp_path / "ct").iterdir())):
            packed.write(file, f"DICOM/{number}/IM0")
    (tmp_path / "study.zip").write_bytes(buffer.getvalue())
    assert read_volume(tmp_path / "study.zip").shape == (2, ROWS, COLUMNS)
