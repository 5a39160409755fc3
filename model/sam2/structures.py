"""What goes in and out of SAM2: slice features, prompts, memories, and the outcome of a step."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SliceFeatures:
    """Image features of S slices; prompt-independent, so computed once per scan.

    Attributes:
        vision: FPN top level (S, d, h, w), without the no-memory embedding.
        high_res: After conv_s0 and conv_s1: (S, d/8, 4h, 4w) and (S, d/4, 2h, 2w).
    """

    vision: Tensor
    high_res: tuple[Tensor, Tensor]

    def __len__(self) -> int:
        return self.vision.shape[0]

    def _map(self, function: Any) -> "SliceFeatures":
        return SliceFeatures(function(self.vision), (function(self.high_res[0]), function(self.high_res[1])))

    def __getitem__(self, index: int | slice) -> "SliceFeatures":
        """Views of some slices; one index keeps a batch of one."""
        if isinstance(index, int):
            index = range(len(self))[index]
            index = slice(index, index + 1)
        return self._map(lambda x: x[index])

    def select(self, indices: Tensor) -> "SliceFeatures":
        """Copies of the slices named by a 1D index tensor."""
        return self._map(lambda x: x.index_select(0, indices))

    def expand(self, batch: int) -> "SliceFeatures":
        """One slice seen ``batch`` times, without a copy."""
        return self._map(lambda x: x.expand(batch, -1, -1, -1))

    def repeat_interleave(self, times: int) -> "SliceFeatures":
        """Each slice ``times`` times in a row: the batch for ``times`` objects on every slice."""
        return self._map(lambda x: x.repeat_interleave(times, dim=0))

    def to(self, *args: Any, **kwargs: Any) -> "SliceFeatures":
        """Move or cast, as ``Tensor.to``."""
        return self._map(lambda x: x.to(*args, **kwargs))

    @property
    def nbytes(self) -> int:
        """Memory taken, in bytes."""
        return self.vision.nbytes + self.high_res[0].nbytes + self.high_res[1].nbytes

    @staticmethod
    def cat(parts: Sequence["SliceFeatures"]) -> "SliceFeatures":
        """Join along the slices."""
        vision = torch.cat([p.vision for p in parts])
        return SliceFeatures(vision, tuple(torch.cat([p.high_res[i] for p in parts]) for i in range(2)))


@dataclass(frozen=True)
class Prompts:
    """What is asked of B objects on one slice; every field may be missing.

    The decoder's tokens are: box corners, points, one padding token, embeddings.

    Attributes:
        points: (B, P, 2) as (x, y) in pixels of the model's image.
        labels: (B, P); 1 foreground, 0 background, -1 padding.
        boxes: (B, 4) as x0, y0, x1, y1 in the same pixels.
        masks: (B, 1, m, m) mask logits given as a hint, for instance those of the click before.
        embeddings: (B, E, d) extra tokens, such as the [SEG] vector.
        given_masks: (B, 1, R, R) masks of 0 and 1 that are taken as the slice's outcome; no other field then counts.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None
    embeddings: Tensor | None = None
    given_masks: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.points is None) != (self.labels is None):
            raise ValueError("prompts: expected points and labels together, got one of them; give both or neither")
        if self.points is not None and self.points.shape != (*self.labels.shape, 2):
            raise ValueError(
                f"prompts: expected points (B, P, 2) with labels (B, P), "
                f"got {tuple(self.points.shape)} and {tuple(self.labels.shape)}"
            )
        sizes = {name: x.shape[0] for name, x in self._items() if x is not None}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"prompts: expected one batch size, got {sizes}; repeat the smaller ones per object")

    def _items(self) -> list[tuple[str, Tensor | None]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self)]

    def _map(self, function: Any) -> "Prompts":
        return Prompts(**{name: None if x is None else function(x) for name, x in self._items()})

    @property
    def batch_size(self) -> int | None:
        """Number of objects, None when nothing is given."""
        return next((x.shape[0] for _, x in self._items() if x is not None), None)

    @property
    def num_points(self) -> int:
        """Points per object as SAM2 counts them: a box is two."""
        points = 0 if self.labels is None else self.labels.shape[1]
        return points + (0 if self.boxes is None else 2)

    @property
    def is_from_user(self) -> bool:
        """Whether anything but an embedding is given."""
        return any(x is not None for name, x in self._items() if name != "embeddings")

    def __getitem__(self, index: int | slice | Tensor) -> "Prompts":
        """The prompts of some objects; one index keeps a batch of one."""
        if isinstance(index, int):
            index = range(self.batch_size or 0)[index]
            index = slice(index, index + 1)
        return self._map(lambda x: x[index])

    def repeat(self, times: int) -> "Prompts":
        """All objects ``times`` times over: (o1, o2, o1, o2, ...), the batch for several slices."""
        return self._map(lambda x: x.repeat(times, *[1] * (x.dim() - 1)))

    def to(self, *args: Any, **kwargs: Any) -> "Prompts":
        """Move or cast, as ``Tensor.to``."""
        return self._map(lambda x: x.to(*args, **kwargs))

    def with_embeddings(self, embeddings: Tensor | None) -> "Prompts":
        """The same prompts with other embeddings."""
        return replace(self, embeddings=embeddings)

    @staticmethod
    def cat(parts: Sequence["Prompts"]) -> "Prompts":
        """Join along the objects; fewer points are filled up with padding points (label -1).

        Padding points are tokens the decoder sees, so an object's mask may differ slightly from the one it gets alone.
        Boxes, masks and embeddings must be given for all objects or for none.
        """
        most = max((0 if p.labels is None else p.labels.shape[1]) for p in parts)
        joined = {}
        for name in ("boxes", "masks", "embeddings", "given_masks"):
            given = [x for p in parts if (x := getattr(p, name)) is not None]
            if given and len(given) != len(parts):
                raise ValueError(f"prompts: expected {name} for all objects or none; join the others on their own")
            joined[name] = torch.cat(given) if given else None
        if most:
            anchor = next(p.points for p in parts if p.points is not None)
            points, labels = [], []
            for part in parts:
                if part.batch_size is None:
                    raise ValueError("prompts: expected at least one field per object, got an empty prompt to join")
                have = 0 if part.labels is None else part.labels.shape[1]
                pad = anchor.new_zeros(part.batch_size, most - have, 2)
                mark = anchor.new_full((part.batch_size, most - have), -1)
                points.append(pad if have == 0 else torch.cat((part.points, pad), dim=1))
                labels.append(mark if have == 0 else torch.cat((part.labels.to(mark.dtype), mark), dim=1))
            joined |= {"points": torch.cat(points), "labels": torch.cat(labels)}
        return Prompts(**joined)


@dataclass(frozen=True)
class MemoryEntry:
    """What one slice leaves behind for the others.

    Attributes:
        features: Memory tokens (B, h*w, mem_dim), row by row.
        pointer: Object pointers (B, d).
    """

    features: Tensor
    pointer: Tensor


@dataclass(frozen=True)
class StepOutput:
    """Outcome of one slice for B objects.

    Attributes:
        low_res_logits: Chosen mask (B, 1, m, m); NO_OBJECT where gated by the object score.
        iou: Predicted IoU of the chosen mask (B,).
        object_score: Logit that the object is on this slice (B, 1).
        object_pointer: (B, d).
        all_logits: The decoder's masks, ungated (B, 4, m, m): the single mask, then the three of multimask output.
            For a given mask: that mask, (B, 1, m, m).
        all_ious: Predicted IoU of each (B, 4), or (B, 1).
        memory: The entry for the memory bank, None if it was not asked for.
    """

    low_res_logits: Tensor
    iou: Tensor
    object_score: Tensor
    object_pointer: Tensor
    all_logits: Tensor
    all_ious: Tensor
    memory: MemoryEntry | None = None
