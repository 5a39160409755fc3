import re

import numpy as np
import pytest

from medvl_sam2.training.corpus import synthetic_facts
from medvl_sam2.training.reports import facts_findings, report_findings, write_report
from medvl_sam2.training.terms import ENLARGED, FINDING_TERMS, REGION_SECTIONS, STRUCTURE_TERMS, describe

SEEDS = range(1500)


def facts_and_report(seed):
    rng = np.random.default_rng(seed)
    facts = synthetic_facts(rng)
    return facts, write_report(facts, rng)


def finding(kind, side=None, **more):
    organ = FINDING_TERMS[kind].organs[0].format(side=side)
    return {"type": kind, "side": side, "organ": organ, "location": None, "size_mm": None, "volume_ml": None} | more


def facts_with(*findings, region="thorax, abdomen and pelvis", removed=()):
    structures = {name: {"volume_ml": 100.0, "fraction": 1.0} for name in STRUCTURE_TERMS if name not in removed}
    return {
        "seed": 0, "region": region, "phase": "arterial", "sex": "female",
        "structures": structures, "removed": list(removed), "findings": list(findings),
    }  # fmt: skip


def test_reports_read_back_exactly():
    for seed in SEEDS:
        facts, report = facts_and_report(seed)
        assert report_findings(report) == facts_findings(facts), (seed, report)


@pytest.mark.parametrize("kind", FINDING_TERMS)
@pytest.mark.parametrize("region", REGION_SECTIONS)
def test_every_finding_alone_reads_back_in_every_region(kind, region):
    for side in ("left", "right") if FINDING_TERMS[kind].sided else (None,):
        facts = facts_with(finding(kind, side), region=region)
        for seed in range(4):
            report = write_report(facts, np.random.default_rng(seed))
            assert report_findings(report) == {(kind, side)}, report


def test_report_holds_a_side_word_only_for_findings_on_that_side():
    for seed in SEEDS:
        facts, report = facts_and_report(seed)
        sides = {f["side"] for f in facts["findings"]} | {f["organ"].split()[0] for f in facts["findings"]}
        sides |= {(f["location"] or "").split(" ")[0] for f in facts["findings"]}
        for side in ("left", "right"):
            if re.search(rf"\b{side}\b", report):
                assert side in sides, report
            elif side in {f["side"] for f in facts["findings"]}:
                assert "bilateral" in report.lower(), report


def test_report_order_and_sections():
    for seed in SEEDS[:300]:
        facts, report = facts_and_report(seed)
        heads = [line.split(":")[0] for line in report.splitlines()[1:]]
        assert heads == [*(s.capitalize() for s in REGION_SECTIONS[facts["region"]]), "Impression"]
        assert facts["phase"] in report.splitlines()[0].lower() or "without contrast" in report.splitlines()[0]


SWAP = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}


def swapped(text):
    return re.sub(r"\b(?:left|right)\b", lambda match: SWAP[match[0]], text, flags=re.I)


def test_swapping_sides_in_a_report_swaps_them_in_its_findings():
    for seed in SEEDS[:500]:
        facts, report = facts_and_report(seed)
        expected = {(kind, side and swapped(side)) for kind, side in facts_findings(facts)}
        assert report_findings(swapped(report)) == expected


def test_impression_alone_and_body_alone_hold_every_finding():
    for seed in SEEDS:
        facts, report = facts_and_report(seed)
        body, impression = report.split("Impression: ")
        assert report_findings(body) == report_findings(impression) == facts_findings(facts)


def test_order_of_sentences_case_and_line_breaks_change_nothing():
    for seed in SEEDS[:300]:
        facts, report = facts_and_report(seed)
        sentences = re.split(r"(?<=\.)\s", report)
        np.random.default_rng(seed).shuffle(sentences)
        assert report_findings(" ".join(sentences)) == facts_findings(facts)
        assert report_findings(report.upper().replace("\n", " ")) == facts_findings(facts)


def test_negating_every_sentence_of_the_impression_leaves_nothing():
    for seed in SEEDS[:500]:
        _, report = facts_and_report(seed)
        sentences = report.split("Impression: ")[1].split(". ")
        negated = ". ".join("No " + sentence[0].lower() + sentence[1:] for sentence in sentences)
        assert report_findings(negated) == set(), negated


def test_same_seed_same_report():
    assert facts_and_report(7) == facts_and_report(7)


def test_removed_organ_counts_only_where_it_would_be_seen():
    assert facts_findings(facts_with(removed=["gallbladder"], region="thorax")) == set()
    assert facts_findings(facts_with(removed=["left kidney"])) == {("absent_kidney", "left")}


def test_unknown_type_and_region_are_named():
    with pytest.raises(ValueError, match="fracture"):
        write_report(facts_with({"type": "fracture", "side": None, "organ": "left ribs"}), np.random.default_rng(0))
    with pytest.raises(ValueError, match="region"):
        write_report(facts_with(region="head"), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No pleural effusion, consolidation or lung nodule.", set()),
        ("Pleural effusion is not seen.", set()),
        ("There is no left pleural effusion. Right pleural effusion.", {("pleural_effusion", "right")}),
        ("Right pleural effusion without pneumothorax.", {("pleural_effusion", "right")}),
        ("Right pleural effusion, no nodule.", {("pleural_effusion", "right")}),
        ("No nodule but a left consolidation.", {("consolidation", "left")}),
        ("Pleural effusion on the left.", {("pleural_effusion", "left")}),
        ("Bilateral pleural effusions.", {("pleural_effusion", "left"), ("pleural_effusion", "right")}),
        ("Pleural effusions on both sides.", {("pleural_effusion", "left"), ("pleural_effusion", "right")}),
        ("Nodules in the left and right lungs.", {("lung_nodule", "left"), ("lung_nodule", "right")}),
        ("Nodule in the left upper lobe and pleural effusion on the right.",
         {("lung_nodule", "left"), ("pleural_effusion", "right")}),
        ("Consolidation in the right lower lobe and a left renal cyst.",
         {("consolidation", "right"), ("renal_cyst", "left")}),
        ("Right pleural effusion and left kidney stone.", {("pleural_effusion", "right"), ("kidney_stone", "left")}),
        ("A cyst of the left kidney.", {("renal_cyst", "left")}),
        ("There is a stone in the lower pole of the right kidney.", {("kidney_stone", "right")}),
        ("The liver is not enlarged.", set()),
        ("The liver and the spleen are enlarged.", {("hepatomegaly", None), ("splenomegaly", None)}),
        ("The liver is normal and the spleen is enlarged.", {("splenomegaly", None)}),
        ("The spleen is enlarged, the liver is normal.", {("splenomegaly", None)}),
        ("Enlarged heart. No hepatomegaly.", {("cardiomegaly", None)}),
        ("The heart is enlarged and there is a large lesion in the right lobe of the liver.",
         {("cardiomegaly", None), ("liver_lesion", None)}),
        ("The gallbladder is surgically absent.", {("absent_gallbladder", None)}),
        ("The left kidney has been removed; the right kidney is normal.", {("absent_kidney", "left")}),
        ("Absent right kidney.", {("absent_kidney", "right")}),
        ("The gallbladder is not absent.", set()),
        ("Cholecystectomy and left nephrectomy.", {("absent_gallbladder", None), ("absent_kidney", "left")}),
        ("Ascites is absent.", set()),
        ("No evidence of aneurysm. Ascites.", {("ascites", None)}),
        ("The abdominal aorta is aneurysmal.", {("aortic_aneurysm", None)}),
        ("CT of the chest without contrast. Left pneumothorax.", {("pneumothorax", "left")}),
        ("Neither effusion nor consolidation.", set()),
        ("", set()),
    ],
)  # fmt: skip
def test_prose_with_traps(text, expected):
    assert report_findings(text) == expected


def test_describe_gives_words_for_every_structure_and_masked_finding():
    for name in STRUCTURE_TERMS:
        assert len(describe(name)) >= 2
        assert name not in describe(name)
    for kind, term in FINDING_TERMS.items():
        assert bool(describe(kind)) == term.masked == (kind not in ENLARGED)
    with pytest.raises(ValueError, match="thymus"):
        describe("thymus")


def test_descriptions_and_synonyms_name_one_structure_only():
    said = [text for term in STRUCTURE_TERMS.values() for text in (*term.names, *term.descriptions)]
    assert len(said) == len(set(said))
    for name, term in STRUCTURE_TERMS.items():
        side = name.split()[0]
        if side in ("left", "right"):
            other = {"left": "right", "right": "left"}[side]
            assert all(side in text and other not in text.split() for text in (*term.names, *term.descriptions))
