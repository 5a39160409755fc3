"""Phantoms of an evaluation that several models share."""

import numpy as np
import pytest

from medvl_sam2.training.cases import phantom_case
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
