"""Number formats of the parts."""

import pytest
import torch
from _scans import ball

from medvl_sam2.engine import precision
from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.model.presets import preset


@pytest.mark.parametrize(
    ("many", "one", "convolution", "chosen_types"),
    [
        (4.0, 0.8, 3.0, ("bfloat16", "float32", "bfloat16")),  # AMX
        (4.0, 1.9, 0.02, ("bfloat16", "bfloat16", "float32")),  # products alone gain
        (0.5, 0.5, 0.02, ("float32", "float32", "float32")),
    ],
)
def test_auto_takes_bfloat16_part_by_part_where_it_pays(monkeypatch, many, one, convolution, chosen_types):
    monkeypatch.setattr(precision, "product_gain", lambda width, rows=1: one if rows == 1 else many)
    monkeypatch.setattr(precision, "convolution_gain", lambda: convolution)
    got = precision.choose_precision("auto", torch.device("cpu"), preset("1b-fast"))
    assert (got.vision, got.language, got.sam2) == tuple(getattr(torch, name) for name in chosen_types)
    # Small parts gain too little to be rounded, however the timing goes.
    assert str(precision.choose_precision("auto", torch.device("cpu"), preset("tiny"))) == "float32"


def test_sixteen_bits_that_slow_the_cpu_down_are_told(monkeypatch, caplog):
    for gain, told in ((0.02, True), (3.0, False)):
        caplog.clear()
        monkeypatch.setattr(precision, "convolution_gain", lambda dtype, gain=gain: gain)
        precision.choose_precision("bfloat16", torch.device("cpu"), preset("tiny"))
        assert ("50 times slower" in caplog.text) == told


def test_parts_of_unlike_dtypes_work_together(monkeypatch):
    found = {}
    scan = ball()
    for kinds in (("float32",) * 3, ("bfloat16", "float32", "bfloat16"), ("bfloat16", "bfloat16", "float32")):
        chosen_types = precision.Precision(*(getattr(torch, kind) for kind in kinds))
        monkeypatch.setattr("medvl_sam2.engine.engine.choose_precision", lambda *_, chosen=chosen_types: chosen)
        session = MedVLEngine.from_pretrained("tiny", device="cpu").open(scan)
        assert session.ask("Is there a nodule?").text
        found[kinds] = session.segment("liver", points=[(32, 32, 16, 1)])
    plain, *others = found.values()
    assert plain.mask.any()
    for other in others:
        assert plain.dice(other) > 0.97
