"""Phantoms: the same seed gives the same scan, and maps, facts and coordinates agree."""

import json

import numpy as np
import pytest

from medvl_sam2.training.phantom import (
    FINDINGS,
    make_phantom,
)


def axes(phantom, counts):
    return [np.linspace(low, high, n) for (low, high), n in zip(phantom.box_mm, counts, strict=True)]


def test_same_seed_same_phantom():
    first, second = make_phantom(5), make_phantom(5)
    grid = axes(first, (12, 48, 48))
    for a, b in zip(first.render(*grid), second.render(*grid), strict=True):
        np.testing.assert_array_equal(a, b)
    assert first.facts == second.facts
    other = make_phantom(6)
    assert other.facts != first.facts
    assert json.loads(json.dumps(first.facts)) == first.facts


def test_slices_do_not_depend_on_their_slab():
    phantom = make_phantom(9)
    z, y, x = axes(phantom, (10, 40, 40))
    whole = phantom.render(z, y, x, slice_thickness_mm=4.0)
    part = phantom.render(z[4:7], y, x, slice_thickness_mm=4.0)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[4:7], b)


def test_descending_axes_flip_the_arrays():
    phantom = make_phantom(9)
    z, y, x = axes(phantom, (6, 30, 30))
    up = phantom.render(z, y, x, noise=False, slice_thickness_mm=4.0)
    down = phantom.render(z[::-1], y, x[::-1], noise=False, slice_thickness_mm=4.0)
    for a, b in zip(up, down, strict=True):
        np.testing.assert_array_equal(a[::-1, :, ::-1], b)


@pytest.mark.parametrize("kind", list(FINDINGS))
def test_every_finding_is_listed_and_drawn(kind):
    listed, masked = 0, 0
    for seed in range(6):
        phantom = make_phantom(seed, region="thorax and abdomen", findings=[kind])
        facts = [f for f in phantom.facts["findings"] if f["type"] == kind]
        listed += len(facts)
        if facts:
            findings = phantom.render(*axes(phantom, (90, 72, 72)), noise=False)[2]
            masked += int((findings == FINDINGS[kind]).any())
    assert listed >= 5
    assert masked == (listed if FINDINGS[kind] <= FINDINGS["aortic_aneurysm"] else 0)
