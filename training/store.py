"""Rendered phantoms on disk, memory-mapped: the encoder grid of each, and some runs of consecutive SAM2 slices.

A phantom is rendered straight on the model's grids, which takes a fraction of a second where the native CT takes
several, so a run of thousands of patients fits a laptop.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from medvl_sam2.engine.files import make_folder, replacing, write_text
from medvl_sam2.engine.geometry import InputError
from medvl_sam2.model.config import MedVLConfig
from medvl_sam2.model.processing import ScanArray, foreground_box
from medvl_sam2.training.config import DataConfig
from medvl_sam2.training.phantom import FINDINGS, Phantom, check_training_seed, make_phantom
from medvl_sam2.training.prepared import SETTINGS, alone, claim, spread

SHARD = 50
# Raised when phantoms of an older version would no longer be rendered alike.
_VERSION = 1
# Coarse grid on which the patient is found before rendering, (Z, Y, X).
_SCOUT = (40, 96, 96)


@dataclass
class Sample:
    """One phantom as stored.

    Attributes:
        facts: What is true of it.
        grid: (D, H, W) int16 HU.
        grid_structures: (D, H, W) uint8.
        grid_findings: (D, H, W) uint8.
        slices: (runs, length, R, R) int16 HU.
        slice_structures: Same shape, uint8.
        slice_findings: Same shape, uint8.
        midline: Column of the patient's midline, as a share of the width; what lies beyond it is left.
    """

    facts: dict[str, Any]
    grid: np.ndarray
    grid_structures: np.ndarray
    grid_findings: np.ndarray
    slices: np.ndarray
    slice_structures: np.ndarray
    slice_findings: np.ndarray
    midline: float


class PhantomStore:
    """Phantoms by index; missing shards are rendered first.

    Args:
        directory: Of the shards.
        model: Gives the grids.
        data: Which phantoms, and how many slices of each.
    """

    def __init__(self, directory: Path, model: MedVLConfig, data: DataConfig):
        self.directory, self.model, self.data = Path(directory), model, data
        self.record = _record(model, data)
        self._shards: dict[int, tuple[np.ndarray, list[dict[str, Any]]]] = {}

    def __len__(self) -> int:
        return self.data.phantoms

    def prepare(self) -> None:
        """Render what is missing, in `data.workers` processes; shards that have become too short are rendered anew.

        A folder from before its settings were written down is taken where all of its shards have the size that the
        settings give; which share of them is rich is believed.

        Raises:
            InputError: The folder holds phantoms that were rendered with other settings.
        """
        if (self.directory / SETTINGS).is_file():
            claim(self.directory / SETTINGS, self._made())
            if not self._missing():
                # A complete folder need not be writable.
                return
        make_folder(self.directory)
        with alone(self.directory, wait=True):
            if not (self.directory / SETTINGS).is_file():
                self._check_sizes()
                claim(self.directory / SETTINGS, self._made())
            if missing := self._missing():
                done = spread(self._render_shard, missing, self.data.workers)
                for _ in tqdm(done, total=len(missing), desc="phantoms", disable=None):
                    pass

    def _missing(self) -> list[int]:
        return [n for n in range(-(-len(self) // SHARD)) if self._held(n) < self._wanted(n)]

    def _held(self, shard: int) -> int:
        """Phantoms of a shard: as many as both of its files have."""
        data = self._data_path(shard)
        records = data.stat().st_size // self.record.itemsize if data.is_file() else 0
        return min(records, _count(self._facts_path(shard)))

    def _made(self) -> dict[str, Any]:
        # Neither the seeds nor their number: a shard is named by its first seed, and tells how many it holds.
        volume, data = self.model.volume, self.data
        return {
            "version": _VERSION,
            "size": volume.size,
            "slices": volume.slices,
            "foreground_hu": volume.foreground_hu,
            "side": self.model.sam2.image_size,
            "rich": data.rich,
            "runs": data.runs,
            "run_length": data.run_length,
        }

    def _check_sizes(self) -> None:
        for path in self.directory.glob("*.bin"):
            facts = path.with_suffix(".json")
            expected = _count(facts) * self.record.itemsize
            if facts.is_file() and path.stat().st_size != expected:
                raise InputError(
                    f"{path}: expected {expected} bytes, got {path.stat().st_size}: its phantoms were rendered with "
                    "other settings; give another folder, or remove this one"
                )

    def _wanted(self, shard: int) -> int:
        return min(SHARD, len(self) - shard * SHARD)

    def __getitem__(self, index: int) -> Sample:
        shard, row = divmod(index, SHARD)
        if shard not in self._shards:
            records = np.memmap(self._data_path(shard), self.record, mode="r")
            self._shards[shard] = records, json.loads(self._facts_path(shard).read_text())
        records, facts = self._shards[shard]
        return Sample(facts[row], *(records[row][name] for name in self.record.names))

    def _data_path(self, shard: int) -> Path:
        return self.directory / f"{self.data.first_seed + shard * SHARD}.bin"

    def _facts_path(self, shard: int) -> Path:
        return self._data_path(shard).with_suffix(".json")

    def _render_shard(self, shard: int) -> None:
        records, facts = np.zeros(self._wanted(shard), self.record), []
        for row in range(len(records)):
            phantom = draw_phantom(self.data.first_seed + shard * SHARD + row, self.data.rich)
            facts.append(phantom.facts)
            _render(phantom, records[row], self.model, self.data)
        # Moved there whole, as another process may read the shorter shard that lies there; the facts come last, as a
        # shard without them is rendered again.
        with replacing(self._data_path(shard)) as part:
            records.tofile(part)
        write_text(self._facts_path(shard), json.dumps(facts))


def _count(facts: Path) -> int:
    """Phantoms of a shard, by its file of facts."""
    return len(json.loads(facts.read_text())) if facts.is_file() else 0


def _record(model: MedVLConfig, data: DataConfig) -> np.dtype:
    grid = model.volume.size
    slices = (data.runs, data.run_length, model.sam2.image_size, model.sam2.image_size)
    return np.dtype(
        [
            ("grid", "i2", grid),
            ("grid_structures", "u1", grid),
            ("grid_findings", "u1", grid),
            ("slices", "i2", slices),
            ("slice_structures", "u1", slices),
            ("slice_findings", "u1", slices),
            ("midline", "f4"),
        ]
    )


def draw_phantom(seed: int, rich: float) -> Phantom:
    """Draw a phantom for training, a share of them rich in findings.

    Raises:
        ValueError: The seed is kept for evaluation.
    """
    rng = np.random.default_rng([check_training_seed(seed), 2])
    if rng.random() >= rich:
        return make_phantom(seed)
    return make_phantom(seed, findings=[str(kind) for kind in rng.permutation(list(FINDINGS))[: rng.integers(4, 7)]])


def patient_box(phantom: Phantom, threshold_hu: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the patient lies in the field of view.

    Returns:
        Low and high corner (z, y, x) in mm.
    """
    low, high = phantom.box_mm.T
    scout = _SCOUT
    step = (high - low) / scout
    axes = [low[i] + (np.arange(scout[i]) + 0.5) * step[i] for i in range(3)]
    hu, _, _ = phantom.render(*axes, noise=False)
    box = np.array(foreground_box(ScanArray(hu), threshold_hu), float)
    return low + box[:3] * step, low + box[3:] * step


def _render(phantom: Phantom, record: np.ndarray, model: MedVLConfig, data: DataConfig) -> None:
    rng = np.random.default_rng([phantom.seed, 1])
    low, high = patient_box(phantom, model.volume.foreground_hu)
    # The patient is found a little differently in every real scan: table, arms, noise.
    jitter = rng.uniform(-0.03, 0.05, (2, 2)) * (high - low)[1:]
    low[1:] -= jitter[0]
    high[1:] += jitter[1]

    def axis(dimension: int, size: int) -> np.ndarray:
        return low[dimension] + (np.arange(size) + 0.5) * (high[dimension] - low[dimension]) / size

    # The model samples planes of a scan whose own slices are thinner than the grid's spacing.
    thickness = float(rng.uniform(1, 5))

    def render(z: np.ndarray, height: int, width: int) -> tuple[np.ndarray, ...]:
        return phantom.render(z, axis(1, height), axis(2, width), slice_thickness_mm=thickness)

    record["grid"], record["grid_structures"], record["grid_findings"] = render(
        axis(0, model.volume.size[0]), *model.volume.size[1:]
    )
    side = model.sam2.image_size
    record["midline"] = -low[2] / (high[2] - low[2])
    stack = axis(0, model.volume.slices)
    for run, start in enumerate(_run_starts(record, len(stack), data, rng)):
        arrays = render(stack[start : start + data.run_length], side, side)
        for name, array in zip(("slices", "slice_structures", "slice_findings"), arrays):
            record[name][run] = array


def _run_starts(record: np.ndarray, slices: int, data: DataConfig, rng: np.random.Generator) -> list[int]:
    """Starts of the runs: the first near a finding or a rare structure, the others anywhere."""
    last = slices - data.run_length
    labels, findings = record["grid_structures"], record["grid_findings"]
    starts = [int(s) for s in rng.integers(0, last + 1, data.runs)]
    present = np.unique(findings)[1:] if findings.any() else np.unique(labels)[1:]
    if len(present):
        chosen = (findings if findings.any() else labels) == rng.choice(present)
        depth = rng.choice(np.flatnonzero(chosen.any((1, 2))))
        centre = (depth + 0.5) / labels.shape[0] * slices
        starts[0] = int(np.clip(round(centre - data.run_length / 2), 0, last))
    return starts
