"""Scans with truth, for evaluation: unseen phantoms, folders of real CTs with masks beside them, and manifests."""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from medvl_sam2.engine.files import replacing
from medvl_sam2.engine.volumes import InputError, Volume, read_mask, read_volume
from medvl_sam2.training.datasets.base import Record, Text, read_json
from medvl_sam2.training.datasets.images import read_masks, read_scan
from medvl_sam2.training.datasets.labelled import case_masks, case_scan
from medvl_sam2.training.datasets.manifest import Manifest
from medvl_sam2.training.mask_metrics import Region, label_regions, region
from medvl_sam2.training.phantom import (
    EVALUATION_SEED_START,
    FINDINGS,
    STRUCTURES,
    NativePhantom,
    Phantom,
    make_phantom,
)
from medvl_sam2.training.phantom_findings import MASKED
from medvl_sam2.training.questions import Question

logger = logging.getLogger(__name__)

# Names of public label sets, after lower case, spaces and side in front, to ours. Patterns match whole names.
_ALIASES = (
    (
        r"(left|right) lung( (upper|middle|lower) (lobe|third))?|lung (upper|middle|lower) lobe (left|right)",
        "{side} lung",
    ),
    (r"heart.*|atrial appendage.*", "heart"),
    (r"postcava|inferior vena cava", "inferior vena cava"),
    (r"vertebrae .*|.*(spine|vertebral column)", "vertebrae"),
    (r"rib (left|right) .*|(left|right) ribs?", "{side} ribs"),
    (r"(left |right )?hip( bone)?( left| right)?", "{side} hip bone"),
    (r"bladder|urinary bladder", "urinary bladder"),
)


@dataclass
class TruthCase:
    """A scan with what is known of it.

    Attributes:
        name: For tables.
        volume: The scan.
        regions: Structure or finding name to its mask, canonical.
        facts: Facts of a phantom, None for a real scan.
        report: Of a real scan, where its data set has one.
        questions: Of a real scan, with their answers.
    """

    name: str
    volume: Volume
    regions: dict[str, Region] = field(default_factory=dict)
    facts: dict[str, Any] | None = None
    report: str | None = None
    questions: list[Question] = field(default_factory=list)

    @property
    def masks(self) -> dict[str, np.ndarray]:
        """Whole (Z, Y, X) bool masks by name."""
        return {name: region.whole() for name, region in self.regions.items()}


def phantom_case(seed: int, rendered: Path | None = None) -> TruthCase:
    """An unseen phantom at clinical geometry.

    Args:
        seed: Of the phantom.
        rendered: Folder where phantoms lie once they have been rendered, 130 MB each: rendering takes about as
            long as all else that an evaluation does with a scan.

    Raises:
        ValueError: The seed is one that models may train on.
    """
    if seed < EVALUATION_SEED_START:
        raise ValueError(f"seed: expected at least {EVALUATION_SEED_START}, got {seed}; smaller seeds are for training")
    phantom = make_phantom(seed)
    native = phantom.native() if rendered is None else _rendered(phantom, rendered)
    structures, findings = (
        Volume.from_array(labels, affine=native.affine).voxels for labels in (native.structures, native.findings)
    )
    regions = label_regions(structures, {name: STRUCTURES[name] for name in phantom.facts["structures"]})
    regions |= label_regions(findings, {name: FINDINGS[name] for name in MASKED})
    volume = Volume.from_array(native.voxels, affine=native.affine, modality="CT")
    return TruthCase(f"phantom {seed}", volume, regions, phantom.facts)


def _rendered(phantom: Phantom, folder: Path) -> NativePhantom:
    path = folder / f"{phantom.seed}.npz"
    if path.is_file():
        with np.load(path) as arrays:
            return NativePhantom(**arrays)
    native = phantom.native()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        np.savez(part, **vars(native))
    return native


def folder_cases(directory: Path) -> Iterator[TruthCase]:
    """Cases of a folder: each sub-folder (or the folder itself) with a scan, masks named *seg* and labels.json.

    Raises:
        InputError: No case in the folder.
    """
    found = 0
    for path in sorted({labels.parent for labels in Path(directory).rglob("labels.json")}):
        scan = case_scan(path)
        if scan is None:
            continue
        found += 1
        volume = read_volume(scan)
        yield TruthCase(path.name, volume, _truth(path, volume))
    if not found:
        raise InputError(f"{directory}: expected folders with a scan, a mask named *seg* and labels.json, got none")


def manifest_cases(path: Path, split: str, window: tuple[float, float]) -> Iterator[TruthCase]:
    """Cases of a split of a manifest (`medvl-sam2 data index`), with the reports and questions of their data sets.

    Args:
        path: Of the manifest.
        split: "train", "val" or "test".
        window: Of the model: prepared images without a unit are stretched over it.

    Raises:
        InputError: No such manifest or split; a scan that cannot be read is named in the log and left out.
    """
    manifest = Manifest(path)
    for row in manifest.split(split):
        record = manifest[row]
        try:
            yield _record_case(record, manifest.root(record), window)
        except InputError as error:
            logger.warning("%s; left out", error)


def _record_case(record: Record, root: Path, window: tuple[float, float]) -> TruthCase:
    scan = read_scan(record, root)
    slope, intercept = scan.slope, scan.intercept
    if not record.hu:
        low, high = float(scan.voxels.min()), float(scan.voxels.max())
        slope = (window[1] - window[0]) / max(high - low, 1e-6)
        intercept = window[0] - low * slope
    if scan.volume is None:
        volume = Volume.from_array(scan.voxels, slope=slope, intercept=intercept)
    else:
        volume = replace(scan.volume, slope=slope, intercept=intercept)
    regions = {mask.name: region(voxels) for mask, voxels in read_masks(record, root, scan)}
    reports = [text.answer for text in record.texts if text.kind == "report"]
    questions = [_question(text) for text in record.texts if text.kind in ("short", "long", "multiple_choice")]
    return TruthCase(
        name=record.id,
        volume=volume,
        regions={name: found for name, found in regions.items() if found.voxels},
        report=reports[0] if reports else None,
        questions=questions,
    )


def _question(text: Text) -> Question:
    answer = text.answer
    if text.choices:
        answer = f"{ascii_uppercase[text.choices.index(text.answer)]}. {text.answer}"
    return Question(text.kind, "", text.question or "", answer, text.choices)


def _truth(path: Path, volume: Volume) -> dict[str, Region]:
    names = _label_names(path / "labels.json")
    masks: dict[str, np.ndarray] = {}
    for file in case_masks(path):
        table = names.get(file.name, names)
        try:
            labels, _ = read_mask(file, volume)
        except InputError:
            # Overlapping segments have no single label map; the same folder holds a plain mask of them.
            continue
        for value, label in table.items():
            name = structure_name(label) if isinstance(label, str) and value.isdecimal() else None
            if name is None:
                continue
            mask = labels == int(value)
            masks[name] = masks[name] | mask if name in masks else mask
    return {name: region(mask) for name, mask in masks.items() if mask.any()}


def _label_names(path: Path) -> dict[str, Any]:
    """A label table, or one for each mask by its file's name.

    Raises:
        InputError: Not such a table, as one whose names stand before their values.
    """
    try:
        names = read_json(path, dict)
    except ValueError as error:
        raise InputError(str(error)) from error
    for table in [own for own in names.values() if isinstance(own, dict)] or [names]:
        if table and not any(value.isdecimal() for value in table):
            shown = json.dumps(dict([next(iter(table.items()))]))
            raise InputError(f'{path}: expected values before their names, as {{"1": "liver"}}, got {shown}; turn it')
    return names


def structure_name(label: str) -> str | None:
    """Our name of a label of TotalSegmentator, 3D Slicer or a plain table; None where we have no such structure."""
    text = re.sub(r"[_\s]+", " ", label.strip().lower())
    side = next((word for word in ("left", "right") if re.search(rf"\b{word}\b", text)), None)
    for pattern, name in _ALIASES:
        if re.fullmatch(pattern, text):
            named = name.format(side=side) if side or "{side}" not in name else None
            return named if named in STRUCTURES else None
    if side and not text.startswith(side):
        text = f"{side} {re.sub(rf' ?{side}$', '', text)}"
    return text if text in STRUCTURES else None
