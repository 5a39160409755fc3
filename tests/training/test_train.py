"""The staged trainer on a few phantoms: what trains, that it resumes exactly, and that it refuses a bad loss."""

import csv
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.training import train
from medvl_sam2.training.config import PhaseConfig, TrainConfig, load_config
from medvl_sam2.training.loop import learning_rate, run_phase
from medvl_sam2.training.stages import TRAINABLE


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    config = load_config("tiny", ["data.phantoms=4", "data.workers=1", "data.runs=1", "precision=fp32", "log_every=1"])
    for phase in train.PHASES:
        setattr(config, phase, dataclasses.replace(getattr(config, phase), steps=2, batch=2, questions=2, requests=2))
    return config


@pytest.fixture(scope="module")
def built(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return (*train.build(config, out), out)


def _snapshot(model: MedVLSAM2) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", list(TRAINABLE))
def test_a_stage_moves_its_parameters_and_no_others(stage, built, config):
    model, batches, out = built
    before = _snapshot(model)
    train.run_one(stage, model, batches, config, out)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    expected = {
        "stage1": ("projector.",),
        "stage2": ("projector.", "vision.", "lora_"),
        "stage3": ("projector.", "vision.", "lora_", "seg_bridge.", "seg_input", "seg_output", "sam_mask_decoder."),
    }[stage]
    assert moved
    assert all(any(part in name for part in expected) for name in moved)
    # Every part of the stage learns, not only some of it.
    for part in expected:
        assert any(part in name for name in moved), part


def test_the_language_stays_frozen_in_stage_1(built):
    model, _, _ = built
    assert not any(name.startswith(("language.", "vision.")) for name in _names(model, "stage1"))


def _names(model: MedVLSAM2, stage: str) -> list[str]:
    from medvl_sam2.training.stages import set_trainable

    set_trainable(model, stage)
    return [name for name, p in model.named_parameters() if p.requires_grad]


def _line(config: TrainConfig, out: Path, stop: int | None = None) -> nn.Linear:
    """Fit a line by `run_phase`; `stop` breaks off at that step as a kill would."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.2))

    def batch(step: int) -> torch.Tensor:
        return torch.randn(8, 3, generator=torch.Generator().manual_seed(step))

    steps = iter(range(10**6))

    def losses(x: torch.Tensor) -> dict[str, torch.Tensor]:
        if stop is not None and next(steps) == stop:
            raise KeyboardInterrupt
        return {"loss": (model(x)[:, 0] - x.sum(1)).square().mean()}

    run_phase("vision", {"model": model}, batch, losses, config, out)
    return model


def _fit_config() -> TrainConfig:
    return TrainConfig(save_every=4, log_every=1, vision=PhaseConfig(steps=12, lr=0.05))


def test_a_killed_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    whole = _line(_fit_config(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _line(_fit_config(), tmp_path / "killed", stop=6)
    resumed = _line(_fit_config(), tmp_path / "killed")
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)
    losses = []
    for name in ("whole", "killed"):
        with open(tmp_path / name / "logs" / "vision.csv") as file:
            losses.append({row["step"]: row["loss"] for row in csv.DictReader(file)})
    assert losses[0] == losses[1]


def test_a_finished_phase_is_loaded_not_run(tmp_path):
    first = _line(_fit_config(), tmp_path)
    again = _line(_fit_config(), tmp_path, stop=0)
    assert torch.equal(first[0].weight, again[0].weight)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="step 0"):
        run_phase(
            "vision",
            {"model": model},
            lambda step: torch.full((1, 1), float("nan")),
            lambda x: {"loss": model(x).sum()},
            _fit_config(),
            tmp_path,
        )
    assert not (tmp_path / "checkpoints" / "vision.pt").exists()


def test_learning_rate_warms_up_and_ends_at_zero():
    phase = PhaseConfig(steps=100, warmup=0.1)
    rates = [learning_rate(phase, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert max(rates) == pytest.approx(1.0) and rates[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage1.stepz=3", "did you mean 'stage1.steps'"),
        ("presset=tiny", "did you mean 'preset'"),
        ("stage1.lr=fast", "expected a number"),
        ("stage1=3", "expected a section"),
        ("stage1.steps", "expected key=value"),
    ],
)
def test_bad_settings_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_config("tiny", [override])


def test_evaluation_seeds_are_refused(config, tmp_path):
    bad = dataclasses.replace(config, data=dataclasses.replace(config.data, first_seed=1_000_000, phantoms=1))
    with pytest.raises(ValueError, match="evaluation"):
        train.build(bad, tmp_path)
