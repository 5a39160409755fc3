"""Float8 weights in the engine: what they change is measured, and too much of it takes them back."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from medvl_sam2.engine import engine as engine_module
from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.geometry import InputError, Volume
from medvl_sam2.kernels.float8_linear import Float8Linear
from medvl_sam2.model.prompts import SEGMENT_ANSWER


@pytest.fixture(scope="module")
def scan():
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (18, 40, 36)), indexing="ij"))
    return Volume.from_array(np.where((grid**2).sum(0) < 0.8, 60, -1000) + rng.normal(0, 15, (18, 40, 36)))


@pytest.fixture
def engine(small_model, monkeypatch):
    monkeypatch.setattr(engine_module, "why_not_float8", lambda device: "")
    engine = MedVLEngine.from_pretrained(small_model, device="cpu", dtype="float32")
    # A random model may say that nothing is there.
    forced, first = engine.language.forced, engine.chat.answer(SEGMENT_ANSWER)[0]
    monkeypatch.setattr(
        engine.language, "forced", lambda *a: [replace(result, margin=1.0, first=first) for result in forced(*a)]
    )
    return engine


def _narrow(engine):
    return [name for name, module in engine._model.named_modules() if isinstance(module, Float8Linear)]


def test_rounds_the_llm_and_the_third_stage_and_says_what_changed(engine, scan):
    session = engine.open(scan)
    before = session.segment("liver").logits
    kept = session.nbytes
    check = engine.use_float8(scan, ["liver", "spleen"], least_dice=0.5, least_tokens=0.0)
    assert check.kept and set(check.dice) == {"liver", "spleen"} and 0.5 <= min(check.dice.values()) <= 1
    assert 0 <= check.tokens <= 1
    trunk = engine._model.sam2.image_encoder.trunk
    stage = range(trunk.stage_ends[1] + 1, trunk.stage_ends[2] + 1)
    blocks = {f"sam2.image_encoder.trunk.blocks.{i}" for i in stage}
    names = _narrow(engine)
    assert sum("language" in name for name in names) == 7 * engine.config.language.config["num_hidden_layers"]
    vision = {name for name in names if "language" not in name}
    parts = {f"{b}.{part}" for b in blocks for part in ("attn.proj", "mlp.layers.0", "mlp.layers.1")}
    # The stage's first block widens what comes to it.
    assert vision == parts | {f"sam2.image_encoder.trunk.blocks.{stage[0]}.proj"}
    # What the session knew was made with the old weights.
    assert kept > 0 and session.nbytes == 0
    now = session.segment("liver").logits
    error = (now - before).square().mean().sqrt() / before.square().mean().sqrt()
    assert 1e-5 < error < 0.3


def test_takes_it_back_where_a_scan_shows_harm(engine, scan, caplog):
    before = engine.open(scan).segment("liver").logits
    check = engine.use_float8(scan, ["liver"], least_dice=1.01)
    assert not check.kept and not _narrow(engine) and "the weights stay as they were" in caplog.text
    assert torch.equal(engine.open(scan).segment("liver").logits, before)


def test_a_failure_takes_it_back_too(engine, scan, monkeypatch):
    monkeypatch.setattr(engine.language, "predicted", lambda *a: (_ for _ in ()).throw(RuntimeError("cut")))
    with pytest.raises(RuntimeError, match="cut"):
        engine.use_float8(scan, ["liver"])
    assert not _narrow(engine)


def test_the_unchanged_model_says_its_own_report(engine, scan):
    prefix = engine.language.prefix(engine.visual_tokens(torch.zeros(1, *engine.config.volume.size)))
    question = engine.chat.question("Report.")
    said = [step.token for step in engine.language.generate(prefix, question, max_tokens=20)]
    assert said and engine.language.predicted(prefix, question, said) == said
    changed = [*said[:5], (said[5] + 1) % 500, *said[6:]]
    assert engine.language.predicted(prefix, question, changed)[:6] == said[:6]


def test_refuses_where_there_are_no_float8_products(small_model, scan):
    engine = MedVLEngine.from_pretrained(small_model, device="cpu")
    with pytest.raises(InputError, match="no float8 products on cpu"):
        engine.use_float8(scan, ["liver"])
    assert not _narrow(engine)


def test_refuses_a_scan_in_which_nothing_is_found(engine, scan, monkeypatch):
    forced = engine.language.forced
    monkeypatch.setattr(engine.language, "forced", lambda *a: [replace(r, margin=-1.0) for r in forced(*a)])
    with pytest.raises(InputError, match="one that the model finds"):
        engine.use_float8(scan, ["liver"])
    assert not _narrow(engine)
