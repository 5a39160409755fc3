"""From the rows of an evaluation to its measures, tables and plot."""

import csv
import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medvl_sam2.engine.files import replacing
from medvl_sam2.training.terms import FINDING_TERMS
from medvl_sam2.training.text_metrics import Estimate, caption_scores, finding_scores, ratio

logger = logging.getLogger(__name__)

SMALL = ("left adrenal gland", "right adrenal gland", "pancreas", "gallbladder", "lung_nodule", "liver_lesion")
LARGE_ML = 20.0
MODES = ("text", "box", "point", "box_alone", "point_alone")
# Upper bounds of the size classes in mL.
_SIZES = (1.0, 5.0, 20.0, 100.0, float("inf"))
Row = dict[str, Any]


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Measures over all scans.

    Returns:
        "dice_text", "dice_box", "dice_point" (structures from 20 mL on; "..._alone" without the name), as many
        "surface_dice_...", "soft_dice_text" (M3D's definition), "small_dice_text" (what `SMALL` names),
        "present_called_absent", "absent_refused"; "multiple_choice_accuracy", "short_accuracy", "accuracy_per_topic";
        "findings_f1", "findings_precision", "findings_recall", "findings_f1_per_kind"; "report" and "vqa_open" with the
        caption metrics; "intervals" with the 95 % bootstrap interval of each number ("report/BLEU-1"), whole scans
        resampled; "dice_per_class" and "dice_per_size".
    """
    summary: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}

    def put(name: str, estimate: Estimate) -> None:
        summary[name] = round(estimate.value, 4) if estimate.count else None
        if estimate.count:
            intervals[name] = [round(estimate.low, 4), round(estimate.high, 4)]

    def put_captions(name: str, texts: list[tuple[str, str, str]]) -> None:
        found = _captions(texts)
        summary[name] = {metric: round(estimate.value, 4) for metric, estimate in found.items()}
        for metric, estimate in found.items():
            intervals[f"{name}/{metric}"] = [round(estimate.low, 4), round(estimate.high, 4)]

    objects = [(row["name"], entry) for row in rows for entry in row["objects"]]
    structures = [(scan, entry) for scan, entry in objects if entry["name"] not in FINDING_TERMS]
    large = [(scan, entry) for scan, entry in structures if entry["volume_ml"] >= LARGE_ML]
    if objects:
        for mode in sorted(MODES):
            if any(mode in entry for _, entry in large):
                put(f"dice_{mode}", _mean(large, mode))
                put(f"surface_dice_{mode}", _mean(large, f"{mode}_surface"))
        put("soft_dice_text", _mean(large, "text_soft"))
        put("small_dice_text", _mean([(scan, entry) for scan, entry in objects if entry["name"] in SMALL], "text"))
        put("present_called_absent", _mean(structures, "called_absent"))
    questions = [(row["name"], question) for row in rows for question in row.get("questions", ())]
    if questions:
        for kind in ("multiple_choice", "short"):
            put(f"{kind}_accuracy", _mean([(scan, q) for scan, q in questions if q["kind"] == kind], "right"))
        summary["accuracy_per_topic"] = _per_topic(questions)
        open_ones = [(scan, q["answer"], q["truth"]) for scan, q in questions if q["kind"] != "multiple_choice"]
        put_captions("vqa_open", open_ones)
    reports = [row for row in rows if "report" in row]
    if reports:
        known = [row["findings"] for row in reports if "findings" in row]
        if known:
            told, true = ([set(map(tuple, each[key])) for each in known] for key in ("told", "true"))
            scores = finding_scores(told, true)
            for name in ("f1", "precision", "recall"):
                put(f"findings_{name}", scores.pop(name))
            summary["findings_f1_per_kind"] = {
                name.removeprefix("f1/"): round(score.value, 4) for name, score in scores.items()
            }
        put_captions("report", [(row["name"], row["report"], row["reference"]) for row in reports])
    if any(row.get("absent") for row in rows):
        refused = [(row["name"], {"value": value}) for row in rows for value in row.get("absent", {}).values()]
        put("absent_refused", _mean(refused, "value"))
    summary["intervals"] = intervals
    summary["dice_per_class"] = _per_class(objects)
    summary["dice_per_size"] = _per_size(objects)
    return summary


def summarise_prompts(rows: list[Row]) -> dict[str, Any]:
    """Mean Dice of each way of asking, on the objects that were asked for in every way.

    Args:
        rows: Of the task "prompts".

    Returns:
        "large" (structures from 20 mL on) and "small" (what `SMALL` names), each with a mean by mode, and "classes"
        with one for each name; "objects" counts them.
    """
    entries = [entry for row in rows for entry in row["objects"] if all(mode in entry for mode in MODES)]

    def means(kept: list[Row]) -> dict[str, float]:
        found = {mode: round(sum(entry[mode] for entry in kept) / len(kept), 4) for mode in MODES} if kept else {}
        return {**found, "objects": len(kept)}

    structures = [entry for entry in entries if entry["name"] not in FINDING_TERMS]
    return {
        "large": means([entry for entry in structures if entry["volume_ml"] >= LARGE_ML]),
        "small": means([entry for entry in entries if entry["name"] in SMALL]),
        "classes": {
            name: means([entry for entry in entries if entry["name"] == name])
            for name in sorted({entry["name"] for entry in entries})
        },
    }


def _mean(cases: list[tuple[str, Row]], key: str) -> Estimate:
    held = [(scan, float(entry[key])) for scan, entry in cases if key in entry]
    return ratio([value for _, value in held], [1] * len(held), [scan for scan, _ in held])


def _captions(texts: list[tuple[str, str, str]]) -> Mapping[str, Estimate]:
    """Scores of (scan, text, reference)."""
    if not texts:
        return {}
    scans, told, true = zip(*texts)
    try:
        return caption_scores(told, true, scans)
    except ImportError as error:
        logger.warning("%s; BLEU, ROUGE, METEOR and CIDEr are left out", error)
        return {}


def _per_topic(questions: list[tuple[str, Row]]) -> dict[str, float]:
    groups: dict[str, list[tuple[str, Row]]] = defaultdict(list)
    for scan, question in questions:
        if question["topic"] and question["right"] is not None:
            groups[f"{question['kind']}/{question['topic']}"].append((scan, question))
    return {name: round(_mean(cases, "right").value, 4) for name, cases in sorted(groups.items())}


def _per_class(objects: list[tuple[str, Row]]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[tuple[str, Row]]] = defaultdict(list)
    for scan, entry in objects:
        groups[entry["name"]].append((scan, entry))
    return {name: _columns(cases) for name, cases in sorted(groups.items())}


def _per_size(objects: list[tuple[str, Row]]) -> dict[str, dict[str, Any]]:
    rows, low = {}, 0.0
    for high in _SIZES:
        cases = [(scan, entry) for scan, entry in objects if low <= entry["volume_ml"] < high]
        if cases:
            name = f"from {low:g} mL" if high == float("inf") else f"{low:g} to {high:g} mL"
            rows[name] = _columns(cases)
        low = high
    return rows


def _columns(cases: list[tuple[str, Row]]) -> dict[str, Any]:
    keys = [key for mode in MODES for key in (mode, f"{mode}_surface", f"{mode}_soft")]
    found: dict[str, Any] = {}
    for key in keys:
        values = [float(entry[key]) for _, entry in cases if key in entry]
        if values:
            found[key] = round(sum(values) / len(values), 4)
    return {**found, "scans": len(cases)}


def write_tables(rows: list[Row], summary: dict[str, Any], out: Path) -> None:
    """Write `objects.csv`, `classes.csv` and, where matplotlib is installed, `dice.png`.

    Args:
        rows: Of the scans.
        summary: Of `summarise`.
        out: Folder, which must exist.
    """
    objects = [{"scan": row["name"], **entry} for row in rows for entry in row["objects"]]
    if not objects:
        return
    _write_csv(out / "objects.csv", objects)
    grouped = {**summary["dice_per_class"], **summary["dice_per_size"]}
    _write_csv(out / "classes.csv", [{"class": name, **values} for name, values in grouped.items()])
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("matplotlib: not installed, so dice.png is left out")
        return
    with replacing(out / "dice.png") as part:
        _draw(summary["dice_per_class"], Figure).savefig(part, dpi=110)


def _write_csv(path: Path, rows: list[Row]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _draw(classes: dict[str, dict[str, Any]], figure_class: type) -> Any:
    names = sorted(classes, key=lambda name: classes[name].get("text", 0))
    figure = figure_class(figsize=(7, 1.5 + 0.22 * len(names)), layout="constrained")
    axes = figure.subplots()
    for mode, marker in zip(MODES, "os^DP"):
        held = [(place, classes[name][mode]) for place, name in enumerate(names) if mode in classes[name]]
        if held:
            axes.plot([value for _, value in held], [place for place, _ in held], marker, label=mode, alpha=0.8)
    axes.set_yticks(range(len(names)), [f"{name.replace('_', ' ')} ({classes[name]['scans']})" for name in names])
    axes.set(xlim=(0, 1), xlabel="mean Dice at the scan's resolution (objects in brackets)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    return figure
