"""CT-RATE: chest CT volumes with reports, and the questions of CT-CHAT about them (CC-BY-NC-SA 4.0).

    dataset/{train,valid}[_fixed]/train_1/train_1_a/train_1_a_1.nii.gz      patient 1, scan a, reconstruction 1
    dataset/radiology_text_reports/{train,validation}_reports.csv           VolumeName, Findings_EN, Impressions_EN, ...
    dataset/metadata/{train,validation}_metadata.csv                        VolumeName, RescaleSlope, RescaleIntercept
    dataset/vqa/{train,valid}_vqa.json                                      LLaVA conversations

The files of the `_fixed` folders hold HU; those of the others need the scale of the metadata, as in CT-CLIP's own
preprocessing. A question ends in a tag for its kind; all of a volume's questions join its report.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medvl_sam2.training.datasets.base import Layout, Problem, Record, Text, listed, read_json, read_rows, within

_NAME = re.compile(r"(train|valid)_(\d+)_([a-z]+)_(\d+)(?:\.nii\.gz)?$")
_TAGS = {
    "<long_answer>": "long",
    "<short_answer>": "short",
    # As CT-CHAT's constants spell it.
    "<short_answe>": "short",
    "<multiple_choice>": "multiple_choice",
    "<report_generation>": "report",
}
_TYPES = {"conversation": "long", "description": "long", "free_response": "long"}
_CHOICE = re.compile(r"\(([a-z])\)\s*(.*?)(?=\s*\([a-z]\)|$)", re.S)
_HEAD = re.compile(r"^\s*\(?([a-z])[).:]", re.I)


def _base(root: Path) -> Path:
    return root / "dataset" if (root / "dataset").is_dir() else root


def _reports(root: Path) -> list[Path]:
    return sorted((_base(root) / "radiology_text_reports").glob("*_reports.csv"))


def _questions(root: Path) -> list[Path]:
    return sorted((_base(root) / "vqa").glob("*_vqa.json"))


class _Volumes:
    """Paths and scales of volumes by name."""

    def __init__(self, root: Path):
        self.root, self.base = root, _base(root)
        self.known: dict[str, Record] = {}
        self.scales: dict[str, tuple[float, float]] = {}
        for table in sorted((self.base / "metadata").glob("*_metadata.csv")):
            for row in read_rows(table, ("VolumeName", "RescaleSlope", "RescaleIntercept")):
                self.scales[row["VolumeName"]] = float(row["RescaleSlope"]), float(row["RescaleIntercept"])

    def record(self, name: str) -> Record:
        found = _NAME.match(name)
        if found is None:
            raise ValueError(f"expected a volume name like train_1_a_1.nii.gz, got {name!r}")
        stem = name.removesuffix(".nii.gz")
        if stem not in self.known:
            group, patient, scan, _ = found.groups()
            nested = Path(f"{group}_{patient}", f"{group}_{patient}_{scan}", f"{stem}.nii.gz")
            places = [
                self.base / f"{group}{fixed}" / p for fixed in ("_fixed", "") for p in (nested, Path(nested.name))
            ]
            path = next((place for place in places if place.is_file()), places[0])
            plain = path.relative_to(self.base).parts[0] == group
            slope, intercept = self.scales.get(f"{stem}.nii.gz", (1.0, 0.0)) if plain else (1.0, 0.0)
            self.known[stem] = Record(
                f"ct-rate/{stem}",
                "",
                f"ct-rate/{group}_{patient}",
                within(self.root, path),
                split="test" if group == "valid" else "train",
                slope=slope,
                intercept=intercept,
            )
        return self.known[stem]


def _read(root: Path) -> Iterator[Record | Problem]:
    try:
        volumes = _Volumes(root)
    except ValueError as error:
        yield Problem("metadata", str(error))
        return

    def reports(path: Path) -> Iterator[Record | Problem]:
        for number, row in enumerate(read_rows(path, ("VolumeName", "Findings_EN", "Impressions_EN")), start=2):
            parts = [("Findings", row["Findings_EN"]), ("Impression", row["Impressions_EN"])]
            text = " ".join(f"{name}: {' '.join(part.split())}" for name, part in parts if part)
            try:
                if not text:
                    raise ValueError(f"the report of {row['VolumeName']} is empty")
                volumes.record(row["VolumeName"]).texts.append(Text("report", text))
            except ValueError as error:
                yield Problem(within(root, path), f"row {number}: {error}")

    def questions(path: Path) -> Iterator[Record | Problem]:
        for number, item in enumerate(read_json(path, list)):
            try:
                record = volumes.record(item["image"])
                for text in conversation_texts(item["conversations"]):
                    # The report table has the same report, without errors of conversion.
                    if text.kind != "report" or all(known.kind != "report" for known in record.texts):
                        record.texts.append(text)
            except (KeyError, TypeError, ValueError) as error:
                reason = f"missing {error}" if isinstance(error, KeyError) else str(error)
                yield Problem(within(root, path), f"item {number}: {reason}")

    yield from listed(root, _reports(root), reports)
    yield from listed(root, _questions(root), questions)
    yield from volumes.known.values()


def conversation_texts(messages: list[dict[str, Any]]) -> Iterator[Text]:
    """Questions and answers of one LLaVA conversation.

    Args:
        messages: {"from": "human", "value": "<image>\\n... <short_answer>", "type": ...}, {"from": "gpt", ...}, ...

    Raises:
        ValueError: A question without an answer, or an empty one.
    """
    for asked, told in zip(messages[::2], messages[1::2] + [None] * (len(messages) % 2)):
        if told is None or asked["from"] != "human" or told["from"] != "gpt":
            raise ValueError("expected questions and answers in turn")
        question = asked["value"].replace("<image>", " ")
        kind = next((kind for tag, kind in _TAGS.items() if tag in question), None)
        kind = kind or _TYPES.get(asked.get("type", ""), "long")
        for tag in _TAGS:
            question = question.replace(tag, " ")
        question, answer = " ".join(question.split()), " ".join(told["value"].split())
        if not question or not answer:
            raise ValueError("expected a question and an answer, got an empty one")
        yield Text("report", answer) if kind == "report" else _with_choices(kind, question, answer)


def _with_choices(kind: str, question: str, answer: str) -> Text:
    if kind != "multiple_choice":
        return Text(kind, answer, question)
    found = list(_CHOICE.finditer(question))
    letters = [match[1] for match in found]
    picked = _HEAD.match(answer)
    if len(found) < 2 or letters != sorted(set(letters)) or picked is None or picked[1].lower() not in letters:
        # Without its choices it is still a question with an answer.
        return Text("short", answer, question)
    choices = tuple(match[2].strip(" ,;.") for match in found)
    return Text(
        "multiple_choice", choices[letters.index(picked[1].lower())], question[: found[0].start()].strip(), choices
    )


CT_RATE = Layout("ct-rate", lambda root: bool(_reports(root) or _questions(root)), _read)
