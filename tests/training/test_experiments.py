"""The experiments' bookkeeping, with training and measuring replaced: budgets, shared runs, going on after a stop."""

import json

import pytest
import torch

from medvl_sam2.training import evaluate, experiments, train
from medvl_sam2.training.config import load_config
from medvl_sam2.training.experiments import Lab, run

SETTINGS = ("stage1.steps=3", "stage2.steps=4", "stage3.steps=5", "language.steps=1", "vision.steps=1", "sam2.steps=1")


@pytest.fixture
def calls(monkeypatch):
    """What was trained and measured."""
    trained, measured = [], []

    def fake_train(config, out, *, until=None, settings=None):
        steps = {phase: getattr(config, phase).steps for phase in train.PHASES}
        kind = settings.projector.kind if settings else None
        trained.append({"run": out.name, "seed": config.seed, "until": until, "kind": kind, "steps": steps})
        (out / "model").mkdir(parents=True, exist_ok=True)
        (out / "model" / "config.json").write_text(json.dumps({"until": until}))
        if out.name == "base":
            (out / "checkpoints").mkdir()
            for part in ("language", "vision", "sam2"):
                torch.save({"step": 1}, out / "checkpoints" / f"{part}.pt")
        return out / "model"

    def fake_evaluate(model, *, seeds, out, processes, tasks):
        measured.append({"model": model, "scans": list(seeds), "tasks": tuple(tasks), "out": out.name})
        out.mkdir(parents=True)
        until = json.loads((model / "config.json").read_text())["until"]
        (out / "summary.json").write_text(json.dumps({"dice_text": 0.5, "until": until}))

    monkeypatch.setattr(train, "run", fake_train)
    monkeypatch.setattr(evaluate, "run", fake_evaluate)
    return trained, measured


def make_lab(tmp_path, **changes) -> Lab:
    return Lab(tmp_path / "out", load_config("experiment", SETTINGS), seeds=(0, 1), scans=2, **changes)


def test_projectors_have_one_budget_and_one_start(calls, tmp_path):
    trained, measured = calls
    result = run("projector", make_lab(tmp_path))
    arms = [call for call in trained if call["run"] != "base"]
    # All pre-training, and nothing of the stages.
    (until,) = [call["until"] for call in trained if call["run"] == "base"]
    assert train.PHASES[train.PHASES.index(until) + 1] == "stage1"
    assert {(call["kind"], call["seed"]) for call in arms} == {
        (kind, seed) for kind in experiments.PROJECTORS for seed in (0, 1)
    }
    assert len({tuple(call["steps"].items()) for call in arms}) == 1
    assert {len(rows) for rows in result["arms"].values()} == {2}
    assert all(call["scans"] == [1_000_000, 1_000_001] for call in measured)
    for call in arms:
        assert (tmp_path / "out" / "runs" / call["run"] / "checkpoints" / "sam2.pt").is_file()


def test_a_stopped_experiment_goes_on(calls, tmp_path, monkeypatch):
    trained, measured = calls
    whole = train.run

    def stop_at_the_fourth(*args, **options):
        if len(trained) == 3:
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr(train, "run", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run("projector", make_lab(tmp_path))
    monkeypatch.setattr(train, "run", whole)
    before = len(trained)
    run("projector", make_lab(tmp_path))
    assert len(trained) - before == 7 - before
    assert len(measured) == len({call["out"] for call in measured}) == 6


def test_one_stage_has_the_steps_of_three(calls, tmp_path):
    trained, measured = calls
    result = run("stages", make_lab(tmp_path))
    steps = {call["run"]: call["steps"] for call in trained}
    assert [steps["one_stage-0"][f"stage{n}"] for n in (1, 2, 3)] == [0, 0, 12]
    assert [steps["mixer-0"][f"stage{n}"] for n in (1, 2, 3)] == [3, 4, 5]
    assert {row["until"] for row in result["arms"]["after stage 2"]} == {"stage2"}
    assert {row["until"] for row in result["arms"]["three stages"]} == {None}


def test_stages_after_projector_measure_the_right_weights(calls, tmp_path):
    run("projector", make_lab(tmp_path))
    result = run("stages", make_lab(tmp_path))
    assert {row["until"] for row in result["arms"]["after stage 2"]} == {"stage2"}
    assert {row["until"] for row in result["arms"]["three stages"]} == {None}
    model = tmp_path / "out" / "runs" / "mixer-0" / "model" / "config.json"
    assert json.loads(model.read_text())["until"] is None


def test_a_ready_model_is_measured_on_disjoint_scans(calls, tmp_path):
    trained, measured = calls
    (tmp_path / "ready").mkdir()
    (tmp_path / "ready" / "config.json").write_text('{"until": null}')
    run("prompts", make_lab(tmp_path), model=tmp_path / "ready")
    assert not trained
    first, second = (set(call["scans"]) for call in measured)
    assert len(first) == len(second) == 2 and not first & second
    assert measured[0]["tasks"] == (evaluate.PROMPTS,)


@pytest.mark.parametrize(("name", "seeds", "message"), [("speed", (0, 1), "experiment"), ("stages", (0,), "seeds")])
def test_mistakes_are_named(name, seeds, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(name, Lab(tmp_path, load_config("experiment"), seeds=seeds))


def test_a_base_without_its_parts_is_named(calls, tmp_path):
    with pytest.raises(ValueError, match=r"expected .*\.pt of a finished run"):
        run("projector", make_lab(tmp_path, base=tmp_path))
