"""Mask metrics against MONAI and plain arithmetic on whole arrays."""

import numpy as np
import pytest
import torch

from medvl_sam2.model.processing import GridTransform
from medvl_sam2.training.mask_metrics import dice, label_regions, region, soft_dice, surface_dice

SHAPE = (9, 14, 12)


def blob(seed: int, share: float = 0.4) -> np.ndarray:
    """A random block with holes, so that surfaces are everywhere and some touch the border."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(SHAPE, bool)
    low = rng.integers(0, 4, 3)
    mask[low[0] : low[0] + 5, low[1] : low[1] + 8, low[2] : low[2] + 7] = True
    return mask & (rng.random(SHAPE) > share * rng.random())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tolerance", [0.7, 1.5, 3.0])
def test_surface_dice_equals_monai(seed, tolerance):
    from monai.metrics import compute_surface_dice

    a, b, spacing = blob(seed), blob(seed + 10), (2.5, 0.7, 0.7)
    tensors = [torch.from_numpy(mask)[None, None] for mask in (a, b)]
    expected = compute_surface_dice(*tensors, [tolerance], include_background=True, spacing=spacing)
    assert surface_dice(region(a), region(b), spacing, tolerance) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_dice_of_regions_equals_dice_of_whole_masks(seed):
    a, b = blob(seed), blob(seed + 20)
    assert np.array_equal(region(a).whole(), a)
    assert dice(region(a), region(b)) == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_empty_masks():
    empty, full = region(np.zeros(SHAPE, bool)), region(blob(0))
    corner = np.zeros(SHAPE, bool)
    corner[-1, -1, -1] = True
    assert dice(empty, empty) == surface_dice(empty, empty, (1, 1, 1), 1) == 1
    assert dice(empty, full) == dice(full, empty) == surface_dice(empty, full, (1, 1, 1), 1) == 0
    assert dice(region(corner), full) == 0


def test_label_regions_are_the_labels():
    labels = np.random.default_rng(0).integers(0, 4, SHAPE).astype(np.uint8)
    found = label_regions(labels, {"one": 1, "three": 3, "five": 5})
    assert set(found) == {"one", "three"}
    assert np.array_equal(found["three"].whole(), labels == 3)


def test_soft_dice_equals_m3d_on_the_resampled_truth():
    truth = blob(3)
    transform = GridTransform(SHAPE, (1, 2, 0, 9, 14, 12), slices=4)
    probabilities = np.random.default_rng(1).random((4, 6, 6))
    z, y, x = 1 + 2 * np.arange(4) + 1, 2 + 2 * np.arange(6) + 1, 2 * np.arange(6) + 1
    g = truth[np.ix_(z, y, x)]
    expected = 2 * (probabilities * g).sum() / (probabilities.sum() + g.sum() + 1)
    assert soft_dice(probabilities, region(truth), transform) == pytest.approx(expected)


def test_marks_lie_in_and_round_the_mask():
    mask = np.zeros((7, 12, 14), bool)
    mask[2:5, 3:9, 4:11] = True
    mask[3, 1, 1] = True
    x, y, z = region(mask).inner_point()
    assert mask[z, y, x]
    assert min(x - 4, 10 - x, y - 3, 8 - y) >= 2
    assert region(mask).tight_box() == (1, 1, 2, 10, 8, 4)
    # An object that the scan cuts off is not deepest at the scan's edge.
    cut = np.zeros((3, 9, 20), bool)
    cut[1, :, :6] = True
    x, y, z = region(cut).inner_point()
    assert z == 1 and 2 <= y <= 6 and 2 <= x <= 3
