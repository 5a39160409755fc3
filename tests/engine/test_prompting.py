"""Boxes in millimetres on scans whose axes are turned against the patient's."""

import re

import numpy as np
import pytest

from medvl_sam2.engine.geometry import InputError, Volume
from medvl_sam2.engine.prompting import slice_prompts
from medvl_sam2.model.processing import GridTransform

SIZE, MIDDLE = 101, 50


def turned(degrees: float, axes: tuple[int, int]) -> Volume:
    """A cube of 1 mm voxels, turned in the plane of two axes."""
    angle, (a, b) = np.radians(degrees), axes
    affine = np.eye(4)
    affine[[a, b], [a, b]] = np.cos(angle)
    affine[a, b], affine[b, a] = -np.sin(angle), np.sin(angle)
    affine[:3, :3] @= np.diag([-1.0, -1.0, 1.0])
    return Volume.from_array(np.zeros((SIZE, SIZE, SIZE), np.int16), affine=affine)


@pytest.mark.parametrize("space", ["ras", "lps"])
@pytest.mark.parametrize("axes", [(0, 1), (1, 2)], ids=["in plane", "tilted"])
@pytest.mark.parametrize("degrees", [0, 20, 45])
def test_box_in_millimetres_covers_its_cube(degrees, axes, space):
    volume = turned(degrees, axes)
    # A pixel of the slice stack is a voxel here.
    transform = GridTransform(volume.shape, (0, 0, 0, SIZE, SIZE, SIZE), SIZE)
    centre = volume.from_index(np.full(3, float(MIDDLE)), space)
    marked = slice_prompts(volume, transform, SIZE, None, (*(centre - 20), *(centre + 20)), space)
    angle = np.radians(degrees)
    reach = np.array([20 * (np.cos(angle) + np.sin(angle)) if axis in axes else 20.0 for axis in range(3)])
    low, high = MIDDLE - reach[:2] - 0.5, MIDDLE + reach[:2] + 0.5
    np.testing.assert_allclose(marked.prompts[MIDDLE].boxes[0], [*low, *high], atol=1e-3)
    assert marked.extent == (round(MIDDLE - reach[2]), round(MIDDLE + reach[2]))


def test_span_of_a_turned_volume_is_told_whole():
    volume = turned(45, (0, 1))
    transform = GridTransform(volume.shape, (0, 0, 0, SIZE, SIZE, SIZE), SIZE)
    with pytest.raises(InputError, match="outside") as caught:
        slice_prompts(volume, transform, SIZE, [(500.0, 0.0, 0.0)], None, "ras")
    x0, y0, z0, x1, y1, z1 = map(float, re.findall(r"-?\d+(?:\.\d+)?", str(caught.value).split("spans")[1]))
    diagonal = 100 * np.sqrt(2)
    np.testing.assert_allclose([x1 - x0, y1 - y0, z1 - z0], [diagonal, diagonal, 100], atol=0.2)
