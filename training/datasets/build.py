"""A training run on real scans: the model it begins with and its batches."""

from pathlib import Path

import torch

from medvl_sam2.engine.geometry import InputError
from medvl_sam2.engine.precision import choose_device
from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.training.augment import NONE, Chances
from medvl_sam2.training.config import TrainConfig
from medvl_sam2.training.datasets.batches import ManifestBatches
from medvl_sam2.training.datasets.cache import FEATURES
from medvl_sam2.training.datasets.features import FeatureCache
from medvl_sam2.training.datasets.manifest import Manifest
from medvl_sam2.training.datasets.store import ManifestStore


def build_real(config: TrainConfig, out: Path) -> tuple[MedVLSAM2, ManifestBatches]:
    """Model and batches for the paper's stages on the scans of `data.source`.

    Args:
        config: Of the run; `preset` names the weights to begin with.
        out: Folder of the run, which keeps the prepared scans unless `data.cache` names another place.

    Raises:
        InputError: No such manifest or weights, or a cache made for another model.
    """
    cache = Path(config.data.cache or out / "scans")
    manifest = Manifest(config.data.source)
    try:
        model = MedVLSAM2.from_pretrained(config.preset, torch.float32)
    except ValueError as error:
        raise InputError(f"preset: {error}") from error
    store = ManifestStore(manifest, model.config, config.data.split, cache)
    features = FeatureCache(cache / FEATURES, model, config.precision) if config.data.features else None
    chances = Chances() if config.data.augment else NONE
    batches = ManifestBatches(store, model.config, model.chat, config, chances=chances, features=features)
    if features is not None and config.stage1.steps:
        features.fill(model, store, batches.usable("stage1"), choose_device(config.device))
    return model, batches
