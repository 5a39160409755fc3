"""Scans of an evaluation: phantoms that several models share, and folders of real ones."""

import json

import numpy as np
import pytest
import SimpleITK as sitk

from medvl_sam2.training.cases import folder_cases, phantom_case
from medvl_sam2.training.datasets.index import index
from medvl_sam2.training.datasets.manifest import Manifest
from medvl_sam2.training.phantom import Phantom


def test_a_kept_phantom_is_the_rendered_one_and_is_rendered_once(monkeypatch, tmp_path):
    native, rendered = Phantom.native, []

    def coarse(self):
        rendered.append(self.seed)
        return native(self, 32)

    monkeypatch.setattr(Phantom, "native", coarse)
    # Its axes are flipped or not by the seed: the second phantom differs from the first in that too.
    for seed in (1_600_000, 1_600_001):
        plain, first, again = (phantom_case(seed, folder) for folder in (None, tmp_path / "a", tmp_path / "a"))
        for case in (first, again):
            assert np.array_equal(case.volume.voxels, plain.volume.voxels)
            assert np.array_equal(case.volume.affine, plain.volume.affine)
            assert case.facts == plain.facts and case.regions.keys() == plain.regions.keys()
            assert all(np.array_equal(case.masks[name], mask) for name, mask in plain.masks.items())
    assert rendered == [1_600_000, 1_600_000, 1_600_001, 1_600_001]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["1600000.npz", "1600001.npz"]


def test_a_training_seed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="seed: expected at least 1000000, got 7"):
        phantom_case(7, tmp_path)


@pytest.mark.parametrize("name", ["ct.nii.gz", "Chest.nrrd"])
def test_a_folder_is_read_alike_for_evaluation_and_for_training(name, tmp_path):
    case = tmp_path / "case"
    (case / "dicom_seg").mkdir(parents=True)
    voxels = np.zeros((5, 9, 8), np.int16)
    voxels[1:3, 3:6, 2:5] = 1
    # Masks are capitalised by 3D Slicer and others.
    for file in (name, "Segmentation.nii.gz"):
        sitk.WriteImage(sitk.GetImageFromArray(voxels), case / file)
    (case / "labels.json").write_text(json.dumps({"1": "liver"}))
    (found,) = folder_cases(tmp_path)
    assert found.volume.shape == (5, 9, 8) and found.regions["liver"].voxels == voxels.sum()
    index([f"folder={tmp_path}"], tmp_path / "m.jsonl")
    record = Manifest(tmp_path / "m.jsonl")[0]
    assert record.image == f"case/{name}" and [mask.path for mask in record.masks] == ["case/Segmentation.nii.gz"]
