"""Objects followed through the slices of one volume: prompts, chains of slices, corrections.

Only logits, object scores and object pointers are kept per slice. A slice's memory follows from them, so it is made
again where a chain is taken up anew, and nothing else grows with the number of slices.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from threading import Event
from typing import Literal

import torch
from torch import Tensor

from medvl_sam2.engine.chains import Chain, ChainLoop, LoopOptions, lay_out
from medvl_sam2.engine.runner import SliceRunner
from medvl_sam2.engine.track_state import Features, Mode, TrackState
from medvl_sam2.model.sam2 import Prompts
from medvl_sam2.model.sam2.propagation import HINT_LIMIT
from medvl_sam2.model.sam2.structures import StepOutput

Directions = Literal["both", "forward", "reverse"]

KEYS_BYTES = 512 << 20


class VolumeTrack:
    """B objects in one volume; the counterpart of `model.sam2.VolumeTracker`, and equal to it.

    Args:
        runner: The model.
        features: All S slices.
        mode: "reference": forward, then reverse in the same state, as the sam2 package's video predictor does it; the
            reverse chain reads memories that the forward one left. "independent": neither sees the other's, and both
            run together as a batch.
        seg_embeddings: (B, E, d) tokens given on every slice, prompted or not.
        storage_dtype: Memories are rounded to it, as the package does; None keeps them as computed.
        multimask, gate_by_object_score: As in `SAM2.step`.
        chunk: Slices that are made ready at a time.
        keys_bytes: Most memory for keys kept from step to step; beyond it they are projected anew.
        static: Run every step on the same addresses, as one CUDA graph; None does so on CUDA.
        cancel: Ends a run with `Cancelled` before the next slice once set; the track is then good for nothing more.
    """

    def __init__(
        self,
        runner: SliceRunner,
        features: Features,
        *,
        mode: Mode = "reference",
        seg_embeddings: Tensor | None = None,
        storage_dtype: torch.dtype | None = torch.bfloat16,
        multimask: bool | None = None,
        gate_by_object_score: bool | None = None,
        chunk: int = 4,
        keys_bytes: int = KEYS_BYTES,
        static: bool | None = None,
        cancel: Event | None = None,
    ) -> None:
        self.runner, self.features = runner, features
        self.seg_embeddings, self.multimask = seg_embeddings, multimask
        gate = True if gate_by_object_score is None else gate_by_object_score
        static = runner.sam2.no_mem_embed.is_cuda if static is None else static
        self._options = LoopOptions(gate, chunk, keys_bytes, static, cancel)
        self._state = TrackState(runner, features, mode, storage_dtype)
        self.loop = ChainLoop(runner, features, self._options)

    @property
    def logits(self) -> Tensor:
        """(S, B, m, m) mask logits; slices not reached hold NO_OBJECT."""
        self._need_objects()
        return self._state.logits

    @property
    def scores(self) -> Tensor:
        """(S, B) object scores; slices not reached hold NO_OBJECT."""
        self._need_objects()
        return self._state.scores

    @torch.inference_mode()
    def prompt(self, index: int, prompts: Prompts | None) -> None:
        """Segment a slice from prompts; the chains of the next `run` start from it.

        On a slice that has a mask, the new clicks correct it: its logits go in as a hint, and `correct` also brings the
        slices that follow from it up to date.
        """
        self._check(index)
        state, prompts = self._state, prompts or Prompts()
        if self.seg_embeddings is not None and prompts.embeddings is None and prompts.given_masks is None:
            prompts = prompts.with_embeddings(self.seg_embeddings)
        reached = index in state.conditioning or index in state.tracked
        has_clicks = prompts.points is not None or prompts.boxes is not None
        if reached and has_clicks and prompts.masks is None:
            hint = state.logits[index, :, None].clamp(-HINT_LIMIT, HINT_LIMIT)
            prompts = replace(prompts, masks=hint)
        from_user = prompts.is_from_user
        if index in state.tracked and prompts.given_masks is None:
            prompt = self.runner.encode_prompts(prompts, state.objects, self.multimask)
            self.loop.run([self._chain_of(index, [index])._replace(prompt=prompt)])
            state.tracked[index] = from_user
            state.forget(index)
            return
        out = self.runner.sam2.step(
            self.features[index],
            prompts,
            None,
            is_conditioning=True,
            slice_index=index,
            multimask=self.multimask,
            encode_memory=False,
            gate_by_object_score=self._options.gate,
        )
        self.take(index, out, from_user)

    def take(self, index: int, out: StepOutput, from_user: bool = False, rows: slice = slice(None)) -> None:
        """Let the chains of the next `run` start from the outcome of a slice.

        Args:
            index: The slice.
            out: Its outcome.
            from_user: Whether a user's input made the masks.
            rows: The B objects' places in the outcome.
        """
        self._state.store(index, out, rows)
        known = self._state.tracked if index in self._state.tracked else self._state.conditioning
        known[index] = from_user
        self._state.forget(index)

    @torch.inference_mode()
    def run(self, start: int, directions: Directions = "both") -> None:
        """Carry the objects from ``start`` to the ends of the volume.

        Args:
            start: Slice where the chains begin, usually a prompted one.
            directions: Which chains.
        """
        for chains in self.ways(start, directions):
            self.loop.run(chains)

    def ways(self, start: int, directions: Directions = "both") -> Iterator[list[Chain]]:
        """The chains of `run` in lots that run side by side; a lot is to be run before the next one is asked for.

        Args:
            start: As in `run`.
            directions: As in `run`.
        """
        if directions not in ("both", "forward", "reverse"):
            raise ValueError(f"directions: expected 'both', 'forward' or 'reverse', got {directions!r}")
        state = self._state
        self._check(start)
        if not state.conditioning:
            raise ValueError("track: expected a prompted slice before run(), got none; call prompt() first")
        state.start = start
        forward = [t for t in range(start, len(self.features)) if t not in state.conditioning]
        # As in the package, a reverse run from the first slice has nowhere to go.
        reverse = [t for t in range(start, -1, -1) if t not in state.conditioning] if start else []
        wanted = [(forward, False)] * (directions != "reverse") + [(reverse, True)] * (directions != "forward")
        wanted = [(order, backwards) for order, backwards in wanted if order]
        if state.mode == "independent" and start in state.conditioning:
            yield [self._chain(order, backwards, ()) for order, backwards in wanted]
            return
        for order, backwards in wanted:
            # A start that nobody prompted is a step of both chains, which then must not run side by side.
            seen = () if state.mode == "independent" else tuple(state.tracked)
            yield [self._chain(order, backwards, seen)]

    @torch.inference_mode()
    def correct(self, index: int, prompts: Prompts) -> list[int]:
        """Correct a slice by clicks and bring up to date what follows from it.

        Args:
            index: Any slice.
            prompts: All prompts of that slice.

        Returns:
            The slices whose masks were made again.
        """
        state = self._state
        if state.start is None:
            raise ValueError("track: expected run() before a correction, got none; call prompt() and run()")
        was_tracked = index in state.tracked
        reached = list(state.tracked)
        self.prompt(index, prompts)
        start = state.start
        forward = [t for t in range(start, len(self.features)) if t in reached]
        reverse = [t for t in range(start, -1, -1) if t in reached and t not in forward]
        if was_tracked:
            side = forward if index in forward else reverse
            side[:] = side[side.index(index) + 1 :]
            if side is forward and not self._reads_from(reverse, index):
                reverse = []
            if side is reverse:
                forward = []
        chains = [self._chain_of(order[0], order) for order in (forward, reverse) if order]
        if state.mode == "independent":
            self.loop.run(chains)
        else:
            for chain in chains:
                self.loop.run([chain])
        return sorted({index, *forward, *reverse})

    def _reads_from(self, reverse: Sequence[int], index: int) -> bool:
        """Whether the reverse chain reads a slice from ``index`` on."""
        state = self._state
        if state.mode == "independent" or not reverse:
            return False
        laid_out = lay_out(self._chain_of(reverse[0], list(reverse)))
        return any(
            t >= index
            for step in laid_out.steps
            for t in (*(t for t, _ in step.pointers), *laid_out.loads)
            if t not in state.conditioning
        )

    def _chain_of(self, first: int, order: list[int]) -> Chain:
        """A chain taken up at a slice that was tracked before, in the direction it was tracked in."""
        state = self._state
        reverse = first < state.start
        if state.mode == "reference":
            return self._chain(order, reverse, tuple(state.tracked))
        own = [t for t in state.tracked if (t < state.start) == reverse]
        return self._chain(order, reverse, tuple(own))

    def _chain(self, order: list[int], reverse: bool, tracked: Sequence[int]) -> Chain:
        asked = Prompts(embeddings=self.seg_embeddings)
        prompt = self.runner.encode_prompts(asked, self._state.objects, self.multimask)
        return Chain(self._state, prompt, order, reverse, tracked)

    def _check(self, index: int) -> None:
        last = len(self.features) - 1
        if not 0 <= index <= last:
            raise ValueError(f"slice: expected 0 to {last}, got {index}; the volume has no such slice")

    def _need_objects(self) -> None:
        if self._state.logits is None:
            raise ValueError("track: expected a prompted slice, got none; call prompt() and run() first")
