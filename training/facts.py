"""What is true of a phantom, for pre-training: as a vector for the image encoder, spread over rows for the LLM."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from medvl_sam2.training.phantom import FINDINGS, STRUCTURES
from medvl_sam2.training.questions import REMOVABLE, shown_structures
from medvl_sam2.training.reports import absent_key, facts_findings
from medvl_sam2.training.terms import PHASES, REGION_SECTIONS, SIDES, place_word, size_word

_PLACES = (
    "upper lobe",
    "middle lobe",
    "lower lobe",
    "right lobe",
    "left lobe",
    "upper pole",
    "lower pole",
    "thoracic",
    "abdominal",
)
_FOUND = (
    *(f"{kind} {side}" if side else kind for kind in FINDINGS for side in (None, *SIDES)),
    *(" ".join(word for word in absent_key(organ) if word) for organ in REMOVABLE),
)
_PLACED = tuple(f"{kind}, {place}" for kind in FINDINGS for place in _PLACES)
_SIZED = tuple(f"{size} {kind}" for kind in FINDINGS for size in ("small", "large"))

FACTS: tuple[str, ...] = (
    *(f"phase {phase}" for phase in PHASES),
    *(f"region {region}" for region in REGION_SECTIONS),
    *(f"shown {name}" for name in STRUCTURES),
    *_FOUND,
    *_PLACED,
    *_SIZED,
)
_INDEX = {fact: i for i, fact in enumerate(FACTS)}


def _true_facts(facts: Mapping[str, Any]) -> set[str]:
    true = {f"phase {facts['phase']}", f"region {facts['region']}"}
    true |= {f"shown {name}" for name in shown_structures(facts)}
    true |= {f"{kind} {side}" if side else kind for kind, side in facts_findings(facts)}
    for finding in facts["findings"]:
        if finding["type"] == "absent_organ":
            continue
        true |= {f"{finding['type']}, {place_word(finding)}", f"{size_word(finding)} {finding['type']}"}
    return true


def fact_vector(facts: Mapping[str, Any]) -> np.ndarray:
    """(len(FACTS),) float32, 1 where the fact holds."""
    vector = np.zeros(len(FACTS), np.float32)
    vector[[_INDEX[fact] for fact in _true_facts(facts) if fact in _INDEX]] = 1
    return vector


def fact_rows(facts: Mapping[str, Any], rows: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, len(FACTS)) float32: a fact that holds is 1 on one to four random rows, as a scan tells it in places."""
    spread = np.zeros((rows, len(FACTS)), np.float32)
    for fact in np.flatnonzero(fact_vector(facts)):
        spread[rng.choice(rows, min(rows, rng.integers(1, 5)), replace=False), fact] = 1
    return spread
