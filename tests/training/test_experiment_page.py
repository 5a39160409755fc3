"""Verdicts on made-up results, and the page around them."""

import json
from pathlib import Path

import pytest
from scipy import stats

from medvl_sam2.training.verdicts import HELD, OPEN, REVERSED, UNMEASURED, compare, overall, spread

pytest.importorskip("matplotlib")
from medvl_sam2.training.experiment_page import write_page

MODES = ("text", "point", "box", "point_alone", "box_alone")


@pytest.mark.parametrize(
    ("better", "worse", "outcome"),
    [
        ([0.80, 0.71, 0.90], [0.70, 0.60, 0.80], HELD),
        ([0.70, 0.60, 0.80], [0.80, 0.71, 0.90], REVERSED),
        # Better with every seed, but three seeds so far apart tell nothing.
        ([0.80, 0.61, 0.90], [0.50, 0.60, 0.80], OPEN),
        ([0.7, 0.7, 0.7], [0.7, 0.7, 0.7], OPEN),
        ([None, 0.6, 0.5], [0.7, 0.7, None], UNMEASURED),
        ([0.8], [0.1], UNMEASURED),
    ],
)
def test_a_difference_counts_beyond_the_spread_of_the_seeds(better, worse, outcome):
    assert compare(better, worse).outcome == outcome


def test_the_interval_is_students():
    found = compare([0.5, 0.62, 0.4, None], [0.3, 0.5, 0.35, 0.1])
    test = stats.ttest_rel([0.5, 0.62, 0.4], [0.3, 0.5, 0.35])
    assert (found.low, found.high) == pytest.approx(test.confidence_interval(0.95))
    assert found.outcome == OPEN and test.pvalue > 0.05
    assert found.words() == "no verdict (+0.123, 95 % interval -0.063 to +0.310)"
    assert compare([], []).words() == "not measured"


@pytest.mark.parametrize(
    ("outcomes", "words"),
    [
        ("hh", "The claim held at this scale."),
        ("ho", "The claim held at this scale in part, in 1 of 2 comparisons."),
        ("oo", "No verdict: the differences lie within the spread of the seeds."),
        ("hr", "The claim held in some comparisons at this scale, and the reverse was seen in others."),
        ("ro", "The claim did not hold at this scale: the reverse was seen."),
        ("rr", "The claim did not hold at this scale: the reverse was seen."),
        ("hu", "The claim held at this scale."),
        ("uu", "No verdict: fewer than two seeds have been measured."),
    ],
)
def test_the_verdict_on_a_claim(outcomes, words):
    made = {
        "h": compare([1, 1.1], [0, 0.1]),
        "r": compare([0, 0.1], [1, 1.1]),
        "o": compare([0, 1], [1, 0]),
        "u": compare([], []),
    }
    assert overall([made[letter] for letter in outcomes]) == words


def test_spread():
    assert (spread([0.5, None, 0.7]), spread([0.5]), spread([None])) == ("0.600 ± 0.141", "0.500", "-")
    assert spread([9, 11.5], 1) == "10.2 ± 1.8"


def result(arms: dict, **changes) -> dict:
    steps = {"stage1": 40, "stage2": 180, "stage3": 180}
    base = {"name": "tiny", "before_stages": False}
    return {
        "command": "",
        "seeds": [0, 1, 2],
        "scans": 16,
        "steps": steps,
        "base": base,
        "model": None,
        "arms": arms,
        **changes,
    }


def rows(dice: float, answers: float, **more) -> list[dict]:
    """Three seeds around these values."""
    return [
        {"dice_text": dice + d, "small_dice_text": dice / 2 + d, "multiple_choice_accuracy": answers + 2 * d, **more}
        for d in (-0.01, 0.0, 0.01)
    ]


def page_of(tmp_path, name: str, found: dict) -> str:
    (tmp_path / f"{name}.json").write_text(json.dumps(found))
    text = write_page(tmp_path, tmp_path / "docs" / "page.md").read_text()
    assert (tmp_path / "docs" / "experiments" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    (section,) = (part for part in text.split("\n## ") if f"`medvl-sam2 experiment {name}`" in part)
    return section


def test_without_results_the_page_says_so(tmp_path):
    text = write_page(tmp_path, tmp_path / "page.md").read_text()
    assert text.count("Not run yet: there are no results.") == text.count("**Claim.**") == 3
    assert "±" not in text.split("## ", 1)[1] and "|" not in text and "Verdict" not in text
    assert not (tmp_path / "experiments").exists()


def test_the_projectors_section(tmp_path):
    arms = {"mixer": rows(0.6, 0.5), "grouped_linear": rows(0.5, 0.5), "pooled": rows(0.6, 0.55)}
    section = page_of(tmp_path, "projector", result(arms))
    assert "**Verdict.** The claim held at this scale in part, in 1 of 2 comparisons." in section
    assert "| MLP-Mixer (the paper's) | 0.600 ± 0.010 | 0.300 ± 0.010 | 0.500 ± 0.020 |" in section
    assert "- Mixer better than linear, 4 neighbours joined, Dice, 20 mL and more: held (+0.100" in section
    assert "pooled" not in section and "multiple choice: the reverse was seen (-0.050" in section
    assert "Steps: stage1 40, stage2 180, stage3 180. All begin with the parts of `tiny`, which has been" in section
    reversed_ = {**arms, "mixer": rows(0.4, 0.5)}
    assert "**Verdict.** The claim did not hold" in page_of(tmp_path, "projector", result(reversed_))


def test_the_number_of_seeds_and_a_note_are_told(tmp_path):
    arms = {kind: rows(0.6, 0.5) for kind in ("mixer", "grouped_linear", "pooled")}
    section = page_of(tmp_path, "projector", result(arms, note="The base is older than the shipped weights."))
    assert "what the stages teach. The base is older than the shipped weights.\n" in section
    told = {}
    for seeds in (3, 5, 12):
        page_of(tmp_path, "projector", result(arms, seeds=list(range(seeds))))
        told[seeds] = " ".join((tmp_path / "docs" / "page.md").read_text().split("**Cost.**")[0].split())
    assert "run with three seeds" in told[3] and "run with five seeds" in told[5] and "run with 12 seeds" in told[12]
    assert "hree" not in told[5]


def test_an_experiment_that_is_not_finished_says_so(tmp_path):
    arms = {kind: rows(0.6, 0.5)[:1] for kind in ("mixer", "grouped_linear", "pooled")}
    section = page_of(tmp_path, "projector", result(arms, base={"name": "runs/tiny", "before_stages": True}))
    assert "1 of 3 seeds" in section and "fewer than two seeds" in section
    assert "pre-trained parts of `runs/tiny`, as they were before any stage" in section


def test_the_prompts_section(tmp_path):
    def modes(*values: float, objects: int = 4) -> dict:
        return {**dict(zip(MODES, values)), "objects": objects}

    def row(d: float) -> dict:
        classes = {
            "liver": modes(0.9 + d, 0.9 - d, 0.9 + d, 0.5, 0.5),
            "left_adrenal": modes(0.1, 0.1, 0.1, 0.1, 0.1),
            "lung_nodule": modes(0.1 + d, 0.3 + d, 0.5 + d, 0.2, 0.4 + d),
        }
        small = modes(0.1 + d, 0.3 + d, 0.5 + d, 0.2, 0.4 + d)
        return {"prompts": {"large": classes["liver"], "small": small, "classes": classes}}

    section = page_of(tmp_path, "prompts", result({"prompts": [row(d) for d in (0.0, 0.01, 0.02)]}))
    assert "**Verdict.** The claim held at this scale." in section
    assert "| lung nodule | 0.110 ± 0.010 | 0.510 ± 0.010 | 0.310 ± 0.010 | 0.410 ± 0.010 | 0.200 ± 0.000 |" in section
    assert "- A box helps [SEG]: lung nodule (small)." in section
    assert "- No verdict on a box: left adrenal, liver." in section
    assert "- [SEG] + box better than box alone, small structures: held (+0.100" in section
    ready = result({"prompts": [row(d) for d in (0.0, 0.01, 0.02)]}, model="tiny", base=None, steps={})
    assert "Measured on `tiny`, on a set of phantoms of its own for each seed." in page_of(tmp_path, "prompts", ready)


def test_the_stages_section(tmp_path):
    curve = [[20, 3.0], [40, 2.5]]
    arms = {
        "three stages": rows(0.6, 0.5, curve=curve, minutes=4.0, findings_f1=0.3),
        "after stage 2": [{"multiple_choice_accuracy": 0.6 + d, "findings_f1": 0.3} for d in (0.0, 0.01, 0.03)],
        "one stage": rows(0.5, 0.4, curve=curve, minutes=6.0, findings_f1=0.3),
    }
    section = page_of(tmp_path, "stages", result(arms))
    assert "**Verdict.** The claim held at this scale." in section
    assert "- What stage 2 knew, multiple choice: stage 3 forgot some of it (+0.113" in section
    assert "- What stage 2 knew, findings F1: no forgetting beyond the spread (+0.000" in section
    assert "| after stage 2 | - | - | 0.613 ± 0.015 |" in section and "| 6.0 ± 0.0 |" in section


def test_the_page_in_docs_is_of_this_method(tmp_path):
    docs = Path(__file__).resolve().parents[2] / "docs" / "experiments.md"
    page_of(tmp_path, "projector", result({kind: rows(0.6, 0.5) for kind in ("mixer", "grouped_linear", "pooled")}))
    page = (tmp_path / "docs" / "page.md").read_text()
    assert docs.read_text().split("\n## ")[0] == page.split("\n## ")[0]
