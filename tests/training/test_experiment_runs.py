"""Every experiment from the command line to its page, on a small random model and coarse phantoms."""

import functools
import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medvl_sam2.cli import main
from medvl_sam2.engine.session import VolumeSession
from medvl_sam2.training import evaluate, text_metrics
from medvl_sam2.training.config import load_config
from medvl_sam2.training.experiments import Lab, run
from medvl_sam2.training.phantom import Phantom, make_phantom

BUDGET = ["precision=fp32", "device=cpu", "data.phantoms=2", "data.runs=1", "data.run_length=2", "data.workers=1"]
BUDGET += [f"stage{n}.{setting}" for n in (1, 2, 3) for setting in ("steps=1", "batch=1", "requests=2")]


@pytest.fixture
def coarse(monkeypatch) -> None:
    """One small scan, few questions and short answers: a random model never ends one."""
    native, ask, questions = Phantom.native, VolumeSession.ask, evaluate.make_questions
    monkeypatch.setattr(Phantom, "native", lambda self: native(self, 32))
    monkeypatch.setattr(evaluate, "phantom_case", functools.cache(evaluate.phantom_case))
    monkeypatch.setattr(VolumeSession, "ask", lambda *a, **k: ask(*a, **{**k, "max_tokens": 4}))
    monkeypatch.setattr(evaluate, "make_questions", lambda *a: questions(*a)[:3])
    monkeypatch.setattr(text_metrics.shutil, "which", lambda _: None)
    monkeypatch.setattr(evaluate, "_MARKED", 1)
    monkeypatch.setattr(evaluate, "_MARKED_FOR_PROMPTS", 2)


def test_all_three_from_the_command_line(coarse, small_model, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    common = ["--out", tmp_path / "out", "--base", small_model, "--seeds", 2, "--scans", 1, "--processes", 1]
    common += [part for setting in BUDGET for part in ("--set", setting)]
    page = tmp_path / "docs" / "experiments.md"
    for name in ("projector", "prompts", "stages"):
        status = main(["experiment", name, *map(str, common), "--page", str(page), "--json"])
        out, err = capsys.readouterr()
        assert status == 0, err[-2000:]
        document = json.loads(out.splitlines()[-1])
        assert all(len(rows) == 2 for rows in document["arms"].values())
        text = page.read_text()
        assert f"](experiments/{name}.png)" in text and (page.parent / "experiments" / f"{name}.png").is_file()
        assert text.count("**Verdict.**") + text.count("Not run yet") == 3
    assert "Not run yet" not in text and "Steps: stage1 1, stage2 1, stage3 1" in text
    assert f"medvl-sam2 experiment stages --seeds 2 --scans 1 --base {small_model} --set precision=fp32" in text
    runs = sorted(path.name for path in (tmp_path / "out" / "runs").iterdir())
    kinds = ("grouped_linear", "mixer", "one_stage", "pooled")
    assert runs == [f"{kind}-{seed}" for kind in kinds for seed in (0, 1)]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As each of two workers has on two cores: Adam's first steps turn a last bit into a whole step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_arms_at_a_time_are_trained_and_measured_like_one_after_the_other(one_thread, small_model, tmp_path):
    weights, classes = [], []
    for processes in (1, 2):
        lab = Lab(tmp_path / str(processes), load_config("experiment", BUDGET), (0, 1), 1, processes, small_model)
        (lab.out / "unseen").mkdir(parents=True)
        # Workers do not inherit a patched renderer, but take what has been rendered.
        coarse = make_phantom(lab.phantoms[0]).native(32)
        np.savez(lab.out / "unseen" / f"{lab.phantoms[0]}.npz", **vars(coarse))
        classes.append([row["prompts"]["classes"] for row in run("prompts", lab)["arms"]["prompts"]])
        weights.append([load_file(lab.out / "runs" / f"mixer-{n}" / "model" / "model.safetensors") for n in (0, 1)])
    assert [list(found) for found in classes[0]] == [list(found) for found in classes[1]]
    assert all(classes[0]) and len(classes[0]) == 2
    # Seeds differ in everything that begins anew.
    for ours, theirs in zip(*weights, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in ours)
    assert not all(torch.allclose(weights[0][0][key], weights[0][1][key], atol=1e-4) for key in weights[0][0])
