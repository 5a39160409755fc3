"""What a phase of training carries from step to step, and its checkpoint."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medvl_sam2.training import checkpoint, precision
from medvl_sam2.training.config import PhaseConfig, TrainConfig
from medvl_sam2.training.distributed import World, full, like


class PhaseState:
    """Optimiser, loss scale and averaged weights of a phase.

    The checkpoint holds whole tensors whatever the number of processes, so one of two processes loads in one and the
    other way round.

    Args:
        path: Of the checkpoint.
        module: Its parameters with `requires_grad` train.
        phase: Settings of the phase.
        config: Of the run.
    """

    def __init__(self, path: Path, module: nn.Module, phase: PhaseConfig, config: TrainConfig):
        self.path, self.steps = path, phase.steps
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.masters = precision.Masters(parameters, config.precision)
        device = next(module.parameters()).device
        self.optimizer = torch.optim.AdamW(
            _groups(self.masters.tuned, phase.weight_decay),
            lr=phase.lr,
            betas=(0.9, phase.beta2),
            fused=device.type == "cuda",
        )
        self.scaler = precision.scaler(config.precision, device)
        # Random buffers, such as SAM2's Fourier matrix, belong to the weights although nothing trains them.
        self.buffers = dict(module.named_buffers())
        self.averages = {name: p.detach().clone() for name, p in self.masters.tuned.items()} if phase.ema else {}

    @torch.no_grad()
    def load(self) -> int:
        """Go on from the checkpoint, if there is one; returns the steps done."""
        kept = checkpoint.load(self.path)
        if kept is None:
            return 0
        for key, value in kept["parameters"].items():
            self.masters.tuned[key].copy_(like(value, self.masters.tuned[key]))
        for key, value in kept.get("buffers", {}).items():
            self.buffers[key].copy_(value)
        averages = kept.get("averages") or kept["parameters"]
        for key, value in self.averages.items():
            value.copy_(like(averages[key], value))
        self.masters.give_values()
        step = int(kept["step"])
        if step < self.steps:
            self._load_optimizer(kept["optimizer"])
            if kept.get("scaler"):
                self.scaler.load_state_dict(kept["scaler"])
        return step

    def _load_optimizer(self, kept: dict[str, Any]) -> None:
        tuned = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            index: {
                key: like(value, tuned[index]) if torch.is_tensor(value) and value.ndim else value
                for key, value in values.items()
            }
            for index, values in kept["state"].items()
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": self._own_groups(kept["param_groups"])})

    def _own_groups(self, kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # Whether the update is fused is a matter of the device, not of the run.
        own = self.optimizer.param_groups
        return [{**group, "fused": mine["fused"], "foreach": mine["foreach"]} for group, mine in zip(kept, own)]

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move the averages towards the weights (exponential moving average)."""
        for name, value in self.averages.items():
            value.lerp_(self.masters.tuned[name].detach(), 1 - decay)

    @torch.no_grad()
    def finish(self) -> None:
        """Take the averages, if any, for the weights that the phase ends with."""
        for name, value in self.averages.items():
            self.masters.tuned[name].copy_(value)
        self.masters.give_values()

    def save(self, step: int, world: World) -> None:
        """Write the checkpoint; every process must call this, the first one writes.

        Raises:
            OSError: It cannot be written; the one before stays whole.
        """
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {
            index: {key: _whole(value) for key, value in values.items()} for index, values in optimizer["state"].items()
        }
        kept = {
            "step": step,
            "parameters": {key: _whole(p) for key, p in self.masters.tuned.items()},
            "averages": {key: _whole(value) for key, value in self.averages.items()},
            "buffers": self.buffers,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
        }
        if world.is_main:
            checkpoint.save(self.path, kept)
        world.barrier()


def _whole(value: Any) -> Any:
    return full(value.detach()).cpu() if isinstance(value, Tensor) else value


def _groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
