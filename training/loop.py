"""The training loop of one phase: schedule, precision, log, checkpoint, resume."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from medvl_sam2.kernels._common import disable
from medvl_sam2.training import precision
from medvl_sam2.training.config import PhaseConfig, TrainConfig
from medvl_sam2.training.distributed import ActivationCheckpoints, World, collect, full, spread, synchronise, to_device
from medvl_sam2.training.log import Log, workload
from medvl_sam2.training.state import PhaseState

logger = logging.getLogger(__name__)

Losses = dict[str, Tensor]


class Indexed(Dataset):
    """Batches by number: number `n` gives the same batch in every process and after every restart."""

    def __init__(self, make: Callable[[int], Any], length: int):
        self.make, self.length = make, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return number, self.make(number)


def learning_rate(phase: PhaseConfig, step: int) -> float:
    """Factor on the peak learning rate: linear warm-up, then cosine to zero."""
    warm = max(1, int(phase.warmup * phase.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, phase.steps - warm)))


def run_phase(
    name: str,
    objective: nn.Module,
    make_batch: Callable[[int], Any],
    config: TrainConfig,
    out: Path,
    world: World | None = None,
) -> None:
    """Train the parameters that require a gradient, from the last checkpoint on.

    A step takes `accumulate` batches in each process and the mean of their gradients, so N processes train as one
    process does with N times the accumulation: batch for batch, the same numbers.

    Args:
        name: Of the phase: its section of the config, its log and its checkpoint.
        objective: Batch -> named scalars; "loss" is minimised, the others are logged. Only its parameters with
            `requires_grad` are trained and saved.
        make_batch: Number -> batch; must depend on nothing else.
        config: Of the run.
        out: Folder of the run.
        world: Processes that train together; this one alone by default.

    Raises:
        FloatingPointError: Loss or gradient is not finite; the last checkpoint, if there is one, stays good.
        ValueError: A setting that does not exist.
    """
    world = world or World()
    phase: PhaseConfig = getattr(config, name)
    precision.check(config.precision, config.parallel)
    path = out / "checkpoints" / f"{name}.pt"
    if not phase.steps and not path.is_file():
        return
    precision.lower(objective, config.precision)
    called, trained = spread(objective, world, config.parallel)
    state = PhaseState(path, trained, phase, config)
    start = state.load()
    if start >= phase.steps:
        collect(objective, trained)
        return
    objective.train()
    trained.train()
    fused = contextlib.nullcontext() if config.fused else disable("all")
    with (
        fused,
        ActivationCheckpoints(trained, config.checkpoint_activations),
        Log(out, name, start, world, config.wandb) as log,
        tqdm(total=phase.steps, initial=start, desc=name, disable=None if world.is_main else True) as bar,
    ):
        batches = _batches(make_batch, start, phase, config, world)
        flops = 0.0
        counted = world.size > 1
        for step in range(start, phase.steps):
            rate = phase.lr * learning_rate(phase, step)
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            for part in range(phase.accumulate):
                number, batch = next(batches)
                tokens, slices = workload(batch)
                # The first batch stands for all; with several processes nothing may come between the collectives.
                if not counted:
                    flops, counted = _count_flops(called, batch, config.precision, world) * phase.accumulate, True
                # Dropout and sampled losses draw from torch's generator: seeded by batch, a resumed run draws the same.
                torch.manual_seed(config.seed * 1_000_003 + number)
                with synchronise(called, part + 1 == phase.accumulate):
                    with precision.autocast(config.precision, world.device):
                        values = called(to_device(batch, world.device))
                    _refuse_nan(name, step, number, batch, values["loss"], world, state.path)
                    state.scaler.scale(values["loss"] / phase.accumulate).backward()
                log.add(values, tokens, slices)
            norm = _update(state, phase, f"{name}: gradient of step {step}", world)
            log.steps += 1
            if torch.isfinite(norm):
                log.add({"grad_norm": norm})
            bar.update()
            last = step + 1 == phase.steps
            if (step + 1) % config.log_every == 0 or last:
                bar.set_postfix(loss=f"{log.write(step + 1, rate, flops):.4f}")
            if last:
                state.finish()
            if (step + 1) % config.save_every == 0 or last:
                state.save(step + 1, world)
    collect(objective, trained)
    objective.eval()


def _count_flops(called: nn.Module, batch: Any, number_format: str, world: World) -> float:
    """FLOPs of a batch, forward and backward, in a pass of its own.

    While they are counted, some operations are made of others and round differently: a run that goes on in the middle
    of a phase would differ from one that never stopped in the last bits of its first step.
    """
    with FlopCounterMode(display=False) as counter:
        with precision.autocast(number_format, world.device):
            values = called(to_device(batch, world.device))
        values["loss"].backward()
    called.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def _update(state: PhaseState, phase: PhaseConfig, what: str, world: World) -> Tensor:
    """Clip, step, and clear the gradients; returns their norm."""
    state.masters.take_gradients()
    state.scaler.unscale_(state.optimizer)
    norm = full(nn.utils.clip_grad_norm_(state.masters.tuned.values(), phase.clip)).detach()
    # With loss scaling an overflow is part of the game: the step is skipped and the scale halved.
    if not state.scaler.is_enabled() and not world.all_true(torch.isfinite(norm)):
        raise FloatingPointError(f"{what} is {norm.item()}; {_last_good(state.path)}")
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.masters.give_values()
    state.average(phase.ema)
    return norm


def _refuse_nan(name: str, step: int, number: int, batch: Any, loss: Tensor, world: World, path: Path) -> None:
    if world.all_true(torch.isfinite(loss.detach())):
        return
    own = None if torch.isfinite(loss) else f"loss is {loss.item()} in batch {number} ({_names(batch)})"
    told = "; ".join(text for text in world.gather(own) if text)
    raise FloatingPointError(f"{name}: {told} at step {step}; {_last_good(path)}")


def _last_good(path: Path) -> str:
    return f"{path} is good" if path.is_file() else "there is no checkpoint of this phase yet"


def _names(batch: Any) -> str:
    return ", ".join(map(str, getattr(batch, "names", ()))) or "without names"


def _batches(
    make_batch: Callable[[int], Any], start: int, phase: PhaseConfig, config: TrainConfig, world: World
) -> Iterator[tuple[int, Any]]:
    per_step = phase.accumulate * world.size
    # Batches come in the order of their numbers however many workers make them.
    loader = DataLoader(
        Indexed(make_batch, phase.steps * per_step),
        batch_size=None,
        sampler=range(start * per_step + world.rank, phase.steps * per_step, world.size),
        # Phantoms are memory-mapped and small, so one worker that runs ahead is enough.
        num_workers=max(1, config.data.workers) if config.data.source else 1,
        prefetch_factor=4,
        multiprocessing_context="fork",
    )
    return iter(loader)
