"""`medvl-sam2 evaluate`: what a model gets right, on unseen phantoms or on real CTs with masks."""

import json
import logging
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.files import write_text
from medvl_sam2.engine.geometry import InputError
from medvl_sam2.engine.segmentation import Segmentation, label_map
from medvl_sam2.engine.session import VolumeSession
from medvl_sam2.training.cases import TruthCase, folder_cases, manifest_cases, phantom_case
from medvl_sam2.training.datasets.cache import model_config
from medvl_sam2.training.mask_metrics import Region, dice, region, soft_dice, surface_dice
from medvl_sam2.training.phantom import STRUCTURES
from medvl_sam2.training.questions import (
    Question,
    answer_is_right,
    hidden_structures,
    make_questions,
    shown_structures,
)
from medvl_sam2.training.reports import facts_findings, report_findings, write_report
from medvl_sam2.training.summary import summarise, write_tables
from medvl_sam2.training.terms import FINDING_TERMS

logger = logging.getLogger(__name__)

TASKS = ("report", "vqa", "segmentation")
# Asked for by name only: the objects once more with point and box alone, which takes long.
PROMPTS = "prompts"
# Surfaces this close count as one, as TotalSegmentator's authors count them (arXiv 2208.05868).
TOLERANCE_MM = 3.0
# Objects per scan that are asked for with a box and a point as well: these run one at a time.
_MARKED, _MARKED_FOR_PROMPTS = 3, 12
# Long answers per scan: each takes as long as many short ones.
_LONG = 2


def run(
    model: str | Path,
    data: str | Path = "phantom",
    *,
    seeds: Iterable[int] = range(1_000_000, 1_000_200),
    out: str | Path | None = None,
    processes: int = 1,
    tasks: Sequence[str] = TASKS,
    split: str = "test",
    rendered: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a model.

    Args:
        model: Preset with weights, or model directory.
        data: "phantom", a folder of real CTs with masks and labels.json, or a manifest of public data sets (.jsonl).
        seeds: Phantoms, from 1,000,000 on.
        out: Folder for `scans.jsonl` (a line per scan, as soon as it is done), `summary.json`, `objects.csv`,
            `classes.csv` and `dice.png`.
        processes: Scans at a time.
        tasks: Of `TASKS`, or "prompts": segmentation with point and box alone beside those with the name. Each is run
            on the scans that have truth for it.
        split: Of a manifest.
        rendered: Folder that keeps the phantoms, for models that are measured on the same ones.

    Returns:
        The measures, by name, with their 95 % bootstrap intervals under "intervals"; Dice values are means over
        objects at the scan's own resolution.

    Raises:
        ValueError: An unknown task.
        InputError: No scan to evaluate.
    """
    if unknown := [task for task in tasks if task not in (*TASKS, PROMPTS)]:
        raise ValueError(f"task: expected {', '.join((*TASKS, PROMPTS))}, got {unknown[0]!r}")
    if str(data) == "phantom":
        cases: Iterable[int | TruthCase] = list(seeds)
    elif Path(data).suffix == ".jsonl":
        cases = manifest_cases(Path(data), split, model_config(model).volume.window)
    else:
        cases = folder_cases(Path(data))
    found = tqdm(_rows(str(model), cases, processes, tuple(tasks), rendered), desc="scans", disable=None)
    rows = list(_kept(found, Path(out)) if out else found)
    if not rows:
        place = f"split {split!r} of {data}" if Path(data).suffix == ".jsonl" else data
        raise InputError(f"{place}: expected scans to evaluate, got none; choose another split or data set")
    summary = {
        "model": str(model),
        "data": str(data),
        "scans": len(rows),
        "tolerance_mm": TOLERANCE_MM,
        **summarise(rows),
    }
    if out:
        write_tables(rows, summary, Path(out))
        write_text(Path(out, "summary.json"), json.dumps(summary, indent=2) + "\n")
    return summary


def _kept(rows: Iterable[dict[str, Any]], out: Path) -> Iterator[dict[str, Any]]:
    """Write each row before the next is begun: an evaluation takes long, and may be killed."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "scans.jsonl", "w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            file.flush()
            yield row


def _rows(
    model: str, cases: Iterable[int | TruthCase], processes: int, tasks: tuple[str, ...], rendered: Path | None
) -> Iterator[dict[str, Any]]:
    """Rows of phantoms (by seed) and read scans, in order."""
    if processes == 1:
        _start_worker(model, 0, tasks, rendered)
        yield from map(_row, cases)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _start_worker, (model, 1, tasks, rendered)) as pool:
        # A pool's own map would read every scan at once.
        waiting: deque[Any] = deque()
        for case in cases:
            waiting.append(pool.apply_async(_row, (case,)))
            if len(waiting) > processes:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()


_worker: tuple[MedVLEngine, tuple[str, ...], Path | None] | None = None


def _start_worker(model: str, threads: int, tasks: tuple[str, ...], rendered: Path | None) -> None:
    global _worker
    if threads:
        torch.set_num_threads(threads)
    _worker = MedVLEngine.from_pretrained(model), tasks, rendered


def _row(case: int | TruthCase) -> dict[str, Any]:
    assert _worker is not None
    engine, tasks, rendered = _worker
    return evaluate_case(engine, phantom_case(case, rendered) if isinstance(case, int) else case, tasks)


def evaluate_case(engine: MedVLEngine, case: TruthCase, tasks: Sequence[str] = TASKS) -> dict[str, Any]:
    """All measures of one scan, as a JSON-able row."""
    session = engine.open(case.volume)
    # Each task draws for itself, so that its numbers do not depend on which others run.
    seed = 0 if case.facts is None else case.facts["seed"]
    row: dict[str, Any] = {"name": case.name, "objects": []}
    if PROMPTS in tasks:
        row["objects"] = _segmentations(
            session, case, np.random.default_rng([7, seed]), _MARKED_FOR_PROMPTS, alone=True
        )
    elif "segmentation" in tasks:
        row["objects"] = _segmentations(session, case, np.random.default_rng([7, seed]), _MARKED)
        if case.facts is not None:
            hidden = hidden_structures(case.facts)
            refused = [found.absent for found in session.segment_all(hidden)] if hidden else []
            row["absent"] = dict(zip(hidden, refused))
    if "report" in tasks and (case.facts is not None or case.report is not None):
        row |= _report(session, case, np.random.default_rng([8, seed]))
    if "vqa" in tasks and (case.facts is not None or case.questions):
        phantom = case.facts is not None
        questions = make_questions(case.facts, np.random.default_rng([9, seed])) if phantom else case.questions
        row["questions"] = _questions(session, questions)
    session.release()
    return row


def _segmentations(
    session: VolumeSession, case: TruthCase, rng: np.random.Generator, count: int, *, alone: bool = False
) -> list[dict[str, Any]]:
    names = list(case.regions)
    if case.facts is not None:
        shown = set(shown_structures(case.facts))
        names = [name for name in names if name in shown or name not in STRUCTURES]
    requests = [_request(name) for name in names]
    objects = []
    marked = set(rng.permutation(len(names))[:count].tolist())
    for i, (name, found) in enumerate(zip(names, session.segment_all(requests) if names else [])):
        truth = case.regions[name]
        entry = {
            "name": name,
            "volume_ml": round(truth.voxels * case.volume.voxel_ml, 2),
            "called_absent": found.absent,
            **_scores("text", found, truth),
            "text_soft": _soft(found, truth),
        }
        if i in marked:
            point, box = (*truth.inner_point(), 1), truth.tight_box()
            entry |= _scores("box", session.segment(requests[i], box=box, space="index"), truth)
            entry |= _scores("point", session.segment(requests[i], points=[point], space="index"), truth)
            if alone:
                entry |= _scores("box_alone", session.segment(box=box, space="index"), truth)
                entry |= _scores("point_alone", session.segment(points=[point], space="index"), truth)
        objects.append(entry)
    return objects


def _scores(mode: str, found: Segmentation, truth: Region) -> dict[str, float]:
    # Values 0 and 1, so the labels are the mask as they stand, without a copy of the whole grid.
    prediction = region(label_map([found]).view(bool))
    surface = surface_dice(prediction, truth, found.volume.spacing, TOLERANCE_MM)
    return {mode: dice(prediction, truth), f"{mode}_surface": surface}


def _soft(found: Segmentation, truth: Region) -> float:
    logits = found.gated_logits
    return 0.0 if logits is None else soft_dice(logits.sigmoid().cpu().numpy(), truth, found.transform)


def _request(name: str) -> str:
    return FINDING_TERMS[name].noun if name in FINDING_TERMS else name


def _report(session: VolumeSession, case: TruthCase, rng: np.random.Generator) -> dict[str, Any]:
    report = session.report().text
    if case.facts is None:
        return {"report": report, "reference": case.report}
    told, true = report_findings(report), facts_findings(case.facts)
    return {
        "report": report,
        "reference": write_report(case.facts, rng),
        "findings": {"told": sorted(told, key=str), "true": sorted(true, key=str)},
        "missed": sorted(map(str, true - told)),
        "invented": sorted(map(str, told - true)),
    }


def _questions(session: VolumeSession, questions: list[Question]) -> list[dict[str, Any]]:
    long = [question for question in questions if question.kind == "long"]
    asked = [question for question in questions if question not in long[_LONG:]]
    rows = []
    for question, answer in zip(asked, session.ask_all([q.text for q in asked], [q.choices for q in asked])):
        right = None if question.kind == "long" else answer_is_right(question, answer.text)
        row = {"kind": question.kind, "topic": question.topic, "right": right}
        rows.append({**row, "question": question.text, "answer": answer.text, "truth": question.answer})
    return rows
