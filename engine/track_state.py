"""What is known of the objects on the slices of a volume, and the memories that follow from it."""

from copy import copy
from typing import Literal, Protocol

import torch
from torch import Tensor

from medvl_sam2.engine.runner import SliceRunner
from medvl_sam2.model.sam2 import NO_OBJECT, SliceFeatures
from medvl_sam2.model.sam2.structures import StepOutput

Mode = Literal["reference", "independent"]


class Features(Protocol):
    """Features of a stack of slices: `SliceFeatures`, `HostFeatures` or `LazyFeatures`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int | slice) -> SliceFeatures: ...


class KeptFeatures(Features, Protocol):
    """Those that take memory until they are let go."""

    @property
    def nbytes(self) -> int: ...


class TrackState:
    """Logits, scores and pointers of B objects on S slices.

    A slice's memory follows from these and is made again where it is needed; only those of conditioning slices and, in
    reference mode, of the few that both directions read are kept.

    Args:
        runner: The model.
        features: All S slices.
        mode: As in `VolumeTrack`.
        storage_dtype: As in `VolumeTrack`.

    Attributes:
        conditioning: Slices whose memory every chain reads, and whether a user's input made their masks.
        tracked: The same of slices that were reached from others.
        start: Where the last run began; None before the first.
        logits: (S, B, m, m), None before the first slice.
        scores: (S, B), likewise.
        pointers: (S, B, d), likewise.
    """

    def __init__(self, runner: SliceRunner, features: Features, mode: Mode, storage_dtype: torch.dtype | None) -> None:
        if mode not in ("reference", "independent"):
            raise ValueError(f"mode: expected 'reference' or 'independent', got {mode!r}")
        self.runner, self.features, self.mode, self.storage_dtype = runner, features, mode, storage_dtype
        self.conditioning: dict[int, bool] = {}
        self.tracked: dict[int, bool] = {}
        self.start: int | None = None
        self.logits: Tensor | None = None
        self.scores: Tensor | None = None
        self.pointers: Tensor | None = None
        self._kept: dict[int, Tensor] = {}

    @property
    def objects(self) -> int:
        """B."""
        return self.scores.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory that it takes, the features aside."""
        tensors = [x for x in (self.logits, self.scores, self.pointers, *self._kept.values()) if x is not None]
        return sum(x.nbytes for x in tensors)

    def fork(self) -> "TrackState":
        """A copy that goes its own way; kept memories, which are replaced and never written to, are shared."""
        other = copy(self)
        other.conditioning, other.tracked, other._kept = dict(self.conditioning), dict(self.tracked), dict(self._kept)
        other.logits, other.scores, other.pointers = self.logits.clone(), self.scores.clone(), self.pointers.clone()
        return other

    def is_settled(self, index: int) -> bool:
        """Whether chains leave the slice as it is: it conditions the others, or a user has corrected it."""
        return index in self.conditioning or self.tracked.get(index, False)

    def store(self, index: int, out: StepOutput, rows: slice = slice(None)) -> None:
        """Note the outcome of a slice: of some rows of a batch that holds other objects too."""
        size = len(self.features)
        logits, scores, pointers = out.low_res_logits[rows, 0], out.object_score[rows, 0], out.object_pointer[rows]
        if self.logits is None:
            self.logits = logits.new_full((size, *logits.shape), NO_OBJECT)
            self.scores = scores.new_full((size, *scores.shape), NO_OBJECT)
            self.pointers = pointers.new_zeros(size, *pointers.shape)
        self.logits[index], self.scores[index], self.pointers[index] = logits, scores, pointers

    def memory(self, index: int) -> Tensor:
        """Memory tokens (B, N, mem_dim) of a slice, made from its masks unless they are still there."""
        if index not in self._kept:
            user = self.conditioning.get(index, self.tracked.get(index, False))
            logits, score = self.logits[index, :, None], self.scores[index, :, None]
            tokens = self.runner.sam2.encode_memory(self.features[index].vision, logits, score, user)
            if index not in self.conditioning and not self.is_near(index):
                return tokens
            self.keep(index, tokens)
        return self._kept[index]

    def keep(self, index: int, tokens: Tensor) -> None:
        """Keep a copy of a slice's memory."""
        self._kept[index] = tokens.to(self.storage_dtype, copy=True) if self.storage_dtype else tokens.clone()

    def forget(self, index: int) -> None:
        """The slice's masks are new: its memory is to be made again."""
        self._kept.pop(index, None)

    @property
    def near(self) -> range:
        """Slices of the forward chain that the reverse chain reads."""
        config = self.runner.sam2.config
        if self.mode != "reference" or self.start is None:
            return range(0)
        return range(self.start, self.start + (config.num_memories - 1) * config.memory_stride)

    def is_near(self, index: int) -> bool:
        """Whether both directions may read the slice's memory."""
        return index in self.near
