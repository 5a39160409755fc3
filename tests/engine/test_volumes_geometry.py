"""Geometry of NIfTI, NRRD and MHA files in any orientation, by property: what is written at a place is read there."""

import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from medvl_sam2.engine.volumes import InputError, Volume, read_mask, read_volume, write_mask
from medvl_sam2.kernels.volume_ingest import ingest_volume

LIMITS = settings(max_examples=40, deadline=None)


@st.composite
def affines(draw: st.DrawFn, shear: bool = True) -> np.ndarray:
    """A random index -> RAS affine: axis order, flips, rotation, spacing, shift and some shear."""
    order = draw(st.permutations([0, 1, 2]))
    signs = draw(st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3))
    turn = draw(st.tuples(*[st.floats(-25, 25)] * 3))
    spacing = draw(st.tuples(*[st.floats(0.3, 9.0)] * 3))
    shift = draw(st.tuples(*[st.floats(-500, 500)] * 3))
    matrix = np.eye(3)[:, order] * signs
    if shear:
        matrix[0] += draw(st.floats(-0.3, 0.3)) * matrix[1]
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", turn, degrees=True).as_matrix() @ matrix * spacing
    affine[:3, 3] = shift
    return affine


def random_voxels(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(-1024, 2000, rng.integers(1, 7, 3)).astype(rng.choice(["<i2", ">i2", "<i4", ">f4", "<f8"]))


def assert_same_places(volume: Volume, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Each voxel of the (i, j, k) array has its value at its own index, and in RAS and LPS space."""
    ijk = np.argwhere(np.ones(voxels.shape))
    ras = nib.affines.apply_affine(affine, ijk)
    tolerance = 1e-4 * max(1.0, np.abs(affine).max())
    index = volume.to_index(ijk, "voxel")
    np.testing.assert_allclose(volume.from_index(index, "ras"), ras, atol=tolerance)
    np.testing.assert_allclose(volume.from_index(index, "lps"), ras * [-1, -1, 1], atol=tolerance)
    np.testing.assert_allclose(volume.to_index(ras, "ras"), index, atol=1e-2)
    np.testing.assert_allclose(volume.to_index(volume.from_index(index, "lps"), "lps"), index, atol=1e-6)
    x, y, z = np.rint(index).astype(int).T
    found = volume.voxels[z, y, x] * volume.slope + volume.intercept
    np.testing.assert_allclose(found, voxels[tuple(ijk.T)], rtol=1e-6)
    assert volume.contains(index).all()
    assert volume.contains(ijk, "voxel").all()
    assert not volume.contains(index + np.array(volume.shape[::-1])).any()
    assert sorted(volume.shape) == sorted(voxels.shape)


def assert_axes_point_left_back_up(volume: Volume) -> None:
    """No other order and sign of the axes comes closer to LPS."""
    unit = np.diag([-1, -1, 1]) @ volume.affine[:3, :3] / np.array(volume.spacing[::-1])
    assert (np.diag(unit) > 0.4).all()


@LIMITS
@given(affine=affines(), seed=st.integers(0, 2**32 - 1))
def test_nifti_round_trip(affine: np.ndarray, seed: int):
    voxels = random_voxels(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.nii{'.gz' if seed % 2 else ''}"
        image = nib.Nifti1Image(voxels, affine)
        nib.save(image, path)
        volume = read_volume(path)
        assert_same_places(volume, voxels, affine)
        assert_axes_point_left_back_up(volume)
        np.testing.assert_array_equal(volume.to_source(volume.voxels), voxels)

        mask = np.random.default_rng(seed).integers(0, 4, volume.shape).astype(np.uint8)
        write_mask(Path(folder) / "m.nii.gz", mask, volume, {1: "one"})
        written = nib.load(Path(folder) / "m.nii.gz")
        np.testing.assert_array_equal(written.affine, nib.load(path).affine)
        assert written.shape == voxels.shape
        np.testing.assert_array_equal(np.asarray(written.dataobj), volume.to_source(mask))
        np.testing.assert_array_equal(read_mask(Path(folder) / "m.nii.gz")[0], mask)


@LIMITS
@given(affine=affines(shear=False), seed=st.integers(0, 2**32 - 1), suffix=st.sampled_from([".nrrd", ".mha"]))
def test_itk_round_trip(affine: np.ndarray, seed: int, suffix: str):
    voxels = random_voxels(seed)
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(voxels.astype(voxels.dtype.newbyteorder("=")).transpose(2, 1, 0))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        sitk.WriteImage(image, str(path))
        volume = read_volume(path)
        assert_same_places(volume, voxels, affine)
        assert_axes_point_left_back_up(volume)

        mask = np.random.default_rng(seed).integers(0, 4, volume.shape).astype(np.uint8)
        write_mask(Path(folder) / f"m{suffix}", mask, volume, {2: "two"})
        written = sitk.ReadImage(str(Path(folder) / f"m{suffix}"))
        assert written.GetSize() == image.GetSize()
        np.testing.assert_allclose(written.GetDirection(), image.GetDirection(), atol=1e-9)
        np.testing.assert_allclose(written.GetOrigin(), image.GetOrigin(), atol=1e-6)
        np.testing.assert_allclose(written.GetSpacing(), image.GetSpacing(), atol=1e-9)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(written).transpose(2, 1, 0), volume.to_source(mask))


@LIMITS
@given(affine=affines(), seed=st.integers(0, 2**32 - 1))
def test_array_round_trip(affine: np.ndarray, seed: int):
    voxels = random_voxels(seed)
    assert_same_places(Volume.from_array(voxels.transpose(2, 1, 0), affine=affine), voxels, affine)


@LIMITS
@given(scan=affines(), mask=affines(), seed=st.integers(0, 1000))
def test_mask_on_another_grid_goes_to_the_nearest_voxel(scan: np.ndarray, mask: np.ndarray, seed: int):
    rng = np.random.default_rng(seed)
    scan[:3, 3] = mask[:3, 3] = 0
    volume = Volume.from_array(np.zeros((5, 6, 7), np.int16), affine=scan)
    labels = rng.integers(1, 200, (9, 8, 6)).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        nib.save(nib.Nifti1Image(labels, mask), Path(folder) / "m.nii")
        found, _ = read_mask(Path(folder) / "m.nii", volume)
    index = np.argwhere(np.ones(volume.shape[::-1]))
    place = nib.affines.apply_affine(np.linalg.inv(mask) @ volume.affine, index)
    nearest = np.floor(place + 0.5).astype(int)
    inside = ((nearest >= 0) & (nearest < labels.shape)).all(axis=1)
    # Half-way points may go to either side.
    sure = (np.abs(place - np.floor(place) - 0.5) > 1e-3).all(axis=1)
    expected = np.where(inside, labels[tuple(np.where(inside[:, None], nearest, 0).T)], 0)
    np.testing.assert_array_equal(found[tuple(index[:, ::-1].T)][sure], expected[sure])


def test_array_without_affine_is_lps():
    volume = Volume.from_array(np.zeros((2, 3, 4), np.int16), spacing=(5.0, 0.7, 0.8), slope=2, intercept=-10)
    assert volume.spacing == pytest.approx((5.0, 0.7, 0.8))
    np.testing.assert_allclose(volume.from_index([1, 1, 1], "lps"), [0.8, 0.7, 5.0])
    assert volume.hu(1).dtype == np.float32
    assert (volume.hu(1) == -10).all()
    assert volume.voxel_ml == pytest.approx(5.0 * 0.7 * 0.8 / 1000)


def test_points_of_one_and_of_many():
    volume = Volume.from_array(np.zeros((4, 5, 6), np.int16))
    assert volume.to_index([1, 2, 3]).shape == (3,)
    assert volume.to_index(np.zeros((0, 3))).shape == (0, 3)
    assert volume.contains([5.4, 4.4, 3.4])
    assert not volume.contains([5.6, 0, 0])
    assert volume.contains(np.array([[-0.4, 0, 0], [-0.6, 0, 0]])).tolist() == [True, False]


@pytest.mark.parametrize("points", [[1, 2], [[1, 2]], [[[1, 2, 3]]], [1, 2, np.nan], [np.inf, 0, 0]])
def test_bad_points_are_refused(points: list):
    with pytest.raises(InputError, match="points: expected"):
        Volume.from_array(np.zeros((4, 5, 6), np.int16)).to_index(points)


def test_unknown_space_is_refused():
    with pytest.raises(InputError, match='space: expected "voxel", "ras", "lps" or "index", got \'mni\''):
        Volume.from_array(np.zeros((4, 5, 6), np.int16)).to_index([0, 0, 0], "mni")


@pytest.mark.parametrize(
    ("kind", "highest", "held"),
    [
        ("bool", 1, "uint8"),
        ("uint32", 3000, "int32"),
        (">u4", 2**32 - 1, "int64"),
        ("uint64", 3000, "int32"),
        ("longdouble", 3000, "float64"),
    ],
)
def test_dtypes_that_the_kernels_do_not_read(kind: str, highest: int, held: str):
    """Held in another dtype with the same values; the model's grid is that of the values in float64."""
    plain = np.random.default_rng(0).integers(0, highest + 1, (6, 8, 10)).astype(np.float64)
    plain[0, 0, 0] = highest
    volumes = [Volume.from_array(voxels, affine=np.diag([2, 1, 3, 1])) for voxels in (plain.astype(kind), plain)]
    assert volumes[0].voxels.dtype == held
    np.testing.assert_array_equal(volumes[0].voxels, volumes[1].voxels)
    one, other = (ingest_volume(v.voxels, (3, 4, 5), window=(0.0, float(highest))) for v in volumes)
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert one.max() > 0


def test_four_axes_with_one_frame_keep_their_shape(tmp_path: Path):
    voxels = np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6, 1)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([1, 2, 3, 1])), tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    assert volume.shape == (6, 5, 4)
    assert volume.source.shape == (4, 5, 6, 1)
    write_mask(tmp_path / "m.nii.gz", np.ones(volume.shape, bool), volume, {1: "all"})
    assert nib.load(tmp_path / "m.nii.gz").shape == (4, 5, 6, 1)
    assert read_mask(tmp_path / "m.nii.gz", volume)[0].shape == (6, 5, 4)


def test_one_slice_is_a_volume(tmp_path: Path):
    nib.save(nib.Nifti1Image(np.full((8, 9, 1), -1000, np.int16), np.diag([1, 1, 5, 1])), tmp_path / "a.nii.gz")
    assert read_volume(tmp_path / "a.nii.gz").shape == (1, 9, 8)


def test_uncompressed_file_is_mapped_not_loaded(tmp_path: Path):
    nib.save(nib.Nifti1Image(np.zeros((8, 9, 10), np.int16), np.diag([-1, -1, 1, 1])), tmp_path / "a.nii")
    base = read_volume(tmp_path / "a.nii").voxels
    while base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
