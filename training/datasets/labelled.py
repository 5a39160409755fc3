"""Segmentation sets of scans beside masks: CT-ORG, TotalSegmentator, the decathlon, and plain folders.

CT-ORG             .../volume-0.nii.gz, .../labels-0.nii.gz
TotalSegmentator   s0000/ct.nii.gz, s0000/segmentations/<class>.nii.gz, meta.csv (";", with a split)
decathlon (MSD)    Task03_Liver/dataset.json, imagesTr/, labelsTr/; nnU-Net's form of it too
folder             <case>/ct.nii.gz (or any scan), <case>/*seg*, <case>/labels.json {"1": "liver"}
"""

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from medvl_sam2.training.datasets.base import (
    Layout,
    Mask,
    Problem,
    Record,
    folders_with,
    listed,
    read_json,
    read_rows,
    tidy,
    within,
)

CT_ORG_CLASSES = {1: "liver", 2: "bladder", 3: "lungs", 4: "kidneys", 5: "bone", 6: "brain"}
# The publishers' test set: the volumes whose lungs and bones were marked by hand.
_CT_ORG_TEST = range(21)
_SCANS = ("ct.nii.gz", "ct.nii", "ct.nrrd", "ct.mha", "dicom", "dicom.zip")
_MASK_FILE = re.compile(r"seg.*\.(nii|nii\.gz|nrrd|mha)$", re.I)
_LESIONS = ("cancer", "tumour", "tumor", "tumours", "tumors")


def _ct_org_volumes(root: Path) -> list[Path]:
    found = folders_with(root, "volume-*.nii.gz") + folders_with(root, "volume-*.nii")
    return sorted(found, key=lambda path: (_number(path), path))


def _number(path: Path) -> int:
    digits = re.search(r"-(\d+)\.nii", path.name)
    return int(digits[1]) if digits else -1


def _read_ct_org(root: Path) -> Iterator[Record | Problem]:
    labels = {_number(path): path for ending in ("nii.gz", "nii") for path in folders_with(root, f"labels-*.{ending}")}
    for path in _ct_org_volumes(root):
        number = _number(path)
        if number not in labels:
            yield Problem(within(root, path), f"no labels-{number}.nii.gz beside it")
            continue
        mask = within(root, labels[number])
        yield Record(
            f"ct-org/volume-{number}",
            "",
            f"ct-org/volume-{number}",
            within(root, path),
            split="test" if number in _CT_ORG_TEST else "train",
            masks=[Mask(name, mask, value) for value, name in CT_ORG_CLASSES.items()],
            classes=list(CT_ORG_CLASSES.values()),
        )


def _read_totalsegmentator(root: Path) -> Iterator[Record | Problem]:
    splits: dict[str, str] = {}
    for table in folders_with(root, "meta.csv", 1):
        try:
            splits |= {row["image_id"]: row["split"] for row in read_rows(table, ("image_id", "split"), ";")}
        except ValueError as error:
            yield Problem(within(root, table), str(error))
    cases = _totalsegmentator_cases(root)
    # Older releases leave classes out of a case's folder where they are not seen.
    found = {case: sorted((case / "segmentations").glob("*.nii.gz")) for case in cases}
    classes = sorted({tidy(path.name.removesuffix(".nii.gz")) for paths in found.values() for path in paths})
    for case, paths in found.items():
        if not paths:
            yield Problem(within(root, case), "no masks in its folder segmentations")
            continue
        yield Record(
            f"totalsegmentator/{case.name}",
            "",
            f"totalsegmentator/{case.name}",
            within(root, case / "ct.nii.gz"),
            split=splits.get(case.name) if splits.get(case.name) in ("train", "val", "test") else None,
            masks=[Mask(tidy(path.name.removesuffix(".nii.gz")), within(root, path)) for path in paths],
            classes=classes,
        )


def _totalsegmentator_cases(root: Path) -> list[Path]:
    return sorted({path.parent for level in ("", "*/") for path in root.glob(f"{level}s[0-9]*/segmentations")})


def _read_decathlon(root: Path) -> Iterator[Record | Problem]:
    def read(listing: Path) -> Iterator[Record | Problem]:
        document = read_json(listing, dict)
        modalities = document.get("modality", document.get("channel_names", {}))
        if not any("CT" in str(name).upper() for name in modalities.values()):
            yield Problem(
                within(root, listing), f"not CT ({', '.join(map(str, modalities.values())) or 'no modality'})"
            )
            return
        task = re.sub(r"^(Task|Dataset)\d+_", "", listing.parent.name)
        names = _label_names(document["labels"], task)
        for pair in document.get("training") or _nnunet_pairs(listing.parent, document):
            image, mask = (within(root, listing.parent / pair[key].removeprefix("./")) for key in ("image", "label"))
            case = re.sub(r"(_0000)?\.nii(\.gz)?$", "", Path(image).name)
            yield Record(
                f"decathlon/{task}/{case}",
                "",
                f"decathlon/{case}",
                image,
                masks=[Mask(name, mask, value) for value, name in names.items()],
                classes=list(names.values()),
            )

    yield from listed(root, _decathlon_listings(root), read)


def _label_names(labels: dict[str, Any], task: str) -> dict[int, str]:
    """Value -> name, from the decathlon's {"1": "liver"} or nnU-Net's {"liver": 1}; a bare "cancer" gets its organ."""
    pairs = labels.items() if all(str(key).isdecimal() for key in labels) else [(v, k) for k, v in labels.items()]
    names = {int(value): tidy(str(name)) for value, name in pairs if int(value)}
    return {value: f"{task.lower()} {name}" if name.lower() in _LESIONS else name for value, name in names.items()}


def _nnunet_pairs(folder: Path, document: dict[str, Any]) -> Iterator[dict[str, str]]:
    ending = document.get("file_ending", ".nii.gz")
    for label in sorted((folder / "labelsTr").glob(f"*{ending}")):
        stem = label.name.removesuffix(ending)
        yield {"image": f"imagesTr/{stem}_0000{ending}", "label": f"labelsTr/{label.name}"}


def _decathlon_listings(root: Path) -> list[Path]:
    return folders_with(root, "dataset.json", 1)


def case_scan(case: Path) -> Path | None:
    """The scan in the folder of a case, or None."""
    named = (case / name for name in _SCANS if (case / name).exists())
    others = (path for path in sorted(case.glob("*.nrrd")) if "seg" not in path.name.lower())
    return next(chain(named, others), None)


def case_masks(case: Path) -> list[Path]:
    """Label maps in the folder of a case."""
    return sorted(path for path in case.iterdir() if path.is_file() and _MASK_FILE.search(path.name))


def _read_folder(root: Path) -> Iterator[Record | Problem]:
    def read(listing: Path) -> Iterator[Record | Problem]:
        case = listing.parent
        scan = case_scan(case)
        if scan is None:
            yield Problem(within(root, case), f"no scan: expected one of {', '.join(_SCANS)} or a .nrrd")
            return
        tables = read_json(listing, dict)
        masks = []
        for path in case_masks(case):
            table = tables.get(path.name, tables)
            masks += [
                Mask(tidy(name), within(root, path), int(value))
                for value, name in table.items()
                if isinstance(name, str) and str(value).isdecimal() and int(value)
            ]
        if not masks:
            yield Problem(within(root, case), 'no mask named *seg* with names in labels.json, as {"1": "liver"}')
            return
        name = within(root, case) if case != root else root.name
        names = sorted({mask.name for mask in masks})
        yield Record(f"folder/{name}", "", f"folder/{name}", within(root, scan), masks=masks, classes=names)

    yield from listed(root, _folder_listings(root), read)


def _folder_listings(root: Path) -> list[Path]:
    return folders_with(root, "labels.json")


CT_ORG = Layout("ct-org", lambda root: bool(_ct_org_volumes(root)), _read_ct_org)
TOTALSEGMENTATOR = Layout("totalsegmentator", lambda root: bool(_totalsegmentator_cases(root)), _read_totalsegmentator)
DECATHLON = Layout("decathlon", lambda root: bool(_decathlon_listings(root)), _read_decathlon)
FOLDER = Layout("folder", lambda root: bool(_folder_listings(root)), _read_folder)
