"""Records of a manifest as training samples, kept on disk once they are prepared."""

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from medvl_sam2.engine.files import make_folder, replacing
from medvl_sam2.engine.geometry import InputError
from medvl_sam2.model.config import MedVLConfig
from medvl_sam2.training.datasets.base import Problem, Record
from medvl_sam2.training.datasets.manifest import Manifest
from medvl_sam2.training.datasets.prepare import Prepared, prepare, stack_side
from medvl_sam2.training.prepared import SETTINGS, claim, spread

logger = logging.getLogger(__name__)

_TABLE = "table"
# Raised when prepared files of an older version would no longer be made alike.
_VERSION = 1


@dataclass
class RealSample:
    """One real scan with what is known of it; slices are read when asked for.

    Attributes:
        record: What is known.
        grid: (D, H, W) int16 HU.
        names: Class -> (layer, value).
        empty: Classes looked for and not there.
        counts: Class -> (S,) pixels on each slice.
        depth: Slices S.
        terms: Class -> descriptions.
    """

    record: Record
    grid: np.ndarray
    names: dict[str, tuple[int, int]]
    empty: list[str]
    counts: dict[str, np.ndarray]
    depth: int
    terms: dict[str, list[str]] = field(repr=False)
    _source: "Prepared | Path" = field(repr=False)

    def slices(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(stop - start, R, R) int16 HU and (L, stop - start, R, R) uint8 label layers of some slices."""
        if isinstance(self._source, Prepared):
            stack, layers = self._source.stack[start:stop], self._source.layers[:, start:stop]
        else:
            with safe_open(self._source, "numpy") as file:
                stack = file.get_slice("stack")[start:stop]
                layers = file.get_slice("layers")[:, start:stop] if self.names else None
        return stack, layers if self.names else np.zeros((0, *stack.shape), np.uint8)

    def mask(self, name: str, layers: np.ndarray) -> np.ndarray:
        """(T, R, R) bool of a class in layers that `slices` gave; empty for a class that is not there."""
        if name not in self.names:
            return np.zeros(layers.shape[1:], bool)
        layer, value = self.names[name]
        return layers[layer] == value


class ManifestStore:
    """Samples by position within a split.

    Args:
        manifest: Of the data.
        model: Gives the grids.
        split: "train", "val" or "test".
        cache: Folder of prepared scans; a scan not in it is prepared when asked for and kept there. None: never kept.

    Raises:
        InputError: The cache was made for another model.
    """

    def __init__(self, manifest: Manifest, model: MedVLConfig, split: str = "train", cache: str | Path | None = None):
        self.manifest, self.model = manifest, model
        self.rows = manifest.split(split)
        self.cache = None if cache is None else _open_cache(make_folder(cache), model)

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, index: int) -> Record:
        """What is known of a sample, without its voxels."""
        return self.manifest[self.rows[index]]

    def __getitem__(self, index: int) -> RealSample:
        """A sample.

        Raises:
            InputError: A file of it is missing or broken; it is named.
        """
        record = self.record(index)
        path = self.path(record)
        if path is not None and (sample := self._kept(record, path)) is not None:
            return sample
        prepared = prepare(record, self.manifest.root(record), self.model)
        if path is not None:
            _keep(prepared, path)
        return self._sample(record, prepared, prepared.stack.shape[0], prepared)

    def path(self, record: Record) -> Path | None:
        """Where the prepared record is kept.

        The name also depends on what the record says of its files, so that a new manifest never meets old masks.
        """
        if self.cache is None:
            return None
        plain = [record.image, record.format, record.slope, record.intercept, record.hu, record.placed]
        plain += [[mask.name, mask.path, mask.value, mask.channel] for mask in record.masks]
        stamp = hashlib.sha256(json.dumps([self.manifest.root(record).as_posix(), plain]).encode()).hexdigest()[:24]
        return self.cache / stamp[:2] / f"{stamp}.safetensors"

    def _kept(self, record: Record, path: Path) -> RealSample | None:
        if not path.is_file():
            return None
        try:
            with safe_open(path, "numpy") as file:
                table = json.loads(file.metadata()[_TABLE])
                grid = file.get_tensor("grid")
                counts = file.get_tensor("counts")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            logger.warning("%s: damaged, made again", path)
            return None
        names = {name: (layer, value) for name, layer, value in table["names"]}
        found = Prepared(grid, counts, counts, names, table["empty"], dict(zip(names, counts)))
        return self._sample(record, found, table["depth"], path)

    def _sample(self, record: Record, found: Prepared, depth: int, source: "Prepared | Path") -> RealSample:
        return RealSample(
            record, found.grid, found.names, found.empty, found.counts, depth, self.manifest.terms, source
        )

    def fill(self, processes: int = 1, rows: Sequence[int] | None = None) -> Iterator[Problem]:
        """Prepare what is not kept yet; a broken scan is named and the next is prepared.

        Args:
            processes: Scans at a time.
            rows: Positions within the split; all when None.

        Yields:
            A problem for each scan that cannot be prepared.
        """
        rows = range(len(self)) if rows is None else rows
        done = spread(self._fill_one, rows, processes)
        for problem in tqdm(done, total=len(rows), desc="cache", disable=not sys.stderr.isatty()):
            if problem is not None:
                yield problem

    def _fill_one(self, index: int) -> Problem | None:
        record = self.record(index)
        try:
            path = self.path(record)
            if path is None or self._kept(record, path) is None:
                self[index]
        except InputError as error:
            file, _, reason = str(error).partition(": ")
            return Problem(file, f"{reason} [{record.id}]")
        return None


def _open_cache(folder: Path, model: MedVLConfig) -> Path:
    """Check that a cache fits the model, or begin it."""
    claim(folder / SETTINGS, {"version": _VERSION, "volume": asdict(model.volume), "side": stack_side(model)})
    return folder


def _keep(prepared: Prepared, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    depth, side, _ = prepared.stack.shape
    names = [[name, layer, value] for name, (layer, value) in prepared.names.items()]
    counts = np.stack(list(prepared.counts.values())) if names else np.zeros((0, depth), np.int64)
    arrays = {"grid": prepared.grid, "stack": prepared.stack, "counts": counts.astype(np.int32)}
    if names:
        arrays["layers"] = prepared.layers
    table = json.dumps({"names": names, "empty": prepared.empty, "depth": depth})
    with replacing(path) as part:
        save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, part, metadata={_TABLE: table})
