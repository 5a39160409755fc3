"""The demo end to end on a small random model and a coarse phantom."""

import json

import nibabel as nib
import pytest

from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.training import demo
from medvl_sam2.training.phantom import Phantom


def test_demo_writes_everything(small_model, tmp_path, monkeypatch):
    native = Phantom.native
    monkeypatch.setattr(Phantom, "native", lambda self, _: native(self, 64))
    ask = demo.VolumeSession.ask
    # A random model never ends its answers.
    monkeypatch.setattr(demo.VolumeSession, "ask", lambda *a, **k: ask(*a, **{**k, "max_tokens": 8}))
    document, text = demo.run(MedVLEngine.from_pretrained(small_model, device="cpu"), tmp_path, 1_000_250)
    phantom, *real = document["cases"]
    assert [one["by"] for one in phantom["objects"]][:5] == ["name", "name", "description", "point", "box"]
    assert phantom["objects"][-1]["absent_in_truth"] is True
    assert {turn["kind"] for turn in phantom["questions"]} == {"short", "multiple_choice", "long"}
    assert all(one["dice"] is not None for one in phantom["objects"][:-1])
    assert {"vision", "slices", "masks"} <= set(phantom["seconds"])
    assert json.loads((tmp_path / "run_report.json").read_text()) == json.loads(json.dumps(document))
    assert (tmp_path / "montage.png").is_file()
    assert (tmp_path / "index.html").is_file()
    source, masks = (nib.load(tmp_path / "phantom" / name) for name in ("ct.nii.gz", "masks.nii.gz"))
    assert source.shape == masks.shape
    assert "Not a medical device" in text
    assert bool(real) == ((tmp_path / "chest" / "masks.nii.gz").is_file())


def test_demo_goes_on_without_the_real_scan(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    assert demo.chest_case(None, tmp_path) is None


@pytest.mark.parametrize(("findings", "expected"), [([], None), (["liver_lesion", "liver_lesion"], None)])
def test_findings_that_share_a_label_are_not_shown(findings, expected):
    listed = [{"type": kind, "side": None, "volume_ml": 3.0} for kind in findings]
    assert demo._masked_finding({"findings": listed}) == expected
