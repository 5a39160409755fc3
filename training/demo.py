"""The tour: report, questions and masks on an unseen phantom and on a real chest CT, with the truth beside them."""

import json
import resource
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from medvl_sam2.engine.case import Case, Exchange, ShownObject
from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.files import write_text
from medvl_sam2.engine.geometry import Volume
from medvl_sam2.engine.info import device_info, versions
from medvl_sam2.engine.masks import read_mask, write_mask
from medvl_sam2.engine.montage import write_montage
from medvl_sam2.engine.page import write_page
from medvl_sam2.engine.progress import bar
from medvl_sam2.engine.session import VolumeSession
from medvl_sam2.training.mask_metrics import region
from medvl_sam2.training.phantom import FINDINGS, STRUCTURES, make_phantom, write_phantom
from medvl_sam2.training.questions import Question, hidden_structures, make_questions, shown_structures
from medvl_sam2.training.reports import write_report
from medvl_sam2.training.terms import FINDING_TERMS, describe

SOFT, WIDE = (-160.0, 260.0), (-1000.0, 600.0)
_FAVOURITES = ("liver", "spleen", "heart", "right kidney", "left lung", "aorta", "right lung", "vertebrae")


def run(engine: MedVLEngine, out: Path, seed: int) -> tuple[dict[str, Any], str]:
    """Run the tour and write masks, montage.png, index.html and run_report.json.

    Args:
        engine: With the model to show.
        out: Folder, which must exist.
        seed: Of the phantom; 1,000,000 or more, so that no training has seen it.

    Returns:
        The content of run_report.json, and a summary to read.
    """
    begin = perf_counter()
    with bar("demo", ("phantom", "real chest CT", "page and montage")) as step:
        cases = [phantom_case(engine, out, seed)]
        step()
        chest = chest_case(engine, out)
        cases += [chest] if chest else []
        step()
        document = {
            "model": engine.config.name,
            "device": str(engine.device),
            "dtype": str(engine.precision),
            "versions": versions(),
            "machine": device_info(),
            "phantom_seed": seed,
            "cases": [case.to_dict() for case in cases],
        }
        notes = (
            f"Model {engine.config.name} on {engine.device}, medvl-sam2 {versions()['medvl-sam2']}. "
            f"Phantom seed {seed} was kept out of training.",
            "Not a medical device.",
        )
        write_montage(out / "montage.png", cases)
        write_page(out / "index.html", "MedVL-SAM2: a CT read, questioned and segmented", cases, notes)
        step()
    document["seconds"] = round(perf_counter() - begin, 2)
    document["peak_memory_gb"] = round(_peak_bytes() / 1e9, 2)
    write_text(out / "run_report.json", json.dumps(document, indent=2) + "\n")
    return document, _summary(cases, document, out, chest is None)


def phantom_case(engine: MedVLEngine, out: Path, seed: int) -> Case:
    """An unseen phantom, asked and segmented in every way."""
    phantom = make_phantom(seed)
    native = write_phantom(phantom, out / "phantom")
    facts = phantom.facts
    session = engine.open(out / "phantom" / "ct.nii.gz")
    structures = Volume.from_array(native.structures, affine=native.affine).voxels
    findings = Volume.from_array(native.findings, affine=native.affine).voxels
    rng = np.random.default_rng(seed)
    case = Case(
        title=f"Phantom {seed}: {facts['region']}, {facts['phase']}",
        volume=session.volume,
        window=SOFT,
        report=session.report().text,
        true_report=write_report(facts, rng),
    )
    questions = make_questions(facts, rng)
    for kind in ("short", "multiple_choice", "long"):
        case.exchanges.append(_ask(session, next(q for q in questions if q.kind == kind)))
    truths = {name: structures == STRUCTURES[name] for name in _FAVOURITES if name in shown_structures(facts)}
    names = list(truths)
    plan = [(names[0], "name"), (names[1], "name"), (names[2], "description"), (names[3], "point"), (names[4], "box")]
    for name, how in plan:
        case.objects.append(_segment(session, name, how, truths[name]))
    if found := _masked_finding(facts):
        words, kind = found
        case.objects.append(_segment(session, words, "name", findings == FINDINGS[kind]))
    missing = (*facts["removed"], *hidden_structures(facts))[0]
    case.objects.append(_segment(session, missing, "name", None, absent=True))
    return _finished(case, session, out / "phantom" / "masks.nii.gz")


def chest_case(engine: MedVLEngine, out: Path) -> Case | None:
    """The real chest CT that the package slicerio carries; None where it is not installed."""
    spec = find_spec("slicerio")
    data = Path(spec.origin).parent / "data" if spec and spec.origin else None
    if data is None or not (data / "CTChest4.nrrd").is_file():
        return None
    (out / "chest").mkdir(exist_ok=True)
    session = engine.open(data / "CTChest4.nrrd")
    labels, names = read_mask(data / "Segmentation.seg.nrrd", session.volume)
    truths = {name.lower(): labels == value for value, name in names.items()}
    spine = np.logical_or.reduce([mask for name, mask in truths.items() if "vertebral" in name])
    case = Case(
        title="Real chest CT (CTChest4 of slicerio)",
        volume=session.volume,
        window=WIDE,
        report=session.report().text,
        exchanges=[
            _ask(session, Question("short", "finding", "Is there a pleural effusion?", "")),
            _ask(session, Question("multiple_choice", "region", "Which region is scanned?", "", ("chest", "pelvis"))),
            _ask(session, Question("long", "describe", "Describe the lungs.", "")),
        ],
    )
    for name, how, truth in (
        ("right lung", "name", truths["right lung"]),
        ("left lung", "description", truths["left lung"]),
        ("vertebrae", "name", spine),
        ("left lung", "point", truths["left lung"]),
        ("right lung", "box", truths["right lung"]),
    ):
        case.objects.append(_segment(session, name, how, truth))
    case.objects.append(_segment(session, "urinary bladder", "name", None, absent=True))
    return _finished(case, session, out / "chest" / "masks.nii.gz")


def _ask(session: VolumeSession, question: Question) -> Exchange:
    answer = session.ask(question.text, question.choices)
    return Exchange(question.kind, question.prompt, answer.text, question.answer or None)


def _segment(
    session: VolumeSession, name: str, how: str, truth: np.ndarray | None, absent: bool = False
) -> ShownObject:
    request = describe(name)[0] if how == "description" else name
    points, box = None, None
    if how == "point":
        points = [tuple(session.volume.from_index(np.array(region(truth).inner_point(), float)))]
    elif how == "box":
        corners = session.volume.from_index(np.array(region(truth).tight_box(), float).reshape(2, 3))
        box = (*corners.min(0), *corners.max(0))
    found = session.segment(request, points=points, box=box)
    return ShownObject(
        name=name,
        how=how,
        request=request,
        answer=found.text,
        mask=None if found.absent else found.mask,
        volume_ml=found.volume_ml,
        dice=None if truth is None else found.dice(truth),
        absent_in_truth=absent if absent or truth is not None else None,
    )


def _masked_finding(facts: Mapping[str, Any]) -> tuple[str, str] | None:
    """Words and type of a finding whose label in the truth is one object: the largest of those."""
    listed = [f for f in facts["findings"] if f["type"] in FINDING_TERMS and FINDING_TERMS[f["type"]].masked]
    single = [f for f in listed if sum(other["type"] == f["type"] for other in listed) == 1]
    if not single:
        return None
    largest = max(single, key=lambda f: f["volume_ml"] or 0.0)
    words = " ".join(word for word in (largest["side"], FINDING_TERMS[largest["type"]].noun) if word)
    return words, largest["type"]


def _finished(case: Case, session: VolumeSession, path: Path) -> Case:
    """Write the masks as one label map, later objects over earlier ones, and note the times."""
    labels, names = np.zeros(session.volume.shape, np.uint8), {}
    for value, shown in enumerate(case.objects, 1):
        if shown.mask is not None:
            labels[shown.mask] = value
            names[value] = f"{shown.name} (by {shown.how})"
    write_mask(path, labels, session.volume, names)
    case.seconds = dict(session.stages)
    _, y0, x0, _, y1, x1 = session.transform.box
    case.crop = (y0, x0, y1, x1)
    session.release()
    return case


def _summary(cases: list[Case], document: dict[str, Any], out: Path, without_chest: bool) -> str:
    lines = []
    for case in cases:
        lines += [case.title, "", *(f"  {line}" for line in case.report.splitlines()), ""]
        for turn in case.exchanges:
            lines.append(f"  Q: {turn.question}")
            lines.append(f"  A: {turn.answer}" + (f"   (truth: {turn.truth})" if turn.truth else ""))
        lines.append("")
        for shown in case.objects:
            lines.append(f"  {shown.name:<28} by {shown.how:<12} {shown.outcome}")
        lines.append("")
    if without_chest:
        lines += ["The real chest CT was left out: `pip install slicerio` brings it.", ""]
    lines.append(f"Open {out / 'index.html'}; the masks, montage.png and run_report.json lie beside it.")
    lines.append(f"{document['seconds']:.1f} s, peak memory {document['peak_memory_gb']:.2f} GB. Not a medical device.")
    return "\n".join(lines)


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
