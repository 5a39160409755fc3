"""A small model trained on batches with and without objects; run as one of two processes by test_distributed.py."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.training.batches import JointBatch
from medvl_sam2.training.config import LossConfig, PhaseConfig, TrainConfig
from medvl_sam2.training.corpus import text_corpus, train_tokenizer
from medvl_sam2.training.distributed import World, join
from medvl_sam2.training.loop import run_phase
from medvl_sam2.training.objectives import JointObjective
from medvl_sam2.training.packing import pack
from medvl_sam2.training.segmentation import Clips
from medvl_sam2.training.stages import set_trainable

STEPS, SAVED = 4, 2

_spec = importlib.util.spec_from_file_location("_small_model", Path(__file__).parents[1] / "_small_model.py")
_small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_small)


def make_model() -> MedVLSAM2:
    torch.manual_seed(0)
    config = _small.small_config()
    return MedVLSAM2(config, train_tokenizer(text_corpus(range(8)), config.language.config["vocab_size"]))


class MakeBatch:
    """Even batches ask for an object with SAM2's memory on, odd ones are text alone; `stop` breaks off."""

    def __init__(self, model: MedVLSAM2, stop: int | None):
        self.config, self.chat, self.stop = model.config, model.chat, stop

    def __call__(self, number: int) -> JointBatch:
        if self.stop is not None and number >= self.stop:
            raise InterruptedError
        rng = np.random.default_rng(number)
        side, size = self.config.sam2.image_size, self.config.sam2.mask_size

        def draw(*shape: int) -> torch.Tensor:
            return torch.from_numpy(rng.random(shape, dtype=np.float32))

        turns = [("Is there a stone?", "No." if rng.random() < 0.5 else "Yes.")]
        clips = None
        if number % 2 == 0:
            turns.append(("Segment the liver.", "It is [SEG]."))
            clips = Clips(
                images=draw(1, 2, 3, side, side) - 0.5,
                owner=torch.zeros(1, dtype=torch.long),
                targets=(draw(1, 2, size, size) > 0.5).float(),
                points=torch.zeros(1, 0, 2),
                point_labels=torch.zeros(1, 0, dtype=torch.int32),
                semantic=True,
                memory=True,
            )
        return JointBatch(
            draw(1, 1, *self.config.volume.size), pack(self.chat, [turns]), clips, names=(f"made {number}",)
        )


def train(out: Path, world: World, *, parallel: str = "ddp", killed: bool = False) -> dict[str, torch.Tensor]:
    """Stage 3 in `world`, two batches per step altogether; returns the weights that it trained."""
    phase = PhaseConfig(steps=STEPS, batch=1, accumulate=2 // world.size, lr=1e-3, warmup=0.0)
    config = TrainConfig(parallel=parallel, save_every=SAVED, log_every=1, device="cpu", stage3=phase)
    model = make_model()
    set_trainable(model, "stage3")
    objective: nn.Module = JointObjective(model, LossConfig())
    batches = MakeBatch(model, 2 * (SAVED + 1) if killed else None)
    try:
        run_phase("stage3", objective, batches, config, out, world)
    except InterruptedError:
        assert killed
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, here = Path(sys.argv[1]), join("cpu")
    train(folder / "ddp", here, killed=True)
    train(folder / "fsdp", here, parallel="fsdp", killed=True)
    train(folder / "one", here, parallel="fsdp")
