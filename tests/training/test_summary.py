"""Measures of made-up rows, worked out by hand."""

import csv
import json

import pytest

from medvl_sam2.training.experiment_page import spread, verdict, write_page
from medvl_sam2.training.summary import summarise, write_tables

LIVER = {"name": "liver", "called_absent": False}
ROWS = [
    {
        "name": "a",
        "objects": [
            {
                "name": "liver",
                "volume_ml": 900.0,
                "called_absent": False,
                "text": 0.8,
                "text_surface": 0.6,
                "text_soft": 0.7,
            },
            {"name": "pancreas", "volume_ml": 8.0, "called_absent": True, "text": 0.0, "text_surface": 0.0, "box": 0.5},
        ],
        "report": "The liver is enlarged.",
        "reference": "The liver is enlarged.",
        "findings": {"right": 1, "told": 2, "true": 1},
        "questions": [
            {"kind": "short", "right": True, "answer": "yes", "truth": "yes"},
            {"kind": "long", "right": None, "answer": "a small cyst", "truth": "a small cyst"},
            {"kind": "multiple_choice", "right": False, "answer": "A. left", "truth": "B. right"},
        ],
        "absent": {"spleen": True},
    },
    {
        "name": "b",
        "objects": [
            {
                "name": "liver",
                "volume_ml": 700.0,
                "called_absent": False,
                "text": 0.6,
                "text_surface": 0.4,
                "text_soft": 0.5,
            },
            {"name": "lung_nodule", "volume_ml": 0.5, "called_absent": False, "text": 0.4, "text_surface": 0.9},
        ],
        "absent": {"spleen": False, "gallbladder": False},
    },
]


def test_measures():
    summary = summarise(ROWS)
    assert summary["dice_text"] == pytest.approx(0.7)
    assert summary["surface_dice_text"] == pytest.approx(0.5)
    assert summary["soft_dice_text"] == pytest.approx(0.6)
    # Pancreas and nodule.
    assert summary["small_dice_text"] == pytest.approx(0.2)
    # Two livers and a pancreas; the nodule is a finding.
    assert summary["present_called_absent"] == pytest.approx(1 / 3, abs=1e-4)
    assert summary["absent_refused"] == pytest.approx(1 / 3, abs=1e-4)
    assert summary["findings_f1"] == pytest.approx(2 / 3, abs=1e-4)
    assert (summary["short_accuracy"], summary["multiple_choice_accuracy"]) == (1.0, 0.0)
    low, high = summary["intervals"]["dice_text"]
    assert low == pytest.approx(0.6) and high == pytest.approx(0.8)
    assert summary["dice_per_class"]["liver"] == {"text": 0.7, "text_surface": 0.5, "text_soft": 0.6, "scans": 2}
    assert {name: row["scans"] for name, row in summary["dice_per_size"].items()} == {
        "0 to 1 mL": 1,
        "5 to 20 mL": 1,
        "from 100 mL": 2,
    }


def test_equal_texts_score_one():
    pytest.importorskip("pycocoevalcap")
    summary = summarise(ROWS)
    assert summary["report"]["BLEU-4"] == pytest.approx(1, abs=1e-3)
    assert summary["vqa_open"]["ROUGE-L"] == pytest.approx(1, abs=1e-3)


def test_scans_without_text_have_no_text_measures():
    summary = summarise([{"name": "c", "objects": []}])
    assert set(summary) == {"intervals", "dice_per_class", "dice_per_size"}


def test_tables(tmp_path):
    summary = summarise(ROWS)
    write_tables(ROWS, summary, tmp_path)
    with open(tmp_path / "objects.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["scan"], row["name"], row["box"]) for row in rows][1] == ("a", "pancreas", "0.5")
    with open(tmp_path / "classes.csv") as file:
        assert {row["class"] for row in csv.DictReader(file)} == {*summary["dice_per_class"], *summary["dice_per_size"]}
    pytest.importorskip("matplotlib")
    assert (tmp_path / "dice.png").read_bytes()[:4] == b"\x89PNG"


def test_verdicts_go_by_the_spread_of_paired_differences():
    assert verdict([0.8, 0.7, 0.9], [0.7, 0.6, 0.8]).startswith("held")
    assert verdict([0.7, 0.6, 0.8], [0.8, 0.7, 0.9]).startswith("did not hold")
    assert verdict([0.8, 0.6, 0.7], [0.7, 0.7, 0.7]).startswith("no difference")
    assert verdict([None, 0.6], [0.7, 0.7]) == "not measured"
    assert spread([0.5, 0.7]) == "0.600 ± 0.141"


def test_the_page_has_a_section_per_experiment_with_results(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"dice_text": 0.5 + 0.1 * i, "multiple_choice_accuracy": 0.4, "small_dice_text": None} for i in range(2)]
    classes = {"liver": {"text": 0.5, "box": 0.9, "scans": 2}, "pancreas": {"text": 0.1, "scans": 1}}
    result = {"seeds": [0, 1], "scans": 2, "steps": {"stage1": 5, "stage2": 0}, "model": "tiny"}
    arms = {
        "projector": dict.fromkeys(("mixer", "grouped_linear", "pooled"), rows),
        "prompts": {"prompts": [{"dice_text": 0.5, "dice_box": 0.9, "dice_per_class": classes}] * 2},
    }
    for name, found in arms.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**result, "arms": found}))
    page = write_page(tmp_path, tmp_path / "docs" / "experiments.md").read_text()
    assert "## Projector" in page and "## Prompts" in page and "## Stages" not in page
    assert "0.550 ± 0.071" in page and "stage1 5" in page and "stage2" not in page.split("Repeat")[0].split("Steps")[1]
    assert (tmp_path / "docs" / "experiments" / "projector.png").is_file()
    assert "A box helps beyond the spread in 1 of 2 classes: liver" in page
