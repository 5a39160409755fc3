"""Batches of real scans: repeatable from any step, true to the sides, and the trainer runs on them."""

import dataclasses
import json
import logging
from pathlib import Path

import fake_datasets as fake
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from medvl_sam2.cli import main
from medvl_sam2.engine.geometry import InputError
from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.training import train
from medvl_sam2.training.augment import NONE, Chances
from medvl_sam2.training.config import TrainConfig, load_config
from medvl_sam2.training.datasets import batches as module
from medvl_sam2.training.datasets import speed
from medvl_sam2.training.datasets.batches import ManifestBatches
from medvl_sam2.training.datasets.cache import FEATURES, fill_cache
from medvl_sam2.training.datasets.features import FeatureCache
from medvl_sam2.training.datasets.index import index
from medvl_sam2.training.datasets.manifest import Manifest
from medvl_sam2.training.datasets.store import ManifestStore
from medvl_sam2.training.loop import Indexed
from medvl_sam2.training.objectives import JointObjective


@pytest.fixture(scope="module")
def model(small_model) -> MedVLSAM2:
    return MedVLSAM2.from_pretrained(small_model)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Folder of a manifest: text-only, mask-only and referring scans."""
    root = tmp_path_factory.mktemp("data")
    fake.ct_rate(root / "ct-rate")
    fake.totalsegmentator(root / "ts")
    for part in (fake.m3d_refseg, fake.m3d_cap, fake.m3d_vqa):
        part(root / "m3d")
    index([root / name for name in ("ct-rate", "ts", "m3d")], root / "manifest.jsonl")
    # All scans train here.
    (root / "manifest.train.txt").write_text("\n".join(Manifest(root / "manifest.jsonl").ids) + "\n")
    for split in ("val", "test"):
        (root / f"manifest.{split}.txt").write_text("")
    return root


def settings(data: Path, *overrides: str) -> TrainConfig:
    config = load_config(
        "tiny", [f"data.source={data / 'manifest.jsonl'}", "precision=fp32", "log_every=1", *overrides]
    )
    for stage in train.STAGES:
        changed = dataclasses.replace(getattr(config, stage), steps=2, batch=2, questions=2, requests=3)
        setattr(config, stage, changed)
    return config


def make(data: Path, model: MedVLSAM2, chances: Chances | None = None, **options) -> ManifestBatches:
    store = ManifestStore(Manifest(data / "manifest.jsonl"), model.config, "train", data / "cache")
    return ManifestBatches(store, model.config, model.chat, settings(data), chances=chances, **options)


def assert_equal(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert_equal(getattr(a, field.name), getattr(b, field.name))
    else:
        assert a == b


def test_a_batch_depends_on_its_number_alone(data, model):
    first = make(data, model)
    made = {step: first.stage("stage3")(step) for step in range(7)}
    # A resumed run begins in the middle of an epoch, with nothing remembered.
    for step in (5, 2):
        assert_equal(make(data, model).stage("stage3")(step), made[step])
    loader = DataLoader(
        Indexed(make(data, model).stage("stage3"), 7),
        batch_size=None,
        sampler=range(3, 7),
        num_workers=2,
        multiprocessing_context="fork",
    )
    for (number, batch), step in zip(loader, range(3, 7), strict=True):
        assert number == step
        assert_equal(batch, made[step])


@pytest.mark.parametrize(("stage", "scans"), [("stage1", 5), ("stage2", 5), ("stage3", 9)])
def test_an_epoch_holds_every_usable_scan_once(data, model, stage, scans):
    batches = make(data, model)
    assert len(batches.usable(stage)) == scans
    phase = dataclasses.replace(settings(data).stage1, batch=scans)
    epochs = [[place for place, _ in batches._drawn(stage, phase, step)] for step in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(scans))] * 2
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    "chances", [NONE, Chances(flip=1.0), Chances(turn=1.0, flip=0.5)], ids=["none", "mirror", "all"]
)
def test_left_and_right_in_words_and_masks_agree(data, model, monkeypatch, chances):
    told = []
    pack = module.pack
    monkeypatch.setattr(module, "pack", lambda chat, turns: told.append(turns) or pack(chat, turns))
    batches = make(data, model, chances)
    checked = {"left": 0, "right": 0}
    for step in range(40):
        batch = batches.stage("stage3")(step)
        if batch.clips is not None and not batch.clips.semantic:
            # Clicks and boxes without a name: only what the first slice shows, whatever the words ask for.
            assert all((labels >= 0).all() for labels in batch.clips.point_labels)
            continue
        masks = iter(batch.clips.targets if batch.clips is not None else ())
        for question, answer in (turn for turns in told[-1] for turn in turns):
            found = [next(masks) for _ in range(answer.count("[SEG]"))]
            side = [word for word in ("left", "right") if f"{word} kidney" in f"{question} {answer}"]
            if len(found) == 1 and len(side) == 1 and found[0].any():
                columns = torch.arange(found[0].shape[-1]) + 0.5
                centre = float((found[0].sum((0, 1)) * columns).sum() / found[0].sum()) / found[0].shape[-1]
                # The patient's left is at high x in the model's order.
                assert (centre > 0.5) == (side[0] == "left"), (question, centre)
                checked[side[0]] += 1
        assert next(masks, None) is None
    assert min(checked.values()) > 5, checked


def test_mirrored_reports_are_mirrored_in_words(data, model, monkeypatch):
    told = []
    pack = module.pack
    monkeypatch.setattr(module, "pack", lambda chat, turns: told.append(turns) or pack(chat, turns))
    batches = make(data, model, Chances(flip=1.0))
    for step in range(6):
        batches.stage("stage1")(step)
    answers = {answer for turns in told for scan in turns for _, answer in scan}
    assert "Findings: The right lung is clear. Impression: Normal, chest." in answers
    # "RUL" hides a side: that scan is not mirrored.
    assert "Findings: RUL nodule. No effusion. Impression: Nodule." in answers
    assert not any("left lung is clear" in answer for answer in answers)


def test_a_broken_scan_is_replaced_in_every_run_alike(tmp_path, model, caplog):
    fake.ct_org(tmp_path / "d", 4)
    index([tmp_path / "d"], tmp_path / "manifest.jsonl")
    broken = tmp_path / "d" / "OrganSegmentations" / "volume-22.nii.gz"
    broken.write_bytes(broken.read_bytes()[:300])
    with caplog.at_level(logging.WARNING):
        runs = [[make(tmp_path, model).stage("stage3")(step) for step in range(3)] for _ in range(2)]
    assert str(broken) in caplog.text
    for one, other in zip(*runs):
        assert_equal(one, other)
        assert not any("volume-22" in name for name in one.names)


def test_a_stage_without_its_data_is_refused(tmp_path, model):
    fake.ct_org(tmp_path / "d")
    index([tmp_path / "d"], tmp_path / "manifest.jsonl")
    with pytest.raises(InputError, match="no scan with what stage1 needs"):
        make(tmp_path, model).stage("stage1")


def test_kept_features_are_the_encoders_to_the_last_bit(data, model):
    kept = FeatureCache(data / FEATURES, model)
    plain = make(data, model, NONE)
    kept.fill(model, plain.store, plain.usable("stage1"))
    batches = make(data, model, features=kept)
    for step in range(3):
        batch, expected = batches.stage("stage1")(step), plain.stage("stage1")(step)
        assert torch.equal(batch.grid, expected.grid) and batch.names == expected.names
        with torch.no_grad():
            for features, grid in zip(batch.features, expected.grid):
                assert torch.equal(features, model.vision(grid[None])[0])
            objective = JointObjective(model, settings(data).loss)
            objective.eval()
            one, other = objective(batch)["loss"], objective(expected)["loss"]
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    # The views of later stages change the scans, so nothing is kept for them; other weights have a place of their own.
    assert batches.stage("stage2")(0).features is None
    with torch.no_grad():
        other = MedVLSAM2(model.config, model.tokenizer)
    assert FeatureCache(data / FEATURES, other).folder != kept.folder
    with pytest.raises(InputError, match="no features of x"):
        kept.load("x")


def test_features_are_kept_ahead_of_training(data, small_model, model, tmp_path):
    document = fill_cache(
        data / "manifest.jsonl", tmp_path, model=small_model, splits=("train",), features=True, device="cpu"
    )
    assert document["problems"] == [] and document["scans"] == 9
    kept = FeatureCache(tmp_path / FEATURES, model)
    store = ManifestStore(Manifest(data / "manifest.jsonl"), model.config, "train", tmp_path)
    sample = store[3]
    values = (torch.from_numpy(sample.grid.astype(np.float32)) - model.config.volume.window[0]) / (
        model.config.volume.window[1] - model.config.volume.window[0]
    )
    with torch.no_grad():
        assert torch.equal(kept.load(sample.record.id), model.vision(values.clamp(0, 1)[None, None])[0])


def test_loading_rates_count_the_scans_after_the_first_batch(data, model, monkeypatch):
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr(speed, "perf_counter", lambda: next(clock))
    # Five scans are three batches of two; the last two take the clock's two seconds.
    rates = speed.loading_rates(make(data, model), "stage1", workers=(0, 1), scans=5)
    assert rates == [{"workers": 0, "scans_per_second": 2.0}, {"workers": 1, "scans_per_second": 2.0}]
    assert speed.rate(str, range(6)) == 3.0


def test_loading_is_measured_from_the_command_line(data, small_model, tmp_path, capsys):
    small = [f"preset={small_model}", "device=cpu", "precision=fp32", "stage1.batch=2", "data.features=true"]
    options = [part for setting in small for part in ("--set", setting)]
    command = ["data", "speed", data / "manifest.jsonl", "--out", tmp_path, "--stage", "stage1", "--scans", 3]
    assert main([*map(str, command), "--workers", "0", *options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    keys = ("from_files", "features_computed", "features_kept")
    assert all(document[key] > 0 for key in keys)
    assert [rate["workers"] for rate in document["prepared"]] == [0]
    assert len(list((tmp_path / FEATURES).rglob("*.safetensors"))) == 3


def test_the_three_stages_train_on_real_scans(data, small_model, tmp_path):
    config = settings(data, f"preset={small_model}", "data.features=true", "data.workers=2", "device=cpu")
    directory = train.run(config, tmp_path / "run")
    trained, begun = MedVLSAM2.from_pretrained(directory), MedVLSAM2.from_pretrained(small_model)
    moved = {n for (n, a), b in zip(trained.named_parameters(), begun.parameters()) if not torch.equal(a, b)}
    for part in ("projector.", "vision.", "lora_", "seg_bridge.", "sam_mask_decoder."):
        assert any(part in name for name in moved), part
    assert not any(part in name for name in moved for part in ("memory_attention", "image_encoder"))
    for stage in train.STAGES:
        assert (tmp_path / "run" / "logs" / f"{stage}.csv").read_text().count("\n") == 3
