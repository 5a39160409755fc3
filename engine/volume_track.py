"""Objects followed through the slices of one volume: prompts, chains of slices, corrections.

Only logits, object scores and object pointers are kept per slice. A slice's memory follows from them, so it is made
again where a chain is taken up anew, and nothing else grows with the number of slices.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
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

    @property
    def start(self) -> int | None:
        """Slice where the last run began; None before the first."""
        return self._state.start

    @property
    def nbytes(self) -> int:
        """Memory that it takes, the features aside."""
        return self._state.nbytes

    @torch.inference_mode()
    def fork(self, cancel: Event | None = None) -> "VolumeTrack":
        """A copy to be corrected while this one stays as it is.

        Args:
            cancel: Of the copy, in place of this one's.
        """
        self._need_objects()
        other = copy(self)
        other._options, other._state = replace(self._options, cancel=cancel), self._state.fork()
        other.loop = ChainLoop(self.runner, self.features, other._options)
        return other

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

        As in the package's legacy video predictor, slices that a user corrected keep their masks.

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
        forward = [t for t in range(start, len(self.features)) if not state.is_settled(t)]
        # As in the package, a reverse run from the first slice has nowhere to go.
        reverse = [t for t in range(start, -1, -1) if not state.is_settled(t)] if start else []
        wanted = [(forward, False)] * (directions != "reverse") + [(reverse, True)] * (directions != "forward")
        wanted = [(order, backwards) for order, backwards in wanted if order]
        if state.mode == "independent" and start in state.conditioning:
            yield [self._chain(order, backwards, self._corrected(backwards)) for order, backwards in wanted]
            return
        for order, backwards in wanted:
            # A start that nobody prompted is a step of both chains, which then must not run side by side.
            seen = self._corrected(backwards) if state.mode == "independent" else tuple(state.tracked)
            yield [self._chain(order, backwards, seen)]

    @torch.inference_mode()
    def correct(self, index: int, prompts: Prompts) -> list[int]:
        """Correct a slice by clicks and bring up to date what follows from it.

        Args:
            index: Any slice.
            prompts: All prompts of that slice.

        Returns:
            As `correct_all`.
        """
        return self.correct_all({index: prompts})

    @torch.inference_mode()
    def correct_all(self, prompts: Mapping[int, Prompts]) -> list[int]:
        """Correct slices by clicks, the nearest to the start first, and bring up to date what follows from any of them.

        A slice that was tracked does not become a conditioning one, which all others would have to follow: the
        package's video predictors do the same (`add_all_frames_to_correct_as_cond` is false). As in the legacy one, it
        keeps the mask of its clicks when other slices are corrected later, and is their memory; the newer one would
        track over it.

        Args:
            prompts: All prompts of each of the slices.

        Returns:
            The slices whose masks were made again.
        """
        state, start = self._state, self._state.start
        if start is None:
            raise ValueError("track: expected run() before a correction, got none; call prompt() and run()")
        reached = set(state.tracked)
        for index in sorted(prompts, key=lambda t: abs(t - start)):
            self.prompt(index, prompts[index])
        follows = [t for t in sorted(reached) if not state.is_settled(t)]
        forward, reverse = [t for t in follows if t >= start], [t for t in reversed(follows) if t < start]
        if reached.issuperset(prompts):
            ahead, behind = [t for t in prompts if t >= start], [t for t in prompts if t < start]
            forward = [t for t in forward if ahead and t > min(ahead)]
            if not self._reads(reverse, {*ahead, *forward}):
                reverse = [t for t in reverse if behind and t < max(behind)]
        chains = [self._chain_of(order[0], order) for order in (forward, reverse) if order]
        if state.mode == "independent":
            self.loop.run(chains)
        else:
            for chain in chains:
                self.loop.run([chain])
        return sorted({*prompts, *forward, *reverse})

    def _reads(self, reverse: list[int], changed: Collection[int]) -> bool:
        """Whether the reverse chain reads one of the changed slices."""
        if self._state.mode == "independent" or not reverse:
            return False
        laid_out = lay_out(self._chain_of(reverse[0], reverse))
        read = {t for step in laid_out.steps for t, _ in step.pointers} | set(laid_out.loads)
        return not read.isdisjoint(changed)

    def _corrected(self, reverse: bool) -> list[int]:
        """Tracked slices on one side of the start, which belongs to both, that a user corrected."""
        start, tracked = self._state.start, self._state.tracked
        return [t for t, user in tracked.items() if user and (t <= start if reverse else t >= start)]

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
