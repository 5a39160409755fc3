"""Reports of phantoms: written from the facts, and read back into findings.

The writer is compact and canonical (technique, chest, abdomen, pelvis, impression; one or two wordings a sentence), so
that a small language model can learn it. The reader is not tied to the writer: it handles negation, laterality and
lists, so it also scores what a model makes up. Findings are pairs ``(type, side)`` with side "left", "right" or None; a
removed organ is ``("absent_kidney", "left")`` or ``("absent_gallbladder", None)``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medvl_sam2.training.terms import (
    ENLARGED,
    FINDING_TERMS,
    FULL_VIEW,
    REGION_WORDS,
    SIDES,
    STRUCTURE_TERMS,
    fraction_in_view,
    join_words,
    place_word,
    sections_of,
    side_of,
    size_word,
    without_side,
)

Finding = tuple[str, str | None]


def removed_organs(facts: Mapping[str, Any]) -> list[str]:
    """Return the surgically absent organs that the scanned region would show, in the facts' order."""
    organs = [finding["organ"] for finding in facts["findings"] if finding["type"] == "absent_organ"]
    sections = sections_of(facts)
    organs += [organ for organ in facts["removed"] if STRUCTURE_TERMS[organ].section in sections]
    return list(dict.fromkeys(organs))


def finding_key(finding: Mapping[str, Any]) -> Finding:
    """Return ``(type, side)`` of one entry of ``facts["findings"]``.

    Raises:
        ValueError: If the type is not one of `FINDING_TERMS` or "absent_organ".
    """
    if finding["type"] == "absent_organ":
        return absent_key(finding["organ"])
    if finding["type"] not in FINDING_TERMS:
        raise ValueError(f"type: expected one of {[*FINDING_TERMS, 'absent_organ']}, got {finding['type']!r}")
    return finding["type"], finding["side"] if FINDING_TERMS[finding["type"]].sided else None


def absent_key(organ: str) -> Finding:
    """Return the finding of a removed organ: "left kidney" becomes ``("absent_kidney", "left")``."""
    return "absent_" + without_side(organ).replace(" ", "_"), side_of(organ)


def facts_findings(facts: Mapping[str, Any]) -> set[Finding]:
    """Return the true findings of a phantom as pairs of type and side."""
    return {finding_key(f) for f in facts["findings"]} | {absent_key(organ) for organ in removed_organs(facts)}


def write_report(facts: Mapping[str, Any], rng: np.random.Generator) -> str:
    """Write the report of one phantom.

    Args:
        facts: `Phantom.facts`.
        rng: Chooses between equal wordings; the content never depends on it.

    Returns:
        One line per section: technique, then "Chest:", "Abdomen:", "Pelvis:" as far as scanned, then "Impression:".

    Raises:
        ValueError: On an unknown region or type of finding.
    """
    covered = sections_of(facts)
    found: dict[str, list[Mapping[str, Any]]] = {}
    for finding in facts["findings"]:
        finding_key(finding)
        found.setdefault(finding["type"], []).append(finding)
    lines = [_technique(facts, rng)]
    bodies = {"chest": _chest, "abdomen": _abdomen, "pelvis": _pelvis}
    for section, body in bodies.items():
        texts = body(facts, found, rng) if section in covered else _outside(facts, section, found, rng)
        if texts:
            lines.append(f"{section.capitalize()}: " + " ".join(texts))
    lines.append("Impression: " + " ".join(_impression(facts, found)))
    return "\n".join(lines)


def finding_phrase(findings: Sequence[Mapping[str, Any]], place: bool = True) -> str:
    """Return a noun phrase for one or more findings of one type, sides included, without a leading article.

    "small right pleural effusion", "lung nodules in the right upper lobe and the left lower lobe".
    """
    kind = findings[0]["type"]
    term = FINDING_TERMS[kind]
    sizes = {size_word(finding) for finding in findings}
    size = sizes.pop() if len(sizes) == 1 else ""
    sides = [side for side in SIDES if term.sided and any(finding["side"] == side for finding in findings)]
    noun = term.plural if len(findings) > 1 else term.noun
    places = [place_word(finding) for finding in findings] if place else []
    if kind in ("lung_nodule", "consolidation") and any(places):
        noun = noun.removeprefix("lung ")
        where = dict.fromkeys(_in_lung(f["side"], word) for f, word in zip(findings, places))
        return f"{size} {noun} in {join_words(where)}".strip()
    if kind == "aortic_aneurysm":
        return " ".join(word for word in (*dict.fromkeys(map(place_word, findings)), noun) if word)
    if kind == "liver_lesion" and any(places):
        where = dict.fromkeys(word for word in places if word)
        return f"{size} {noun} in the {join_words(where)}".strip()
    side = "bilateral" if len(sides) == 2 else "".join(sides)
    return " ".join(word for word in (size, side, noun) if word)


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a singular countable phrase, nothing before others."""
    countable = any(re.search(rf"\b{term.noun}\b", phrase) for term in FINDING_TERMS.values() if term.article)
    countable = countable or re.search(r"\bnodule\b", phrase) is not None
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase if countable and "bilateral" not in phrase else phrase


def _in_lung(side: str | None, place: str) -> str:
    return "the " + " ".join(word for word in (side, place or "lung") if word)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _pick(rng: np.random.Generator, *options: str) -> str:
    return options[int(rng.integers(len(options)))]


def _technique(facts: Mapping[str, Any], rng: np.random.Generator) -> str:
    region, phase = REGION_WORDS[facts["region"]], facts["phase"]
    if phase == "non-contrast":
        return _pick(rng, f"Non-contrast CT of the {region}.", f"CT of the {region} without contrast.")
    return _pick(rng, f"CT of the {region} in the {phase} phase.", f"Contrast CT of the {region}, {phase} phase.")


def _sentence(phrase: str, rng: np.random.Generator) -> str:
    verb = "are" if re.search(r"\b(effusions|nodules|lesions|cysts|stones|pneumothoraces)\b", phrase) else "is"
    return _pick(rng, f"{_capital(phrase)}.", f"There {verb} {with_article(phrase)}.")


def _stated(found: Mapping[str, list], types: Sequence[str], rng: np.random.Generator) -> list[str]:
    return [_sentence(finding_phrase(found[kind]), rng) for kind in types if kind in found]


def _absent(facts: Mapping[str, Any], organ: str, rng: np.random.Generator) -> list[str]:
    if organ not in removed_organs(facts):
        return []
    verb, have = ("are", "have") if STRUCTURE_TERMS[organ].plural else ("is", "has")
    return [_pick(rng, f"The {organ} {verb} surgically absent.", f"The {organ} {have} been removed.")]


def _outside(facts: Mapping[str, Any], section: str, found: Mapping[str, list], rng: np.random.Generator) -> list[str]:
    """What is seen of a section at the border of a region that does not cover it (an effusion above the liver)."""
    types = [kind for kind, term in FINDING_TERMS.items() if term.section == section and kind in found]
    if section == "abdomen" and "chest" in sections_of(facts) and "aortic_aneurysm" in types:
        types.remove("aortic_aneurysm")
    texts = []
    for kind in types:
        texts += [f"The {ENLARGED[kind]} is enlarged."] if kind in ENLARGED else _stated(found, (kind,), rng)
    for organ in removed_organs(facts):
        texts += _absent(facts, organ, rng) if STRUCTURE_TERMS[organ].section == section else []
    return texts


def _chest(facts: Mapping[str, Any], found: Mapping[str, list], rng: np.random.Generator) -> list[str]:
    texts = [text for side in SIDES for text in _absent(facts, f"{side} lung", rng)]
    inside = ("consolidation", "lung_nodule")
    texts += _stated(found, inside, rng) or [_pick(rng, "The lungs are clear.", "Clear lungs.")]
    around = ("pleural_effusion", "pneumothorax")
    texts += _stated(found, around, rng)
    if missing := [FINDING_TERMS[kind].noun for kind in around if kind not in found]:
        texts.append(f"No {' or '.join(missing)}.")
    texts.append("The heart is enlarged." if "cardiomegaly" in found else "The heart size is normal.")
    if "abdomen" not in sections_of(facts) or _thoracic(found):
        texts += _aorta(found, rng)
    return texts


def _thoracic(found: Mapping[str, list]) -> bool:
    return any(place_word(finding) == "thoracic" for finding in found.get("aortic_aneurysm", ()))


def _aorta(found: Mapping[str, list], rng: np.random.Generator) -> list[str]:
    return _stated(found, ("aortic_aneurysm",), rng) or ["The aorta is normal."]


def _abdomen(facts: Mapping[str, Any], found: Mapping[str, list], rng: np.random.Generator) -> list[str]:
    removed = removed_organs(facts)
    texts: list[str] = []
    if fraction_in_view(facts, "liver") >= FULL_VIEW or "hepatomegaly" in found:
        size = "enlarged" if "hepatomegaly" in found else "normal in size"
        texts.append(f"The liver is {size}.")
    texts += _stated(found, ("liver_lesion",), rng) or ["No liver lesion."]
    if "spleen" not in removed:
        texts.append(f"The spleen is {'enlarged' if 'splenomegaly' in found else 'normal in size'}.")
    for organ in removed:
        texts += _absent(facts, organ, rng) if STRUCTURE_TERMS[organ].section == "abdomen" else []
    normal = [
        organ for organ in ("gallbladder", "pancreas") if organ not in removed and fraction_in_view(facts, organ) > 0
    ]
    if normal:
        verb = "are" if len(normal) > 1 else "is"
        texts.append(f"The {join_words(normal)} {verb} normal.")
    texts += _stated(found, ("renal_cyst", "kidney_stone"), rng)
    if missing := [FINDING_TERMS[kind].noun for kind in ("renal_cyst", "kidney_stone") if kind not in found]:
        texts.append(f"No {' or '.join(missing)}.")
    if "chest" not in sections_of(facts) or not _thoracic(found):
        texts += _aorta(found, rng)
    texts += _stated(found, ("ascites",), rng) or ["No ascites."]
    return texts


def _pelvis(facts: Mapping[str, Any], found: Mapping[str, list], rng: np.random.Generator) -> list[str]:
    return _absent(facts, "urinary bladder", rng) or [_pick(rng, "The urinary bladder is normal.", "Normal bladder.")]


def _impression(facts: Mapping[str, Any], found: Mapping[str, list]) -> list[str]:
    texts = []
    for kind in FINDING_TERMS:
        if kind in found and kind in ENLARGED:
            texts.append(f"Enlarged {ENLARGED[kind]}.")
        elif kind in found:
            texts.append(_capital(finding_phrase(found[kind], place=False)) + ".")
    texts += [f"Absent {organ}." for organ in removed_organs(facts)]
    return texts or ["No abnormal finding."]


_MENTIONS: tuple[tuple[str, str], ...] = (
    ("pleural_effusion", r"(?:pleural |lung )?effusions?|pleural fluid|hydrothorax"),
    ("pneumothorax", r"pneumothora(?:x|ces)"),
    ("consolidation", r"consolidations?|consolidated"),
    ("lung_nodule", r"(?:lung |pulmonary )?nodules?"),
    (
        "liver_lesion",
        r"(?:liver|hepatic|focal) lesions?|lesions? (?:is |are )?(?:seen )?in the (?:\w+ )*?(?:liver|hepatic)\b",
    ),
    ("renal_cyst", r"(?:renal |kidney )?cysts?"),
    ("kidney_stone", r"(?:renal |kidney )?(?:stones?|calcul(?:us|i))|nephrolithiasis"),
    ("ascites", r"ascites|free (?:abdominal )?fluid"),
    ("hepatomegaly", r"hepatomegaly"),
    ("splenomegaly", r"splenomegaly"),
    ("cardiomegaly", r"cardiomegaly"),
    ("aortic_aneurysm", r"aneurysms?|aneurysmal"),
    ("absent_gallbladder", r"cholecystectomy"),
    ("absent_spleen", r"splenectomy"),
    ("absent_kidney", r"nephrectomy"),
)
_MENTION = re.compile("|".join(rf"(?P<{kind}>\b(?:{pattern})\b)" for kind, pattern in _MENTIONS))
_ORGANS = {"liver": "hepatomegaly", "spleen": "splenomegaly", "heart": "cardiomegaly", "cardiac": "cardiomegaly"}
_REMOVABLE = sorted({without_side(name) for name in STRUCTURE_TERMS} | {"bladder", "kidneys", "lungs"}, key=len)[::-1]
_ORGAN = re.compile(rf"\b(?:(left|right|both) )?({'|'.join(_REMOVABLE)}|cardiac)\b")
_COPULA = re.compile(r"\b(?:is|are|was|were|appears?|has been|have been)\b")
_NEGATION = re.compile(r"\b(?:no|without|not|free of|negative for|excluded|never|neither|nor|resolved)\b")
_AFTER_NEGATION = re.compile(
    r"\b(?:(?:is|are) (?:absent|excluded)|(?:is|are) not|not (?:seen|present|found)|resolved)\b"
)
_BREAK = re.compile(
    r"[.;:\n!?]|\b(?:but|however|although|though|except)\b"
    r"|(?:,|\band\b|\bwith\b)(?=\s*(?:(?:and|with|there is|there are)\s+)*(?:no|without)\b)"
    r"|(?<!no )(?<!not )\bwithout\b(?=)"
)
_TRAILING_SIDE = re.compile(
    r"\b(?:in|on|of|at|within|to)\s+(?:(?:the|upper|lower|middle|pole|lobe|base|of)\s+)*(left|right|both)\b"
)
_LEADING_SIDE = re.compile(r"\b(left|right|bilateral|both)\b")


def report_findings(text: str) -> set[Finding]:
    """Read the findings out of a report, or out of any prose in its manner.

    Handles negation before and after ("no effusion or nodule", "effusion is not seen"), laterality before and after
    ("right effusion", "effusion on the right", "bilateral"), enlargement and removal of organs said in several ways.

    Args:
        text: The report.

    Returns:
        Pairs of finding type and side, as `facts_findings` gives them.
    """
    findings: set[Finding] = set()
    for clause in _clauses(text.lower()):
        findings |= _mentions(clause) | _states(clause)
    return findings


def _clauses(text: str) -> list[str]:
    starts = [0, *(m.start() if m.group() == "without" else m.end() for m in _BREAK.finditer(text))]
    return [text[a:b].strip() for a, b in zip(starts, [*starts[1:], len(text)]) if text[a:b].strip()]


def _sides(word: str | None) -> tuple[str | None, ...]:
    return SIDES if word in ("both", "bilateral") else (word,)


def _mentions(clause: str) -> set[Finding]:
    findings: set[Finding] = set()
    matches = list(_MENTION.finditer(clause))
    used, side = 0, None
    for index, match in enumerate(matches):
        end = matches[index + 1].start() if index + 1 < len(matches) else len(clause)
        before, after = clause[used : match.start()], clause[match.end() : end]
        within = match.group() + after
        used = match.end()
        trailing = list(_TRAILING_SIDE.finditer(after)) or list(_TRAILING_SIDE.finditer(within))
        leading = _LEADING_SIDE.findall(before)
        if trailing:
            words = {found.group(1) for found in trailing} | set(re.findall(r"\band (?:the )?(left|right)\b", after))
            if index + 1 < len(matches):
                words = {found.group(1) for found in trailing}
            used = match.end() + trailing[-1].end() if after else match.end()
            side = "both" if words == set(SIDES) else words.pop() if len(words) == 1 else "both"
        elif leading:
            side = "both" if {"left", "right"} <= set(leading) else leading[-1]
        elif index + 1 < len(matches) and (shared := _shared_side(clause, matches[index:])):
            side = shared
        negated = _NEGATION.search(clause[: match.start()]) or _AFTER_NEGATION.search(clause[match.end() :])
        if negated:
            continue
        kind = match.lastgroup or ""
        sided = kind == "absent_kidney" or (kind in FINDING_TERMS and FINDING_TERMS[kind].sided)
        findings |= {(kind, each) for each in (_sides(side) if sided else (None,))}
    return findings


def _shared_side(clause: str, matches: Sequence[re.Match]) -> str | None:
    """A side said once behind a list: "nodule and effusion on the right"."""
    gaps = [clause[a.end() : b.start()] for a, b in zip(matches, matches[1:])]
    if any(_LEADING_SIDE.search(gap) for gap in gaps):
        return None
    trailing = _TRAILING_SIDE.search(clause, matches[-1].end())
    return trailing.group(1) if trailing else None


def _states(clause: str) -> set[Finding]:
    """Findings said of an organ: "the liver and spleen are enlarged", "absent left kidney", "has been removed"."""
    findings: set[Finding] = set()
    for state in re.finditer(r"\b(enlarged|enlargement|absent|removed|absence|missing)\b", clause):
        head = clause[: state.start()]
        verbs = list(_COPULA.finditer(head))
        if re.search(r"\b(?:no|not|without|nor|never)\b", head[verbs[-1].start() if verbs else 0 :]):
            continue
        if verbs and re.fullmatch(
            r"(?:\s|surgically|mildly|markedly|now|also|both|moderately|slightly)*", head[verbs[-1].end() :]
        ):
            subject = clause[verbs[-2].end() if len(verbs) > 1 else 0 : verbs[-1].start()]
            if re.search(r"\b(?:no|neither)\b", subject):
                continue
        else:
            nxt = _COPULA.search(clause, state.end())
            subject = clause[state.end() : nxt.start() if nxt else len(clause)]
        for side, organ in _ORGAN.findall(subject):
            if state.group() in ("enlarged", "enlargement"):
                findings |= {(_ORGANS[organ], None)} if organ in _ORGANS else set()
            elif organ != "cardiac":
                name = {"bladder": "urinary bladder", "kidneys": "kidney", "lungs": "lung"}.get(organ, organ)
                both = organ in ("kidneys", "lungs") or side == "both"
                paired = f"left {name}" in STRUCTURE_TERMS
                for each in SIDES if both else (side or None,):
                    findings.add(("absent_" + name.replace(" ", "_"), each if paired else None))
    return findings
