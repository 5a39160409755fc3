"""How fast scans reach the trainer, and what keeping them prepared saves: `medvl-sam2 data speed`."""

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import DataLoader

from medvl_sam2.engine.geometry import InputError
from medvl_sam2.engine.precision import choose_device
from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.training import precision
from medvl_sam2.training.config import TrainConfig
from medvl_sam2.training.datasets.batches import ManifestBatches
from medvl_sam2.training.datasets.cache import FEATURES
from medvl_sam2.training.datasets.features import FeatureCache, encode
from medvl_sam2.training.datasets.manifest import Manifest
from medvl_sam2.training.datasets.prepare import prepare
from medvl_sam2.training.datasets.store import ManifestStore
from medvl_sam2.training.loop import Indexed

# Preparing a clinical scan takes seconds, so a few are enough.
_PREPARED = 8


def measure(
    config: TrainConfig,
    cache: str | Path,
    *,
    stage: str = "stage3",
    workers: Sequence[int] = (0, 1, 2),
    scans: int = 64,
) -> dict[str, Any]:
    """Measure loading as a training run does it, on prepared scans; those that are not prepared yet are first.

    Args:
        config: Of the run: `preset` names the model, `data.source` the manifest; with `data.features`, features are
            measured too.
        cache: Folder of the prepared scans.
        stage: Whose batches to make.
        workers: Numbers of worker processes; 0 loads in this one.
        scans: How many to load for each number.

    Returns:
        In scans per second: "from_files" (prepared from their files, in one process), "prepared" (a list of "workers"
        and "scans_per_second"), and with features "features_computed" and "features_kept".

    Raises:
        InputError: No manifest or model, or nothing in it for the stage.
    """
    try:
        model = MedVLSAM2.from_pretrained(config.preset, torch.float32)
    except ValueError as error:
        raise InputError(f"preset: {error}") from error
    manifest = Manifest(config.data.source)
    store = ManifestStore(manifest, model.config, config.data.split, cache)
    batches = ManifestBatches(store, model.config, model.chat, config)
    rows = [int(row) for row in batches.usable(stage)[:scans]]
    records = [store.record(row) for row in rows[:_PREPARED]]
    rates: dict[str, Any] = {
        "stage": stage,
        "from_files": rate(lambda record: prepare(record, manifest.root(record), model.config), records),
        "prepared": loading_rates(batches, stage, workers, scans),
    }
    if config.data.features:
        kept = FeatureCache(Path(cache) / FEATURES, model, config.precision)
        device = choose_device(config.device)
        kept.fill(model, store, rows, device)
        encoder = copy.deepcopy(model.vision).to(device).eval()
        precision.lower(encoder, config.precision)
        window = model.config.volume.window
        # Brought back to the host, so that the device's work is waited for.
        rates["features_computed"] = rate(
            lambda row: encode(encoder, store[row].grid, window, config.precision).cpu(), rows
        )
        rates["features_kept"] = rate(lambda row: kept.load(store.record(row).id), rows)
    return rates


def loading_rates(
    batches: ManifestBatches, stage: str, workers: Sequence[int], scans: int
) -> list[dict[str, float | int]]:
    """Scans per second that reach a loop which does nothing with them, after the first batch.

    Args:
        batches: Of a run.
        stage: Whose.
        workers: Numbers of worker processes.
        scans: How many to load for each; at least two batches.
    """
    size = getattr(batches.config, stage).batch
    steps = max(2, -(-scans // size))
    make = batches.stage(stage)
    for step in range(steps):
        # Prepares what is not kept yet and warms the file cache, for all numbers of workers alike.
        make(step)
    rates = []
    for count in workers:
        ahead = {"prefetch_factor": 4, "multiprocessing_context": "fork"} if count else {}
        loader = iter(DataLoader(Indexed(make, steps), batch_size=None, num_workers=count, **ahead))
        next(loader)
        seconds = _seconds(loader)
        rates.append({"workers": count, "scans_per_second": (steps - 1) * size / seconds})
    return rates


def rate(work: Callable[[Any], object], items: Sequence[Any]) -> float:
    """Items per second."""
    return len(items) / _seconds(map(work, items))


def _seconds(things: Iterable[Any]) -> float:
    """How long it takes to go through them."""
    began = perf_counter()
    for _ in things:
        pass
    return perf_counter() - began
