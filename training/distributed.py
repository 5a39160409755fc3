"""Training on several devices: the processes that torchrun or accelerate started, and a model spread over them."""

import contextlib
import copy
import functools
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from medvl_sam2.engine.precision import choose_device
from medvl_sam2.model.sam2.hiera import MultiScaleBlock
from medvl_sam2.model.vision import Block

# The first process may render phantoms or prepare scans for hours before the others go on.
_TIMEOUT = timedelta(hours=24)


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: Of this one.
        size: How many.
        device: Of this one.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this one writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def all_true(self, value: Tensor) -> bool:
        """Whether a 0-dim bool tensor is true in every process."""
        if self.size == 1:
            return bool(value)
        flag = value.to(torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)


def join(device: str = "auto") -> World:
    """Join the processes named in torchrun's environment variables; a world of one without them.

    Args:
        device: "auto", "cpu" or a CUDA device; with several processes each takes the GPU of its local rank.

    Raises:
        ValueError: No such device.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device)
    if size == 1:
        return World(device=chosen)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_TIMEOUT)
    return World(dist.get_rank(), size, chosen)


def spread(objective: nn.Module, world: World, parallel: str) -> tuple[nn.Module, nn.Module]:
    """Put an objective on the device(s).

    Args:
        objective: Losses as a module; its `forward` takes a batch.
        world: Of the run.
        parallel: "ddp" (a whole copy per process) or "fsdp" (FSDP2: parameters, gradients and optimiser state in
            shards). A world of one takes neither.

    Returns:
        What is to be called with batches, and the module whose parameters train: `objective` itself, except under
        FSDP, which cannot be undone and so works on a copy; `collect` brings its weights back.
    """
    if world.size == 1:
        objective = objective.to(world.device)
        return objective, objective
    if parallel == "ddp":
        objective = objective.to(world.device)
        # Which parameters a batch uses depends on its prompts: SAM2's memory, or the class prompts, may be idle.
        return DistributedDataParallel(objective, find_unused_parameters=True), objective
    sharded = copy.deepcopy(objective).to(world.device)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks(sharded):
        fully_shard(block, mesh=mesh)
    return fully_shard(sharded, mesh=mesh), sharded


@torch.no_grad()
def collect(objective: nn.Module, trained: nn.Module) -> None:
    """Copy the weights that trained in shards into the whole objective."""
    if trained is not objective:
        whole = dict(objective.named_parameters())
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                whole[name].copy_(full(parameter.detach()))


def synchronise(called: nn.Module, last: bool) -> Any:
    """Context of one micro-batch: gradients travel between processes after the last one of a step."""
    if isinstance(called, DistributedDataParallel) and not last:
        return called.no_sync()
    if hasattr(called, "set_requires_gradient_sync"):
        called.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def blocks(module: nn.Module) -> list[nn.Module]:
    """Transformer blocks of the 3D ViT, the LLM and SAM2's trunk: each runs once per batch, whatever the prompts."""
    return [part for part in module.modules() if isinstance(part, Block | MultiScaleBlock | GradientCheckpointingLayer)]


class ActivationCheckpoints:
    """Context in which the blocks of a module keep their inputs alone and compute the rest again in the backward."""

    def __init__(self, module: nn.Module, enabled: bool):
        self.blocks = blocks(module) if enabled else []

    def __enter__(self) -> None:
        for block in self.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    def __exit__(self, *exc: object) -> None:
        for block in self.blocks:
            del block.forward


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, in every process; other tensors as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor in the shards of another."""
    tensor = tensor.to(other.device)
    if isinstance(other, DTensor):
        return distribute_tensor(tensor, other.device_mesh, other.placements)
    return tensor


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch, a dataclass of tensors and of such dataclasses."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if hasattr(batch, "__dataclass_fields__"):
        values = {name: to_device(getattr(batch, name), device) for name in batch.__dataclass_fields__}
        return type(batch)(**values)
    return batch
