"""The experiments' bookkeeping, with training and measuring replaced: budgets, shared runs, going on after a stop."""

import json
import signal
import subprocess
import sys

import pytest

from medvl_sam2.engine.geometry import InputError
from medvl_sam2.training import evaluate, experiments
from medvl_sam2.training.arms import AFTER_STAGE2
from medvl_sam2.training.config import load_config
from medvl_sam2.training.experiments import Lab, run

SETTINGS = ("stage1.steps=3", "stage2.steps=4", "stage3.steps=5")
STEPS = ("stage1", "stage2", "stage3")


class Calls:
    """What was trained and measured; `stop` breaks off at that training or measurement, as a kill would."""

    def __init__(self):
        self.trained, self.measured, self.stop = [], [], None

    def count(self) -> None:
        if self.stop is not None and len(self.trained) + len(self.measured) >= self.stop:
            raise KeyboardInterrupt

    def train(self, base, home, name, config, projector, *, keep_stage2=False):
        out = home / "runs" / name
        if (out / "model").is_dir():
            return out
        self.count()
        steps = [getattr(config, stage).steps for stage in STEPS]
        self.trained.append({"run": name, "seed": config.seed, "kind": projector, "steps": steps, "base": base})
        for kept in ("model", AFTER_STAGE2) if keep_stage2 else ("model",):
            (out / kept).mkdir(parents=True)
            (out / kept / "config.json").write_text(f"{name} {kept}")
        return out

    def evaluate(self, model, *, seeds, out, processes, tasks, rendered):
        self.count()
        self.measured.append({"model": model, "scans": list(seeds), "tasks": tuple(tasks), "out": out.name})
        out.mkdir(parents=True, exist_ok=True)
        modes = {"text": 0.2, "box": 0.5, "point": 0.4, "box_alone": 0.3, "point_alone": 0.3}
        row = {"name": "a", "objects": [{"name": "liver", "volume_ml": 900, **modes}]}
        (out / "scans.jsonl").write_text(json.dumps(row) + "\n")
        summary = {"dice_text": 0.5, "of": (model / "config.json").read_text()}
        (out / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def calls(monkeypatch) -> Calls:
    made = Calls()
    monkeypatch.setattr(experiments, "train_arm", made.train)
    monkeypatch.setattr(experiments, "base_model", lambda base, config, home: base)
    monkeypatch.setattr(evaluate, "run", made.evaluate)
    return made


def make_lab(tmp_path, **changes) -> Lab:
    return Lab(tmp_path / "out", load_config("experiment", SETTINGS), seeds=(0, 1), scans=2, **changes)


def test_projectors_have_one_budget_and_one_beginning(calls, tmp_path):
    seen = []
    result = run("projector", make_lab(tmp_path), report=lambda: seen.append(len(calls.measured)))
    assert [(call["kind"], call["seed"]) for call in calls.trained] == [
        (kind, seed) for seed in (0, 1) for kind in experiments.PROJECTORS
    ]
    assert {tuple(call["steps"]) for call in calls.trained} == {(3, 4, 5)}
    assert {call["base"] for call in calls.trained} == {"tiny"}
    assert {len(rows) for rows in result["arms"].values()} == {2}
    assert all(call["scans"] == [1_000_000, 1_000_001] for call in calls.measured)
    # After each seed all arms have been compared alike.
    assert seen == [3, 6]
    assert json.loads((tmp_path / "out" / "projector.json").read_text()) == result


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_an_experiment_stopped_anywhere_goes_on(name, calls, tmp_path):
    whole = run(name, make_lab(tmp_path))
    total = len(calls.trained) + len(calls.measured)
    for stop in range(total):
        again = Calls()
        calls.__dict__.update(again.__dict__)
        calls.stop = stop
        lab = make_lab(tmp_path / str(stop))
        with pytest.raises(KeyboardInterrupt):
            run(name, lab)
        calls.stop = None
        assert run(name, lab) == whole
        # Nothing that was finished is done twice.
        assert len(calls.trained) + len(calls.measured) == total


def test_a_note_on_the_results_is_kept(calls, tmp_path):
    assert run("projector", make_lab(tmp_path))["note"] == ""
    path = tmp_path / "out" / "projector.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "note": "By hand."}))
    assert run("projector", make_lab(tmp_path))["note"] == json.loads(path.read_text())["note"] == "By hand."


def test_one_stage_has_the_steps_of_three(calls, tmp_path):
    result = run("stages", make_lab(tmp_path))
    steps = {call["run"]: call["steps"] for call in calls.trained}
    assert steps["one_stage-0"] == [0, 0, 12]
    assert steps["mixer-0"] == [3, 4, 5]
    assert [row["of"] for row in result["arms"]["after stage 2"]] == [f"mixer-{n} {AFTER_STAGE2}" for n in (0, 1)]
    assert [row["of"] for row in result["arms"]["three stages"]] == [f"mixer-{n} model" for n in (0, 1)]


def test_experiments_share_the_mixers_runs(calls, tmp_path):
    run("projector", make_lab(tmp_path))
    before = len(calls.trained)
    run("stages", make_lab(tmp_path))
    run("prompts", make_lab(tmp_path))
    assert [call["run"] for call in calls.trained[before:]] == ["one_stage-0", "one_stage-1"]


def test_a_measure_belongs_to_its_model_scans_and_tasks(calls, tmp_path):
    run("prompts", make_lab(tmp_path))
    (tmp_path / "ready").mkdir()
    (tmp_path / "ready" / "config.json").write_text("first")
    run("prompts", make_lab(tmp_path), model=tmp_path / "ready")
    first, second = (set(call["scans"]) for call in calls.measured[2:])
    assert len(first) == len(second) == 2 and not first & second
    assert calls.measured[2]["tasks"] == (evaluate.PROMPTS,)
    run("prompts", make_lab(tmp_path), model=tmp_path / "ready")
    assert len(calls.measured) == 4
    # Other weights under the same name.
    (tmp_path / "ready" / "config.json").write_text("second")
    result = run("prompts", make_lab(tmp_path), model=tmp_path / "ready")
    assert len(calls.measured) == 6 and {row["of"] for row in result["arms"]["prompts"]} == {"second"}


def test_two_experiments_in_one_folder_are_refused(calls, tmp_path):
    lab = make_lab(tmp_path)
    lab.out.mkdir()
    hold = f"import fcntl, sys; f = open({str(lab.out / 'lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
    hold += "print(flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(InputError, match="another run is at work"):
            run("projector", lab)
    finally:
        other.kill()
        other.communicate()
    run("projector", lab)


@pytest.mark.parametrize(("name", "seeds", "message"), [("speed", (0, 1), "experiment"), ("stages", (0,), "seeds")])
def test_mistakes_are_named(name, seeds, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(name, Lab(tmp_path, load_config("experiment"), seeds=seeds))


WAITING = """
import time
from medvl_sam2.training.config import load_config
from medvl_sam2.training.experiments import Lab, _several
with _several(Lab({out!r}, load_config("experiment"), processes=2), training=False) as work:
    # More jobs than workers: some are held and not begun.
    found = work(time.sleep, [0, 600, 600, 600, 600])
    next(found)
    print(flush=True)
    next(found)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_an_experiment(how, tmp_path):
    script = WAITING.format(out=str(tmp_path))
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        other.stdout.readline()
        other.send_signal(how)
        # Ends when the last process that holds it has.
        assert other.communicate(timeout=300)[0] == b""
        assert other.returncode != 0
    finally:
        other.kill()
