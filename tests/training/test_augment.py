"""Views of scans: equal to MONAI's transforms, and never a left or right that is no longer true."""

import monai.transforms as mt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medvl_sam2.training.augment import (
    NONE,
    Chances,
    Intensity,
    View,
    can_swap_sides,
    draw_intensity,
    draw_view,
    speaks_of_sides,
    swap_sides,
)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize(
    "flips", [(False, False, False), (True, False, False), (False, True, True), (True, True, True)]
)
def test_views_are_monais(turns, flips):
    volume = np.random.default_rng(0).normal(size=(2, 5, 6, 6))
    expected = mt.Rotate90(k=turns, spatial_axes=(1, 2))(volume) if turns else torch.from_numpy(volume)
    axes = [axis for axis, flip in enumerate(flips) if flip]
    expected = mt.Flip(spatial_axis=axes)(expected) if axes else expected
    assert np.array_equal(View(turns, flips).apply(volume), expected.numpy())


def test_quarter_turns_need_squares():
    with pytest.raises(ValueError, match="square"):
        View(1).apply(np.zeros((2, 4, 6)))


def test_intensity_is_monais_in_the_window():
    values = torch.rand(3, 4, 5)
    window = (-1000.0, 1000.0)
    hu = values * 2000 - 1000
    changed = (Intensity(1.07, -0.04).apply(hu, window) + 1000) / 2000
    scaled = mt.ScaleIntensity(minv=None, maxv=None, factor=0.07)(values[None])[0]
    torch.testing.assert_close(changed, mt.ShiftIntensity(offset=-0.04)(scaled[None])[0], rtol=1e-5, atol=1e-5)


def test_intensity_is_drawn_as_often_as_asked():
    rng = np.random.default_rng(0)
    drawn = [draw_intensity(rng, Chances()) for _ in range(2000)]
    assert 0.45 < np.mean([change.factor != 1 for change in drawn]) < 0.55
    assert 0.45 < np.mean([change.offset != 0 for change in drawn]) < 0.55
    assert max(abs(change.factor - 1) for change in drawn) <= 0.1
    assert draw_intensity(rng, NONE) == Intensity()


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("left kidney", "right kidney"),
        ("The LEFT lung, Right-sided effusion.", "The RIGHT lung, Left-sided effusion."),
        ("Shift to the left; leftward deviation, rightsided", "Shift to the right; rightward deviation, leftsided"),
        ("Left and right atrium (left > right).", "Right and left atrium (right > left)."),
        ("bilateral upright brightness cleft", "bilateral upright brightness cleft"),
        ("kidney_left", "kidney_right"),
    ],
)
def test_sides_are_swapped(text, mirrored):
    assert swap_sides(text) == mirrored
    assert swap_sides(mirrored) == text


@pytest.mark.parametrize(
    "text",
    [
        "RUL nodule",
        "consolidation of the LLL.",
        "calcified LAD",
        "levoscoliosis of the spine",
        "Dextrocardia",
        "situs inversus",
        "a right angle at the duodenum",
        "the tube was left in place",
        "nothing left.",
        "Rt kidney",
        "lesion at 3 o'clock",
        "the L kidney",
    ],
)
def test_hidden_sides_refuse_the_mirror(text):
    assert speaks_of_sides([text])
    assert not can_swap_sides([text])
    with pytest.raises(ValueError, match="mirror"):
        swap_sides(text)


@given(
    st.lists(st.sampled_from(["left", "right", "Left", "RIGHT", "lung", "of", "the", "cleft", ",", "."]), max_size=12)
)
def test_swapping_twice_gives_the_text_back(words):
    text = " ".join(words)
    assert swap_sides(swap_sides(text)) == text
    assert swap_sides(text).lower().split().count("left") == text.lower().split().count("right")


ALWAYS = Chances(turn=1.0, flip=1.0)


def test_scans_with_sides_are_only_mirrored_across_the_midline():
    rng = np.random.default_rng(1)
    for _ in range(50):
        view = draw_view(["liver", "left kidney"], rng, ALWAYS)
        assert view == View(0, (False, False, True)) and view.swaps_sides


def test_scans_with_hidden_sides_stay_as_they_are():
    rng = np.random.default_rng(1)
    assert {draw_view(["nodule in the RUL", "left kidney"], rng, ALWAYS) for _ in range(20)} == {View()}


def test_scans_without_sides_are_turned_and_flipped_freely():
    rng = np.random.default_rng(1)
    views = {draw_view(["liver", "The spleen is large."], rng, Chances()) for _ in range(400)}
    assert {view.turns for view in views} == {0, 1, 2, 3}
    assert any(view.flips[0] for view in views) and any(view.flips[1] for view in views)


def test_later_draws_do_not_depend_on_the_texts():
    # Else adding a text to the data would change every later choice of the batch.
    after = []
    for texts in (["liver"], ["left kidney"]):
        rng = np.random.default_rng(3)
        draw_view(texts, rng, NONE)
        after.append(rng.random())
    assert after[0] == after[1]


def test_a_mirrored_label_lies_on_the_side_it_is_named_after():
    volume = np.zeros((2, 4, 10), bool)
    volume[:, :, 8] = True
    mirrored = View(0, (False, False, True)).apply(volume)
    # High x is the patient's left: the left kidney has become a right one.
    assert np.nonzero(mirrored)[2].mean() < 4.5
    assert swap_sides("left kidney") == "right kidney"
