"""The log of a phase: CSV, TensorBoard where installed, Weights & Biases where asked for."""

import csv
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medvl_sam2.training.distributed import World

# Dense bf16 peak of the devices that models of this kind train on (NVIDIA data sheets), TFLOP/s.
_PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}


class Log:
    """Means over the steps since the last row, with rates; only the first process writes.

    Columns: the step, the learning rate, seconds per step, tokens and slices per second of all processes, TFLOP/s of
    one (and its share of the device's peak as `mfu`, where that is known), peak memory in GB, then the losses.

    Args:
        out: Folder of the run.
        name: Of the phase.
        start: Step that the run goes on from; later rows of a killed run are dropped.
        world: Of the run.
        wandb: Project of Weights & Biases, or "".

    Raises:
        ValueError: `wandb` is set but the package is missing.
    """

    def __init__(self, out: Path, name: str, start: int, world: World, wandb: str = ""):
        self.path = out / "logs" / f"{name}.csv"
        self.name, self.start, self.world = name, start, world
        self.board = self.wandb = None
        self.project = wandb
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.steps = self.tokens = self.slices = 0
        self.started = time.perf_counter()

    def __enter__(self) -> "Log":
        self.rows: list[dict[str, str]] = []
        if not self.world.is_main:
            return self
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.start and self.path.is_file():
            with open(self.path, newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= self.start]
        self.columns = list(self.rows[0]) if self.rows else []
        self._rewrite()
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.path.parent / "tensorboard" / self.name, purge_step=self.start + 1)
        except ImportError:
            pass
        if self.project:
            self.wandb = _start_wandb(self.project, self.path.parent, self.name)
        return self

    def __exit__(self, *exc: object) -> None:
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()

    def add(self, values: dict[str, Tensor], tokens: int = 0, slices: int = 0) -> None:
        """Count one micro-batch; nothing is waited for on the device."""
        for key, value in values.items():
            value = value.detach().float()
            self.sums[key] = self.sums[key] + value if key in self.sums else value
            self.counts[key] = self.counts.get(key, 0) + 1
        self.tokens += tokens
        self.slices += slices

    def write(self, step: int, lr: float, flops: float = 0.0) -> float:
        """Write the row up to `step`.

        Args:
            step: Steps done.
            lr: Learning rate of the last one.
            flops: Floating-point operations of one step in one process; 0 when unknown.

        Returns:
            The mean loss over all processes.
        """
        own = {key: (value.item(), self.counts[key]) for key, value in self.sums.items()}
        everyone = self.world.gather((own, self.tokens, self.slices))
        means = {}
        for key in dict.fromkeys(key for values, *_ in everyone for key in values):
            parts = [values[key] for values, *_ in everyone if key in values]
            means[key] = sum(total for total, _ in parts) / sum(count for _, count in parts)
        if self.world.is_main:
            seconds = time.perf_counter() - self.started
            row = {"step": step, "lr": lr, "seconds_per_step": seconds / max(1, self.steps)}
            row |= {"tokens_per_second": sum(tokens for _, tokens, _ in everyone) / seconds}
            row |= {"slices_per_second": sum(slices for *_, slices in everyone) / seconds}
            row |= {**_speed(flops / row["seconds_per_step"], self.world.device), **means}
            self._append({key: f"{value:.6g}" for key, value in row.items()})
            for key, value in row.items():
                if self.board is not None:
                    self.board.add_scalar(key, value, step)
            if self.wandb is not None:
                self.wandb.log({f"{self.name}/{key}": value for key, value in row.items()})
        self._reset()
        return means["loss"]

    def _append(self, row: dict[str, str]) -> None:
        self.rows.append(row)
        if new := [key for key in row if key not in self.columns]:
            self.columns += new
            self._rewrite()
            return
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(row)

    def _rewrite(self) -> None:
        with open(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            if self.columns:
                writer.writeheader()
            writer.writerows(self.rows)


def _speed(flops_per_second: float, device: torch.device) -> dict[str, float]:
    rates = {"tflops": flops_per_second / 1e12}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = next((value for key, value in _PEAK_TFLOPS.items() if key in name), None)
        if peak is not None:
            rates["mfu"] = rates["tflops"] / peak
        return {**rates, "peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9}
    unit = 1 if sys.platform == "darwin" else 1024
    return {**rates, "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}


def _start_wandb(project: str, folder: Path, name: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError("wandb: expected the wandb package; pip install wandb, or leave the setting empty") from error
    return wandb.init(project=project, dir=folder, name=f"{folder.parent.name}/{name}")


def workload(batch: Any) -> tuple[int, int]:
    """(text tokens, SAM2 slices) of a batch."""
    text = getattr(batch, "text", batch)
    ids, clips = getattr(text, "input_ids", None), getattr(batch, "clips", None)
    return (0 if ids is None else ids.numel()), (0 if clips is None else clips.images.shape[:2].numel())
