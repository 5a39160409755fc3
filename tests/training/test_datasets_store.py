"""Real scans on the model's grids: equal to what the engine and M3D make of them, kept on disk, asked about truly."""

from dataclasses import replace
from pathlib import Path

import fake_datasets as fake
import monai.transforms as mt
import nibabel as nib
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from medvl_sam2.engine.geometry import InputError
from medvl_sam2.engine.volumes import read_volume
from medvl_sam2.model.config import MedVLConfig
from medvl_sam2.model.processing import ScanArray, VolumeProcessor
from medvl_sam2.model.prompts import SEG
from medvl_sam2.training.augment import swap_sides
from medvl_sam2.training.datasets.base import Record, Text
from medvl_sam2.training.datasets.index import index
from medvl_sam2.training.datasets.manifest import Manifest
from medvl_sam2.training.datasets.prepare import Prepared, prepare
from medvl_sam2.training.datasets.store import ManifestStore
from medvl_sam2.training.datasets.turns import requests, text_turn


@pytest.fixture(scope="module")
def config(small_model) -> MedVLConfig:
    return MedVLConfig.load(small_model)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    root = tmp_path_factory.mktemp("data")
    fake.ct_org(root / "ct-org")
    fake.totalsegmentator(root / "ts")
    for part in (fake.m3d_seg, fake.m3d_refseg, fake.m3d_cap, fake.m3d_vqa):
        part(root / "m3d")
    fake.ct_rate(root / "ct-rate")
    index([root / name for name in ("ct-org", "ts", "m3d", "ct-rate")], root / "manifest.jsonl")
    return Manifest(root / "manifest.jsonl")


def get(manifest: Manifest, name: str) -> tuple[Record, Path]:
    record = manifest[manifest.row(name)]
    return record, manifest.root(record)


def mask(prepared: Prepared, name: str) -> np.ndarray:
    layer, value = prepared.names[name]
    return prepared.layers[layer] == value


def test_grids_are_the_engines(manifest, config):
    record, root = get(manifest, "totalsegmentator/s0287")
    prepared = prepare(record, root, config)
    volume = read_volume(root / record.image)
    scan = ScanArray(volume.voxels, volume.slope, volume.intercept)
    processor = VolumeProcessor(config)
    transform = processor.transform(scan)
    low, high = config.volume.window
    grid = processor.encoder_grid(scan, transform)[0].numpy() * (high - low) + low
    assert np.abs(prepared.grid - grid).max() <= 0.51
    images = processor.slice_images(scan, transform)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (config.volume.slice_mean, config.volume.slice_std))
    hu = torch.from_numpy(prepared.stack.astype(np.float32))
    windows = config.volume.slice_windows
    shown = torch.stack([((hu - a) / (b - a)).clamp(0, 1) for a, b in windows], 1)
    # Half a unit of rounding; one window at a time is clipped after the slices are blended, not before.
    assert (shown - (images * std + mean)).abs().median() < 1e-3
    z0, y0, x0, z1, y1, x1 = transform.box
    for file, name in (("kidney_left", "left kidney"), ("liver", "liver")):
        source = nib.as_closest_canonical(nib.load(root / "s0287" / "segmentations" / f"{file}.nii.gz"))
        native = np.ascontiguousarray(np.asarray(source.dataobj)[::-1, ::-1].transpose(2, 1, 0)[z0:z1, y0:y1, x0:x1])
        size = prepared.stack.shape
        expected = F.interpolate(torch.from_numpy(native)[None, None].float(), size, mode="nearest-exact")[0, 0] > 0
        # Liver and kidney overlap, so the two lie in layers of their own.
        assert np.array_equal(mask(prepared, name), expected.numpy())
        assert np.array_equal(prepared.counts[name], expected.sum((1, 2)).numpy())
    assert len(prepared.layers) == 2


def test_relative_values_are_prepared_as_m3d_does(manifest, config):
    record, root = get(manifest, "m3d-seg/0011/s0011")
    prepared = prepare(replace(record, placed=True), root, config)
    image = np.swapaxes(np.load(root / record.image), -1, -3)
    image = image - image.min()
    image = image / image.max()
    cropped = mt.CropForeground(allow_smaller=True)(image)
    expected = mt.Resize(config.volume.size, mode="trilinear")(cropped)[0].numpy()
    low, high = config.volume.window
    assert np.abs((prepared.grid - low) / (high - low) - expected).max() < 1e-3


def test_a_set_without_orientation_is_turned_by_its_labels(tmp_path, config):
    found = []
    for sign in (1, -1):
        fake.m3d_seg(tmp_path / str(sign), affine_sign=sign)
        index([tmp_path / str(sign)], tmp_path / f"{sign}.jsonl")
        record, root = get(Manifest(tmp_path / f"{sign}.jsonl"), "m3d-seg/0011/s0011")
        found.append(prepare(record, root, config))
    assert np.array_equal(found[0].grid, found[1].grid)
    assert np.array_equal(found[0].stack, found[1].stack)
    for prepared in found:
        left, right = (np.nonzero(mask(prepared, f"{side} kidney"))[2].mean() for side in ("left", "right"))
        assert left > right
        assert prepared.empty == ["spleen"]


def test_prepared_scans_come_back_from_disk(manifest, config, tmp_path):
    store = ManifestStore(manifest, config, "train", tmp_path / "cache")
    assert list(store.fill()) == []
    again = ManifestStore(manifest, config, "train", tmp_path / "cache")
    fresh = ManifestStore(manifest, config, "train")
    for position in range(len(store)):
        assert again.path(again.record(position)).is_file()
        kept, made = again[position], fresh[position]
        assert np.array_equal(kept.grid, made.grid) and kept.names == made.names and kept.empty == made.empty
        for name in made.names:
            assert np.array_equal(kept.counts[name], made.counts[name])
        for ours, theirs in zip(kept.slices(2, 5), made.slices(2, 5)):
            assert np.array_equal(ours, theirs)
            assert ours.shape[-3:] == (3, *made.slices(0, 1)[0].shape[1:])
    # A damaged file is made again; a cache of another model is refused.
    path = again.path(again.record(0))
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert np.array_equal(again[0].grid, fresh[0].grid)
    assert path.read_bytes() == whole
    with pytest.raises(InputError, match=r"volume.slices \d+, not 5; give another folder"):
        ManifestStore(manifest, replace(config, volume=replace(config.volume, slices=5)), "train", tmp_path / "cache")


def test_a_broken_scan_is_named_and_the_rest_prepared(config, tmp_path):
    fake.ct_org(tmp_path / "d", 3)
    index([tmp_path / "d"], tmp_path / "m.jsonl")
    broken = tmp_path / "d" / "OrganSegmentations" / "volume-22.nii.gz"
    broken.write_bytes(broken.read_bytes()[:200])
    store = ManifestStore(Manifest(tmp_path / "m.jsonl"), config, "train", tmp_path / "cache")
    (problem,) = store.fill()
    assert problem.path == str(broken) and "ct-org/volume-22" in problem.reason
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == len(store) - 1


def test_real_scans_are_prepared(shared_data, config, tmp_path):
    index([f"folder={shared_data}"], tmp_path / "m.jsonl")
    manifest = Manifest(tmp_path / "m.jsonl")
    record, root = get(manifest, "folder/ts_abdomen_pelvis")
    prepared = prepare(record, root, config)
    left, right = (np.nonzero(mask(prepared, f"{side} kidney"))[2].mean() for side in ("left", "right"))
    # Canonical: the patient's left at high x, the liver to the right of the spleen.
    assert left > right
    assert np.nonzero(mask(prepared, "spleen"))[2].mean() > np.nonzero(mask(prepared, "liver"))[2].mean()
    assert prepared.layers.shape[0] == 1


QUESTION = Text("multiple_choice", "left lung", "Which side is ill?", ("right lung", "left lung", "both"))


def test_texts_in_all_wordings():
    rng = np.random.default_rng(0)
    turns = {text_turn(QUESTION, rng) for _ in range(200)}
    lettered = {turn for turn in turns if turn[1] == "B. left lung"}
    open_ended = {turn for turn in turns if turn[1] == "left lung"}
    assert lettered | open_ended == turns and len(lettered) > 2 and len(open_ended) > 2
    assert all("A. right lung B. left lung C. both" in question for question, _ in lettered)
    assert all("A. " not in question for question, _ in open_ended)
    question, answer = text_turn(replace(QUESTION, kind="long"), rng, swap_sides)
    assert answer == "right lung" and "Which side is ill?" in question
    mirrored = {text_turn(QUESTION, rng, swap_sides) for _ in range(100)}
    assert {answer for _, answer in mirrored} == {"B. right lung", "right lung"}
    # Words of the templates themselves ("Choose the right answer.") are no sides.
    assert not any("left answer" in question or "is left." in question for question, _ in mirrored)
    assert any("right answer" in question for question, _ in mirrored)
    assert text_turn(Text("report", "The left lung is clear."), rng, swap_sides)[1] == "The right lung is clear."


def test_requests_ask_for_what_is_there_and_deny_what_is_not(manifest, config):
    store = ManifestStore(manifest, config, "test")
    sample = next(store[i] for i in range(len(store)) if store.record(i).id == "m3d-seg/0011/s0011")
    rng = np.random.default_rng(0)
    made = requests(sample, 400, rng, str)
    kinds = {kind: [r for r in made if r.kind == kind] for kind in ("name", "description", "several", "absent")}
    assert all(kinds.values()) and sum(map(len, kinds.values())) == len(made)
    for request in made:
        assert request.answer.count(SEG) == len(request.targets)
        assert all(name in sample.names for _, name, _ in request.targets)
    assert {r.subject for r in kinds["absent"]} == {"spleen"}
    assert all(r.answer.startswith("There is no") and not r.targets for r in kinds["absent"])
    assert {len(r.targets) for r in kinds["several"]} == {2, 3}
    # M3D's dictionary, under M3D's order of words, describes our "left kidney".
    assert any("Makes urine on the left side" in r.text and r.subject == "left kidney" for r in kinds["description"])
    marked = requests(sample, 100, rng, str, marked=True)
    assert {r.kind for r in marked} == {"interactive"}
    assert 15 < sum("kidney" not in r.text and "liver" not in r.text for r in marked) < 45


def test_referring_requests_keep_the_publishers_words(manifest, config):
    store = ManifestStore(manifest, config, "train")
    sample = next(store[i] for i in range(len(store)) if store.record(i).id == "m3d-refseg/s0287")
    made = requests(sample, 30, np.random.default_rng(0), swap_sides)
    assert {(r.text, r.answer) for r in made} == {
        ("Please segment the cyst in the right kidney.", "Sure, it is [SEG]."),
        ("What causes colic?", "The stone: [SEG]."),
    }
