"""The staged trainer on a few phantoms: what trains, that it resumes exactly, and that it refuses a bad loss."""

import copy
import csv
import dataclasses
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.training import checkpoint, train
from medvl_sam2.training.batches import CLASSES
from medvl_sam2.training.config import PhaseConfig, TrainConfig, load_config
from medvl_sam2.training.facts import FACTS
from medvl_sam2.training.loop import learning_rate, run_phase
from medvl_sam2.training.pretrain import _LanguageObjective, _VisionObjective
from medvl_sam2.training.stages import TRAINABLE


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    small = ["data.phantoms=4", "data.workers=1", "data.runs=1", "vision.crops=3", "precision=fp32", "log_every=1"]
    config = load_config("tiny", small)
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


def test_the_language_learns_its_names_from_sam2(built, config, tmp_path):
    model, batches, _ = built
    with pytest.raises(ValueError, match=r"sam2: expected it to be trained before language"):
        train.run_one("language", model, batches, config, tmp_path)
    skipped = dataclasses.replace(config, language=dataclasses.replace(config.language, steps=0))
    train.run_one("language", model, batches, skipped, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_the_language_reads_the_rows_of_facts_as_visual_tokens(built, config):
    model, batches, _ = built
    batch = batches.language(0)
    objective = _LanguageObjective(model, torch.zeros(len(CLASSES), model.config.sam2.d_model))
    text, names = batch.text, batch.classes
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.zero_()
        model.language.seg_input.copy_(model.language.causal.get_input_embeddings().weight[model.chat.seg_id])
        model.language.seg_output.copy_(model.language.causal.get_output_embeddings().weight[model.chat.seg_id])
        whole = model(
            text.input_ids,
            torch.einsum("brf,fh->brh", batch.rows, objective.heads.weight) + objective.ground,
            attention_mask=text.attention_mask,
            position_ids=text.position_ids,
            labels=text.labels,
        )
        losses = objective(batch)
        prompts = model.seg_prompts(whole.hidden, text.input_ids)
    torch.testing.assert_close(losses["ce"], whole.loss)
    assert len(names) == len(prompts)
    torch.testing.assert_close(losses["naming"], prompts.square().mean())


def test_the_projector_learns_to_say_what_the_language_reads(built, config, tmp_path):
    model, batches, _ = built
    with pytest.raises(ValueError, match=r"language: expected it to be trained before vision"):
        train.run_one("vision", model, batches, config, tmp_path)
    batch = dataclasses.replace(batches.vision(config.vision.steps), tokens=None)
    ground, *vectors = torch.randn(1 + len(FACTS), model.config.language.hidden_size)
    objective = _VisionObjective(model, torch.stack(vectors), ground)
    rows = torch.stack([objective.places * holds for holds in batch.facts]) @ torch.stack(vectors)
    losses = {}
    for name, said in (("all", rows), ("half", rows / 2), ("nothing", torch.zeros_like(rows))):
        objective.projector = _Says(ground + said)
        with torch.no_grad():
            losses[name] = float(objective(batch)["facts"])
    assert losses["all"] == 0
    assert losses["half"] == pytest.approx(losses["nothing"] / 4)


class _Says(nn.Module):
    def __init__(self, rows: torch.Tensor):
        super().__init__()
        self.rows = rows

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.rows


def test_the_language_stays_frozen_in_stage_1(built):
    model, _, _ = built
    assert not any(name.startswith(("language.", "vision.")) for name in _names(model, "stage1"))


def _names(model: MedVLSAM2, stage: str) -> list[str]:
    from medvl_sam2.training.stages import set_trainable

    set_trainable(model, stage)
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_a_model_is_replaced_whole_or_not_at_all(small_model, config, tmp_path, monkeypatch):
    model, save = MedVLSAM2.from_pretrained(small_model, torch.float32), MedVLSAM2.save_pretrained
    monkeypatch.setattr(train, "build", lambda *_: (model, None))
    monkeypatch.setattr(train, "run_one", lambda *_: None)

    def weights() -> torch.Tensor:
        return next(MedVLSAM2.from_pretrained(tmp_path / "model", torch.float32).projector.parameters())

    def half(self, directory):
        save(self, directory)
        raise KeyboardInterrupt

    first = next(model.projector.parameters())
    before = first.detach().clone()
    train.run(config, tmp_path)
    first.data += 1
    with monkeypatch.context() as patched:
        patched.setattr(MedVLSAM2, "save_pretrained", half)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, tmp_path)
    assert torch.equal(weights(), before)
    train.run(config, tmp_path)
    assert torch.equal(weights(), before + 1)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class _Fit(nn.Module):
    """Fits a line; `stop` breaks off at that batch as a kill would."""

    def __init__(self, stop: int | None = None):
        super().__init__()
        self.line = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.2))
        self.left = stop

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.left is not None:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
        told = self.line(x.to(self.line[0].weight.dtype))[:, 0].float()
        return {"loss": (told - x.sum(1)).square().mean()}


def _numbers(number: int) -> torch.Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(number))


def _line(config: TrainConfig, out: Path, stop: int | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    objective = _Fit(stop)
    run_phase("vision", objective, _numbers, config, out)
    return objective.line


def _fit_config(**settings) -> TrainConfig:
    phase = {key: settings.pop(key) for key in ("accumulate", "ema", "steps") if key in settings}
    return TrainConfig(save_every=4, log_every=1, vision=PhaseConfig(**{"steps": 12, "lr": 0.05, **phase}), **settings)


def _losses(out: Path) -> dict[str, str]:
    with open(out / "logs" / "vision.csv") as file:
        return {row["step"]: row["loss"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-pure", "fp16"])
def test_a_killed_run_goes_on_as_if_it_had_never_stopped(precision, tmp_path):
    config = _fit_config(precision=precision, ema=0.5)
    whole = _line(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _line(config, tmp_path / "killed", stop=6)
    resumed = _line(config, tmp_path / "killed")
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)
    assert _losses(tmp_path / "whole") == _losses(tmp_path / "killed")
    assert len((tmp_path / "killed" / "logs" / "vision.csv").read_text().splitlines()) == 13


def test_a_finished_phase_is_loaded_not_run(tmp_path):
    first = _line(_fit_config(), tmp_path)
    again = _line(_fit_config(), tmp_path, stop=0)
    assert torch.equal(first[0].weight, again[0].weight)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(tmp_path):
    def numbers(number: int) -> torch.Tensor:
        return _numbers(number) * (float("nan") if number == 6 else 1)

    with pytest.raises(FloatingPointError, match=r"batch 6 .* at step 6; .*vision.pt is good"):
        run_phase("vision", _Fit(), numbers, _fit_config(), tmp_path)
    assert torch.load(tmp_path / "checkpoints" / "vision.pt")["step"] == 4


def test_a_loss_that_is_not_finite_before_the_first_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match=r"at step 2; there is no checkpoint of this phase yet"):
        run_phase("vision", _Fit(), lambda number: _numbers(number) / (number != 2), _fit_config(), tmp_path)
    assert not (tmp_path / "checkpoints" / "vision.pt").exists()


def test_kill_9_at_a_random_step(tmp_path):
    config = _fit_config(steps=40)
    whole = _line(config, tmp_path / "whole")
    stop = int(np.random.default_rng().integers(5, 39))
    code = (
        "import importlib.util, pathlib, sys\n"
        "spec = importlib.util.spec_from_file_location('test_train', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['test_train'] = module\n"
        "spec.loader.exec_module(module)\n"
        "module.run_until_killed(pathlib.Path(sys.argv[2]), int(sys.argv[3]))\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, __file__, str(tmp_path / "killed"), str(stop)],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    resumed = _line(config, tmp_path / "killed")
    assert torch.equal(whole[0].weight, resumed[0].weight)
    assert _losses(tmp_path / "whole") == _losses(tmp_path / "killed")


def run_until_killed(out: Path, stop: int) -> None:
    """Train, and die at a step without a chance to tidy up."""
    torch.manual_seed(0)
    objective = _Fit()
    steps = iter(range(10**6))

    def kill(*_: object) -> None:
        if next(steps) == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    objective.register_forward_pre_hook(kill)
    run_phase("vision", objective, _numbers, _fit_config(steps=40), out)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    path = tmp_path / "state.pt"
    checkpoint.save(path, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        with pytest.raises(OSError, match="could not be written"):
            checkpoint.save(path, {"step": 2, "weights": torch.randn(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.load(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_accumulated_batches_are_one_large_batch(tmp_path):
    class Both(_Fit):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            self.line.eval()
            return super().forward(x)

    def pair(number: int) -> torch.Tensor:
        return torch.cat([_numbers(2 * number), _numbers(2 * number + 1)])

    fits = []
    for name, make, parts in (("parts", _numbers, 2), ("pairs", pair, 1)):
        torch.manual_seed(0)
        objective = Both()
        run_phase("vision", objective, make, _fit_config(accumulate=parts), tmp_path / name)
        fits.append(objective.line[0].weight)
    torch.testing.assert_close(*fits)


def test_work_without_countable_operations_keeps_its_accumulated_gradients(tmp_path):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))
            self.calls = 0

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            self.calls += 1
            return {"loss": (self.factor * x).square().mean()}

    objective = Scale()
    run_phase("vision", objective, _numbers, _fit_config(accumulate=3, steps=2), tmp_path)
    # Six batches and the one that is counted.
    assert objective.calls == 7


def test_the_phase_ends_with_the_moving_average(tmp_path):
    seen = []

    class Watched(_Fit):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            seen.append(self.line[0].weight.detach().clone())
            return super().forward(x)

    torch.manual_seed(0)
    objective = Watched()
    run_phase("vision", objective, _numbers, _fit_config(ema=0.5, steps=3), tmp_path)
    kept = torch.load(tmp_path / "checkpoints" / "vision.pt")["parameters"]["line.0.weight"]
    assert torch.equal(objective.line[0].weight, kept)
    # Weights after step n are what step n + 1 sees; the last is not seen, so the average of the first three is undone.
    partial = seen[0]
    for weight in seen[1:]:
        partial = partial.lerp(weight, 0.5)
    last = 2 * kept - partial
    assert not torch.allclose(last, kept)
    torch.manual_seed(0)
    plain = _Fit()
    run_phase("vision", plain, _numbers, _fit_config(steps=3), tmp_path / "plain")
    torch.testing.assert_close(plain.line[0].weight.detach(), last)


@pytest.mark.parametrize("settings", [{"checkpoint_activations": True}, {"fused": False}, {"precision": "bf16"}])
def test_the_loss_curve_does_not_depend_on_how_it_is_computed(settings, built, config, tmp_path):
    model, batches, _ = built
    curves = []
    for name, changes in (("plain", {}), ("changed", settings)):
        copied = copy.deepcopy(model)
        train.run_one("stage3", copied, batches, dataclasses.replace(config, **changes), tmp_path / name)
        with open(tmp_path / name / "logs" / "stage3.csv") as file:
            curves.append([float(row["loss"]) for row in csv.DictReader(file)])
    tolerance = 2e-2 if "precision" in settings else 1e-4
    assert curves[0] == pytest.approx(curves[1], rel=tolerance)
    assert curves[0][0] != curves[0][1]


def test_the_log_tells_rates(built, config):
    _, batches, out = built
    train.run_one("stage1", built[0], batches, config, out)
    with open(out / "logs" / "stage1.csv") as file:
        row = next(csv.DictReader(file))
    assert all(float(row[key]) > 0 for key in ("tokens_per_second", "tflops", "peak_memory_gb", "grad_norm"))


@pytest.mark.parametrize("name", ["1b", "4b", "8b", "experiment"])
def test_shipped_configs_load_and_share_one_recipe(name):
    config, base = load_config(name), load_config("1b")
    if name == "experiment":
        stages = [config.stage1, config.stage2, config.stage3]
        assert len({(s.lr, s.batch, s.warmup, s.clip, s.weight_decay) for s in stages}) == 1
        return
    for stage in ("stage1", "stage2", "stage3"):
        ours, theirs = getattr(config, stage), getattr(base, stage)
        assert ours.batch * ours.accumulate == theirs.batch * theirs.accumulate
        assert (ours.lr, ours.steps, ours.weight_decay) == (theirs.lr, theirs.steps, theirs.weight_decay)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "int8"}, "expected one of fp32"),
        ({"precision": "fp16", "parallel": "fsdp"}, "with parallel=fsdp"),
        ({"parallel": "tp"}, "expected ddp or fsdp"),
        ({"wandb": "project"}, "pip install wandb"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=message):
        _line(_fit_config(**settings), tmp_path)


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
