"""Evaluation of real scans: in several processes as in one, and written whole."""

import json

import fake_datasets as fake
import pytest

from medvl_sam2.training.datasets.index import index
from medvl_sam2.training.evaluate import run


def test_several_processes_measure_as_one_does(small_model, tmp_path):
    fake.ct_org(tmp_path / "ct-org", 4)
    index([tmp_path / "ct-org"], tmp_path / "m.jsonl")
    rows = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        run(small_model, tmp_path / "m.jsonl", out=out, processes=processes, split="train", tasks=("segmentation",))
        rows.append([json.loads(line) for line in (out / "scans.jsonl").read_text().splitlines()])
    assert [row["name"] for row in rows[0]] == [f"ct-org/volume-{n}" for n in (21, 22, 23)]
    for one, other in zip(*rows):
        assert one["name"] == other["name"]
        for ours, theirs in zip(one["objects"], other["objects"], strict=True):
            # Threads differ, so sums may in their last bits.
            assert ours == pytest.approx(theirs, abs=1e-4)
    names = {entry["name"] for row in rows[0] for entry in row["objects"]}
    assert names == {"liver", "kidneys"}
    summary = json.loads((tmp_path / "2" / "summary.json").read_text())
    assert summary["scans"] == 3 and set(summary["dice_per_class"]) == names


def test_an_unknown_task_is_named(small_model):
    with pytest.raises(ValueError, match="task: expected report, vqa, segmentation, prompts, got 'reports'"):
        run(small_model, tasks=("reports",))
