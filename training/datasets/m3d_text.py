"""M3D-Cap and M3D-VQA (BAAI-DCAI/M3D): reports and questions about radiology teaching cases.

    M3D_Cap/M3D_Cap.json                        {"train": [{"image": ..., "text": ...}], "validation": [], "test1k": []}
    M3D_Cap/ct_case/000001/Axial_non_contrast/0.png ...  slices in the order of their numbers
    M3D_Cap/ct_case/000001/text.txt
    M3D_Cap_npy/ct_case/000001/Axial_non_contrast.npy    the same, prepared: (1, 32, 256, 256) in 0-1
    M3D-VQA/M3D_VQA_{train,val,test,test5k,yn_train,...}.csv

The listings name the prepared files; either form is found. Pictures are shown as a radiologist sees them, so the
patient's left is on the picture's right.
"""

from collections.abc import Iterator
from pathlib import Path

from medvl_sam2.training.datasets.base import (
    Layout,
    Problem,
    Record,
    Text,
    folders_with,
    listed,
    locate,
    read_json,
    read_rows,
)

_QUESTION_COLUMNS = ("Image Path", "Question", "Answer")
_PREPARED = "_npy"
_SECTIONS = ("study_findings:", "discussion:")
_SHORTEST = 5


def _split(name: str) -> str:
    name = name.lower()
    return "test" if "test" in name else "val" if "val" in name else "train"


def _image(root: Path, listing: Path, given: str) -> tuple[str, str]:
    """Path and format of an image named in a listing, prepared or as pictures."""
    bases = [listing.parent.parent, root, listing.parent, *sorted(p for p in root.iterdir() if p.is_dir())]
    bases = [base for base in dict.fromkeys(bases) if base.is_relative_to(root)]
    raw = given.removesuffix(".npy").replace(f"M3D_Cap{_PREPARED}", "M3D_Cap")
    for written, kind in ((given, "npy" if given.endswith(".npy") else "slices"), (raw, "slices")):
        path = locate(root, written, bases)
        if (root / path).exists():
            return path, kind
    return locate(root, given, bases), "npy" if given.endswith(".npy") else "slices"


def _record(root: Path, listing: Path, given: str, split: str, known: dict[str, Record]) -> Record:
    if given not in known:
        image, kind = _image(root, listing, given)
        # .../ct_case/000001/Axial_non_contrast.npy: the case is the patient, whatever the series.
        case, series = Path(given).parts[-3:-1], Path(given).name.removesuffix(".npy")
        patient = "/".join(("m3d-cap", *case))
        known[given] = Record(f"{patient}/{series}", "", patient, image, kind, split, hu=False)
    return known[given]


def report_text(raw: str) -> str:
    """The findings in a case's text.txt, or its discussion, or all of it, on one line."""
    for section in _SECTIONS:
        _, found, rest = raw.partition(section)
        text = " ".join(rest.split())
        if found and len(text.replace(" ", "")) >= _SHORTEST:
            return text
    return " ".join(raw.split())


def _read_captions(root: Path) -> Iterator[Record | Problem]:
    def read(listing: Path) -> Iterator[Record | Problem]:
        # The listed subsets of the test set repeat its cases.
        known: dict[str, Record] = {}
        for name, pairs in read_json(listing, dict).items():
            for pair in pairs:
                if pair["image"] in known:
                    continue
                record = _record(root, listing, pair["image"], _split(name), known)
                bases = [base for base in (listing.parent.parent, root, listing.parent) if base.is_relative_to(root)]
                path = root / locate(root, pair["text"], bases)
                if not path.is_file():
                    path = (root / record.image).parent / "text.txt"
                try:
                    answer = report_text(path.read_text(encoding="utf-8"))
                except (OSError, UnicodeDecodeError) as error:
                    yield Problem(pair["text"], f"text of {record.id} cannot be read ({error})")
                    continue
                if not answer:
                    yield Problem(pair["text"], f"text of {record.id} is empty")
                    continue
                record.texts.append(Text("report", answer))
                yield record

    yield from listed(root, _captions(root), read)


def _read_questions(root: Path) -> Iterator[Record | Problem]:
    def read(listing: Path) -> Iterator[Record | Problem]:
        known: dict[str, Record] = {}
        for number, row in enumerate(read_rows(listing, _QUESTION_COLUMNS), start=2):
            try:
                text = _question(row)
            except ValueError as error:
                yield Problem(listing.relative_to(root).as_posix(), f"row {number}: {error}")
                continue
            _record(root, listing, row["Image Path"], _split(listing.stem), known).texts.append(text)
        yield from known.values()

    yield from listed(root, _questions(root), read)


def _question(row: dict[str, str]) -> Text:
    if not row["Question"] or not row["Answer"] or not row["Image Path"]:
        raise ValueError("expected an image path, a question and an answer, got an empty one")
    choices = tuple(row.get(f"Choice {letter}", "") for letter in "ABCD")
    letter = row.get("Answer Choice", "")
    if not letter:
        return Text("short", row["Answer"], row["Question"])
    if letter not in ("A", "B", "C", "D") or not all(choices):
        raise ValueError(f"expected an answer choice A-D and four choices, got {letter!r} of {choices}")
    return Text("multiple_choice", choices["ABCD".index(letter)], row["Question"], choices)


def _captions(root: Path) -> list[Path]:
    return folders_with(root, "M3D_Cap.json")


def _questions(root: Path) -> list[Path]:
    return folders_with(root, "M3D_VQA_*.csv")


M3D_CAP = Layout("m3d-cap", lambda root: bool(_captions(root)), _read_captions)
M3D_VQA = Layout("m3d-vqa", lambda root: bool(_questions(root)), _read_questions)
