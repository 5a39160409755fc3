"""Measures of made-up rows, worked out by hand."""

import csv

import pytest

from medvl_sam2.engine.geometry import InputError
from medvl_sam2.training import text_metrics
from medvl_sam2.training.summary import summarise, summarise_prompts, write_tables


@pytest.fixture(autouse=True)
def without_java(monkeypatch):
    """pycocoevalcap's METEOR takes long to begin, and has a test of its own."""
    monkeypatch.setattr(text_metrics.shutil, "which", lambda _: None)


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
        "findings": {"told": [["cyst", "left"], ["stone", None]], "true": [["cyst", "left"]]},
        "questions": [
            {"kind": "short", "topic": "finding", "right": True, "answer": "yes", "truth": "yes"},
            {"kind": "long", "topic": "describe", "right": None, "answer": "a small cyst", "truth": "a small cyst"},
            {"kind": "multiple_choice", "topic": "side", "right": False, "answer": "A. left", "truth": "B. right"},
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
    assert (summary["findings_precision"], summary["findings_recall"]) == (0.5, 1.0)
    assert summary["findings_f1_per_kind"] == {"cyst": 1.0, "stone": 0.0}
    assert summary["accuracy_per_topic"] == {"multiple_choice/side": 0.0, "short/finding": 1.0}
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
    assert summary["intervals"]["report/BLEU-4"] == pytest.approx([1, 1], abs=1e-3)


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


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path):
    (tmp_path / "objects.csv").write_text("old")
    with pytest.raises(InputError, match=r"objects.csv: could not be written"):
        write_tables([{"name": "a", "objects": [{"name": _Full()}]}], summarise(ROWS), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["objects.csv"]
    assert (tmp_path / "objects.csv").read_text() == "old"


class _Full:
    def __str__(self) -> str:
        raise OSError(28, "No space left on device")


def test_ways_of_asking_are_compared_on_the_same_objects():
    modes = ("text", "box", "point", "box_alone", "point_alone")

    def entry(name, volume, *values):
        return {"name": name, "volume_ml": volume, **dict(zip(modes, values))}

    rows = [
        {"objects": [entry("liver", 900, 0.8, 0.9, 0.85, 0.6, 0.5), entry("liver", 900, 0.1)]},
        {"objects": [entry("liver", 900, 0.6, 0.7, 0.75, 0.2, 0.1)]},
        {"objects": [entry("lung_nodule", 0.4, 0.0, 0.5, 0.4, 0.3, 0.2)]},
    ]
    found = summarise_prompts(rows)
    assert found["large"] == {
        "text": 0.7, "box": 0.8, "point": 0.8, "box_alone": 0.4, "point_alone": 0.3, "objects": 2,
    }  # fmt: skip
    assert found["classes"]["liver"] == found["large"]
    assert found["small"]["box"] == 0.5 and found["small"]["objects"] == 1
    assert summarise_prompts([{"objects": [entry("liver", 900, 0.1)]}])["large"] == {"objects": 0}
