"""Features of the frozen image encoder, kept on disk: stage 1 trains the projector alone and need not run the ViT."""

import copy
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from medvl_sam2.engine.files import make_folder, replacing
from medvl_sam2.engine.geometry import InputError
from medvl_sam2.model.config import MedVLConfig
from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.model.vision import VisionEncoder
from medvl_sam2.training.clips import windowed
from medvl_sam2.training.datasets.store import ManifestStore
from medvl_sam2.training.precision import autocast, lower

logger = logging.getLogger(__name__)

_KEY = "features"


class FeatureCache:
    """Features by record, in a folder named after the weights, grid and precision that gave them.

    Args:
        folder: Of all caches.
        model: Whose image encoder is frozen.
        precision: Of the run that will train on them; see `training.precision`.
    """

    def __init__(self, folder: str | Path, model: MedVLSAM2, precision: str = "fp32"):
        self.folder = Path(folder) / _stamp(model, precision)
        self.precision = precision

    def path(self, name: str) -> Path:
        """File of a record's features."""
        stamp = hashlib.sha256(name.encode()).hexdigest()[:24]
        return self.folder / stamp[:2] / f"{stamp}.safetensors"

    def load(self, name: str) -> Tensor:
        """(T, C) features of a record.

        Raises:
            InputError: They are not kept, or damaged.
        """
        try:
            return load_file(self.path(name))[_KEY]
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(
                f"{self.path(name)}: no features of {name}; run 'medvl-sam2 data cache --features'"
            ) from error

    def fill(
        self, model: MedVLSAM2, store: ManifestStore, rows: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        """Compute what is missing, scan by scan.

        Args:
            model: The model; it stays where it is.
            store: Scans.
            rows: Positions in the store. A scan that cannot be read is named and left out.
            device: Where to compute: the one to train on, for the very numbers that training would see.
        """
        make_folder(self.folder)
        encoder = None
        for index in tqdm(rows, desc="features", disable=None):
            record = store.record(int(index))
            if self.path(record.id).is_file():
                continue
            try:
                sample = store[int(index)]
            except InputError as error:
                logger.warning("%s; left out", error)
                continue
            if encoder is None:
                encoder = copy.deepcopy(model.vision).to(device).eval()
                lower(encoder, self.precision)
            self.keep(record.id, encode(encoder, sample.grid, model.config.volume.window, self.precision))

    def keep(self, name: str, features: Tensor) -> None:
        """Write the features of a record, whole or not at all."""
        path = self.path(name)
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as part:
            save_file({_KEY: features.cpu().contiguous()}, part)


@torch.no_grad()
def encode(encoder: VisionEncoder, grid: np.ndarray, window: tuple[float, float], precision: str = "fp32") -> Tensor:
    """(T, C) features of one scan by itself, as the image encoder gives them in training.

    Args:
        encoder: With its weights lowered to the precision.
        grid: (D, H, W) int16 HU.
        window: HU mapped to 0 and 1.
        precision: Of the run.
    """
    weight = encoder.cls_token
    values = windowed(torch.from_numpy(grid.astype(np.float32)), window)[None, None]
    with autocast(precision, weight.device):
        return encoder(values.to(weight.device, weight.dtype))[0]


def _stamp(model: MedVLSAM2, precision: str) -> str:
    config: MedVLConfig = model.config
    stamp = hashlib.sha256(json.dumps([asdict(config.volume), precision]).encode())
    for name, tensor in sorted(model.vision.state_dict().items()):
        stamp.update(name.encode())
        stamp.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return stamp.hexdigest()[:24]
