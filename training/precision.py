"""Number formats of training: float32, autocast to bf16 or fp16, and all-bf16 weights with float32 masters."""

import contextlib
from typing import Any

import torch
from torch import nn

from medvl_sam2.model.modeling import cast_weights

PRECISIONS = ("fp32", "bf16", "fp16", "bf16-pure")


def check(precision: str, parallel: str = "ddp") -> None:
    """Refuse what does not exist.

    Raises:
        ValueError: Unknown precision, or fp16 in shards.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if parallel not in ("ddp", "fsdp"):
        raise ValueError(f"parallel: expected ddp or fsdp, got {parallel!r}")
    if precision == "fp16" and parallel == "fsdp":
        # Each process would judge overflows by its own shard.
        raise ValueError("precision: expected fp32, bf16 or bf16-pure with parallel=fsdp, got 'fp16'")


def autocast(precision: str, device: torch.device) -> Any:
    """Context of the forward pass."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling, which only fp16 needs: its smallest gradients would be zero."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


class Masters:
    """What the optimiser works on: the trained parameters, or float32 copies of those that are bf16.

    An update is often smaller than half a bf16 step of its weight and would be lost without them.

    Args:
        parameters: Trained parameters by name.
        precision: Of the run.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], precision: str):
        self.live = parameters
        self.separate = precision == "bf16-pure"
        self.tuned = parameters
        if self.separate:
            self.tuned = {name: nn.Parameter(p.detach().float()) for name, p in parameters.items()}

    def take_gradients(self) -> None:
        """Move the gradients to the copies."""
        if self.separate:
            for name, parameter in self.live.items():
                if parameter.grad is not None:
                    self.tuned[name].grad = parameter.grad.float()
                    parameter.grad = None

    @torch.no_grad()
    def give_values(self) -> None:
        """Round the copies back into the model."""
        if self.separate:
            for name, parameter in self.live.items():
                parameter.copy_(self.tuned[name])


def lower(module: nn.Module, precision: str) -> None:
    """Cast all weights for "bf16-pure"."""
    if precision == "bf16-pure":
        cast_weights(module, torch.bfloat16)
