"""The words of the phantoms' radiology: how each structure and each finding is called, described and sized.

One table per kind, read by the report writer, the questions and the segmentation requests, so that the three never
disagree. The descriptions are written for this project; they play the part of M3D-Seg's term dictionary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SIDES = ("left", "right")
REGION_SECTIONS: dict[str, tuple[str, ...]] = {
    "thorax": ("chest",),
    "abdomen": ("abdomen",),
    "abdomen and pelvis": ("abdomen", "pelvis"),
    "thorax and abdomen": ("chest", "abdomen"),
    "thorax, abdomen and pelvis": ("chest", "abdomen", "pelvis"),
}
REGION_WORDS = {region: region.replace("thorax", "chest") for region in REGION_SECTIONS}
PHASES = ("non-contrast", "arterial", "portal venous")


@dataclass(frozen=True)
class StructureTerm:
    """Names and descriptions of one structure; ``{side}`` stands for left or right in those of paired ones."""

    section: str
    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    plural: bool = False


@dataclass(frozen=True)
class FindingTerm:
    """One type of finding.

    Attributes:
        noun: Singular noun without article or side.
        plural: Plural noun.
        section: Part of the report it belongs to.
        organs: Structures that must be in view for the finding to be asked about; ``{side}`` as above.
        sided: Whether left and right are told apart.
        masked: Whether the finding has a mask of its own.
        large_mm: Diameter from which it is called large, or None.
        large_ml: Volume from which it is called large, or None.
        names: Further names for a request, after "the".
        descriptions: Descriptions for a request, after "the".
        article: Whether the noun takes "a" (a nodule) or none (ascites).
    """

    noun: str
    plural: str
    section: str
    organs: tuple[str, ...]
    sided: bool
    masked: bool
    large_mm: float | None = None
    large_ml: float | None = None
    names: tuple[str, ...] = ()
    descriptions: tuple[str, ...] = ()
    article: bool = True


_SINGLE = {
    "heart": StructureTerm(
        "chest",
        ("heart",),
        ("muscular pump between the lungs", "organ that drives the blood through the body"),
    ),
    "aorta": StructureTerm(
        "chest",
        ("aorta", "main artery"),
        ("largest artery of the body", "vessel that carries blood from the heart down in front of the spine"),
    ),
    "inferior vena cava": StructureTerm(
        "abdomen",
        ("inferior vena cava", "IVC", "lower caval vein"),
        ("large vein that returns blood from the lower body", "wide vein to the right of the aorta"),
    ),
    "trachea": StructureTerm(
        "chest",
        ("trachea", "windpipe"),
        ("air tube that divides into the main bronchi", "airway in front of the gullet"),
    ),
    "esophagus": StructureTerm(
        "chest",
        ("esophagus", "gullet"),
        ("muscular tube that carries food to the stomach", "food pipe behind the heart"),
    ),
    "liver": StructureTerm(
        "abdomen",
        ("liver",),
        ("large organ under the right diaphragm that stores glycogen", "organ that makes bile"),
    ),
    "gallbladder": StructureTerm(
        "abdomen", ("gallbladder", "gall bladder"), ("small sac under the liver that stores bile", "reservoir of bile")
    ),
    "spleen": StructureTerm(
        "abdomen",
        ("spleen",),
        ("organ under the left diaphragm that filters old blood cells", "lymphatic organ beside the stomach"),
    ),
    "pancreas": StructureTerm(
        "abdomen",
        ("pancreas",),
        ("gland behind the stomach that makes insulin", "organ of digestive enzymes between duodenum and spleen"),
    ),
    "stomach": StructureTerm(
        "abdomen",
        ("stomach",),
        ("hollow organ where acid digests the food", "food pouch between gullet and bowel"),
    ),
    "urinary bladder": StructureTerm(
        "pelvis",
        ("urinary bladder", "bladder"),
        ("hollow pelvic organ that holds urine", "urine reservoir of the pelvis"),
    ),
    "vertebrae": StructureTerm(
        "bones",
        ("vertebrae", "spine", "vertebral column"),
        ("column of bones that protects the spinal cord", "bones of the back"),
        plural=True,
    ),
    "sternum": StructureTerm(
        "chest", ("sternum", "breastbone"), ("flat bone in the front of the chest", "bone that joins the ribs in front")
    ),
    "sacrum": StructureTerm(
        "pelvis", ("sacrum", "sacral bone"), ("triangular bone at the back of the pelvis", "bone between the hip bones")
    ),
    "colon": StructureTerm(
        "abdomen",
        ("colon", "large bowel", "large intestine"),
        ("last part of the bowel, which frames the abdomen", "bowel segment that holds stool"),
    ),
}
_PAIRED = {
    "{side} lung": StructureTerm(
        "chest",
        ("{side} lung", "lung on the {side}"),
        ("air-filled organ on the {side} of the chest", "breathing organ on the {side} side"),
    ),
    "{side} kidney": StructureTerm(
        "abdomen",
        ("{side} kidney", "kidney on the {side}"),
        ("organ on the {side} that makes urine", "bean-shaped organ on the {side} of the spine"),
    ),
    "{side} adrenal gland": StructureTerm(
        "abdomen",
        ("{side} adrenal gland", "{side} adrenal", "{side} suprarenal gland"),
        ("small hormone gland above the {side} kidney", "gland on top of the {side} kidney that makes cortisol"),
    ),
    "{side} ribs": StructureTerm(
        "chest",
        ("{side} ribs", "ribs on the {side}"),
        ("curved bones of the {side} chest wall", "{side} half of the rib cage"),
        plural=True,
    ),
    "{side} hip bone": StructureTerm(
        "pelvis",
        ("{side} hip bone", "{side} hip", "{side} pelvic bone"),
        ("{side} wing of the bony pelvis", "bone with the hip socket on the {side}"),
    ),
    "{side} femur": StructureTerm(
        "pelvis",
        ("{side} femur", "{side} thigh bone"),
        ("longest bone of the {side} leg", "bone whose head sits in the {side} hip socket"),
    ),
}


def _with_side(term: StructureTerm, side: str) -> StructureTerm:
    fill = lambda texts: tuple(text.format(side=side) for text in texts)  # noqa: E731
    return StructureTerm(term.section, fill(term.names), fill(term.descriptions), term.plural)


STRUCTURE_TERMS: dict[str, StructureTerm] = _SINGLE | {
    key.format(side=side): _with_side(term, side) for key, term in _PAIRED.items() for side in SIDES
}

FINDING_TERMS: dict[str, FindingTerm] = {
    "pleural_effusion": FindingTerm(
        "pleural effusion", "pleural effusions", "chest", ("{side} lung",), True, True, large_ml=700.0,
        names=("pleural effusion", "effusion", "pleural fluid"),
        descriptions=("fluid between the {side} lung and the chest wall",),
    ),
    "pneumothorax": FindingTerm(
        "pneumothorax", "pneumothoraces", "chest", ("{side} lung",), True, True, large_ml=700.0,
        names=("pneumothorax", "pleural air"),
        descriptions=("air between the {side} lung and the chest wall",),
    ),
    "consolidation": FindingTerm(
        "consolidation", "consolidations", "chest", ("{side} lung",), True, True, large_ml=350.0,
        names=("consolidation", "lung consolidation"),
        descriptions=("part of the {side} lung that has lost its air",), article=False,
    ),
    "lung_nodule": FindingTerm(
        "lung nodule", "lung nodules", "chest", ("{side} lung",), True, True, large_mm=20.0,
        names=("lung nodule", "nodule", "pulmonary nodule"),
        descriptions=("round solid spot inside the {side} lung",),
    ),
    "cardiomegaly": FindingTerm("cardiomegaly", "cardiomegaly", "chest", ("heart",), False, False, article=False),
    "aortic_aneurysm": FindingTerm(
        "aortic aneurysm", "aortic aneurysms", "abdomen", ("aorta",), False, True,
        names=("aortic aneurysm", "aneurysm"), descriptions=("widened part of the main artery",),
    ),
    "hepatomegaly": FindingTerm("hepatomegaly", "hepatomegaly", "abdomen", ("liver",), False, False, article=False),
    "liver_lesion": FindingTerm(
        "liver lesion", "liver lesions", "abdomen", ("liver",), False, True, large_mm=35.0,
        names=("liver lesion", "hepatic lesion", "lesion in the liver"),
        descriptions=("round spot inside the liver that differs from the rest",),
    ),
    "splenomegaly": FindingTerm("splenomegaly", "splenomegaly", "abdomen", ("spleen",), False, False, article=False),
    "renal_cyst": FindingTerm(
        "renal cyst", "renal cysts", "abdomen", ("{side} kidney",), True, True, large_mm=35.0,
        names=("renal cyst", "kidney cyst"),
        descriptions=("round water-filled sac in the {side} kidney",),
    ),
    "kidney_stone": FindingTerm(
        "kidney stone", "kidney stones", "abdomen", ("{side} kidney",), True, True, large_mm=14.0,
        names=("kidney stone", "renal stone", "kidney calculus"),
        descriptions=("bright calcified spot in the {side} kidney",),
    ),
    "ascites": FindingTerm(
        "ascites", "ascites", "abdomen", ("liver",), False, True,
        names=("ascites", "free abdominal fluid"), descriptions=("fluid around the abdominal organs",), article=False,
    ),
}  # fmt: skip

PLACES: dict[str, tuple[str, ...]] = {
    "lung_nodule": ("upper lobe", "lower lobe"),
    "consolidation": ("upper lobe", "lower lobe"),
    "liver_lesion": ("right lobe", "left lobe"),
    "renal_cyst": ("upper pole", "lower pole"),
    "kidney_stone": ("upper pole", "lower pole"),
    "aortic_aneurysm": ("thoracic", "abdominal"),
}
"""The places within their organ that findings of a type are told apart by."""
ENLARGED = {"cardiomegaly": "heart", "hepatomegaly": "liver", "splenomegaly": "spleen"}
PAIRS: dict[str, tuple[str, str]] = {
    "lungs": ("left lung", "right lung"),
    "kidneys": ("left kidney", "right kidney"),
    "adrenal glands": ("left adrenal gland", "right adrenal gland"),
    "ribs": ("left ribs", "right ribs"),
    "hip bones": ("left hip bone", "right hip bone"),
    "femurs": ("left femur", "right femur"),
}
OFTEN_HIDDEN = frozenset(
    [name for name, term in STRUCTURE_TERMS.items() if term.section == "pelvis"]
    + ["trachea", "sternum", "colon", "heart", "gallbladder", "right adrenal gland", "right kidney", "left kidney"]
)
"""Structures that many fields of view leave out, or that may have been removed."""
FULL_VIEW = 0.9
"""Fraction of a structure inside the field of view from which its size may be judged."""
CLEAR_VIEW = 0.3
"""Fraction inside the field of view from which a structure is asked for as present."""


def describe(name: str) -> tuple[str, ...]:
    """Return the descriptions of a structure or a finding, each a noun phrase that follows "the".

    Args:
        name: A structure ("left kidney"), or a finding type ("renal_cyst"); descriptions of a sided finding keep the
            place holder ``{side}``.

    Raises:
        ValueError: If the name is in neither table.
    """
    if name in STRUCTURE_TERMS:
        return STRUCTURE_TERMS[name].descriptions
    if name in FINDING_TERMS:
        return FINDING_TERMS[name].descriptions
    raise ValueError(f"name: expected a structure or finding, got {name!r}; see STRUCTURE_TERMS and FINDING_TERMS")


def side_of(name: str) -> str | None:
    """Return "left" or "right" for a name that starts with it, else None."""
    first = name.split(" ", 1)[0]
    return first if first in SIDES else None


def without_side(name: str) -> str:
    """Return the name without its leading side: "left kidney" becomes "kidney"."""
    return name.split(" ", 1)[1] if side_of(name) else name


def join_words(words: Iterable[str]) -> str:
    """Join words as English does: "a", "a and b", "a, b and c"."""
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def sections_of(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the sections of the report that the scanned region covers.

    Raises:
        ValueError: If the region is not one of the five known ones.
    """
    if facts["region"] not in REGION_SECTIONS:
        raise ValueError(f"region: expected one of {sorted(REGION_SECTIONS)}, got {facts['region']!r}")
    return REGION_SECTIONS[facts["region"]]


def fraction_in_view(facts: Mapping[str, Any], name: str) -> float:
    """Return how much of a structure lies inside the field of view, 0 when it is not shown at all."""
    return float(facts["structures"].get(name, {"fraction": 0.0})["fraction"])


def size_word(finding: Mapping[str, Any]) -> str:
    """Return "small", "large" or "" (no size known, or a type without sizes)."""
    term = FINDING_TERMS[finding["type"]]
    for limit, key in ((term.large_mm, "size_mm"), (term.large_ml, "volume_ml")):
        if limit is not None and finding.get(key) is not None:
            return "large" if finding[key] >= limit else "small"
    return ""


def place_word(finding: Mapping[str, Any]) -> str:
    """Return where in its organ a finding lies, without any side of its own ("upper lobe"), or ""."""
    words = (finding.get("location") or "").split()
    if finding["type"] != "liver_lesion":
        words = [word for word in words if word not in SIDES]
    return " ".join(words)
