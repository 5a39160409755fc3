"""The plain loop over slices: prompts on some of them, memory-conditioned masks on all the others.

It keeps to the video predictor of facebookresearch/sam2, a volume taking the place of a video, except that objects are
a batch rather than a Python loop. It is the reference that faster runners are held to.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from medvl_sam2.model.sam2.memory_bank import MemoryBank
from medvl_sam2.model.sam2.modeling import NO_OBJECT, SAM2
from medvl_sam2.model.sam2.structures import MemoryEntry, Prompts, SliceFeatures, StepOutput

HINT_LIMIT = 32.0


@dataclass
class _Pending:
    """A prompted slice whose memory is encoded when propagation begins."""

    output: StepOutput
    is_conditioning: bool
    is_from_user: bool


class VolumeTracker:
    """One inference state: B objects followed through the slices of one volume.

    Prompt slices with :meth:`prompt`, then :meth:`run` forward and in reverse; prompt again to correct, and run again.

    Args:
        sam2: The model, in eval mode for the package's behaviour.
        features: All S slices.
        seg_embeddings: (B, E, d) tokens given on every slice, prompted or not; None for SAM2's own behaviour.
        memory_dtype: Storage type of memory tokens; the package keeps bfloat16. None keeps them as computed.
        multimask: As in :meth:`SAM2.step`, for every slice.
        gate_by_object_score: As in :meth:`SAM2.step`, for every slice.
    """

    def __init__(
        self,
        sam2: SAM2,
        features: SliceFeatures,
        *,
        seg_embeddings: Tensor | None = None,
        memory_dtype: torch.dtype | None = torch.bfloat16,
        multimask: bool | None = None,
        gate_by_object_score: bool | None = None,
    ) -> None:
        self.sam2 = sam2
        self.features = features
        self.seg_embeddings = seg_embeddings
        self.bank = MemoryBank(len(features), memory_dtype)
        self.outputs: dict[int, StepOutput] = {}
        self._options = {"multimask": multimask, "gate_by_object_score": gate_by_object_score}
        self._pending: dict[int, _Pending] = {}
        self._direction: dict[int, bool] = {}

    def prompt(self, slice_index: int, prompts: Prompts | None) -> StepOutput:
        """Segment a slice from prompts; it conditions the others unless it was already reached by propagation.

        On a slice that has a mask already, the new clicks correct it: its logits go in as a hint. All prompts of the
        slice are to be given each time. A conditioning slice stays one when it is corrected after a run; the package
        would show the correction and then forget it.

        Returns:
            The slice's outcome; its memory is encoded when :meth:`run` begins.
        """
        index = self._check_index(slice_index)
        prompts = prompts or Prompts()
        is_conditioning = index not in self._direction or index in self.bank.conditioning
        previous = self._pending[index].output if index in self._pending else self.outputs.get(index)
        has_clicks = prompts.points is not None or prompts.boxes is not None
        if previous is not None and has_clicks and prompts.masks is None:
            hint = previous.low_res_logits.clamp(-HINT_LIMIT, HINT_LIMIT)
            prompts = replace(prompts, masks=hint)
        output = self._step(index, prompts, is_conditioning, self._direction.get(index, False), encode_memory=False)
        self._pending[index] = _Pending(output, is_conditioning, prompts.is_from_user)
        return output

    def run(self, start: int, *, reverse: bool = False) -> Iterator[tuple[int, StepOutput]]:
        """Propagate from ``start`` to the last slice, or to slice 0 in reverse; yields each slice's outcome.

        In reverse the chain also reads the memories that an earlier forward run left on higher slices, as the
        package does with one inference state.
        """
        start = self._check_index(start)
        self._settle()
        if reverse:
            order = range(start, -1, -1) if start > 0 else range(0)
        else:
            order = range(start, len(self.features))
        for index in order:
            if index not in self.bank.conditioning:
                output = self._step(index, Prompts(), False, reverse, encode_memory=True)
                self.bank.add(index, output.memory, is_conditioning=False)
                self.outputs[index] = replace(output, memory=None)
            self._direction[index] = reverse
            yield index, self.outputs[index]

    def fork(self) -> "VolumeTracker":
        """A tracker with the same conditioning slices and nothing tracked: the start of an independent chain."""
        self._settle()
        other = VolumeTracker(self.sam2, self.features, seg_embeddings=self.seg_embeddings, **self._options)
        other.bank = self.bank.fork()
        other.outputs = {t: self.outputs[t] for t in other.bank.conditioning}
        return other

    def stack(self) -> tuple[Tensor, Tensor]:
        """Logits (S, B, m, m) and object scores (S, B) of all slices; slices not reached hold NO_OBJECT."""
        if not self.outputs:
            raise ValueError("tracker: expected a prompted slice, got none; call prompt() and run() first")
        empty = next(iter(self.outputs.values()))
        logits = torch.full_like(empty.low_res_logits[:, 0], NO_OBJECT)
        scores = torch.full_like(empty.object_score[:, 0], NO_OBJECT)
        reached = [self.outputs.get(t) for t in range(len(self.features))]
        return (
            torch.stack([logits if o is None else o.low_res_logits[:, 0] for o in reached]),
            torch.stack([scores if o is None else o.object_score[:, 0] for o in reached]),
        )

    def _check_index(self, index: int) -> int:
        if not 0 <= index < len(self.features):
            raise ValueError(
                f"slice: expected 0 to {len(self.features) - 1}, got {index}; the volume has no such slice"
            )
        return index

    def _step(
        self, index: int, prompts: Prompts, is_conditioning: bool, reverse: bool, encode_memory: bool
    ) -> StepOutput:
        if self.seg_embeddings is not None and prompts.embeddings is None and prompts.given_masks is None:
            prompts = prompts.with_embeddings(self.seg_embeddings)
        return self.sam2.step(
            self.features[index],
            prompts,
            self.bank,
            is_conditioning=is_conditioning,
            slice_index=index,
            reverse=reverse,
            encode_memory=encode_memory,
            **self._options,
        )

    def _settle(self) -> None:
        """Encode the memories of the prompted slices, now that their masks are final."""
        for index, pending in sorted(self._pending.items(), key=lambda item: item[1].is_conditioning):
            output = pending.output
            tokens = self.sam2.encode_memory(
                self.features[index].vision, output.low_res_logits, output.object_score, pending.is_from_user
            )
            self.bank.add(index, MemoryEntry(tokens, output.object_pointer), pending.is_conditioning)
            self.outputs[index] = output
        self._pending.clear()
        if not self.bank.conditioning:
            raise ValueError("tracker: expected a prompted slice before run(), got none; call prompt() first")


def propagate(
    sam2: SAM2,
    features: SliceFeatures,
    prompts: Mapping[int, Prompts | None] | None = None,
    *,
    start: int,
    seg_embeddings: Tensor | None = None,
    mode: Literal["reference", "independent"] = "reference",
    directions: Literal["both", "forward", "reverse"] = "both",
    memory_dtype: torch.dtype | None = torch.bfloat16,
    multimask: bool | None = None,
    gate_by_object_score: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Segment B objects through a volume.

    Args:
        sam2: The model.
        features: All S slices.
        prompts: Prompts of the B objects by slice. When there are none, ``start`` is conditioned on the embeddings.
        start: Slice where the chains begin.
        seg_embeddings: (B, E, d) tokens given on every slice, such as the [SEG] vector.
        mode: "reference": forward, then reverse in the same state, as the package's video predictor does it; the
            reverse chain reads memories that the forward one left. "independent": neither sees the other's.
        directions: Which chains to run.
        memory_dtype: Storage type of memory tokens, see :class:`VolumeTracker`.
        multimask, gate_by_object_score: As in :meth:`SAM2.step`.

    Returns:
        Logits (S, B, m, m) and object scores (S, B); slices not reached hold NO_OBJECT.
    """
    if mode not in ("reference", "independent"):
        raise ValueError(f"mode: expected 'reference' or 'independent', got {mode!r}")
    if directions not in ("both", "forward", "reverse"):
        raise ValueError(f"directions: expected 'both', 'forward' or 'reverse', got {directions!r}")
    if not prompts and seg_embeddings is None:
        raise ValueError("propagate: expected prompts or seg_embeddings, got neither; say what to segment")
    tracker = VolumeTracker(
        sam2,
        features,
        seg_embeddings=seg_embeddings,
        memory_dtype=memory_dtype,
        multimask=multimask,
        gate_by_object_score=gate_by_object_score,
    )
    for index, asked in (prompts or {start: None}).items():
        tracker.prompt(index, asked)
    backward = tracker.fork() if mode == "independent" else tracker
    if directions != "reverse":
        for _ in tracker.run(start):
            pass
    if directions != "forward":
        for _ in backward.run(start, reverse=True):
            pass
    if backward is not tracker:
        tracker.outputs.update(backward.outputs if directions != "forward" else {})
    return tracker.stack()
