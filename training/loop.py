"""The training loop of one phase: schedule, precision, log, checkpoint, resume."""

import contextlib
import csv
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from medvl_sam2.training import checkpoint
from medvl_sam2.training.config import PhaseConfig, TrainConfig

logger = logging.getLogger(__name__)

Losses = dict[str, Tensor]


class Indexed(Dataset):
    """Batches by step number: step `s` gives the same batch in every process and after every restart."""

    def __init__(self, make: Callable[[int], Any], steps: int):
        self.make, self.steps = make, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Any:
        return self.make(step)


def learning_rate(phase: PhaseConfig, step: int) -> float:
    """Factor on the peak learning rate: linear warm-up, then cosine to zero."""
    warm = max(1, int(phase.warmup * phase.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, phase.steps - warm)))


def run_phase(
    name: str,
    modules: dict[str, nn.Module],
    make_batch: Callable[[int], Any],
    losses: Callable[[Any], Losses],
    config: TrainConfig,
    out: Path,
) -> None:
    """Train the parameters that require a gradient, from the last checkpoint on.

    Args:
        name: Of the phase: its section of the config, its log and its checkpoint.
        modules: What holds the parameters; only those with `requires_grad` are trained and saved.
        make_batch: Step number -> batch; must depend on nothing else.
        losses: Batch -> named scalars; "loss" is minimised, the others are logged.
        config: Of the run.
        out: Folder of the run.

    Raises:
        FloatingPointError: The loss is not finite; the last checkpoint stays good.
    """
    phase: PhaseConfig = getattr(config, name)
    parameters = {
        f"{key}.{n}": p for key, module in modules.items() for n, p in module.named_parameters() if p.requires_grad
    }
    optimizer = torch.optim.AdamW(_groups(parameters, phase.weight_decay), lr=phase.lr, betas=(0.9, 0.98))
    # Random buffers, such as SAM2's Fourier matrix, belong to the weights although nothing trains them.
    buffers = {f"{key}.{n}": b for key, module in modules.items() for n, b in module.named_buffers()}
    path = out / "checkpoints" / f"{name}.pt"
    state = checkpoint.load(path)
    start = 0
    if state is not None:
        start = state["step"]
        with torch.no_grad():
            for own, kept in ((parameters, state["parameters"]), (buffers, state["buffers"])):
                for key, value in kept.items():
                    own[key].copy_(value)
        if start >= phase.steps:
            return
        optimizer.load_state_dict(state["optimizer"])
    for module in modules.values():
        module.train()
    autocast = torch.autocast("cpu", torch.bfloat16) if config.precision == "bf16" else contextlib.nullcontext()
    with _Log(out, name, start) as log, tqdm(total=phase.steps, initial=start, desc=name, disable=None) as bar:
        for step, batch in zip(range(start, phase.steps), _batches(make_batch, start, phase.steps, _workers(config))):
            for group in optimizer.param_groups:
                group["lr"] = phase.lr * learning_rate(phase, step)
            # Dropout and sampled losses draw from torch's generator: seeded by step, a resumed run draws the same.
            torch.manual_seed(config.seed * 1_000_003 + step)
            with autocast:
                values = losses(batch)
            if not torch.isfinite(values["loss"]):
                raise FloatingPointError(f"{name}: loss is {values['loss'].item()} at step {step}; {path} is good")
            optimizer.zero_grad(set_to_none=True)
            values["loss"].backward()
            norm = nn.utils.clip_grad_norm_(parameters.values(), phase.clip)
            optimizer.step()
            log.add({**values, "grad_norm": norm})
            bar.update()
            if (step + 1) % config.log_every == 0 or step + 1 == phase.steps:
                bar.set_postfix(loss=f"{log.write(step + 1, optimizer.param_groups[0]['lr']):.4f}")
            if (step + 1) % config.save_every == 0 or step + 1 == phase.steps:
                saved = {key: p.detach() for key, p in parameters.items()}
                state = {"step": step + 1, "parameters": saved, "buffers": buffers, "optimizer": optimizer.state_dict()}
                checkpoint.save(path, state)
    for module in modules.values():
        module.eval()


def _groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _workers(config: TrainConfig) -> int:
    # Phantoms are memory-mapped and small, so one worker that runs ahead is enough.
    return max(1, config.data.workers) if config.data.source else 1


def _batches(make_batch: Callable[[int], Any], start: int, steps: int, workers: int) -> Iterator[Any]:
    # Batches come in the order of their steps however many workers make them.
    loader = DataLoader(
        Indexed(make_batch, steps),
        batch_size=None,
        sampler=range(start, steps),
        num_workers=workers,
        prefetch_factor=4,
        multiprocessing_context="fork",
    )
    return iter(loader)


class _Log:
    """CSV and, where installed, TensorBoard; means over the steps since the last row."""

    def __init__(self, out: Path, name: str, start: int):
        self.path = out / "logs" / f"{name}.csv"
        self.name, self.resumed = name, start > 0
        self.sums: dict[str, float] = {}
        self.count = 0
        self.started = time.perf_counter()

    def __enter__(self) -> "_Log":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a" if self.resumed else "w", newline="")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.path.parent / "tensorboard" / self.name)
        except ImportError:
            self.board = None
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()

    def add(self, values: Losses) -> None:
        """Count one step."""
        self.count += 1
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value.item()

    def write(self, step: int, lr: float) -> float:
        """Write the row up to `step`; returns the mean loss."""
        means = {key: value / self.count for key, value in self.sums.items()}
        seconds = (time.perf_counter() - self.started) / self.count
        row = {"step": step, "lr": lr, "seconds_per_step": seconds, **means}
        writer = csv.DictWriter(self.file, row)
        if self.file.tell() == 0:
            writer.writeheader()
        writer.writerow({key: f"{value:.6g}" for key, value in row.items()})
        self.file.flush()
        if self.board is not None:
            for key, value in row.items():
                self.board.add_scalar(key, value, step)
        self.sums, self.count, self.started = {}, 0, time.perf_counter()
        return means["loss"]
