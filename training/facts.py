"""What is true of a phantom, as a vector, and as the rows of a scan's visual tokens that tell it."""

from collections.abc import Mapping
from functools import lru_cache
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
# Spread of what a token says of facts that are not its own.
_MURMUR = 0.02
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


@lru_cache
def fact_places(tokens: int) -> np.ndarray:
    """(tokens, len(FACTS)) float32: 1 where a visual token tells of a fact; two tokens each, evenly spread."""
    rng = np.random.default_rng(0)
    rounds = [rng.permutation(tokens) for _ in range(-(-2 * len(FACTS) // tokens))]
    places = np.zeros((tokens, len(FACTS)), np.float32)
    places[np.concatenate(rounds)[: 2 * len(FACTS)], np.tile(np.arange(len(FACTS)), 2)] = 1
    places.flags.writeable = False
    return places


def fact_rows(facts: Mapping[str, Any], tokens: int, rng: np.random.Generator) -> np.ndarray:
    """(tokens, len(FACTS)) float32: how much each visual token says of each fact, unsure as an encoder would be."""
    holds = fact_vector(facts) > 0
    told = np.where(holds, rng.uniform(0.5, 1.0, len(FACTS)), rng.uniform(0.0, 0.25, len(FACTS)))
    return (fact_places(tokens) * told + rng.normal(0, _MURMUR, (tokens, len(FACTS)))).astype(np.float32)
