"""What is broken in a manifest's files, and what it holds."""

import dataclasses
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from tqdm import tqdm

from medvl_sam2.engine.geometry import InputError
from medvl_sam2.model.prompts import SEG
from medvl_sam2.training.datasets.base import SPLITS, TEXT_KINDS, Mask, Problem, Record
from medvl_sam2.training.datasets.images import Scan, read_masks, read_scan
from medvl_sam2.training.datasets.manifest import Manifest
from medvl_sam2.training.prepared import spread

logger = logging.getLogger(__name__)


def check(manifest: Manifest, processes: int = 1) -> Iterator[Problem]:
    """Read every file of a manifest; each that is missing or broken is named, and the next is read.

    Args:
        manifest: To check.
        processes: Scans at a time.

    Yields:
        What `index` could not use, split files that are missing or let a patient leak, and broken files.
    """
    yield from manifest.problems
    yield from _splits(manifest)
    work = partial(_row, manifest)
    rows = range(len(manifest))
    for problems in tqdm(spread(work, rows, processes), total=len(rows), desc="check", disable=not sys.stderr.isatty()):
        yield from problems


def _splits(manifest: Manifest) -> Iterator[Problem]:
    listed: Counter[int] = Counter()
    for split in SPLITS:
        try:
            listed.update(manifest.split(split))
        except InputError as error:
            yield _problem(error)
            return
    for patient, splits in manifest.leaks().items():
        yield Problem(manifest.path.as_posix(), f"patient {patient} is in the splits {' and '.join(splits)}")
    for row, name in enumerate(manifest.ids):
        if listed[row] != 1:
            yield Problem(manifest.path.as_posix(), f"{name} is in {listed[row]} splits, not in one")


def _row(manifest: Manifest, row: int) -> list[Problem]:
    record = manifest[row]
    try:
        return list(check_record(record, manifest))
    except Exception as error:
        logger.debug("%s", record.id, exc_info=True)
        return [Problem((manifest.root(record) / record.image).as_posix(), f"{type(error).__name__}: {error}")]


def check_record(record: Record, manifest: Manifest) -> Iterator[Problem]:
    """Read one record's files.

    Yields:
        A problem for each broken file or text.
    """
    root = manifest.root(record)
    for problem in _texts(record):
        yield Problem((root / record.image).as_posix(), problem)
    try:
        scan = read_scan(record, root)
    except InputError as error:
        yield _problem(error)
        # Missing masks are worth naming too; those of a scan that can't be read can't be compared with it.
        for path in sorted({mask.path for mask in record.masks}):
            if not (root / path).is_file():
                yield Problem((root / path).as_posix(), "no such file")
        return
    # The file's warnings are about its own values, which the metadata may have yet to turn into HU.
    scaled = (record.slope, record.intercept) != (1.0, 0.0)
    for warning in scan.warnings:
        if record.hu and not scaled and ("without the values of a CT" in warning or "not HU" in warning):
            yield Problem((root / record.image).as_posix(), warning)
    if scan.voxels.min() == scan.voxels.max():
        yield Problem((root / record.image).as_posix(), "every voxel has the same value")
    by_path: dict[str, list[Mask]] = {}
    for mask in record.masks:
        by_path.setdefault(mask.path, []).append(mask)
    for masks in by_path.values():
        try:
            _read_all(dataclasses.replace(record, masks=masks), root, scan)
        except InputError as error:
            yield _problem(error)


def _read_all(record: Record, root: Any, scan: Scan) -> None:
    for _ in read_masks(record, root, scan):
        pass


def _texts(record: Record) -> Iterator[str]:
    for text in record.texts:
        if text.kind not in TEXT_KINDS:
            yield f"a text of kind {text.kind!r}, expected one of {', '.join(TEXT_KINDS)}"
        elif not text.answer or (text.kind != "report" and not text.question):
            yield f"an empty {text.kind} text"
        elif text.kind == "multiple_choice" and text.answer not in (text.choices or ()):
            yield f"the answer {text.answer!r} is none of the choices of {text.question!r}"
        elif text.kind == "referring" and (text.target not in record.masks or text.answer.count(SEG) != 1):
            yield f"the answer to {text.question!r} has no mask or not one {SEG}"


def _problem(error: InputError) -> Problem:
    path, _, reason = str(error).partition(": ")
    return Problem(path, reason)


def stats(manifest: Manifest) -> dict[str, Any]:
    """Counts of a manifest.

    Returns:
        "records", "patients", "splits" (records and patients of each), and for each data set "records", "patients",
        "texts" by kind, "masks" and the number of scans that mark each class.
    """
    datasets: dict[str, dict[str, Any]] = {}
    patients: dict[str, set[str]] = {}
    for record in manifest:
        entry = datasets.setdefault(
            record.dataset, {"records": 0, "texts": Counter(), "masks": 0, "classes": Counter()}
        )
        entry["records"] += 1
        entry["masks"] += len(record.masks)
        entry["texts"].update(text.kind for text in record.texts)
        entry["classes"].update({mask.name for mask in record.masks})
        patients.setdefault(record.dataset, set()).add(record.patient)
    splits = {}
    for split in SPLITS:
        rows = manifest.split(split)
        splits[split] = {"records": len(rows), "patients": len({manifest.patients[row] for row in rows})}
    return {
        "records": len(manifest),
        "patients": len(set(manifest.patients)),
        "splits": splits,
        "datasets": {
            name: {
                **entry,
                "patients": len(patients[name]),
                "texts": dict(sorted(entry["texts"].items())),
                "classes": dict(entry["classes"].most_common()),
            }
            for name, entry in datasets.items()
        },
    }
