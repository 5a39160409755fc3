"""Results on disk: rows appended to CSV files, and JSON documents that any reader takes."""

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RESULTS = Path(__file__).resolve().parent / "results"


def append_csv(rows: Sequence[Row], path: Path | str, columns: Sequence[str] = ()) -> Path:
    """Append rows to a CSV file, by default in ``bench/results/``, and return its path.

    A file of an older version that lacks some of the columns gets them at the end, empty in its own rows.

    Args:
        rows: Values by column; numbers that are not finite are left empty.
        path: Of the file, which need not exist.
        columns: Of a new file; those of the rows by default.

    Raises:
        ValueError: The file is there and is no table.
    """
    path = RESULTS / path
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = list(dict.fromkeys([*columns, *(key for row in rows for key in row)]))
    known, kept = _read(path)
    header = [*known, *(column for column in wanted if column not in known)]
    if header == known and path.read_bytes().endswith(b"\n"):
        with path.open("a", newline="") as file:
            _write(file, header, rows)
        return path
    # Written beside the old file and then put in its place, so that a stop half way loses nothing.
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    with whole.open("w", newline="") as file:
        csv.writer(file).writerow(header)
        _write(file, header, [*kept, *rows])
    whole.replace(path)
    return path


def _read(path: Path) -> tuple[list[str], list[Row]]:
    if not path.is_file() or not path.stat().st_size:
        return [], []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    known = list(reader.fieldnames or ())
    short = any(None in row.values() for row in rows)
    if short or len(set(known)) < len(known) or any(None in row for row in rows):
        raise ValueError(f"{path}: expected a table whose rows have its header's columns; move it away")
    return known, rows


def _write(file: Any, header: Sequence[str], rows: Sequence[Row]) -> None:
    writer = csv.DictWriter(file, header, restval="")
    writer.writerows({key: f"{x:.6g}" if isinstance(x, float) else x for key, x in finite(row).items()} for row in rows)


def write_json(document: Mapping[str, Any], path: Path | str) -> Path:
    """Write a document, by default into ``bench/results/``, and return its path."""
    path = RESULTS / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(document), indent=1, default=str, allow_nan=False) + "\n")
    return path


def finite(value: Any) -> Any:
    """The same document with None for numbers that are not finite, which JSON has no words for."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
