"""M3D-Seg and M3D-RefSeg (BAAI-DCAI/M3D).

    M3D_Seg/0000/0000.json                       decathlon-like: labels, train and test lists
    M3D_Seg/0000/<case>/image.npy                (1, W, H, D), SegVol-normalised
    M3D_Seg/0000/<case>/mask_(C, W, H, D).npz    scipy CSR (C, W * H * D); the shape is in the name
    M3D_Seg_npy/0000/<case>/masks/mask_3.npy     prepared: (1, 32, 256, 256), one file a class
    term_dictionary.json                         class -> descriptions
    M3D_RefSeg/M3D_RefSeg{,_train,_test}.csv     Image, Mask, Mask_ID, Question_Type, Question, Answer
    M3D_RefSeg/<case>/{ct.nii.gz,mask.nii.gz,text.json}

The affines are gone from M3D-Seg, so its files do not tell left from right.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from medvl_sam2.model.prompts import SEG
from medvl_sam2.training.datasets.base import (
    Layout,
    Mask,
    Problem,
    Record,
    Text,
    folders_with,
    listed,
    locate,
    read_json,
    read_rows,
    tidy,
    within,
)

# Cases of 3D-IRCADB and QUBIQ are marked for some of the classes only: what is not marked may well be there.
_PARTLY_MARKED = ("0009", "0017")
_MASK_SHAPE = re.compile(r"mask_(\(\d+(?:, ?\d+){3},?\))\.npz$")
_PREPARED_MASK = re.compile(r"mask_(\d+)\.npy$")
_REFSEG_COLUMNS = ("Image", "Mask", "Mask_ID", "Question", "Answer")
# Cases that M3D took from these sets keep their names.
_KNOWN_CASES = (
    (re.compile(r"s\d{4}"), "totalsegmentator"),
    (re.compile(r"volume-\d+"), "ct-org"),
    (re.compile(r"(colon|hepaticvessel|liver|lung|pancreas|spleen)_\d+"), "decathlon"),
)


def mask_shape(path: str) -> tuple[int, int, int, int]:
    """(C, W, H, D) that the name of a sparse mask gives.

    Raises:
        ValueError: The name gives none.
    """
    found = _MASK_SHAPE.search(path)
    if found is None:
        raise ValueError(f"{path}: expected a name like 'mask_(2, 512, 512, 96).npz', got none with a shape")
    return ast.literal_eval(found[1])


def patient_of(case: str, otherwise: str) -> str:
    """The patient behind a case's name: the same as in the set it was taken from, where the name tells."""
    return next((f"{key}/{case}" for pattern, key in _KNOWN_CASES if pattern.fullmatch(case)), f"{otherwise}/{case}")


def _read_sets(root: Path) -> Iterator[Record | Problem]:
    def read(listing: Path) -> Iterator[Record | Problem]:
        document = read_json(listing, dict)
        code = listing.stem
        labels = {int(value): tidy(name) for value, name in document["labels"].items() if int(value)}
        classes = [] if code in _PARTLY_MARKED else sorted(set(labels.values()))
        known: dict[str, Record] = {}
        for split, key in (("train", "train"), ("val", "validation"), ("test", "test")):
            for pair in document.get(key, ()):
                try:
                    record = _seg_record(root, listing, code, pair, split, classes, known)
                    _add_masks(root, listing, record, pair["label"], labels)
                except (KeyError, TypeError, ValueError) as error:
                    yield Problem(within(root, listing), f"entry {pair}: {error}")
        yield from known.values()

    yield from listed(root, _listings(root), read)


def _bases(root: Path, listing: Path) -> list[Path]:
    return [base for base in (listing.parent.parent, root, listing.parent) if base.is_relative_to(root)]


def _seg_record(
    root: Path, listing: Path, code: str, pair: dict[str, str], split: str, classes: list[str], known: dict[str, Record]
) -> Record:
    image = locate(root, pair["image"], _bases(root, listing))
    if image not in known:
        case = Path(image).parent.name
        kind = "npy" if _PREPARED_MASK.search(pair["label"]) else "m3d-seg"
        known[image] = Record(
            f"m3d-seg/{code}/{case}",
            "",
            patient_of(case, f"m3d-seg/{code}"),
            image,
            kind,
            split,
            hu=False,
            placed=False,
            classes=classes,
        )
    return known[image]


def _add_masks(root: Path, listing: Path, record: Record, label: str, labels: dict[int, str]) -> None:
    path = locate(root, label, _bases(root, listing))
    prepared = _PREPARED_MASK.search(path)
    channels = [int(prepared[1])] if prepared else range(mask_shape(path)[0])
    for channel in channels:
        if channel + 1 not in labels:
            raise ValueError(f"{path}: class {channel + 1} has no name in {listing.name}")
        record.masks.append(Mask(labels[channel + 1], path, channel=0 if prepared else channel))


def _read_referring(root: Path) -> Iterator[Record | Problem]:
    def read(listing: Path) -> Iterator[Record | Problem]:
        split = "test" if "test" in listing.stem else "train"
        known: dict[str, Record] = {}
        for number, row in enumerate(read_rows(listing, _REFSEG_COLUMNS), start=2):
            answer = re.sub(r"<SEG>|\[SEG\]", SEG, row["Answer"])
            if answer.count(SEG) != 1 or not row["Question"] or not row["Mask_ID"].isdecimal():
                yield Problem(within(root, listing), f"row {number}: expected a question, a mask id and one [SEG]")
                continue
            image, mask = (_referred(root, listing, row[key]) for key in ("Image", "Mask"))
            case = Path(image).parent.name
            if image not in known:
                patient = patient_of(case, "m3d-refseg")
                known[image] = Record(f"m3d-refseg/{case}", "", patient, image, split=split)
            target = Mask(f"referred {row['Mask_ID']}", mask, value=int(row["Mask_ID"]))
            if target not in known[image].masks:
                known[image].masks.append(target)
            known[image].texts.append(Text("referring", answer, row["Question"], target=target))
        yield from known.values()

    yield from listed(root, _referring(root), read)


def _referred(root: Path, listing: Path, given: str) -> str:
    """A scan or mask of M3D-RefSeg: the NIfTI file, also where the prepared array is listed.

    The prepared arrays are left alone: their in-plane axes are swapped, so that left and right can't be told.
    """
    stem = re.sub(r"\.(npy|nii\.gz)$", "", given).replace("_npy", "")
    return locate(root, f"{stem}.nii.gz", _bases(root, listing))


def _listings(root: Path) -> list[Path]:
    return [path for path in folders_with(root, "[0-9][0-9][0-9][0-9].json") if path.stem == path.parent.name]


def _referring(root: Path) -> list[Path]:
    return folders_with(root, "M3D_RefSeg*.csv")


M3D_SEG = Layout("m3d-seg", lambda root: bool(_listings(root)), _read_sets)
M3D_REFSEG = Layout("m3d-refseg", lambda root: bool(_referring(root)), _read_referring)
