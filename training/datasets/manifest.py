"""The manifest: one JSON line a scan, after a header line with the data sets' roots (schema in docs/data.md)."""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from medvl_sam2.engine.files import replacing
from medvl_sam2.engine.geometry import InputError
from medvl_sam2.training.datasets.base import SPLITS, Mask, Problem, Record, Text

VERSION = 1
_ID = re.compile(rb'\{"id": "((?:[^"\\]|\\.)*)", "patient": "((?:[^"\\]|\\.)*)"')


class Manifest:
    """Records by position or id, read from the file when asked for.

    Only ids, patients and offsets stay in memory, so millions of texts do not. Safe to use in forked workers.

    Args:
        path: Of the manifest.

    Attributes:
        roots: Data set -> folder.
        terms: Class -> descriptions, from M3D's term dictionary.
        problems: What `index` could not read.
        ids: Of all records, in order.
        patients: Of all records, in order.

    Raises:
        InputError: No such file, or not a manifest.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file; make it with 'medvl-sam2 data index'")
        offsets: list[int] = []
        self.ids: list[str] = []
        self.patients: list[str] = []
        with open(self.path, "rb") as file:
            header = self._header(file.readline())
            position = file.tell()
            for number, line in enumerate(file, start=2):
                found = _ID.match(line)
                if found is None or not line.endswith(b"\n"):
                    raise InputError(f"{self.path}: line {number} is not a record; index the data again")
                self.ids.append(json.loads(b'"' + found[1] + b'"'))
                self.patients.append(json.loads(b'"' + found[2] + b'"'))
                offsets.append(position)
                position += len(line)
        self._offsets = np.array(offsets, np.int64)
        self._rows = {name: row for row, name in enumerate(self.ids)}
        self.roots = {name: Path(root) for name, root in header["roots"].items()}
        self.terms: dict[str, list[str]] = header.get("terms", {})
        self.problems = [Problem(*problem) for problem in header.get("problems", ())]

    def _header(self, line: bytes) -> dict[str, Any]:
        try:
            header = json.loads(line)
            if header["manifest"] != VERSION:
                raise InputError(f"{self.path}: expected manifest version {VERSION}, got {header['manifest']}")
            return header
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.path}: not a manifest; make one with 'medvl-sam2 data index'") from error

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> Record:
        with open(self.path, "rb") as file:
            file.seek(int(self._offsets[row]))
            return _record(json.loads(file.readline()))

    def __iter__(self) -> Iterator[Record]:
        with open(self.path, "rb") as file:
            file.readline()
            for line in file:
                yield _record(json.loads(line))

    def row(self, name: str) -> int:
        """Position of an id.

        Raises:
            InputError: No such record.
        """
        if name not in self._rows:
            raise InputError(f"{self.path}: no record {name!r}")
        return self._rows[name]

    def root(self, record: Record) -> Path:
        """Folder that the record's paths are relative to."""
        return self.roots[record.dataset]

    def split_file(self, split: str) -> Path:
        """File with the ids of a split: `<manifest>.<split>.txt`."""
        if split not in SPLITS:
            raise InputError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        return split_path(self.path, split)

    def split(self, split: str) -> list[int]:
        """Positions of the records of a split.

        Raises:
            InputError: No split file, or one that names an unknown record.
        """
        path = self.split_file(split)
        if not path.is_file():
            raise InputError(f"{path}: no such file; index the data again")
        return [self.row(name) for name in path.read_text(encoding="utf-8").splitlines() if name]

    def leaks(self) -> dict[str, list[str]]:
        """Patients found in more than one split, with the splits."""
        seen: dict[str, set[str]] = {}
        for split in SPLITS:
            for row in self.split(split):
                seen.setdefault(self.patients[row], set()).add(split)
        return {patient: sorted(splits) for patient, splits in sorted(seen.items()) if len(splits) > 1}


def split_path(manifest: Path, split: str) -> Path:
    """Where a manifest's split is kept."""
    return manifest.with_name(f"{manifest.name.removesuffix('.jsonl')}.{split}.txt")


def write_manifest(
    path: Path, roots: dict[str, str], records: Iterable[Record], terms: dict[str, list[str]], problems: list[Problem]
) -> None:
    """Write a manifest whole.

    Args:
        path: Of the file.
        roots: Data set -> folder.
        records: In order.
        terms: Class -> descriptions.
        problems: Kept for `check` to name again.

    Raises:
        InputError: The place cannot be written.
    """
    header = {"manifest": VERSION, "roots": roots, "terms": terms}
    header["problems"] = [[problem.path, problem.reason] for problem in problems]
    with replacing(path) as part, open(part, "w", encoding="utf-8") as file:
        file.write(json.dumps(header) + "\n")
        file.writelines(json.dumps(_plain(record)) + "\n" for record in records)


def _plain(value: Any) -> dict[str, Any]:
    """JSON form: id and patient first, defaults left out."""
    plain: dict[str, Any] = {}
    names = [f.name for f in dataclasses.fields(value)]
    if isinstance(value, Record):
        names = ["id", "patient", *(name for name in names if name not in ("id", "patient"))]
    defaults = {f.name: _default(f) for f in dataclasses.fields(value)}
    for name in names:
        item = getattr(value, name)
        if item == defaults[name]:
            continue
        if isinstance(item, list) and item and dataclasses.is_dataclass(item[0]):
            item = [_plain(one) for one in item]
        plain[name] = _plain(item) if dataclasses.is_dataclass(item) else item
    return plain


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _record(plain: dict[str, Any]) -> Record:
    masks = [Mask(**mask) for mask in plain.pop("masks", ())]
    texts = [_text(text) for text in plain.pop("texts", ())]
    return Record(**plain, masks=masks, texts=texts)


def _text(plain: dict[str, Any]) -> Text:
    target = plain.pop("target", None)
    choices = plain.pop("choices", None)
    return Text(**plain, choices=tuple(choices) if choices else None, target=Mask(**target) if target else None)
