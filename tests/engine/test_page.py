"""The montage and the page: what they show is what was found, and the page needs nothing but itself."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from medvl_sam2.engine.case import Case, Exchange, ShownObject, to_gray
from medvl_sam2.engine.geometry import InputError, Volume
from medvl_sam2.engine.montage import overlay, write_montage
from medvl_sam2.engine.page import MAX_OBJECTS, write_page


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    volume = Volume.from_array(rng.integers(-200, 200, (6, 40, 60)).astype(np.int16), spacing=(3, 1, 1))
    masks = np.zeros((2, 6, 40, 60), bool)
    masks[0, 1:4, 10:30, 10:40] = True
    masks[1, 2:6, 20:36, 30:50] = True
    return Case(
        title="Case </script><b>1</b>",
        volume=volume,
        window=(-160.0, 240.0),
        report="A report.\nWith 5 < 6 & </script> in it.",
        exchanges=[Exchange("short", "Where?", "Here.", "There.")],
        objects=[
            ShownObject("first", "name", "first", "It is [SEG].", masks[0], 1.0, 0.9, False),
            ShownObject("gone", "name", "gone", "There is none.", None, absent_in_truth=True),
            ShownObject("second", "box", "second", "It is [SEG].", masks[1], 2.0, 0.8, False),
        ],
        crop=(4, 6, 38, 56),
    )


def page_data(path):
    (line,) = re.findall(r"^const data = (.*);$", path.read_text(), re.MULTILINE)
    return json.loads(line)


def picture(url):
    return np.array(Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))))


def test_page_holds_slices_and_masks(case, tmp_path):
    write_page(tmp_path / "p.html", "A & B", [case], ["a note"])
    (shown,) = page_data(tmp_path / "p.html")["cases"]
    assert shown["report"] == case.report
    assert [one["masked"] for one in shown["objects"]] == [True, False, True]
    assert len(shown["slices"]) == 6
    for slice_ in shown["slices"]:
        z = slice_["z"]
        gray = picture(slice_["image"]).astype(int)
        expected = to_gray(case.volume.hu(z), case.window)[4:38, 6:56].astype(int)
        assert gray.shape == expected.shape
        assert abs(gray - expected).mean() < 12
        masks = [case.objects[0].mask[z, 4:38, 6:56], case.objects[2].mask[z, 4:38, 6:56]]
        if slice_["bits"] is None:
            assert not any(mask.any() for mask in masks)
            continue
        bits = picture(slice_["bits"])[..., 0]
        for number, mask in zip((0, 2), masks):
            np.testing.assert_array_equal(bits >> number & 1, mask)
        assert not (bits >> 1 & 1).any()


def test_page_is_self_contained_and_cannot_be_broken_out_of(case, tmp_path):
    write_page(tmp_path / "p.html", "<i>title</i>", [case])
    text = (tmp_path / "p.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", text)
    assert not re.search(r"https?://", text)
    assert text.count("</script>") == 1
    assert "<i>title</i>" not in text


def test_large_slices_are_made_smaller_alike(tmp_path):
    volume = Volume.from_array(np.zeros((2, 500, 701), np.int16))
    mask = np.zeros(volume.shape, bool)
    mask[0, 100:200, 300:500] = True
    case = Case("big", volume, (-100.0, 100.0), "", objects=[ShownObject("x", "name", "x", "", mask)])
    write_page(tmp_path / "p.html", "t", [case])
    first = page_data(tmp_path / "p.html")["cases"][0]["slices"][0]
    assert picture(first["image"]).shape == picture(first["bits"]).shape[:2] == (250, 351)


def test_too_many_objects(case, tmp_path):
    case.objects = [ShownObject(str(i), "name", "", "", None) for i in range(MAX_OBJECTS + 1)]
    with pytest.raises(ValueError, match="objects"):
        write_page(tmp_path / "p.html", "t", [case])
    assert not list(tmp_path.iterdir())


def test_montage_shows_every_colour_that_has_a_mask(case, tmp_path):
    write_montage(tmp_path / "m.png", [case, case])
    image = np.array(Image.open(tmp_path / "m.png"))
    seen = {tuple(color) for color in image.reshape(-1, 3)[::1].tolist()}
    assert case.color(0) in seen
    assert case.color(2) in seen
    assert case.color(1) not in seen


@pytest.mark.parametrize("depth", [1, 2, 3, 40])
def test_montage_without_masks_shows_slices_that_are_there(case, tmp_path, depth):
    case.volume = Volume.from_array(np.zeros((depth, 40, 60), np.int16))
    case.objects, seen, gray = [], [], case.gray
    case.gray = lambda z: seen.append(z) or gray(z)
    write_montage(tmp_path / "m.png", [case])
    assert len(seen) == len(set(seen)) == min(depth, 3)
    assert min(seen) >= 0 and max(seen) < depth


def test_overlay_tints_inside_and_paints_the_edge():
    gray = np.full((9, 9), 100, np.uint8)
    mask = np.zeros((9, 9), bool)
    mask[2:7, 2:7] = True
    image = overlay(gray, [mask], [(200, 0, 100)])
    assert image[0, 0].tolist() == [100, 100, 100]
    assert image[2, 2].tolist() == [200, 0, 100]
    assert image[4, 4].tolist() == [138, 62, 100]


def test_place_that_cannot_be_written(case, tmp_path):
    with pytest.raises(InputError, match="p.html"):
        write_page(tmp_path / "none" / "p.html", "t", [case])


def test_outcome_words():
    mask = np.ones((1, 1, 1), bool)
    assert ShownObject("a", "name", "", "", mask, 2.0, 0.9, False).outcome == "Dice 0.900"
    assert ShownObject("a", "name", "", "", None, 0.0, 0.0, False).outcome == "called absent, Dice 0.00"
    assert ShownObject("a", "name", "", "", None, absent_in_truth=True).outcome == "rightly no mask"
    assert ShownObject("a", "name", "", "", mask, absent_in_truth=True).outcome == "a mask of something absent"
    assert ShownObject("a", "name", "", "", mask, 2.0).outcome == "2.0 mL"
