"""Which memories a slice reads: the bookkeeping of SAM2's video predictor, over the slices of a volume."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from medvl_sam2.model.sam2.config import SAM2Config
from medvl_sam2.model.sam2.structures import MemoryEntry


@dataclass(frozen=True)
class MemorySelection:
    """What one slice reads.

    Attributes:
        memories: (index into the temporal encoding, entry) in reading order; conditioning slices first.
        pointers: (distance in slices, pointer (B, d)) in reading order.
        pointer_span: Distance that is scaled to 1 in the pointers' temporal encoding.
    """

    memories: list[tuple[int, MemoryEntry]]
    pointers: list[tuple[int, Tensor]]
    pointer_span: int


@dataclass
class MemoryBank:
    """Memories of the slices seen so far, for one batch of objects.

    Attributes:
        num_slices: Slices of the volume (or clip).
        storage_dtype: Type to keep memory tokens in; the package's video predictor keeps bfloat16. None: as they are,
            which training needs.
        conditioning: Entries of slices that the user (or the start) conditions on.
        tracked: Entries of slices that were reached from others.
    """

    num_slices: int
    storage_dtype: torch.dtype | None = None
    conditioning: dict[int, MemoryEntry] = field(default_factory=dict)
    tracked: dict[int, MemoryEntry] = field(default_factory=dict)

    def add(self, slice_index: int, entry: MemoryEntry, is_conditioning: bool) -> None:
        """Store a slice's entry; a conditioning entry replaces a tracked one of the same slice."""
        if self.storage_dtype is not None:
            entry = replace(entry, features=entry.features.to(self.storage_dtype))
        if is_conditioning:
            self.tracked.pop(slice_index, None)
            self.conditioning[slice_index] = entry
        else:
            self.tracked[slice_index] = entry

    def fork(self) -> "MemoryBank":
        """A bank with the same conditioning entries and no tracked ones: the start of an independent chain."""
        return MemoryBank(self.num_slices, self.storage_dtype, dict(self.conditioning))

    @property
    def batch_size(self) -> int | None:
        """Number of objects, None while the bank is empty."""
        entry = next(iter({**self.tracked, **self.conditioning}.values()), None)
        return None if entry is None else entry.pointer.shape[0]

    def _closest_conditioning(self, slice_index: int, most: int) -> dict[int, MemoryEntry]:
        if most == -1 or len(self.conditioning) <= most:
            return self.conditioning
        before = max((t for t in self.conditioning if t < slice_index), default=None)
        after = min((t for t in self.conditioning if t >= slice_index), default=None)
        chosen = [t for t in (before, after) if t is not None]
        rest = sorted((t for t in self.conditioning if t not in chosen), key=lambda t: abs(t - slice_index))
        return {t: self.conditioning[t] for t in chosen + rest[: most - len(chosen)]}

    def select(self, slice_index: int, config: SAM2Config, reverse: bool, training: bool) -> MemorySelection:
        """Choose what a slice reads, as ``_prepare_memory_conditioned_features`` of facebookresearch/sam2.

        Args:
            slice_index: The slice that reads.
            config: Numbers of memories and pointers, strides.
            reverse: Whether the chain runs towards lower slices.
            training: In training the stride is 1, and pointers of later conditioning slices are read as well.
        """
        if not self.conditioning:
            raise ValueError(
                "memory: expected at least one conditioning slice, got none; run one with is_conditioning=True first"
            )
        selected = self._closest_conditioning(slice_index, config.max_conditioning_slices)
        unselected = {t: e for t, e in self.conditioning.items() if t not in selected}
        sign = -1 if reverse else 1
        stride = 1 if training else config.memory_stride
        last = config.num_memories - 1

        memories = [(last, entry) for entry in selected.values()]
        for distance in range(last, 0, -1):
            if distance == 1:
                at = slice_index - sign
            else:
                nearest = ((sign * slice_index - 2) // stride) * stride
                at = sign * (nearest - (distance - 2) * stride)
            entry = self.tracked.get(at, unselected.get(at))
            if entry is not None:
                memories.append((distance - 1, entry))

        most = min(self.num_slices, config.max_object_pointers)
        pointers = [
            (sign * (slice_index - t), entry.pointer)
            for t, entry in selected.items()
            if training or sign * (slice_index - t) >= 0
        ]
        for distance in range(1, most):
            at = slice_index - sign * distance
            if not 0 <= at < self.num_slices:
                break
            entry = self.tracked.get(at, unselected.get(at))
            if entry is not None:
                pointers.append((distance, entry.pointer))
        return MemorySelection(memories, pointers, max(1, most - 1))
