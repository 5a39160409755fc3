"""Volume processing: the patient's box, the grids, and the way back to the scan's voxels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from medvl_sam2.model.presets import preset
from medvl_sam2.model.processing import GridTransform, ScanArray, VolumeProcessor, foreground_box

RNG = np.random.default_rng(0)


def _scan(shape=(30, 60, 70), *, table: bool = False) -> ScanArray:
    """A warm ellipsoid in air, with a table under it if asked for."""
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    body = ((z - 14) / 11) ** 2 + ((y - 25) / 15) ** 2 + ((x - 33) / 22) ** 2 < 1
    hu = np.where(body, 40, -1000).astype(np.int16)
    if table:
        hu[:, 52:55, 5:65] = 300
    return ScanArray(hu)


def test_corner_voxels_meet_corner_cells():
    transform = GridTransform((10, 20, 30), (2, 4, 6, 8, 16, 30), 3)
    size = (3, 6, 8)
    # The box's lower edge lies half a voxel before its first centre; a grid cell covers two, two and three voxels.
    np.testing.assert_allclose(transform.to_grid(np.array([[5.5, 3.5, 1.5]]), size), [[-0.5, -0.5, -0.5]])
    np.testing.assert_allclose(transform.to_grid(np.array([[29.5, 15.5, 7.5]]), size), [[7.5, 5.5, 2.5]])
    assert [transform.nearest_slice(z) for z in (2, 4, 5, 7, 99)] == [0, 1, 1, 2, 2]


def test_box_holds_the_patient_and_not_the_table():
    low_z, low_y, low_x, high_z, high_y, high_x = foreground_box(_scan(table=True), -400.0)
    assert low_z <= 4 and low_y <= 11 and low_x <= 12
    assert high_z >= 25 and high_y >= 40 and high_x >= 55
    assert high_y < 52
    assert low_x > 5


def test_box_of_pure_air_is_the_whole_scan():
    assert foreground_box(ScanArray(np.full((4, 5, 6), -1000, np.int16)), -400.0) == (0, 0, 0, 4, 5, 6)


def test_box_honours_slope_and_intercept():
    scan = _scan()
    stored = ScanArray(((scan.voxels.astype(np.int32) + 1024) // 2).astype(np.uint16), 2.0, -1024.0)
    assert foreground_box(stored, -400.0) == foreground_box(scan, -400.0)


def _sampled(hu: np.ndarray, box, size) -> torch.Tensor:
    """torch's own trilinear sampling of the box at the centres of `size` cells, the box's edges repeated."""
    z0, y0, x0, z1, y1, x1 = box
    volume = torch.from_numpy(hu[z0:z1, y0:y1, x0:x1].astype(np.float32))[None, None]
    z, y, x = torch.meshgrid(*[(2 * torch.arange(count) + 1) / count - 1 for count in size], indexing="ij")
    grid = torch.stack([x, y, z], -1)[None].float()
    return F.grid_sample(volume, grid, mode="bilinear", padding_mode="border", align_corners=False)[0, 0]


def test_encoder_grid_equals_torch_sampling_of_the_windowed_scan():
    processor = VolumeProcessor(preset("tiny"))
    scan = ScanArray(RNG.integers(-1100, 1500, (40, 90, 100)).astype(np.int16))
    transform = GridTransform(scan.voxels.shape, (3, 5, 7, 38, 80, 95), 20)
    low, high = processor.config.window
    windowed = np.clip((scan.voxels.astype(np.float32) - low) / (high - low), 0, 1)
    expected = _sampled(windowed, transform.box, processor.config.size)
    torch.testing.assert_close(processor.encoder_grid(scan, transform)[0], expected, atol=2e-5, rtol=1e-4)


def test_part_of_the_slices_equals_that_part_of_all():
    processor = VolumeProcessor(preset("tiny"))
    scan = ScanArray(RNG.integers(-1100, 1500, (23, 40, 50)).astype(np.int16))
    transform = GridTransform(scan.voxels.shape, (1, 2, 3, 22, 37, 48), 10)
    whole = processor.slice_images(scan, transform)
    assert whole.shape == (10, 3, 256, 256)
    torch.testing.assert_close(processor.slice_images(scan, transform, 4, 7), whole[4:7], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["minmax", "percentile"])
def test_m3d_normalisations_equal_numpy_s_on_the_box(kind):
    settings = preset("tiny")
    processor = VolumeProcessor(replace(settings, volume=replace(settings.volume, normalisation=kind)))
    scan = ScanArray(RNG.normal(300, 200, (20, 40, 40)).astype(np.int16), 2.0, -500.0)
    transform = GridTransform(scan.voxels.shape, (2, 3, 4, 18, 39, 37), 16)
    hu = scan.voxels.astype(np.float64) * 2.0 - 500.0
    inside = hu[2:18, 3:39, 4:37]
    if kind == "percentile":
        low, high = np.percentile(inside[inside > inside.mean()], (0.05, 99.95))
    else:
        low, high = inside.min(), inside.max()
    expected = _sampled(np.clip((hu - low) / (high - low), 0, 1), transform.box, processor.config.size)
    torch.testing.assert_close(processor.encoder_grid(scan, transform)[0], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["minmax", "percentile"])
@pytest.mark.parametrize("value", [-1000, 0, 1497])
def test_a_constant_scan_is_normalised_to_zeros(kind, value):
    settings = preset("tiny")
    processor = VolumeProcessor(replace(settings, volume=replace(settings.volume, normalisation=kind)))
    scan = ScanArray(np.full((6, 20, 20), value, np.int16), 0.7, -1024.0)
    grid = processor.encoder_grid(scan, GridTransform(scan.voxels.shape, (0, 0, 0, 6, 20, 20), 6))
    torch.testing.assert_close(grid, torch.zeros_like(grid), atol=1e-3, rtol=0)


@pytest.mark.parametrize("slices", [1, 5])
def test_a_short_scan_keeps_its_own_slices(slices):
    processor = VolumeProcessor(preset("tiny"))
    scan = ScanArray(np.full((slices, 30, 30), 40, np.int16))
    transform = processor.transform(scan)
    assert transform.slices == slices
    assert torch.isfinite(processor.slice_images(scan, transform)).all()
    assert torch.isfinite(processor.encoder_grid(scan, transform)).all()
