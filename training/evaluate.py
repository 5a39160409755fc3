"""`medvl-sam2 evaluate`: what a model gets right, on unseen phantoms or on real CTs with masks."""

import json
import logging
import multiprocessing
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.session import VolumeSession
from medvl_sam2.training.cases import TruthCase, folder_cases, phantom_case
from medvl_sam2.training.phantom import STRUCTURES
from medvl_sam2.training.questions import answer_is_right, hidden_structures, make_questions, shown_structures
from medvl_sam2.training.reports import facts_findings, report_findings
from medvl_sam2.training.terms import FINDING_TERMS

logger = logging.getLogger(__name__)

SMALL = ("left adrenal gland", "right adrenal gland", "pancreas", "gallbladder", "lung_nodule", "liver_lesion")
LARGE_ML = 20.0
# Objects per scan that are asked for with a box and a point as well: these run one at a time.
_MARKED = 6


def run(
    model: str | Path,
    data: str | Path = "phantom",
    *,
    seeds: Iterable[int] = range(1_000_000, 1_000_200),
    out: str | Path | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Evaluate a model.

    Args:
        model: Preset with weights, or model directory.
        data: "phantom", or a folder of real CTs with masks and labels.json.
        seeds: Phantoms, from 1,000,000 on.
        out: Folder for `scans.jsonl` (a line per scan) and `summary.json`.
        processes: Scans at a time.

    Returns:
        The measures, by name; Dice values are means over scans at the scan's own resolution.
    """
    if str(data) == "phantom":
        rows = _run_phantoms(str(model), list(seeds), processes)
    else:
        engine = MedVLEngine.from_pretrained(model)
        rows = [evaluate_case(engine, case) for case in tqdm(folder_cases(Path(data)), desc="scans", disable=None)]
    summary = {"model": str(model), "data": str(data), "scans": len(rows), **summarise(rows)}
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        Path(out, "scans.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path(out, "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _run_phantoms(model: str, seeds: list[int], processes: int) -> list[dict[str, Any]]:
    if processes == 1:
        _start_worker(model, 0)
        return [_phantom_row(seed) for seed in tqdm(seeds, desc="phantoms", disable=None)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _start_worker, (model, 1)) as pool:
        return list(tqdm(pool.imap(_phantom_row, seeds), total=len(seeds), desc="phantoms", disable=None))


_engine: MedVLEngine | None = None


def _start_worker(model: str, threads: int) -> None:
    global _engine
    if threads:
        torch.set_num_threads(threads)
    _engine = MedVLEngine.from_pretrained(model)


def _phantom_row(seed: int) -> dict[str, Any]:
    return evaluate_case(_engine, phantom_case(seed))


def evaluate_case(engine: MedVLEngine, case: TruthCase) -> dict[str, Any]:
    """All measures of one scan, as a JSON-able row."""
    session = engine.open(case.volume)
    rng = np.random.default_rng([7, 0 if case.facts is None else case.facts["seed"]])
    row: dict[str, Any] = {"name": case.name, "objects": _segmentations(session, case, rng)}
    if case.facts is not None:
        row |= _language(session, case.facts, rng)
    session.release()
    return row


def _segmentations(session: VolumeSession, case: TruthCase, rng: np.random.Generator) -> list[dict[str, Any]]:
    names = list(case.masks)
    if case.facts is not None:
        shown = set(shown_structures(case.facts))
        names = [name for name in names if name in shown or name not in STRUCTURES]
    requests = [_request(name) for name in names]
    objects = []
    marked = set(rng.permutation(len(names))[:_MARKED].tolist())
    for i, (name, found) in enumerate(zip(names, session.segment_all(requests) if names else [])):
        mask = case.masks[name]
        volume_ml = float(mask.sum() * case.volume.voxel_ml)
        entry = {
            "name": name,
            "volume_ml": round(volume_ml, 2),
            "called_absent": found.absent,
            "text": found.dice(mask),
        }
        if i in marked:
            point, box = _marks(mask)
            entry["box"] = session.segment(requests[i], box=box, space="index").dice(mask)
            entry["point"] = session.segment(requests[i], points=[point], space="index").dice(mask)
        objects.append(entry)
    return objects


def _request(name: str) -> str:
    return name if name in STRUCTURES else FINDING_TERMS[name].noun


def _marks(mask: np.ndarray) -> tuple[tuple[int, int, int, int], tuple[int, ...]]:
    """A click in the depth of the largest slice, and the tight box; (x, y, z)."""
    z = int(mask.sum((1, 2)).argmax())
    depth = ndimage.distance_transform_edt(np.pad(mask[z], 1))[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    bounds = ndimage.find_objects(mask.astype(np.uint8))[0]
    return (int(x), int(y), z, 1), (*(s.start for s in bounds[::-1]), *(s.stop - 1 for s in bounds[::-1]))


def _language(session: VolumeSession, facts: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    report = session.report().text
    told, true = report_findings(report), facts_findings(facts)
    questions = []
    for question in make_questions(facts, rng):
        if question.kind == "long":
            continue
        answer = session.ask(question.text, question.choices).text
        questions.append({"kind": question.kind, "topic": question.topic, "right": answer_is_right(question, answer)})
    hidden = hidden_structures(facts)
    refused = [found.absent for found in session.segment_all(hidden)] if hidden else []
    return {
        "report": report,
        "findings": {"right": len(told & true), "told": len(told), "true": len(true)},
        "missed": sorted(map(str, true - told)),
        "invented": sorted(map(str, told - true)),
        "questions": questions,
        "absent": dict(zip(hidden, refused)),
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Measures over all scans."""
    per_class: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    large: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for entry in row["objects"]:
            for mode in ("text", "box", "point"):
                if mode not in entry:
                    continue
                per_class[entry["name"]][mode].append(entry[mode])
                if entry["name"] in STRUCTURES and entry["volume_ml"] >= LARGE_ML:
                    large[mode].append(entry[mode])
    objects = [entry for row in rows for entry in row["objects"] if entry["name"] in STRUCTURES]
    summary: dict[str, Any] = {f"dice_{mode}": _mean(values) for mode, values in sorted(large.items())}
    summary["present_called_absent"] = _mean([entry["called_absent"] for entry in objects])
    if any("report" in row for row in rows):
        questions = [question for row in rows for question in row["questions"]]
        for kind in ("multiple_choice", "short"):
            summary[f"{kind}_accuracy"] = _mean([q["right"] for q in questions if q["kind"] == kind])
        counts = {key: sum(row["findings"][key] for row in rows) for key in ("right", "told", "true")}
        summary["findings_f1"] = 2 * counts["right"] / max(1, counts["told"] + counts["true"])
        summary["absent_refused"] = _mean([refused for row in rows for refused in row["absent"].values()])
    summary["dice_per_class"] = {
        name: {mode: _mean(values) for mode, values in modes.items()} | {"scans": len(modes["text"])}
        for name, modes in sorted(per_class.items())
    }
    return summary


def _mean(values: list[float] | list[bool]) -> float | None:
    return round(float(np.mean(values)), 4) if values else None
