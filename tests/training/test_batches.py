"""Batches of the phases, against the stored phantoms that they come from."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from medvl_sam2.model.presets import preset
from medvl_sam2.model.vision import VisionEncoder
from medvl_sam2.training.batches import CLASSES, Batches
from medvl_sam2.training.clips import PromptKind, make_clip, spatial_prompt
from medvl_sam2.training.config import LossConfig, TrainConfig, load_config
from medvl_sam2.training.corpus import synthetic_facts
from medvl_sam2.training.facts import fact_places, fact_rows, fact_vector
from medvl_sam2.training.phantom import FINDINGS, STRUCTURES
from medvl_sam2.training.segmentation import _score
from medvl_sam2.training.store import PhantomStore


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    config = load_config("tiny", ["data.phantoms=3", "data.rich=1.0", "data.workers=1", "data.runs=1"])
    return replace(config, vision=replace(config.vision, steps=10, batch=2, crops=8))


@pytest.fixture(scope="module")
def batches(config, tmp_path_factory) -> Batches:
    settings = preset("tiny")
    store = PhantomStore(tmp_path_factory.mktemp("phantoms"), settings, config.data)
    store.prepare()
    return Batches(store, settings, None, config)


def test_a_crop_tells_what_its_place_in_the_grid_holds(batches):
    batch = batches.vision(0)
    volume = batches.model.volume
    (p, q, r), counts = volume.patch, np.array(volume.size) // np.array(volume.patch)
    rows = np.random.default_rng(0).choice(batch.tokens.shape[1], 20, replace=False)
    for name, tokens, patches in zip(batch.names, batch.tokens, batch.patches):
        sample = batches.store[int(name.split()[-1])]
        for row in rows:
            z, y, x = np.unravel_index(int(tokens[row]), counts) * np.array(volume.patch)
            # The last eighth of a patch is its far corner.
            part = np.s_[z + p // 2 : z + p, y + q // 2 : y + q, x + r // 2 : x + r]
            far = patches[row].view(8, len(CLASSES))[7]
            for i, (kind, what, _) in enumerate(CLASSES):
                if kind == "structure":
                    share = np.mean(sample.grid_structures[part] == STRUCTURES[what])
                else:
                    share = min(np.sum(sample.grid_findings[part] == FINDINGS[what]) / 6, 1)
                assert float(far[i]) == pytest.approx(share, abs=1e-6)


def test_most_crops_hold_a_finding(batches):
    held = [
        batches.vision(step).patches.view(8, -1, 8, len(CLASSES))[..., len(STRUCTURES) :].amax((1, 2, 3)) > 0
        for step in range(4)
    ]
    assert torch.stack(held).float().mean() > 0.6


def test_crops_come_first_and_whole_grids_after(batches):
    assert batches.vision(7).tokens is not None
    whole = batches.vision(8)
    assert whole.tokens is None
    assert whole.facts is not None
    assert whole.grid.shape == (2, 1, *batches.model.volume.size)


def test_the_encoder_places_the_patches_of_a_part_where_they_are_told_to_be():
    settings = preset("tiny")
    encoder = VisionEncoder(settings.volume, settings.vision).eval()
    counts = np.array(settings.volume.size) // np.array(settings.volume.patch)
    grid = torch.rand(1, 1, *settings.volume.size)
    every = torch.arange(settings.volume.tokens)[None]
    with torch.no_grad():
        torch.testing.assert_close(encoder(grid, every), encoder(grid))
        # One block of patches, embedded with the positions that it has in the whole.
        half = counts // 2
        tokens = np.ravel_multi_index(np.indices(half).reshape(3, -1) + half[:, None], tuple(counts))
        part = grid[(..., *(slice(-s // 2, None) for s in settings.volume.size))]
        embedded = encoder.patch_embedding(part, torch.from_numpy(tokens)[None])
        torch.testing.assert_close(embedded, encoder.patch_embedding(grid)[:, tokens])


def test_each_fact_is_told_by_two_tokens_of_its_own():
    facts, tokens = synthetic_facts(np.random.default_rng(3)), 200
    places = fact_places(tokens)
    assert (places.sum(0) == 2).all() and places.sum(1).max() <= 3
    rows = fact_rows(facts, tokens, np.random.default_rng(4))
    told = np.array([rows[places[:, fact] > 0, fact].mean() for fact in range(rows.shape[1])])
    holds = fact_vector(facts) > 0
    assert told[holds].min() > 0.4 > 0.35 > told[~holds].max()
    assert abs(rows[places == 0]).max() < 0.15, "a murmur elsewhere"


def test_a_purely_spatial_clip_holds_only_what_its_first_slice_shows(batches):
    model = batches.model
    side = model.sam2.image_size
    first, later = np.zeros((2, 2, side, side), bool)
    first[:, 8:40, 8:40] = True
    later[1, 60:90, 60:90] = True
    rng = np.random.default_rng(0)
    for kind, expected in ((PromptKind(False, 1), 1), (PromptKind(True, 1), 2)):
        prompts = [spatial_prompt(mask[0], 1, rng) for mask in (later, first)]
        clip = make_clip(torch.zeros(2, side, side), [later, first], prompts, kind, batches.processor, model)
        assert len(clip.owner) == len(clip.targets) == len(clip.points) == expected
        # The one that can be marked is there, with its click inside.
        x, y = clip.points[-1, 0].tolist()
        assert 8 < x < 40 and 8 < y < 40
        assert clip.targets[-1, 0].sum() == pytest.approx((32 * model.sam2.mask_size / side) ** 2)


def test_a_batch_without_an_object_to_mark_has_a_loss_of_zero(batches):
    settings = batches.model.sam2
    logits, scores = torch.zeros(0, 2, settings.mask_size, settings.mask_size), torch.zeros(0, 2)
    terms = _score(logits, scores, scores, logits, LossConfig())
    assert all(float(value) == 0 for value in terms.values())
