"""Masks out: headers, names, 3D Slicer's own reader, equal bytes, and no file left half written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import slicerio

from medvl_sam2.engine import masks
from medvl_sam2.engine.volumes import InputError, Volume, check_writable, read_mask, read_volume, write_mask

SUFFIXES = [".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".mha"]
NAMES = {1: "liver", 7: "left kidney <&> b\u0142onka nerki", 255: "spleen"}


@pytest.fixture
def scan(tmp_path: Path) -> Volume:
    """An oblique, anisotropic NIfTI with both codes, units, a scale and a comment in its header."""
    image = nib.Nifti1Image(np.zeros((7, 8, 9), np.int16), None)
    affine = np.array([[0.0, 0.1, -3.0, 40], [-0.8, 0.0, 0.0, -7], [0.0, 0.7, 0.4, 11], [0, 0, 0, 1]])
    affine[:3, :3] = np.linalg.svd(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))[0] * [0.8, 0.7, 3.0]
    image.set_sform(affine, 3)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"patient name"
    image.header["scl_slope"], image.header["scl_inter"] = 2, -5
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"patient name"))
    nib.save(image, tmp_path / "scan.nii.gz")
    return read_volume(tmp_path / "scan.nii.gz")


@pytest.fixture
def mask(scan: Volume) -> np.ndarray:
    labels = np.zeros(scan.shape, np.uint8)
    labels[1:3, 2:4, 3:5], labels[4, 4, 4], labels[0, 0, 0] = 1, 7, 42
    return labels


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_mask_and_names_come_back(tmp_path: Path, scan: Volume, mask: np.ndarray, suffix: str):
    write_mask(tmp_path / f"m{suffix}", mask, scan, NAMES)
    found, names = read_mask(tmp_path / f"m{suffix}", scan)
    np.testing.assert_array_equal(found, mask)
    assert found.dtype == np.uint8
    assert names == {1: NAMES[1], 7: NAMES[7], 42: "label 42", 255: NAMES[255]}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_masks_give_equal_bytes(tmp_path: Path, scan: Volume, mask: np.ndarray, suffix: str):
    write_mask(tmp_path / f"a{suffix}", mask, scan, NAMES)
    write_mask(tmp_path / f"b{suffix}", mask, scan, NAMES)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"a{suffix}", f"b{suffix}", "scan.nii.gz"]


def test_nifti_keeps_the_header_of_the_scan(tmp_path: Path, scan: Volume, mask: np.ndarray):
    write_mask(tmp_path / "m.nii.gz", mask, scan, NAMES)
    source, written = nib.load(tmp_path / "scan.nii.gz"), nib.load(tmp_path / "m.nii.gz")
    for key in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d",
                "qoffset_x", "qoffset_y", "qoffset_z", "pixdim", "dim", "xyzt_units"):  # fmt: skip
        np.testing.assert_array_equal(written.header[key], source.header[key], err_msg=key)
    np.testing.assert_array_equal(written.affine, source.affine)
    assert written.get_data_dtype() == np.uint8
    assert (written.dataobj.slope, written.dataobj.inter) == (1, 0)
    np.testing.assert_array_equal(written.get_fdata(), scan.to_source(mask))
    assert b"patient" not in written.header.binaryblock + written.header.extensions[0].content


@pytest.mark.parametrize(
    "name",
    [
        "ts_abdomen_pelvis/ct.nii.gz",
        "sts_008/ct.nii.gz",
        "odd_headers/ct_head_phantom_shear_u8_sclslope.nii.gz",
        "odd_headers/mr_AIL_u8_sclslope.nii.gz",
        "odd_headers/mr_bigendian_i16_LAS.nii",
    ],
)
def test_nifti_header_of_real_scans_survives(shared_data: Path, tmp_path: Path, name: str):
    volume, source = read_volume(shared_data / name), nib.load(shared_data / name)
    labels = np.random.default_rng(0).integers(0, 3, volume.shape).astype(np.uint8)
    write_mask(tmp_path / "m.nii.gz", labels, volume, {1: "a", 2: "b"})
    written = nib.load(tmp_path / "m.nii.gz")
    np.testing.assert_array_equal(written.affine, source.affine)
    np.testing.assert_array_equal(written.header["pixdim"], source.header["pixdim"])
    for code in ("sform_code", "qform_code"):
        assert written.header[code] == source.header[code]
    assert written.shape == source.shape
    np.testing.assert_array_equal(read_mask(tmp_path / "m.nii.gz", volume)[0], labels)
    if "shear" not in name:
        image = sitk.ReadImage(str(tmp_path / "m.nii.gz"))
        point = np.argwhere(np.asarray(written.dataobj) == 2)[5]
        assert image[tuple(int(n) for n in point)] == 2
        lps = image.TransformIndexToPhysicalPoint([int(n) for n in point])
        np.testing.assert_allclose(nib.affines.apply_affine(source.affine, point) * [-1, -1, 1], lps, atol=1e-3)


def test_names_are_where_totalsegmentator_puts_them(shared_data: Path, tmp_path: Path):
    folder = shared_data / "ts_abdomen_pelvis"
    labels, names = read_mask(folder / "seg.nii.gz")
    listed = {int(value): name for value, name in json.loads((folder / "labels.json").read_text()).items()}
    assert {value: names[value] for value in listed} == listed
    write_mask(tmp_path / "m.nii.gz", labels, read_volume(folder / "ct.nii.gz"), listed)
    again, written = read_mask(tmp_path / "m.nii.gz")
    np.testing.assert_array_equal(again, labels)
    assert written == listed
    assert nib.load(tmp_path / "m.nii.gz").header.extensions[0].get_content().startswith(b"<?xml")


@pytest.mark.parametrize("name", ["slicerio_chest/CTChest4.nrrd", "sts_008/ct.nii.gz", "sts_008/dicom"])
def test_slicer_reads_the_segmentation(shared_data: Path, tmp_path: Path, name: str):
    volume = read_volume(shared_data / name)
    labels = np.zeros(volume.shape, np.uint8)
    labels[5:9, 10:20, 30:50], labels[12, 40, 60] = 1, 2
    write_mask(tmp_path / "m.seg.nrrd", labels, volume, {1: "liver", 2: "stone", 3: "absent"})
    found = slicerio.read_segmentation(tmp_path / "m.seg.nrrd")
    own = volume.to_source(labels)
    np.testing.assert_array_equal(found["voxels"], own)
    np.testing.assert_allclose(found["ijkToLPS"], np.diag([-1, -1, 1, 1]) @ volume.source.affine, atol=1e-6)
    liver, stone, absent = found["segments"]
    assert [s["name"] for s in found["segments"]] == ["liver", "stone", "absent"]
    assert [s["labelValue"] for s in found["segments"]] == [1, 2, 3]
    assert [s["layer"] for s in found["segments"]] == [0, 0, 0]
    assert len({tuple(s["color"]) for s in found["segments"]}) == 3
    bounds = np.argwhere(own == 1)
    assert liver["extent"] == np.stack([bounds.min(axis=0), bounds.max(axis=0)], axis=1).ravel().tolist()
    assert stone["extent"][::2] == stone["extent"][1::2]
    assert absent["extent"] == [0, -1, 0, -1, 0, -1]
    image = sitk.ReadImage(str(tmp_path / "m.seg.nrrd"))
    (point,) = np.argwhere(own == 2)
    lps = image.TransformIndexToPhysicalPoint([int(n) for n in point])
    np.testing.assert_allclose(volume.to_index(lps, "lps"), [60, 40, 12], atol=1e-3)


def test_shear_is_kept_in_nrrd(shared_data: Path, tmp_path: Path):
    volume = read_volume(shared_data / "odd_headers/ct_head_phantom_shear_u8_sclslope.nii.gz")
    labels = (volume.voxels > 150).astype(np.uint8)
    write_mask(tmp_path / "m.seg.nrrd", labels, volume, {1: "skull"})
    again, _ = read_mask(tmp_path / "m.seg.nrrd", volume)
    np.testing.assert_array_equal(again, labels)
    found = slicerio.read_segmentation(tmp_path / "m.seg.nrrd")
    np.testing.assert_allclose(found["ijkToLPS"], np.diag([-1, -1, 1, 1]) @ volume.source.affine, atol=1e-6)


def test_bool_and_wide_integers_are_taken(tmp_path: Path, scan: Volume):
    write_mask(tmp_path / "a.nii.gz", np.ones(scan.shape, bool), scan, {1: "all"})
    write_mask(tmp_path / "b.nii.gz", np.ones(scan.shape, np.int64), scan, {1: "all"})
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[:-1], "mask: expected shape"),
        (lambda m: m.astype(np.float32), "threshold or round it first"),
        (lambda m: m.astype(np.int16) - 1, "expected labels 0-255, got -1"),
        (lambda m: m.astype(np.int16) * 10, "expected labels 0-255"),
    ],
)
def test_wrong_masks_are_refused(tmp_path: Path, scan: Volume, mask: np.ndarray, change, message: str):
    with pytest.raises(InputError, match=message):
        write_mask(tmp_path / "m.nii.gz", change(mask), scan, {})
    assert not (tmp_path / "m.nii.gz").exists()


def test_names_of_impossible_values_are_refused(tmp_path: Path, scan: Volume, mask: np.ndarray):
    with pytest.raises(InputError, match=r"labels: expected values 1-255, got \[0, 256\]"):
        write_mask(tmp_path / "m.nii.gz", mask, scan, {0: "background", 256: "x"})


def test_unwritable_places_are_found_before_the_work(tmp_path: Path):
    with pytest.raises(InputError, match="cannot write this kind of file; end the name in one of .nii.gz"):
        check_writable(tmp_path / "m.png")
    with pytest.raises(InputError, match="the folder .* does not exist"):
        check_writable(tmp_path / "none" / "m.nii.gz")
    (tmp_path / "d.nii.gz").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_writable(tmp_path / "d.nii.gz")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="does not exist"):
        check_writable(tmp_path / "file" / "m.nii.gz")
    check_writable(tmp_path / "fine.nii.gz")
    assert not (tmp_path / "fine.nii.gz").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"d.nii.gz", "file"}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where nobody may create files")
def test_folder_that_takes_no_files_is_found_before_the_work():
    with pytest.raises(InputError, match=r"/proc/self/m.nii.gz: not writable \("):
        check_writable("/proc/self/m.nii.gz")


def test_full_disk_keeps_the_old_file(tmp_path: Path):
    """A limit on file size makes the system refuse the last bytes, as a full disk does."""
    code = """
import resource, signal, sys
import numpy as np
from medvl_sam2.engine.volumes import InputError, Volume, write_mask
volume = Volume.from_array(np.zeros((40, 40, 40), np.int16))
for path in sys.argv[1:]:
    write_mask(path, np.ones(volume.shape, np.uint8), volume, {1: "old"})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
noise = np.random.default_rng(0).integers(0, 255, volume.shape).astype(np.uint8)
for path in sys.argv[1:]:
    try:
        write_mask(path, noise, volume, {1: "new"})
    except InputError as error:
        print(error)
"""
    paths = [str(tmp_path / f"m{suffix}") for suffix in SUFFIXES]
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True, env=env, cwd=tmp_path
    )
    told = done.stdout.splitlines()
    assert len(told) == len(paths), done
    for path, line in zip(paths, told):
        assert line.startswith(f"{path}: could not be written")
        labels, names = read_mask(path)
        assert (labels == 1).all()
        assert names == {1: "old"}
    assert {str(file) for file in tmp_path.iterdir()} == set(paths)


def test_a_failing_writer_leaves_nothing(tmp_path: Path, scan: Volume, mask: np.ndarray, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    write_mask(tmp_path / "m.nii.gz", mask, scan, {1: "old"})
    before = (tmp_path / "m.nii.gz").read_bytes()
    monkeypatch.setattr(masks.os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        write_mask(tmp_path / "m.nii.gz", mask * 0, scan, {})
    assert (tmp_path / "m.nii.gz").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.nii.gz", "scan.nii.gz"]


def test_a_link_is_written_through(tmp_path: Path, scan: Volume, mask: np.ndarray):
    (tmp_path / "real").mkdir()
    (tmp_path / "m.nii.gz").symlink_to(tmp_path / "real" / "target.nii.gz")
    write_mask(tmp_path / "m.nii.gz", mask, scan, NAMES)
    assert (tmp_path / "m.nii.gz").is_symlink()
    np.testing.assert_array_equal(read_mask(tmp_path / "real" / "target.nii.gz", scan)[0], mask)


def test_what_is_not_a_mask_is_refused(tmp_path: Path, scan: Volume):
    with pytest.raises(InputError, match="holds values from -5 to -5, so it is not a mask"):
        read_mask(tmp_path / "scan.nii.gz", scan)
    nib.save(nib.Nifti1Image(np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 3, 4), np.eye(4)), tmp_path / "p.nii")
    with pytest.raises(InputError, match="holds fractions"):
        read_mask(tmp_path / "p.nii")
    with pytest.raises(InputError, match="does not list its segments"):
        read_mask(tmp_path / "p.nii", segment="liver")
    with pytest.raises(InputError, match="no such file"):
        read_mask(tmp_path / "none.nii.gz")


def test_labels_stored_as_floats_or_above_255_are_read(tmp_path: Path):
    values = np.array([[[0, 3], [300, 7]]])
    for kind in (np.float32, np.float64, np.uint16, np.int32):
        nib.save(nib.Nifti1Image(values.astype(kind), np.diag([-1, -1, 1, 1])), tmp_path / "m.nii")
        labels, _ = read_mask(tmp_path / "m.nii")
        assert labels.dtype == np.uint16
        np.testing.assert_array_equal(labels, values.transpose(2, 1, 0))


def test_layers_without_overlap_are_merged_and_renumbered(tmp_path: Path):
    layers = np.zeros((4, 5, 6, 2), np.uint8)
    layers[0, 0, 0], layers[1, 1, 1] = (1, 0), (0, 1)
    image = sitk.GetImageFromArray(layers, isVector=True)
    for number, name in enumerate(("first", "second")):
        image.SetMetaData(f"Segment{number}_Name", name)
        image.SetMetaData(f"Segment{number}_LabelValue", "1")
        image.SetMetaData(f"Segment{number}_Layer", str(number))
    sitk.WriteImage(image, str(tmp_path / "m.seg.nrrd"))
    labels, names = read_mask(tmp_path / "m.seg.nrrd")
    assert names == {1: "first", 2: "second"}
    assert (labels[0, 0, 0], labels[1, 1, 1], labels.astype(int).sum()) == (1, 2, 3)
    with pytest.raises(InputError, match="has no segment 'third'; choose from: 'first', 'second'"):
        read_mask(tmp_path / "m.seg.nrrd", segment="third")
