"""One scan of a data set with everything known about it, and what a reader of a layout gives."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPLITS = ("train", "val", "test")
TEXT_KINDS = ("report", "short", "long", "multiple_choice", "referring")
_SIDES = ("left", "right")
# csv's own limit is below the longest reports.
_LONGEST_FIELD = 1 << 24


@dataclass(frozen=True)
class Mask:
    """Where one class of a scan is marked.

    Attributes:
        name: As a request says it, side first: "left kidney".
        path: File, relative to the data set's root.
        value: Label value in a label map; None: every value but 0.
        channel: Row of a sparse M3D-Seg mask or channel of a (C, ...) array; None where the file has none.
    """

    name: str
    path: str
    value: int | None = None
    channel: int | None = None


@dataclass(frozen=True)
class Text:
    """One thing said about a scan.

    Attributes:
        kind: "report", "short", "long", "multiple_choice" or "referring".
        answer: Report or true answer; the text of the right choice without its letter; a referring answer has one
            [SEG].
        question: None for a report.
        choices: Of a multiple-choice question, in their order.
        target: Mask of a referring answer.
    """

    kind: str
    answer: str
    question: str | None = None
    choices: tuple[str, ...] | None = None
    target: Mask | None = None


@dataclass
class Record:
    """One scan.

    Attributes:
        id: Unique in a manifest: "ct-rate/train_1_a_1".
        dataset: Key of its root in the manifest's header.
        patient: What splits never divide; equal for the same patient met in two data sets.
        image: File or folder, relative to the root.
        format: "scan" (what `engine.volumes` reads), "npy" ((1, D, H, W), prepared), "m3d-seg" ((1, W, H, D), not
            resampled) or "slices" (folder of numbered pictures).
        split: The publisher's split, None where there is none.
        slope: HU = slope * value + intercept, on top of the file's own scale.
        intercept: See `slope`.
        hu: Whether values are Hounsfield units; else they are relative and span the model's window.
        placed: Whether the file tells left from right; else the labels' own sides decide.
        masks: Marked classes.
        classes: All classes that the data set marks wherever they are seen: what is not found may be asked for as
            absent.
        texts: What is said.
    """

    id: str
    dataset: str
    patient: str
    image: str
    format: str = "scan"
    split: str | None = None
    slope: float = 1.0
    intercept: float = 0.0
    hu: bool = True
    placed: bool = True
    masks: list[Mask] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)


@dataclass(frozen=True)
class Problem:
    """A file or row that cannot be used.

    Attributes:
        path: The file.
        reason: One sentence.
    """

    path: str
    reason: str


Reader = Callable[[Path], Iterator[Record | Problem]]


@dataclass(frozen=True)
class Layout:
    """A published layout.

    Attributes:
        name: For the command line and ids.
        found: Root -> whether it has this layout.
        read: Root -> records, and problems with files that list others.
    """

    name: str
    found: Callable[[Path], bool]
    read: Reader


def tidy(name: str) -> str:
    """A class name as words, side first: "adrenal_gland_left" and "Left adrenal gland" -> "left adrenal gland"."""
    words = re.sub(r"[_\s]+", " ", name).strip()
    sides = [word for word in words.split() if word.lower() in _SIDES]
    if len(sides) != 1:
        return words
    rest = [word for word in words.split() if word.lower() not in _SIDES]
    return " ".join([sides[0].lower(), *rest])


def side_of(name: str) -> str | None:
    """The side in a class name, "left" or "right"; None where there is none or both."""
    sides = [word for word in re.findall(r"[a-z]+", name.lower()) if word in _SIDES]
    return sides[0] if len(sides) == 1 else None


def read_rows(path: Path, columns: tuple[str, ...], delimiter: str = ",") -> Iterator[dict[str, str]]:
    """Rows of a table.

    Raises:
        ValueError: A column is missing, or the file is not UTF-8 text.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        missing = [name for name in columns if name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{path}: expected a column {missing[0]!r}, got {', '.join(rows.fieldnames or ()) or 'none'}"
            )
        for row in rows:
            yield {
                key: (value or "").strip()
                for key, value in row.items()
                if key is not None and not isinstance(value, list)
            }


def read_json(path: Path, kind: type) -> Any:
    """A JSON file whose top is a `kind`.

    Raises:
        ValueError: Damaged, or something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); download it again") from error
    if not isinstance(document, kind):
        raise ValueError(f"{path}: expected a {kind.__name__}, got a {type(document).__name__}")
    return document


def listed(
    root: Path, files: list[Path], read: Callable[[Path], Iterator[Record | Problem]]
) -> Iterator[Record | Problem]:
    """Read each listing file; one that is broken becomes a problem and the next is read."""
    for path in files:
        try:
            yield from read(path)
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = f"missing {error}" if isinstance(error, KeyError) else str(error).removeprefix(f"{path}: ")
            yield Problem(within(root, path), reason)


def within(root: Path, path: Path) -> str:
    """A path relative to its root, with forward slashes."""
    return path.relative_to(root).as_posix()


def locate(root: Path, given: str, bases: list[Path]) -> str:
    """Where a path written in a listing really is.

    Args:
        root: Of the data set.
        given: As written, often relative to a folder of the publisher's machine.
        bases: Folders it may be relative to, best first.

    Returns:
        Relative to the root; as written below the first base when it is nowhere, for `check` to name.
    """
    parts = Path(given.replace("\\", "/")).parts
    parts = tuple(part for part in parts if part not in ("/", "."))
    # A bare file name is too little to tell one case's files from another's.
    for start in range(max(1, len(parts) - 1)):
        for base in bases:
            candidate = base.joinpath(*parts[start:])
            if candidate.exists() and candidate.is_relative_to(root):
                return within(root, candidate)
    return within(root, bases[0].joinpath(*parts))


def folders_with(root: Path, name: str, depth: int = 2) -> list[Path]:
    """Files called `name` (a glob pattern) in the root or at most `depth` folders below, in order."""
    return sorted({path for level in range(depth + 1) for path in root.glob("*/" * level + name) if path.is_file()})
