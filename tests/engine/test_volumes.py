"""Real scans read right: held to nibabel, SimpleITK and pydicom, each used directly on the same file."""

import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from scipy.ndimage import map_coordinates

from medvl_sam2.engine.volumes import InputError, Volume, read_mask, read_volume

NIFTI = [
    "ts_abdomen_pelvis/ct.nii.gz",
    "sts_008/ct.nii.gz",
    "odd_headers/ct_head_phantom_shear_u8_sclslope.nii.gz",
    "odd_headers/mr_RAS_u8_sclslope.nii.gz",
    "odd_headers/mr_AIL_u8_sclslope.nii.gz",
    "odd_headers/mr_bigendian_i16_LAS.nii",
    "odd_headers/mr_torso_not_ct.nii.gz",
]
ITK = ["cip_chest64/ct.nrrd", "elastix_lung/ct.mha", "slicerio_chest/CTChest4.nrrd"]
DICOM = [
    "ts_dicom_upper_abdomen/dicom",
    "cip_chest64/dicom",
    "sts_008/dicom",
    "crlm_ct_1004/CRLM-CT-1004_dicom.zip",
    "dcmqi_ct3slice/dicom.zip",
    "odd_headers/oblique_dicom",
]


def values_at(volume: Volume, index: np.ndarray) -> np.ndarray:
    """HU at integer canonical (x, y, z)."""
    whole = np.rint(index).astype(int)
    np.testing.assert_allclose(index, whole, atol=1e-3)
    return np.array([volume.hu(z)[y, x] for x, y, z in whole])


def random_indices(shape: tuple[int, ...], count: int = 200) -> np.ndarray:
    return np.random.default_rng(0).integers(0, shape[:3], size=(count, 3))


def dicom_files(path: Path, folder: Path) -> list[pydicom.Dataset]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
        path = folder
    return [pydicom.dcmread(file) for file in sorted(path.rglob("*.dcm"))]


def assert_canonical(volume: Volume) -> None:
    """Each index axis points mostly left, back and up, and the arrays are views in the stored type."""
    left_back_up = np.diag([-1, -1, 1]) @ volume.affine[:3, :3] / np.array(volume.spacing[::-1])
    assert (np.argmax(np.abs(left_back_up), axis=0) == [0, 1, 2]).all()
    assert (np.diag(left_back_up) > 0).all()
    assert volume.voxels.base is not None
    assert volume.voxels.dtype.isnative


@pytest.mark.parametrize("name", NIFTI)
def test_nifti_values_and_places(shared_data: Path, name: str):
    volume, image = read_volume(shared_data / name), nib.load(shared_data / name)
    ijk = random_indices(image.shape)
    index = volume.to_index(ijk, "voxel")
    np.testing.assert_allclose(values_at(volume, index), image.get_fdata()[tuple(ijk.T)], rtol=1e-6, atol=1e-3)
    ras = nib.affines.apply_affine(image.affine, ijk)
    np.testing.assert_allclose(volume.from_index(index, "ras"), ras, atol=1e-4)
    np.testing.assert_allclose(volume.to_index(ras, "ras"), index, atol=1e-4)
    np.testing.assert_allclose(volume.to_index(ras * [-1, -1, 1], "lps"), index, atol=1e-4)
    np.testing.assert_allclose(volume.from_index(index, "voxel"), ijk, atol=1e-6)
    assert volume.voxels.dtype == image.get_data_dtype().newbyteorder("=")
    np.testing.assert_allclose(
        np.array(volume.spacing), np.array(nib.as_closest_canonical(image).header.get_zooms())[::-1][:3], rtol=1e-2
    )
    assert_canonical(volume)


@pytest.mark.parametrize("name", [*ITK, "ts_abdomen_pelvis/ct.nii.gz", "sts_008/ct.nii.gz"])
def test_values_and_places_against_simpleitk(shared_data: Path, name: str):
    volume, image = read_volume(shared_data / name), sitk.ReadImage(str(shared_data / name))
    ijk = random_indices(image.GetSize())
    lps = np.array([image.TransformIndexToPhysicalPoint([int(n) for n in point]) for point in ijk])
    index = volume.to_index(lps, "lps")
    expected = [image[tuple(int(n) for n in point)] for point in ijk]
    np.testing.assert_allclose(values_at(volume, index), expected, atol=1e-3)
    np.testing.assert_allclose(volume.from_index(index, "voxel"), ijk, atol=1e-3)
    assert volume.source.shape == image.GetSize()
    assert_canonical(volume)


@pytest.mark.parametrize("name", DICOM)
def test_dicom_values_and_places_against_pydicom(shared_data: Path, tmp_path: Path, name: str):
    volume = read_volume(shared_data / name)
    files = dicom_files(shared_data / name, tmp_path)
    assert volume.source.shape[2] == len(files)
    rng = np.random.default_rng(1)
    for file in rng.choice(len(files), size=min(6, len(files)), replace=False):
        data = files[file]
        if data.file_meta.TransferSyntaxUID.is_compressed:
            stored = sitk.GetArrayFromImage(sitk.ReadImage(data.filename))[0].astype(float)
        else:
            stored = data.pixel_array * float(data.RescaleSlope) + float(data.RescaleIntercept)
        rows, columns = rng.integers(0, data.Rows, 20), rng.integers(0, data.Columns, 20)
        across, down = np.array(data.ImageOrientationPatient, float).reshape(2, 3)
        pitch_down, pitch_across = map(float, data.PixelSpacing)
        # DICOM PS3.3 C.7.6.2.1.1.
        lps = (
            np.array(data.ImagePositionPatient, float)
            + np.outer(columns * pitch_across, across)
            + np.outer(rows * pitch_down, down)
        )
        np.testing.assert_allclose(values_at(volume, volume.to_index(lps, "lps")), stored[rows, columns], atol=1e-3)
    assert volume.source.modality == "CT"
    assert volume.source.format == "dicom"
    assert_canonical(volume)


def test_dicom_and_nifti_of_one_scan_agree(shared_data: Path):
    dicom, nifti = read_volume(shared_data / "sts_008/dicom"), read_volume(shared_data / "sts_008/ct.nii.gz")
    np.testing.assert_array_equal(dicom.voxels, nifti.voxels)
    np.testing.assert_allclose(dicom.affine, nifti.affine, atol=1e-3)


def test_dicom_and_nrrd_of_one_scan_agree(shared_data: Path):
    dicom, nrrd = read_volume(shared_data / "cip_chest64/dicom"), read_volume(shared_data / "cip_chest64/ct.nrrd")
    np.testing.assert_array_equal(dicom.voxels, nrrd.voxels)
    np.testing.assert_allclose(dicom.affine, nrrd.affine, atol=1e-3)


def test_one_image_in_two_axis_orders_is_one_volume(shared_data: Path):
    one = read_volume(shared_data / "odd_headers/mr_RAS_u8_sclslope.nii.gz")
    two = read_volume(shared_data / "odd_headers/mr_AIL_u8_sclslope.nii.gz")
    np.testing.assert_array_equal(one.voxels, two.voxels)
    np.testing.assert_allclose(one.affine, two.affine, atol=1e-3)


def test_reader_takes_spacing_from_positions_not_thickness(shared_data: Path):
    volume = read_volume(shared_data / "ts_dicom_upper_abdomen/dicom")
    assert volume.spacing[0] == pytest.approx(2.0)
    assert not volume.warnings


def test_padding_keeps_its_value(shared_data: Path):
    volume = read_volume(shared_data / "crlm_ct_1004/CRLM-CT-1004_dicom.zip")
    assert volume.hu(20).min() == -3024
    assert volume.voxels.dtype == np.int16
    assert not volume.warnings


def test_sheared_affine_stays_true(shared_data: Path):
    volume = read_volume(shared_data / "odd_headers/ct_head_phantom_shear_u8_sclslope.nii.gz")
    axes = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    lean = np.degrees(np.arcsin(np.abs(axes[:, 1] @ axes[:, 2])))
    assert lean == pytest.approx(18.5, abs=0.1)
    assert volume.voxel_ml < np.prod(volume.spacing) / 1000
    assert "sform" in volume.warnings[0]


@pytest.mark.parametrize("name", ["mr_torso_not_ct.nii.gz", "mr_RAS_u8_sclslope.nii.gz", "mr_bigendian_i16_LAS.nii"])
def test_mr_is_told_by_its_values(shared_data: Path, name: str):
    (warning,) = read_volume(shared_data / "odd_headers" / name).warnings
    assert "without the values of a CT in HU" in warning


@pytest.mark.parametrize("name", ["ts_abdomen_pelvis/ct.nii.gz", "sts_008/dicom", *ITK])
def test_ct_raises_no_warning(shared_data: Path, name: str):
    assert read_volume(shared_data / name).warnings == ()


def test_tilt_and_uneven_gaps_are_resampled(shared_data: Path, tmp_path: Path):
    path = shared_data / "ge_head_gantry_tilt/GE_dicom.zip"
    volume = read_volume(path)
    assert "gantry tilt (18.5 degrees)" in volume.warnings[0]
    assert "uneven slice gaps (1.1, 4, 7 mm)" in volume.warnings[1]
    axes = volume.affine[:3, :3] / np.array(volume.spacing[::-1])
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-5)

    # Every voxel of a source slice lies where its header says: looked up in the result by world place, linearly.
    likeness = []
    for data in dicom_files(path, tmp_path):
        across, down = np.array(data.ImageOrientationPatient, float).reshape(2, 3)
        rows, columns = np.mgrid[100:400:7, 100:400:7].reshape(2, -1)
        pitch = float(data.PixelSpacing[0])
        lps = (
            np.array(data.ImagePositionPatient, float)
            + np.outer(columns * pitch, across)
            + np.outer(rows * pitch, down)
        )
        index = volume.to_index(lps, "lps")
        assert volume.contains(index).all()
        found = map_coordinates(volume.voxels.astype(np.float32), index[:, ::-1].T, order=1, mode="nearest")
        stored = data.pixel_array[rows, columns].astype(float)
        likeness.append(np.corrcoef(found, stored)[0, 1])
    assert min(likeness) > 0.98, likeness


@pytest.mark.parametrize(
    ("scan", "mask", "label", "low", "high"),
    [
        ("ts_abdomen_pelvis/ct.nii.gz", "ts_abdomen_pelvis/seg.nii.gz", 5, 0, 150),
        ("ts_abdomen_pelvis/ct.nii.gz", "ts_abdomen_pelvis/seg.nii.gz", 11, -1000, -500),
        ("ts_abdomen_pelvis/ct.nii.gz", "ts_abdomen_pelvis/seg.nii.gz", 77, 150, 700),
        ("ts_dicom_upper_abdomen/dicom", "ts_dicom_upper_abdomen/seg.nii.gz", 5, 40, 200),
        ("ts_dicom_upper_abdomen/dicom", "ts_dicom_upper_abdomen/seg.nii.gz", 32, 120, 700),
        ("cip_chest64/dicom", "cip_chest64/seg.nrrd", 11, -1000, -600),
        ("slicerio_chest/CTChest4.nrrd", "slicerio_chest/Segmentation.seg.nrrd", 6, -1000, -600),
        ("slicerio_chest/CTChest4.nrrd", "slicerio_chest/Segmentation.seg.nrrd", 1, 150, 700),
        ("elastix_lung/ct.mha", "elastix_lung/seg_finer_grid.mha", 1, -1000, -600),
        ("dcmqi_ct3slice/dicom.zip", "dcmqi_ct3slice/liver_seg.nrrd", 1, 20, 150),
        ("sts_008/dicom", "sts_008/seg.nii.gz", 1, 0, 100),
    ],
)
def test_masks_lie_on_their_organs(shared_data: Path, scan: str, mask: str, label: int, low: float, high: float):
    volume = read_volume(shared_data / scan)
    labels, _ = read_mask(shared_data / mask, volume)
    assert labels.shape == volume.shape
    inside = volume.voxels[labels == label] * volume.slope + volume.intercept
    assert low < inside.mean() < high


def test_left_kidney_is_on_the_patients_left(shared_data: Path):
    volume = read_volume(shared_data / "ts_abdomen_pelvis/ct.nii.gz")
    labels, names = read_mask(shared_data / "ts_abdomen_pelvis/seg.nii.gz", volume)
    values = {name: value for value, name in names.items()}
    x = {side: np.nonzero(labels == values[f"kidney_{side}"])[2].mean() for side in ("left", "right")}
    assert x["left"] > x["right"]
    z = {name: np.nonzero(labels == values[name])[0].mean() for name in ("liver", "urinary_bladder")}
    assert z["liver"] > z["urinary_bladder"]
    y = {name: np.nonzero(labels == values[name])[1].mean() for name in ("spinal_cord", "urinary_bladder")}
    assert y["spinal_cord"] > y["urinary_bladder"]


def test_a_finer_mask_lands_on_the_scan_like_simpleitk_puts_it(shared_data: Path):
    folder = shared_data / "elastix_lung"
    labels, _ = read_mask(folder / "seg_finer_grid.mha", read_volume(folder / "ct.mha"))
    scan, mask = sitk.ReadImage(str(folder / "ct.mha")), sitk.ReadImage(str(folder / "seg_finer_grid.mha"))
    expected = sitk.GetArrayFromImage(sitk.Resample(mask, scan, sitk.Transform(), sitk.sitkNearestNeighbor))
    assert (labels != expected).mean() < 1e-3
    assert labels.sum() == pytest.approx(expected.sum(), rel=2e-3)


def test_overlapping_segments_are_read_one_by_one(shared_data: Path):
    folder = shared_data / "slicerio_chest"
    volume = read_volume(folder / "CTChest4.nrrd")
    with pytest.raises(InputError, match="segments overlap; name one with segment=... from: 'ribs'"):
        read_mask(folder / "SegmentationOverlapping.seg.nrrd", volume)
    lung, names = read_mask(folder / "SegmentationOverlapping.seg.nrrd", volume, segment="Right lung")
    plain, _ = read_mask(folder / "Segmentation.seg.nrrd", volume)
    assert names == {1: "right lung"}
    np.testing.assert_array_equal(lung, plain == 5)


def test_folder_with_a_series_and_other_files_reads_the_series(shared_data: Path):
    volume = read_volume(shared_data / "sts_008")
    assert volume.shape == (51, 137, 141)
    with pytest.raises(InputError, match="none of its 1 files is a DICOM image"):
        read_volume(shared_data / "sts_008/rtstruct")
