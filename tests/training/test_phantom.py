"""Phantoms: the same seed gives the same scan, and maps, facts and coordinates agree."""

import json
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from medvl_sam2.training.phantom import (
    EVALUATION_SEED_START,
    FINDINGS,
    REGIONS,
    STRUCTURES,
    check_training_seed,
    make_phantom,
    write_phantom,
)
from medvl_sam2.training.phantom_findings import ABSENT, MASKED

WHOLE = "thorax, abdomen and pelvis"


def axes(phantom, step):
    return [np.arange(low + step / 2, high, step) for low, high in phantom.box_mm]


@pytest.fixture(scope="module")
def patients():
    """Whole-torso phantoms without findings, one per phase, with their maps at 4 mm."""
    rows = []
    for seed, phase in ((0, "non-contrast"), (1, "arterial"), (2, "portal venous")):
        phantom = make_phantom(seed, region=WHOLE, phase=phase, findings=[])
        grid = axes(phantom, 4.0)
        rows.append((phantom, grid, phantom.render(*grid, noise=False)))
    return rows


def test_same_seed_same_phantom_in_any_process():
    phantom = make_phantom(5)
    code = (
        "from medvl_sam2.training.phantom import make_phantom as m; import numpy as np, json;"
        "p = m(5); g = [np.arange(a, b, 12.0) for a, b in p.box_mm];"
        "print(json.dumps([p.facts, [int(v.astype(np.int64).sum()) for v in p.render(*g)]]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    facts, sums = json.loads(out.stdout)
    grid = [np.arange(low, high, 12.0) for low, high in phantom.box_mm]
    assert facts == phantom.facts
    assert sums == [int(v.astype(np.int64).sum()) for v in phantom.render(*grid)]
    assert make_phantom(6).facts != phantom.facts


def test_slices_do_not_depend_on_their_slab():
    phantom = make_phantom(9)
    z, y, x = axes(phantom, 9.0)
    whole = phantom.render(z, y, x, slice_thickness_mm=4.0)
    part = phantom.render(z[4:7], y, x, slice_thickness_mm=4.0)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[4:7], b)


def test_descending_axes_flip_the_arrays():
    phantom = make_phantom(9)
    z, y, x = axes(phantom, 9.0)
    up = phantom.render(z, y, x, noise=False)
    down = phantom.render(z[::-1], y, x[::-1], noise=False, slice_thickness_mm=9.0)
    for a, b in zip(up, down, strict=True):
        np.testing.assert_array_equal(a[::-1, :, ::-1], b)


def test_every_structure_occurs_once_and_on_its_side(patients):
    for _, (z, _, x), (_, structures, findings) in patients:
        assert set(np.unique(structures)) == {0, *STRUCTURES.values()}
        assert not findings.any()
        for name, label in STRUCTURES.items():
            where = np.nonzero(structures == label)
            if name.startswith(("left ", "right ")):
                assert (np.median(x[where[2]]) > 10) == name.startswith("left ")
        heights = {n: z[np.nonzero(structures == k)[0]].mean() for n, k in STRUCTURES.items()}
        assert heights["trachea"] > heights["heart"] > heights["liver"] > heights["urinary bladder"]
        assert heights["left hip bone"] > heights["left femur"]
        right = x[np.nonzero(structures == STRUCTURES["liver"])[2]].mean()
        left = x[np.nonzero(structures == STRUCTURES["spleen"])[2]].mean()
        assert right < -20 and left > 50


def test_organs_are_one_piece(patients):
    for _, _, (_, structures, _) in patients:
        for name in ("liver", "spleen", "heart", "left kidney", "right kidney", "left lung", "right lung", "stomach"):
            parts, count = ndimage.label(structures == STRUCTURES[name])
            sizes = np.bincount(parts.ravel())[1:]
            assert sizes.max() / sizes.sum() > 0.97, (name, count)


@pytest.mark.parametrize(
    ("name", "ranges"),
    [
        ("left lung", [(-930, -750)] * 3),
        ("right lung", [(-930, -750)] * 3),
        ("liver", [(20, 75), (35, 90), (70, 140)]),
        ("spleen", [(30, 65), (85, 150), (90, 150)]),
        ("aorta", [(28, 58), (180, 450), (110, 190)]),
        ("left kidney", [(18, 50), (55, 200), (135, 225)]),
        ("trachea", [(-1024, -900)] * 3),
        ("vertebrae", [(120, 420)] * 3),
        ("urinary bladder", [(-5, 25)] * 3),
    ],
)
def test_tissue_hu(patients, name, ranges):
    for (_, _, (hu, structures, _)), (low, high) in zip(patients, ranges, strict=True):
        inside = (
            ndimage.binary_erosion(structures == STRUCTURES[name])
            if name != "trachea"
            else structures == STRUCTURES[name]
        )
        assert low <= np.median(hu[inside]) <= high


def test_air_fat_and_muscle_around_the_organs(patients):
    for phantom, (z, y, _), (hu, _, _) in patients:
        assert (hu[:, 0, :] < -950).mean() > 0.8
        body = hu[np.abs(z) < 60][:, np.abs(y) < 60]
        histogram = np.histogram(body, bins=np.arange(-140, 120, 10))[0]
        fat, muscle = histogram[:8].sum(), histogram[15:24].sum()
        assert fat > 0.03 * body.size and muscle > 0.1 * body.size
        assert phantom.noise_sd > 0


def test_noise_has_the_drawn_strength():
    phantom = make_phantom(3, region="abdomen", findings=[])
    y, x = np.arange(-30, 30, 0.8), np.arange(-200, -140, 0.8)
    z = np.array([20.0, 21.0])
    noisy = phantom.render(z, y, x, slice_thickness_mm=1.0)[0].astype(float)
    clean = phantom.render(z, y, x, slice_thickness_mm=1.0, noise=False)[0].astype(float)
    keep = clean > -900
    sd = (noisy - clean)[keep].std()
    assert sd == pytest.approx(1.45 * phantom.noise_sd, rel=0.1)
    assert not np.array_equal(noisy[0] - clean[0], noisy[1] - clean[1])


@pytest.mark.parametrize("kind", list(FINDINGS))
def test_every_finding_is_listed_drawn_and_on_its_side(kind):
    listed = 0
    for seed in range(4):
        phantom = make_phantom(seed, region="thorax and abdomen", findings=[kind])
        facts = [f for f in phantom.facts["findings"] if f["type"] == kind]
        listed += len(facts)
        for fact in facts:
            grid = axes(phantom, 5.0)
            _, structures, findings = phantom.render(*grid, noise=False)
            mask = findings == FINDINGS[kind]
            assert mask.any() == (kind in MASKED and (fact["size_mm"] or 99) > 10) or kind == "kidney_stone"
            if mask.any() and fact["side"]:
                assert (grid[2][np.nonzero(mask)[2]].mean() > 0) == (fact["side"] == "left")
            if mask.any() and fact["organ"] in ("liver", "aorta") or kind in ("renal_cyst", "lung_nodule"):
                assert (structures[mask] == STRUCTURES[fact["organ"]]).mean() > 0.99
            if fact["volume_ml"] and fact["volume_ml"] > 20 and mask.any():
                assert mask.sum() * 0.125 == pytest.approx(fact["volume_ml"], rel=0.25)
    assert listed == 4


def test_facts_agree_with_the_maps():
    for seed in range(100, 105):
        phantom = make_phantom(seed)
        counts = np.round(np.diff(phantom.box_mm)[:, 0] / 4).astype(int)
        steps = np.diff(phantom.box_mm)[:, 0] / counts
        grid = [
            low + step * (np.arange(n) + 0.5) for low, step, n in zip(phantom.box_mm[:, 0], steps, counts, strict=True)
        ]
        _, structures, _ = phantom.render(*grid, noise=False)
        volumes = np.bincount(structures.ravel(), minlength=len(STRUCTURES) + 1) * np.prod(steps) / 1000
        for name, fact in phantom.facts["structures"].items():
            rendered = volumes[STRUCTURES[name]]
            assert rendered == pytest.approx(fact["volume_ml"], rel=0.05 if rendered > 100 else 0.12, abs=1.5), (
                seed,
                name,
            )
            assert 0.15 <= fact["fraction"] <= 1
        for name, label in STRUCTURES.items():
            if name not in phantom.facts["structures"]:
                removed = name in phantom.facts["removed"]
                assert removed or phantom.region != WHOLE
                if removed:
                    assert volumes[label] == 0


def test_normal_and_abnormal_sizes_are_far_apart():
    limits = {
        "hepatomegaly": ("liver", 1900, 2150),
        "splenomegaly": ("spleen", 300, 420),
        "cardiomegaly": ("heart", 780, 920),
    }
    for seed in range(5):
        normal = make_phantom(seed, region="thorax and abdomen", findings=[]).facts["structures"]
        large = make_phantom(seed, region="thorax and abdomen", findings=list(limits)).facts["structures"]
        for organ, low, high in limits.values():
            assert normal[organ]["volume_ml"] < low < high < large[organ]["volume_ml"]


def test_removed_organs_leave_no_voxel():
    seen = set()
    for seed in range(10):
        phantom = make_phantom(seed, region="abdomen", findings=["absent_organ"])
        (name,) = phantom.facts["removed"]
        seen.add(name)
        _, structures, _ = phantom.render(*axes(phantom, 8.0), noise=False)
        assert not (structures == STRUCTURES[name]).any()
        assert phantom.facts["findings"][0]["organ"] == name
    assert seen == set(ABSENT)


def test_draws_are_spread():
    phantoms = [make_phantom(seed) for seed in range(160)]
    regions = [p.region for p in phantoms]
    assert set(regions) == set(REGIONS)
    types = [[f.type for f in p._found] for p in phantoms]
    assert 0.12 < np.mean([not t for t in types]) < 0.28
    assert {t for row in types for t in row} == set(FINDINGS)
    sides = [f.side for p in phantoms for f in p._found if f.side]
    assert 0.4 < np.mean([s == "left" for s in sides]) < 0.6


def test_written_files_lie_where_render_says(tmp_path):
    phantom = make_phantom(4, region="abdomen")
    native = write_phantom(phantom, tmp_path, max_matrix=144)
    image = nib.load(tmp_path / "ct.nii.gz")
    assert image.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), native.voxels)
    np.testing.assert_allclose(image.affine, native.affine, atol=1e-4)
    for name, array in (("structures", native.structures), ("findings", native.findings)):
        stored = nib.load(tmp_path / f"{name}.nii.gz")
        assert stored.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(np.asarray(stored.dataobj).transpose(2, 1, 0), array)
    labels = json.loads((tmp_path / "labels.json").read_text())
    assert labels["structures"] == STRUCTURES
    assert json.loads((tmp_path / "facts.json").read_text()) == phantom.facts
    rng = np.random.default_rng(0)
    spacing = abs(native.affine[2, 2])
    for _ in range(6):
        k, j, i = (int(rng.integers(0, n)) for n in native.voxels.shape)
        x, y, z, _ = native.affine @ (i, j, k, 1) * (-1, -1, 1, 1)
        pixel = abs(native.affine[0, 0])
        patch = [np.array([c - pixel, c, c + pixel]) for c in (y, x)]
        _, structures, findings = phantom.render(np.array([z]), *patch, noise=False, slice_thickness_mm=spacing)
        assert structures[0, 1, 1] == native.structures[k, j, i]
        assert findings[0, 1, 1] == native.findings[k, j, i]
    left = image.affine @ (*np.argwhere(native.structures == STRUCTURES["left kidney"]).mean(0)[::-1], 1)
    assert left[0] < 0


def test_evaluation_seeds_are_kept_apart():
    assert check_training_seed(EVALUATION_SEED_START - 1) == EVALUATION_SEED_START - 1
    with pytest.raises(ValueError, match="evaluation"):
        check_training_seed(EVALUATION_SEED_START)


@pytest.mark.parametrize("wrong", [{"region": "head"}, {"findings": ["cough"]}, {"color": 1}])
def test_unknown_overrides_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        make_phantom(0, **wrong)


def test_unsorted_axis_is_refused():
    phantom = make_phantom(0)
    with pytest.raises(ValueError, match="x_mm"):
        phantom.render(np.arange(3.0), np.arange(3.0), np.array([0.0, 2.0, 1.0]))


def test_rendering_is_fast_enough_to_train_on():
    phantom = make_phantom(0)
    grid = [np.linspace(low, high, n) for (low, high), n in zip(phantom.box_mm, (48, 80, 80), strict=True)]
    phantom.render(*grid)
    start = time.process_time()
    phantom.render(*grid)
    assert time.process_time() - start < 0.5
