"""Prepare the scans of a manifest ahead of training: `medvl-sam2 data cache`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medvl_sam2.engine.geometry import InputError
from medvl_sam2.engine.precision import choose_device
from medvl_sam2.model.config import MedVLConfig
from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.model.presets import PRESETS, preset
from medvl_sam2.training.datasets.features import FeatureCache
from medvl_sam2.training.datasets.manifest import Manifest
from medvl_sam2.training.datasets.store import ManifestStore
from medvl_sam2.training.precision import check

FEATURES = "features"
"""Folder of the features within a cache."""


def fill_cache(
    manifest: str | Path,
    out: str | Path,
    *,
    model: str | Path = "tiny",
    splits: Sequence[str] = ("train", "val", "test"),
    processes: int = 1,
    features: bool = False,
    precision: str = "fp32",
    device: str = "auto",
) -> dict[str, Any]:
    """Prepare what is not prepared yet; a broken scan is named and the next is prepared.

    Args:
        manifest: Of the data.
        out: Folder of the cache, `data.cache` in training.
        model: Preset or model directory; only features need its weights.
        splits: Which.
        processes: Scans at a time.
        features: Also keep the features of the model's image encoder.
        precision: Of the run that will train on the features.
        device: Where to compute them: the kind to train on.

    Returns:
        "scans" that are prepared, and "problems" with a path and a reason each.

    Raises:
        InputError: No manifest, model or precision of this name, or a cache made for another model.
    """
    data = Manifest(manifest)
    try:
        check(precision)
        network = MedVLSAM2.from_pretrained(model) if features else None
        config = network.config if network is not None else model_config(model)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    problems, scans = [], 0
    for split in splits:
        store = ManifestStore(data, config, split, out)
        broken = list(store.fill(processes))
        problems += [{"path": problem.path, "reason": problem.reason} for problem in broken]
        scans += len(store) - len(broken)
        if network is not None:
            kept = FeatureCache(Path(out) / FEATURES, network, precision)
            kept.fill(network, store, range(len(store)), choose_device(device))
    return {"manifest": str(manifest), "cache": str(out), "scans": scans, "problems": problems}


def model_config(model: str | Path) -> MedVLConfig:
    """Shapes of a preset or model directory, without its weights."""
    return preset(str(model)) if str(model) in PRESETS else MedVLConfig.load(model)
