"""Data sets into one manifest, with splits that no patient crosses."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medvl_sam2.engine.files import make_folder, write_text
from medvl_sam2.engine.geometry import InputError
from medvl_sam2.training.datasets.base import SPLITS, Layout, Problem, Record, folders_with
from medvl_sam2.training.datasets.ct_rate import CT_RATE
from medvl_sam2.training.datasets.labelled import CT_ORG, DECATHLON, FOLDER, TOTALSEGMENTATOR
from medvl_sam2.training.datasets.m3d_seg import M3D_REFSEG, M3D_SEG
from medvl_sam2.training.datasets.m3d_text import M3D_CAP, M3D_VQA
from medvl_sam2.training.datasets.manifest import split_path, write_manifest

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (M3D_CAP, M3D_VQA, M3D_SEG, M3D_REFSEG, CT_RATE, CT_ORG, TOTALSEGMENTATOR, DECATHLON, FOLDER)
}
# Of a patient met in several splits, the one that is held out furthest counts.
_HELD_OUT = {None: -1, "train": 0, "val": 1, "test": 2}


def index(
    roots: Sequence[str | Path], out: str | Path, *, val: float = 0.0, test: float = 0.0, seed: int = 0
) -> dict[str, Any]:
    """Read data sets into a manifest and its split files.

    Args:
        roots: Folders, each as "path" or "layout=path"; without a layout every one that is found is read.
        out: Manifest to write, ending in .jsonl.
        val: Share of the patients without a published split that go to validation.
        test: The same for the test split.
        seed: Of that choice; a patient's lot does not depend on the others.

    Returns:
        Counts: "records", "patients", "splits", "datasets", and "unread": what listings hold and cannot be used.

    Raises:
        InputError: No such folder, an unknown layout, nothing found, or no place to write.
    """
    out = Path(out)
    if out.suffix != ".jsonl":
        raise InputError(f"{out}: end the name in .jsonl")
    if not (val >= 0 and test >= 0 and val + test < 1):
        raise InputError(f"val, test: expected shares that leave something to train on, got {val} and {test}")
    make_folder(out.parent)
    found, records, problems = {}, {}, []
    for key, layout, root in _layouts(roots):
        found[key] = root.as_posix()
        for item in layout.read(root):
            if isinstance(item, Problem):
                problems.append(Problem((root / item.path).as_posix(), item.reason))
            else:
                _merge(records, _named(item, key, layout), root, problems)
    kept = _distinct((record for record in records.values() if record.texts or record.masks), problems)
    if not kept:
        why = f"; {problems[0].path}: {problems[0].reason}" if problems else ""
        raise InputError(f"{', '.join(map(str, roots))}: no usable scan found{why}")
    splits = assign_splits(kept, val=val, test=test, seed=seed)
    write_manifest(out, found, kept, _terms(found.values(), problems), problems)
    for split in SPLITS:
        write_text(split_path(out, split), "".join(f"{name}\n" for name in splits[split]))
    return {
        "records": len(kept),
        "patients": len({record.patient for record in kept}),
        "splits": {split: len(splits[split]) for split in SPLITS},
        "unread": len(problems),
        "datasets": dict(Counter(record.dataset for record in kept)),
    }


def assign_splits(
    records: Iterable[Record], *, val: float = 0.0, test: float = 0.0, seed: int = 0
) -> dict[str, list[str]]:
    """Split by patient.

    A patient's scans stay together: where the publishers of two sets (or of one) put them into different splits, all
    go to the one that is held out furthest. Patients without a published split are drawn by a hash of their name.

    Returns:
        Split -> ids.
    """
    records = list(records)
    of_patient: dict[str, str | None] = {}
    for record in records:
        known = of_patient.get(record.patient)
        of_patient[record.patient] = max(known, record.split, key=_HELD_OUT.__getitem__)
    for patient, split in of_patient.items():
        if split is None:
            lot = int.from_bytes(hashlib.sha256(f"{seed}:{patient}".encode()).digest()[:8], "big") / 2**64
            of_patient[patient] = "test" if lot < test else "val" if lot < test + val else "train"
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for record in records:
        splits[of_patient[record.patient]].append(record.id)
    return splits


def _layouts(roots: Sequence[str | Path]) -> Iterator[tuple[str, Layout, Path]]:
    used: Counter[str] = Counter()
    for given in roots:
        name, separator, path = str(given).partition("=")
        if separator and name not in LAYOUTS and Path(str(given)).exists():
            name, separator, path = "", "", str(given)
        root = Path(path if separator else str(given)).resolve()
        if separator and name not in LAYOUTS:
            raise InputError(f"layout: expected one of {', '.join(LAYOUTS)}, got {name!r}")
        if not root.is_dir():
            raise InputError(f"{root}: no such folder; check the path")
        fitting = [LAYOUTS[name]] if separator else [layout for layout in LAYOUTS.values() if layout.found(root)]
        if not fitting or not all(layout.found(root) for layout in fitting):
            raise InputError(f"{root}: not laid out as {name or ', '.join(LAYOUTS)}; see docs/data.md")
        for layout in fitting:
            used[layout.name] += 1
            yield layout.name + (f"-{used[layout.name]}" if used[layout.name] > 1 else ""), layout, root


def _named(record: Record, key: str, layout: Layout) -> Record:
    """The record under its data set's key, which a second root of one layout shares with no other."""
    rename = key + record.id.removeprefix(layout.name) if key != layout.name else record.id
    patient = record.patient
    if key != layout.name and layout.name == FOLDER.name:
        patient = key + patient.removeprefix(layout.name)
    return dataclasses.replace(record, id=rename, patient=patient, dataset=key)


def _merge(records: dict[tuple[str, str], Record], record: Record, root: Path, problems: list[Problem]) -> None:
    """Join what several listings say of one image."""
    known = records.setdefault((root.as_posix(), record.image), record)
    if known is record:
        return
    if (known.slope, known.intercept, known.format) != (record.slope, record.intercept, record.format):
        problems.append(Problem((root / record.image).as_posix(), f"{known.id} and {record.id} disagree on its values"))
        return
    known.texts += [text for text in record.texts if text not in known.texts]
    known.masks += [mask for mask in record.masks if mask not in known.masks]
    known.classes = sorted({*known.classes, *record.classes})
    known.split = max(known.split, record.split, key=_HELD_OUT.__getitem__)


def _distinct(records: Iterable[Record], problems: list[Problem]) -> list[Record]:
    """One record under each id."""
    kept: dict[str, Record] = {}
    for record in records:
        if kept.setdefault(record.id, record) is not record:
            problems.append(Problem(record.image, f"a second scan called {record.id}; left out"))
    return list(kept.values())


def _terms(roots: Iterable[str], problems: list[Problem]) -> dict[str, list[str]]:
    """M3D's term dictionary, where a root or its parent has one; repeated descriptions once."""
    terms: dict[str, list[str]] = {}
    paths = {path for root in roots for path in folders_with(Path(root), "term_dictionary.json")}
    paths |= {Path(root).parent / "term_dictionary.json" for root in roots}
    for path in sorted(path for path in paths if path.is_file()):
        try:
            for name, texts in json.loads(path.read_text(encoding="utf-8")).items():
                terms[name] = list(dict.fromkeys([*terms.get(name, ()), *map(str, texts)]))
        except (ValueError, AttributeError, TypeError) as error:
            problems.append(Problem(path.as_posix(), f"not a table of descriptions ({error})"))
    return terms
