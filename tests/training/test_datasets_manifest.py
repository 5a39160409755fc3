"""The manifest, its splits, and the command line around it."""

import dataclasses
import json
from pathlib import Path

import fake_datasets as fake
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvl_sam2.cli import main
from medvl_sam2.engine.geometry import InputError
from medvl_sam2.training.datasets.base import Mask, Record, Text
from medvl_sam2.training.datasets.index import assign_splits, index
from medvl_sam2.training.datasets.manifest import Manifest, split_path, write_manifest


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder for each publisher."""
    fake.ct_org(tmp_path / "ct-org")
    fake.totalsegmentator(tmp_path / "ts")
    for part in (fake.m3d_seg, fake.m3d_refseg, fake.m3d_cap, fake.m3d_vqa):
        part(tmp_path / "m3d")
    fake.ct_rate(tmp_path / "ct-rate")
    fake.decathlon(tmp_path / "msd")
    return tmp_path


ROOTS = ("ct-org", "ts", "m3d", "ct-rate", "msd")


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main(["data", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_everything_into_one_manifest(data, capsys):
    out = data / "all" / "manifest.jsonl"
    status, text, _ = run(capsys, "index", *(data / root for root in ROOTS), "-o", out, "--json")
    assert status == 0
    document = json.loads(text.splitlines()[-1])
    manifest = Manifest(out)
    assert document["records"] == len(manifest) == 14
    assert set(document["datasets"]) == {
        "m3d-cap", "m3d-seg", "m3d-refseg", "ct-rate", "ct-org", "totalsegmentator", "decathlon",
    }  # fmt: skip
    # The questions about a case join its report; the term dictionary loses its repetitions.
    case = manifest[manifest.row("m3d-cap/ct_case/000006/Axial_non_contrast")]
    assert [t.kind for t in case.texts] == ["report", "multiple_choice", "multiple_choice", "short"]
    assert manifest.terms == {"kidney left": ["Makes urine on the left side."]}
    assert [record.id for record in manifest] == manifest.ids
    assert len(manifest.problems) == document["unread"] == 5


def test_no_patient_is_in_two_splits(data):
    out = data / "manifest.jsonl"
    index([data / root for root in ROOTS], out, val=0.2, test=0.2)
    manifest = Manifest(out)
    assert manifest.leaks() == {}
    # M3D-Seg lists TotalSegmentator's s0011 for training, its publishers test on it; M3D-RefSeg has their s0287.
    test = {manifest.ids[row] for row in manifest.split("test")}
    assert {"m3d-seg/0011/s0011", "totalsegmentator/s0011"} <= test
    train = {manifest.ids[row] for row in manifest.split("train")}
    assert {"m3d-refseg/s0287", "totalsegmentator/s0287"} <= train
    # A leak is found, and named by `check`.
    with open(split_path(out, "train"), "a") as file:
        file.write("totalsegmentator/s0011\n")
    assert Manifest(out).leaks() == {"totalsegmentator/s0011": ["test", "train"]}


@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from([None, "train", "val", "test"])), max_size=40),
    st.integers(0, 3),
)
def test_splits_never_divide_a_patient(drawn, seed):
    records = [Record(f"r{i}", "d", f"p{p}", "x", split=split) for i, (p, split) in enumerate(drawn)]
    splits = assign_splits(records, val=0.3, test=0.3, seed=seed)
    assert sorted(sum(splits.values(), [])) == sorted(record.id for record in records)
    where = {name: split for split, names in splits.items() for name in names}
    of_patient: dict[str, set[str]] = {}
    for record in records:
        of_patient.setdefault(record.patient, set()).add(where[record.id])
        if record.split == "test":
            assert where[record.id] == "test"
    assert all(len(found) == 1 for found in of_patient.values())


def test_a_patients_lot_does_not_depend_on_the_others():
    records = [Record(f"r{i}", "d", f"p{i}", "x") for i in range(400)]
    whole = assign_splits(records, val=0.1, test=0.2)
    half = assign_splits(records[::2], val=0.1, test=0.2)
    assert all(set(half[split]) <= set(whole[split]) for split in half)
    assert 50 < len(whole["test"]) < 110


def test_a_record_comes_back_as_it_was(tmp_path):
    mask = Mask('a "quoted" name', "m.npz", channel=0)
    texts = [Text("multiple_choice", "b", "q", ("a", "b")), Text("referring", "[SEG] ä", "q", target=mask)]
    record = Record('ü"id', "d", "p\\q", "x", "npy", "val", 2.0, -1.0, False, False, [mask], ["liver"], texts)
    write_manifest(tmp_path / "m.jsonl", {"d": "/r"}, [record, Record("2", "d", "p", "y")], {}, [])
    manifest = Manifest(tmp_path / "m.jsonl")
    assert dataclasses.asdict(manifest[0]) == dataclasses.asdict(record)
    assert manifest.ids == ['ü"id', "2"] and manifest.patients == ["p\\q", "p"]


def test_two_roots_of_one_layout(data):
    fake.ct_org(data / "more", 1)
    out = data / "two.jsonl"
    index([f"ct-org={data / 'ct-org'}", f"ct-org={data / 'more'}"], out)
    manifest = Manifest(out)
    assert manifest.ids == ["ct-org/volume-20", "ct-org/volume-21", "ct-org-2/volume-20"]
    assert manifest.root(manifest[2]) == data / "more"
    assert manifest.patients[0] == manifest.patients[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-folder"], "no such folder"),
        (["no-layout=."], "layout: expected one of m3d-cap"),
        (["ct-org=m3d"], "not laid out as ct-org"),
        (["empty"], "not laid out"),
    ],
)
def test_wrong_roots(data, capsys, monkeypatch, arguments, words):
    (data / "empty").mkdir()
    monkeypatch.chdir(data)
    status, out, err = run(capsys, "index", *arguments, "-o", data / "m.jsonl")
    assert (status, out) == (2, "") and words in err
    assert not (data / "m.jsonl").exists()


@pytest.mark.parametrize("text", ["", "{}\n", '{"manifest": 9, "roots": {}}\n', '{"manifest": 1, "roots": {}}\nx\n'])
def test_not_a_manifest(tmp_path, text):
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(InputError, match="m.jsonl"):
        Manifest(tmp_path / "m.jsonl")


def test_check_names_every_broken_file_and_goes_on(data, capsys):
    out = data / "manifest.jsonl"
    index([data / root for root in ROOTS], out)
    assert len(Manifest(out).problems) == 5
    broken = {
        data / "ct-org/OrganSegmentations/volume-20.nii.gz": "missing",
        data / "ct-org/OrganSegmentations/labels-21.nii.gz": "cut",
        data / "ts/s0000/segmentations/liver.nii.gz": "shape",
        data / "ts/s0287/segmentations/kidney_left.nii.gz": "missing",
        data / "m3d/M3D_Seg/0011/s0011/mask_(4, 24, 20, 12).npz": "cut",
        data / "m3d/M3D_Cap_npy/ct_quizze/000010/Coronal_C__arterial_phase.npy": "cut",
        data / "m3d/M3D_Cap/ct_case/000006/Axial_non_contrast/3.png": "cut",
        data / "ct-rate/dataset/train/train_1/train_1_a/train_1_a_2.nii.gz": "missing",
        data / "msd/Task03_Liver/imagesTr/liver_131.nii.gz": "values",
    }
    for path, fault in broken.items():
        if fault == "missing":
            path.unlink()
        elif fault == "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif fault == "shape":
            path.write_bytes(b"not a mask")
        else:
            fake.save(path, np.full((24, 20, 12), 900, np.int16) + fake.body())
    split_path(out, "val").write_text("")
    status, text, _ = run(capsys, "check", out, "--json")
    assert status == 1
    problems = json.loads(text.splitlines()[-1])["problems"]
    named = {problem["path"] for problem in problems}
    assert {str(path) for path in broken} <= named
    # Besides: entries that index could not use, and one scan that lost its split.
    known = {problem.path for problem in Manifest(out).problems}
    others = [problem for problem in problems if problem["path"] not in {*map(str, broken), *known}]
    assert [problem["reason"] for problem in others] == ["totalsegmentator/s0000 is in 0 splits, not in one"]
    status, text, _ = run(capsys, "check", out)
    assert status == 1 and all(str(path) in text for path in broken)


def test_check_of_sound_data(data, capsys):
    out = data / "manifest.jsonl"
    index([data / "ts", data / "ct-org"], out)
    assert run(capsys, "check", out)[:2] == (0, "5 scans, 0 problems\n")


def test_stats(data, capsys):
    out = data / "manifest.jsonl"
    index([data / root for root in ROOTS], out)
    status, text, _ = run(capsys, "stats", out, "--json")
    document = json.loads(text)
    assert status == 0 and document["records"] == 14
    # train_1's reconstructions are one patient, and so are the shared cases of M3D and TotalSegmentator.
    assert document["patients"] == 11
    assert document["datasets"]["ct-rate"]["texts"] == {"long": 1, "multiple_choice": 1, "report": 3, "short": 1}
    assert document["datasets"]["decathlon"]["classes"] == {"liver": 2, "liver cancer": 2}
    assert sum(split["records"] for split in document["splits"].values()) == 14
    assert "ct-rate: 3 scans, 2 patients" in run(capsys, "stats", out)[1]
