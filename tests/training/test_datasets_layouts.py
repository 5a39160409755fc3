"""Every published layout, read from tiny copies with the published names; masks against nibabel and scipy directly."""

import json
import re
from pathlib import Path

import fake_datasets as fake
import nibabel as nib
import numpy as np
import pytest
from scipy import sparse

from medvl_sam2.training.cases import folder_cases
from medvl_sam2.training.datasets.base import Problem, Record, Text
from medvl_sam2.training.datasets.images import read_masks, read_scan
from medvl_sam2.training.datasets.index import LAYOUTS


def read(layout: str, root: Path) -> tuple[dict[str, Record], list[Problem]]:
    assert LAYOUTS[layout].found(root)
    items = list(LAYOUTS[layout].read(root))
    records = {item.id: item for item in items if isinstance(item, Record)}
    return records, [item for item in items if isinstance(item, Problem)]


def masks_of(record: Record, root: Path) -> dict[str, np.ndarray]:
    return {mask.name: voxels for mask, voxels in read_masks(record, root, read_scan(record, root))}


def canonical(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """(I, J, K) -> (Z, Y, X) with x to the left, y to the back, z up, by nibabel alone."""
    image = nib.as_closest_canonical(nib.Nifti1Image(array.astype(np.int16), affine))
    return np.asarray(image.dataobj)[::-1, ::-1].transpose(2, 1, 0)


def test_ct_org(tmp_path):
    labels = fake.ct_org(tmp_path)
    records, problems = read("ct-org", tmp_path)
    assert not problems
    # The publishers' test set is volumes 0 to 20.
    assert {name: record.split for name, record in records.items()} == {
        "ct-org/volume-20": "test",
        "ct-org/volume-21": "train",
    }
    for n, label in labels.items():
        found = masks_of(records[f"ct-org/volume-{n}"], tmp_path)
        assert set(found) == {"liver", "bladder", "lungs", "kidneys", "bone", "brain"}
        for value, name in ((1, "liver"), (4, "kidneys"), (6, "brain")):
            assert np.array_equal(found[name], canonical(label == value, fake.RAS))


@pytest.mark.parametrize("affine", [fake.RAS, fake.LAS], ids=["RAS", "LAS"])
def test_totalsegmentator(tmp_path, affine):
    masks = fake.totalsegmentator(tmp_path, affine)
    records, problems = read("totalsegmentator", tmp_path)
    assert not problems
    splits = {name.split("/")[1]: record.split for name, record in records.items()}
    assert splits == {"s0000": "val", "s0011": "test", "s0287": "train"}
    record = records["totalsegmentator/s0287"]
    assert record.classes == ["left kidney", "liver", "right kidney"]
    found = masks_of(record, tmp_path)
    for file, name in (("kidney_left", "left kidney"), ("kidney_right", "right kidney"), ("liver", "liver")):
        assert np.array_equal(found[name], canonical(masks["s0287", file], affine))


@pytest.mark.parametrize("sign", [1, -1])
def test_m3d_seg(tmp_path, sign):
    masks = fake.m3d_seg(tmp_path, affine_sign=sign)
    records, problems = read("m3d-seg", tmp_path)
    assert not problems
    record = records["m3d-seg/0011/s0011"]
    # The case's name tells that it is TotalSegmentator's s0011: one patient for the splits.
    assert (record.patient, record.split, record.hu, record.placed) == ("totalsegmentator/s0011", "train", False, False)
    assert record.classes == ["left kidney", "liver", "right kidney", "spleen"]
    folder = tmp_path / "M3D_Seg" / "0011" / "s0011"
    (sparse_file,) = folder.glob("mask_*.npz")
    assert sparse_file.name == "mask_(4, 24, 20, 12).npz"
    dense = sparse.load_npz(sparse_file).toarray().reshape(4, 24, 20, 12)
    found = masks_of(record, tmp_path)
    for channel, name in enumerate(("left kidney", "right kidney", "liver", "spleen")):
        assert np.array_equal(found[name], np.swapaxes(dense, -1, -3)[channel].astype(bool))
    assert np.array_equal(found["liver"], masks["liver"].transpose(2, 1, 0))
    assert np.array_equal(read_scan(record, tmp_path).voxels, np.swapaxes(np.load(folder / "image.npy"), -1, -3)[0])


def test_m3d_seg_prepared(tmp_path):
    mask = fake.m3d_seg_prepared(tmp_path)
    records, problems = read("m3d-seg", tmp_path)
    assert not problems
    record = records["m3d-seg/0003/case_1"]
    assert (record.format, record.split, [m.name for m in record.masks]) == ("npy", "test", ["spleen"])
    assert np.array_equal(masks_of(record, tmp_path)["spleen"], mask[0])


def test_ct_org_within_m3d_seg_is_the_same_patient(tmp_path):
    fake.m3d_seg(tmp_path, "0012", "volume-20")
    records, _ = read("m3d-seg", tmp_path)
    assert records["m3d-seg/0012/volume-20"].patient == "ct-org/volume-20"


def test_m3d_refseg(tmp_path):
    labels = fake.m3d_refseg(tmp_path)
    records, problems = read("m3d-refseg", tmp_path)
    assert [p.reason for p in problems] == ["row 4: expected a question, a mask id and one [SEG]"]
    record = records["m3d-refseg/s0287"]
    assert record.patient == "totalsegmentator/s0287"
    assert [text.answer for text in record.texts] == ["Sure, it is [SEG].", "The stone: [SEG]."]
    found = masks_of(record, tmp_path)
    for value, text in enumerate(record.texts, start=1):
        assert np.array_equal(found[text.target.name], canonical(labels == value, fake.RAS))


def test_m3d_cap_as_pictures_and_prepared(tmp_path):
    written = fake.m3d_cap(tmp_path)
    records, problems = read("m3d-cap", tmp_path)
    assert not problems
    case, quiz = (
        records["m3d-cap/ct_case/000006/Axial_non_contrast"],
        records["m3d-cap/ct_quizze/000010/Coronal_C__arterial_phase"],
    )
    assert (case.format, case.split, quiz.format, quiz.split) == ("slices", "train", "npy", "test")
    assert case.texts == [Text("report", "The left kidney holds a stone. No free fluid.")]
    assert quiz.texts == [Text("report", "A mass in the pancreas.")]
    # Slice 10 comes after 9, and the odd-sized one is left out.
    assert np.array_equal(read_scan(case, tmp_path).voxels, written["pictures"])
    assert np.array_equal(read_scan(quiz, tmp_path).voxels, written["array"][0])


def test_m3d_vqa(tmp_path):
    fake.m3d_cap(tmp_path)
    fake.m3d_vqa(tmp_path)
    items = list(LAYOUTS["m3d-vqa"].read(tmp_path))
    problems = [item for item in items if isinstance(item, Problem)]
    texts = [text for item in items if isinstance(item, Record) for text in item.texts]
    assert {item.patient for item in items if isinstance(item, Record)} == {"m3d-cap/ct_case/000006"}
    assert ["row 4" in p.reason for p in problems] == [True]
    assert Text("short", "Yes", "Is there a stone?") in texts
    choices = ("Left kidney", "Right kidney", "Bladder", "Liver")
    assert Text("multiple_choice", "Left kidney", "Where is the stone?", choices) in texts


def test_ct_rate(tmp_path):
    volumes = fake.ct_rate(tmp_path)
    records, problems = read("ct-rate", tmp_path)
    assert [(p.path, "empty" in p.reason or "in turn" in p.reason) for p in problems] == [
        ("dataset/radiology_text_reports/train_reports.csv", True),
        ("dataset/vqa/train_vqa.json", True),
    ]
    first, repaired = records["ct-rate/train_1_a_1"], records["ct-rate/valid_7_b_1"]
    # Two reconstructions are one patient; the repaired file keeps its values, whatever the metadata says.
    assert first.patient == records["ct-rate/train_1_a_2"].patient == "ct-rate/train_1"
    assert (first.split, first.slope, first.intercept) == ("train", 2.0, -1024.0)
    assert (repaired.split, repaired.slope, repaired.intercept) == ("test", 1.0, 0.0)
    for record, name, slope, intercept in ((first, "train_1_a_1", 2, -1024), (repaired, "valid_7_b_1", 1, 0)):
        scan = read_scan(record, tmp_path)
        hu = canonical(volumes[name], fake.RAS) * slope + intercept
        assert np.array_equal(scan.voxels * scan.slope + scan.intercept, hu)
    assert repaired.texts == [Text("report", "Findings: RUL nodule. No effusion. Impression: Nodule.")]
    assert first.texts == [
        Text("report", "Findings: The left lung is clear. Impression: Normal, chest."),
        Text("short", "No", "Is there an effusion?"),
        Text("long", "The left lung is clear.", "Describe the lungs."),
        Text("multiple_choice", "the right lung", "Which lung is ill?", ("the left lung", "the right lung", "both")),
    ]


def test_the_tag_as_ct_chat_spells_it(tmp_path):
    from medvl_sam2.training.datasets.ct_rate import conversation_texts

    said = [{"from": "human", "value": "<image>\nEffusion?<short_answe>"}, {"from": "gpt", "value": "No"}]
    assert list(conversation_texts(said)) == [Text("short", "No", "Effusion?")]


def test_decathlon(tmp_path):
    labels = fake.decathlon(tmp_path)
    records, problems = read("decathlon", tmp_path)
    assert [p.path for p in problems] == ["Task04_Hippocampus/dataset.json"]
    # Test images of the decathlon have no truth.
    assert set(records) == {"decathlon/Liver/liver_0", "decathlon/Liver/liver_131"}
    found = masks_of(records["decathlon/Liver/liver_131"], tmp_path)
    assert set(found) == {"liver", "liver cancer"}
    assert np.array_equal(found["liver cancer"], canonical(labels["liver_131"] == 2, fake.LAS))


def test_nnunet_form_of_the_decathlon(tmp_path):
    base = tmp_path / "Dataset009_Spleen"
    fake.save(base / "imagesTr" / "spleen_2_0000.nii.gz", fake.body())
    mask = fake.save(base / "labelsTr" / "spleen_2.nii.gz", fake.blob((24, 20, 12), (8, 8, 6)).astype(np.uint8))
    document = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "spleen": 1}, "file_ending": ".nii.gz"}
    (base / "dataset.json").write_text(json.dumps(document))
    records, problems = read("decathlon", tmp_path)
    assert not problems
    found = masks_of(records["decathlon/Spleen/spleen_2"], tmp_path)
    assert np.array_equal(found["spleen"], canonical(mask, fake.RAS))


def test_folder_of_real_scans(shared_data):
    records, problems = read("folder", shared_data)
    assert not problems
    for case in ("ts_abdomen_pelvis", "sts_008", "elastix_lung"):
        record = records[f"folder/{case}"]
        found = masks_of(record, shared_data)
        names = json.loads((shared_data / case / "labels.json").read_text())
        assert len({mask.name for mask in record.masks}) == len(set(names.values()))
        assert any(mask.any() for mask in found.values())
    scan = nib.load(shared_data / "ts_abdomen_pelvis" / "ct.nii.gz")
    label = np.asarray(nib.load(shared_data / "ts_abdomen_pelvis" / "seg.nii.gz").dataobj)
    found = masks_of(records["folder/ts_abdomen_pelvis"], shared_data)
    assert np.array_equal(found["left kidney"], canonical(label == 3, scan.affine))
    assert np.array_equal(found["right kidney"], canonical(label == 2, scan.affine))


def test_overlapping_segments_of_a_real_scan(shared_data):
    records, _ = read("folder", shared_data)
    record = records["folder/slicerio_chest"]
    # The second file's segments overlap, so each is read by its own name.
    assert len({mask.path for mask in record.masks}) == 2
    found = masks_of(record, shared_data)
    truth = next(case for case in folder_cases(shared_data / "slicerio_chest")).masks
    assert any(np.array_equal(mask, other) for mask in truth.values() for other in found.values())


@pytest.mark.parametrize(
    ("layout", "file", "text", "reason"),
    [
        ("m3d-cap", "M3D_Cap.json", "{", "not JSON"),
        ("m3d-vqa", "M3D_VQA_train.csv", "Image Path,Question\n", "column 'Answer'"),
        ("m3d-seg", "0003/0003.json", "[]", "expected a dict"),
        ("m3d-seg", "0003/0003.json", "{}", "missing 'labels'"),
        ("m3d-refseg", "M3D_RefSeg.csv", "", "column 'Image'"),
        ("ct-rate", "vqa/train_vqa.json", "{}", "expected a list"),
        ("decathlon", "Task03_Liver/dataset.json", '{"modality": {"0": "CT"}}', "missing 'labels'"),
        ("folder", "a/labels.json", "{}", "no scan"),
    ],
)
def test_a_broken_listing_is_named(tmp_path, layout, file, text, reason):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    records, problems = read(layout, tmp_path)
    assert not records
    assert len(problems) == 1
    assert re.search(re.escape(reason), problems[0].reason)
    assert problems[0].path in (file, str(Path(file).parent))
