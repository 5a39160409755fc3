"""Phantoms drawn for training, and the folder that keeps them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from medvl_sam2.engine.geometry import InputError
from medvl_sam2.model.presets import preset
from medvl_sam2.training import store as module
from medvl_sam2.training.config import DataConfig
from medvl_sam2.training.phantom import make_phantom
from medvl_sam2.training.prepared import SETTINGS, spread
from medvl_sam2.training.store import PhantomStore, draw_phantom


def test_rich_phantoms_show_more_findings_and_the_rest_are_as_drawn():
    usual, rich = (
        np.mean([len(draw_phantom(seed, share).facts["findings"]) for seed in range(12)]) for share in (0.0, 1.0)
    )
    assert rich > usual + 0.8
    assert all(draw_phantom(seed, 0.0).facts == make_phantom(seed).facts for seed in range(2))


def test_the_share_of_rich_phantoms_is_the_one_asked_for():
    changed = [draw_phantom(seed, 0.5).facts != make_phantom(seed).facts for seed in range(24)]
    assert 5 <= sum(changed) <= 19


def test_evaluation_seeds_are_refused():
    with pytest.raises(ValueError, match="evaluation"):
        draw_phantom(1_000_000, 0.5)


DATA = DataConfig(phantoms=1, runs=1, run_length=2, workers=1)


@pytest.fixture
def rendered(monkeypatch) -> list[int]:
    """Seeds in the order of their rendering, which costs nothing here."""
    seeds = []

    def render(phantom, record, model, data):
        seeds.append(phantom.facts["seed"])
        record["midline"] = phantom.facts["seed"]

    monkeypatch.setattr(module, "draw_phantom", lambda seed, rich: SimpleNamespace(facts={"seed": seed, "rich": rich}))
    monkeypatch.setattr(module, "_render", render)
    return seeds


def prepared(folder, **changed) -> PhantomStore:
    store = PhantomStore(folder, preset("tiny"), replace(DATA, **changed))
    store.prepare()
    return store


def test_a_folder_grows_and_what_it_holds_is_taken(rendered, tmp_path):
    first = prepared(tmp_path)[0]
    prepared(tmp_path)
    assert rendered == [0]
    for count in (3, 52, 2):
        grown = prepared(tmp_path, phantoms=count)
        for i in (0, 1, count - 1):
            assert grown[i].facts["seed"] == grown[i].midline == i
    assert rendered == [0, *range(3), *range(50), 50, 51]
    # What was mapped before its shard grew stays readable.
    assert first.midline == 0 and first.slices.shape == (1, 2, 256, 256)


def test_growing_may_be_broken_off(rendered, tmp_path, monkeypatch):
    prepared(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_text", lambda path, text: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(tmp_path, phantoms=3)
    assert [prepared(tmp_path, phantoms=3)[i].facts["seed"] for i in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(("name", "value"), [("rich", 1.0), ("run_length", 1), ("runs", 2)])
def test_phantoms_of_other_settings_are_refused(name, value, rendered, tmp_path):
    prepared(tmp_path)
    for _ in range(2):
        with pytest.raises(InputError, match=f"{name} {getattr(DATA, name)}, not {value}; give another folder"):
            prepared(tmp_path, **{name: value})


def test_a_folder_from_before_settings_is_taken_where_its_sizes_fit(rendered, tmp_path):
    prepared(tmp_path)
    # A shard that was broken off.
    (tmp_path / "50.bin").write_bytes(b"0")
    (tmp_path / SETTINGS).unlink()
    for changed in ({"run_length": 1}, {"runs": 2}):
        with pytest.raises(InputError, match="rendered with other settings; give another folder"):
            prepared(tmp_path, **changed)
    assert prepared(tmp_path, phantoms=51)[50].facts["seed"] == 50
    with pytest.raises(InputError, match=r"rich 0.0, not 1.0"):
        prepared(tmp_path, rich=1.0)


def test_workers_keep_to_a_thread_each(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert list(spread(eval, ["__import__('torch').get_num_threads()"] * 2, 2)) == [1, 1]


def test_a_shard_holds_what_both_of_its_files_have(rendered, tmp_path):
    """As a shorter run leaves it whose records take the place of a longer one's."""
    store = prepared(tmp_path, phantoms=3)
    data = store._data_path(0)
    data.write_bytes(data.read_bytes()[: store.record.itemsize])
    rendered.clear()
    again = prepared(tmp_path, phantoms=3)
    assert len(rendered) == 3 and int(again[2].facts["seed"]) == DATA.first_seed + 2
    assert data.stat().st_size == 3 * store.record.itemsize


def test_a_complete_folder_need_not_be_writable(rendered, tmp_path, monkeypatch):
    prepared(tmp_path)
    monkeypatch.setattr(module, "make_folder", lambda path: pytest.fail("asked whether it can be written"))
    prepared(tmp_path)


def test_a_damaged_note_of_settings_is_told(rendered, tmp_path):
    prepared(tmp_path)
    (tmp_path / SETTINGS).write_text("")
    with pytest.raises(InputError, match=r"settings\.json: damaged .*; remove the folder"):
        prepared(tmp_path)
