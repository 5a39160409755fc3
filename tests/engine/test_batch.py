"""Bulk runs: one line per scan, resumable, and not stopped by a bad scan."""

import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest

from medvl_sam2.engine import batch
from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.geometry import InputError
from medvl_sam2.engine.masks import read_mask
from medvl_sam2.engine.segmentation import label_map
from medvl_sam2.engine.volumes import read_volume


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "scans"
    (place / "study").mkdir(parents=True)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (16, 18, 10)), indexing="ij"))
    for seed, name in enumerate(("a.nii.gz", "study/b.nii.gz", "study/c.nii")):
        rng = np.random.default_rng(seed)
        voxels = np.where((grid**2).sum(0) < 0.4 + 0.2 * seed, 60, -1000) + rng.normal(0, 15, grid.shape[1:])
        nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.diag([2, 2, 3, 1])), place / name)
    (place / "bad.nii.gz").write_bytes((place / "a.nii.gz").read_bytes()[:500])
    (place / "notes.txt").write_text("not a scan")
    return place


@pytest.fixture
def job(small_model):
    return batch.Job(model=str(small_model), device="cpu", targets=("liver", "spleen"), questions=("What is seen?",))


def lines(out) -> dict[str, dict]:
    documents = [json.loads(line) for line in (out / batch.RESULTS).read_text().splitlines()]
    assert len({document["scan"] for document in documents}) == len(documents)
    return {document["scan"]: document for document in documents}


def without_times(documents: dict[str, dict]) -> dict[str, dict]:
    return {scan: {**document, "seconds": None} for scan, document in documents.items()}


def test_scans_are_found(folder, shared_data, tmp_path):
    assert batch.find_scans(folder) == ["a.nii.gz", "bad.nii.gz", "study/b.nii.gz", "study/c.nii"]
    series = next(path for path in sorted(shared_data.rglob("*.dcm"))).parent
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "series").symlink_to(series)
    os.mkdir(tmp_path / "study" / "copy")
    for path in sorted(series.glob("*.dcm"))[:3]:
        (tmp_path / "study" / "copy" / path.stem).write_bytes(path.read_bytes())
    assert batch.find_scans(tmp_path / "study") == ["copy"]


def test_results_among_the_scans_are_no_scans(folder, small_model):
    job, out = batch.Job(model=str(small_model), device="cpu", report=True), folder / "study" / "out"
    scans = ["a.nii.gz", "bad.nii.gz", "study/b.nii.gz", "study/c.nii"]
    for place in (out, folder / "older"):
        place.mkdir()
        shutil.copy(folder / "a.nii.gz", place / "a.nii.gz.masks.nii.gz")
    shutil.copy(folder / "a.nii.gz", out / "b.nii.gz")
    for skipped in (0, 3):
        summary = batch.run(folder, out, job)
        assert (summary["scans"], summary["skipped"]) == (4, skipped)
    assert sorted(lines(out)) == scans
    assert batch.find_scans(folder, folder) == sorted([*scans, "study/out/b.nii.gz"])


def test_dicom_is_found_as_the_reader_finds_it(shared_data, tmp_path):
    """Behind other files, and without the mark that some writers leave out; a segmentation in DICOM is no scan."""
    image = shared_data / "odd_headers" / "oblique_dicom" / "2.dcm"
    bare, none = tmp_path / "in" / "bare", tmp_path / "in" / "none"
    for place in (bare, none):
        place.mkdir(parents=True)
        for number in range(12):
            (place / f"a{number:02}.txt").write_text("no image")
        (place / "a gone.dcm").symlink_to(tmp_path / "gone")
    (bare / "slice.dcm").write_bytes(image.read_bytes()[132:])
    assert read_volume(bare).source.format == "dicom"
    shutil.copy(shared_data / "dcmqi_ct3slice" / "dicom_seg" / "liver.dcm", none)
    assert batch.find_scans(tmp_path / "in") == ["bare"]


def test_lines_and_masks_are_the_engines(folder, job, tmp_path):
    out = tmp_path / "out"
    summary = batch.run(folder, out, job)
    assert (summary["scans"], summary["done"], summary["skipped"], summary["failed"]) == (4, 3, 0, 1)
    (problem,) = summary["problems"]
    assert problem["path"] == "bad.nii.gz" and problem["reason"].startswith("not a readable NIfTI file")
    documents = lines(out)
    assert not documents["bad.nii.gz"]["ok"] and "bad.nii.gz" in documents["bad.nii.gz"]["error"]
    engine = MedVLEngine.from_pretrained(job.model, device="cpu")
    for scan in ("a.nii.gz", "study/b.nii.gz", "study/c.nii"):
        session = engine.open(folder / scan)
        assert documents[scan]["answers"] == [session.ask("What is seen?").text]
        found = session.segment_all(["liver", "spleen"])
        assert [one["answer"] for one in documents[scan]["objects"]] == [one.text for one in found]
        if documents[scan]["mask"]:
            mask, _ = read_mask(out / documents[scan]["mask"], session.volume)
            np.testing.assert_array_equal(mask, label_map(found))
            assert mask.any()


def test_a_stopped_run_goes_on(folder, job, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    batch.run(folder, whole, job)
    seen = []
    process = batch.Worker._process

    def stopped(self, scan):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(scan)
        return process(self, scan)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(batch.Worker, "_process", stopped)
        batch.run(folder, out, job)
    # As a process that was killed while it wrote would leave it.
    with (out / batch.RESULTS).open("a") as stream:
        stream.write('{"scan": "study/b.nii.gz", "o')
    summary = batch.run(folder, out, job)
    assert (summary["skipped"], summary["done"], summary["failed"]) == (1, 2, 1)
    assert without_times(lines(out)) == without_times(lines(whole))
    again = batch.run(folder, out, job)
    assert (again["skipped"], again["done"], again["failed"]) == (3, 0, 1)


def test_jobs_that_make_no_sense(folder, job, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no scans"):
        batch.run(tmp_path / "empty", tmp_path / "out", job)
    with pytest.raises(InputError, match="nothing to do"):
        batch.run(folder, tmp_path / "out", batch.Job(model="tiny"))
    batch._check_job(batch.make_folder(tmp_path / "out"), job)
    with pytest.raises(InputError, match="another job"):
        batch.run(folder, tmp_path / "out", batch.Job(model=job.model, report=True))
