"""Masks from prompts: every slice alone, or carried by SAM2's memory away from a start slice."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import TypeVar

import torch
from torch import Tensor

from medvl_sam2.engine.chunks import Chunks, free_cached, out_of_memory
from medvl_sam2.engine.propagation import follow, follow_each
from medvl_sam2.engine.runner import SliceRunner
from medvl_sam2.engine.slice_features import Images, Place, SliceEncoder, choose_place
from medvl_sam2.engine.track_state import Features, KeptFeatures, Mode
from medvl_sam2.engine.volume_track import VolumeTrack
from medvl_sam2.model.config import SegConfig
from medvl_sam2.model.sam2 import NO_OBJECT, SAM2, Prompts

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Followed:
    """An object's way through the slices, from which corrections go on.

    Attributes:
        track: Of this object alone.
        embeddings: (1, E, d) prompt tokens of the text, or None.
    """

    track: VolumeTrack
    embeddings: Tensor | None


@dataclass(frozen=True)
class ObjectSlices:
    """One object on the slice stack.

    Attributes:
        logits: (S, m, m) mask logits, above zero inside the object; their values where it is not present mean nothing.
        scores: (S,) object-score logits.
        present: (S,) slices that hold the object.
        start: Slice that the memory started from; None without memory.
        followed: For corrections; None without memory and for objects of a batch that share one track.
    """

    logits: Tensor
    scores: Tensor
    present: Tensor
    start: int | None
    followed: Followed | None = None


def union(objects: Sequence[ObjectSlices]) -> ObjectSlices:
    """Several objects as one."""
    present = torch.stack([one.present for one in objects])
    logits = torch.stack([one.logits for one in objects]).masked_fill(~present[:, :, None, None], NO_OBJECT)
    return ObjectSlices(logits.amax(0), torch.stack([one.scores for one in objects]).amax(0), present.any(0), None)


class Segmenter:
    """Runs SAM2 over the slices of a scan.

    Args:
        sam2: In evaluation mode, on its device and in its dtype; not to be changed afterwards.
        config: How [SEG] is used.
        chunk: Slices encoded at a time; None decides by the memory.
        mode: "reference" or "independent", see `VolumeTrack`.
        keep: Where image features stay: on the "device", on the "host", or "auto" as the device's memory allows.
    """

    def __init__(
        self,
        sam2: SAM2,
        config: SegConfig,
        chunk: int | None = None,
        mode: Mode = "reference",
        keep: Place = "auto",
    ):
        self.sam2 = sam2
        self.config = config
        self.mode = mode
        self.keep = keep
        self.runner = SliceRunner(sam2)
        self._encoder = SliceEncoder(sam2, chunk)
        # A slice and an object at a time keep a CPU's cache; a GPU wants many.
        self._pairs = 64 if sam2.no_mem_embed.is_cuda else 4
        self._chunks = Chunks(self._pairs, "decoding")

    @torch.inference_mode()
    def encode(self, images: Images, slices: int, cancel: Event | None = None) -> KeptFeatures:
        """Image features of all slices, to be kept.

        Args:
            images: Gives slices [start, stop) as (n, 3, R, R), normalised.
            slices: How many there are.
            cancel: Ends the work with `Cancelled` before the next slices once set.
        """
        weight = self.sam2.no_mem_embed
        place = (
            choose_place(self.sam2.config, weight.device, weight.dtype, slices) if self.keep == "auto" else self.keep
        )
        if place == "host":
            return self._encoder.encode_to_host(images, slices, cancel)
        return self._encoder.encode(images, 0, slices, cancel)

    @torch.inference_mode()
    def by_text(self, features: Features, embeddings: Tensor, cancel: Event | None = None) -> list[ObjectSlices]:
        """Objects known by their [SEG] vectors alone, as one batch; as smaller ones where memory does not suffice.

        Every slice is first read without memory; the slice with the best object score then starts the memory, which
        runs both ways from there.

        Args:
            features: S slices.
            embeddings: (B, E, d) prompt tokens.
            cancel: Ends the work with `Cancelled` before the next slice once set.
        """
        try:
            return self._retried(lambda: self._by_text(features, embeddings, cancel))
        except (MemoryError, RuntimeError) as error:
            half = len(embeddings) // 2
            if not half or not out_of_memory(error):
                raise
            logger.warning("out of memory: %d objects as batches of %d", len(embeddings), half)
        free_cached()
        return [found for part in embeddings.split(half) for found in self.by_text(features, part, cancel)]

    def _by_text(self, features: Features, embeddings: Tensor, cancel: Event | None) -> list[ObjectSlices]:
        logits, scores = self._alone(features, Prompts(embeddings=embeddings), cancel)
        starts: list[int | None] = [None] * len(embeddings)
        followed: dict[int, Followed] = {}
        if self.config.use_memory:
            best, where = scores.max(0)
            # An object that no slice shows has nothing to start from, and stays empty.
            starts = [
                int(place) if score > self.config.object_gate else None
                for score, place in zip(best.tolist(), where.tolist())
            ]
            rows = [i for i, start in enumerate(starts) if start is not None]
            if rows:
                some = embeddings[rows]
                tracks = follow_each(
                    self.runner,
                    features,
                    Prompts(embeddings=some),
                    starts=[starts[i] for i in rows],
                    seg_embeddings=some if self.config.every_slice else None,
                    mode=self.mode,
                    cancel=cancel,
                )
                logits[:, rows] = torch.cat([track.logits for track in tracks], 1)
                scores[:, rows] = torch.cat([track.scores for track in tracks], 1)
                if len(tracks) == len(rows):
                    followed = {i: Followed(track, embeddings[i : i + 1]) for i, track in zip(rows, tracks)}
        present = scores > self.config.object_gate
        logits = logits - self.config.mask_threshold
        return [
            ObjectSlices(logits[:, i], scores[:, i], present[:, i], start, followed.get(i))
            for i, start in enumerate(starts)
        ]

    @torch.inference_mode()
    def by_prompts(
        self,
        features: Features,
        prompts: Mapping[int, Prompts],
        start: int | None,
        embeddings: Tensor | None,
        extent: tuple[int, int] | None = None,
        cancel: Event | None = None,
    ) -> ObjectSlices:
        """One object marked by a user on some slices.

        Args:
            features: S slices.
            prompts: Points and boxes by slice, batch 1.
            start: Slice from where the memory runs both ways; None takes the one where the text finds the object best.
            embeddings: (1, E, d) prompt tokens of the text, or None.
            extent: First and last slice of a 3D box, whose sides are the box among `prompts`; the object lies within.
            cancel: Ends the work with `Cancelled` before the next slice once set.
        """
        given = {index: prompt.with_embeddings(embeddings) for index, prompt in prompts.items()}
        if start is None:
            _, scores = self._alone(features, Prompts(embeddings=embeddings), cancel)
            start = int(scores[:, 0].argmax())
            given.setdefault(start, Prompts(embeddings=embeddings))
        if self.config.use_memory or embeddings is None:
            every = embeddings if self.config.every_slice else None
            options = {"start": start, "seg_embeddings": every, "mode": self.mode, "cancel": cancel}
            track = self._retried(lambda: follow(self.runner, features, given, **options))
            return self._followed(Followed(track, embeddings), prompts, extent)
        logits, scores = self._alone(features, Prompts(embeddings=embeddings), cancel)
        for index, prompt in given.items():
            logits[index : index + 1], scores[index : index + 1] = self._alone(features[index], prompt, cancel)
        return self._marked(logits, scores, None, prompts, extent)

    @torch.inference_mode()
    def correct(
        self,
        followed: Followed,
        prompts: Mapping[int, Prompts],
        clicked: Collection[int],
        extent: tuple[int, int] | None = None,
        cancel: Event | None = None,
    ) -> ObjectSlices:
        """Correct an object by further clicks; only what follows from them is computed.

        Args:
            followed: As it was; it stays so.
            prompts: Points and boxes by slice, the earlier ones too, batch 1.
            clicked: Slices that have new ones.
            extent: As in `by_prompts`.
            cancel: Ends the work with `Cancelled` before the next slice once set.
        """

        def correct() -> VolumeTrack:
            track = followed.track.fork(cancel)
            track.correct_all({index: prompts[index].with_embeddings(followed.embeddings) for index in clicked})
            return track

        return self._followed(Followed(self._retried(correct), followed.embeddings), prompts, extent)

    def _retried(self, work: Callable[[], T]) -> T:
        """Do work that leaves nothing behind when it fails; again where memory ran out and recorded loops hold some."""
        had_loops = bool(self.runner.loops)
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not had_loops or not out_of_memory(error):
                raise
        logger.warning("out of memory: once more without the loops recorded before")
        self.runner.forget()
        free_cached()
        return work()

    def _followed(
        self, followed: Followed, prompts: Mapping[int, Prompts], extent: tuple[int, int] | None
    ) -> ObjectSlices:
        track = followed.track
        return self._marked(track.logits, track.scores, followed, prompts, extent)

    def _marked(
        self,
        logits: Tensor,
        scores: Tensor,
        followed: Followed | None,
        prompts: Mapping[int, Prompts],
        extent: tuple[int, int] | None,
    ) -> ObjectSlices:
        """What a user marked, within its box."""
        present = scores[:, 0] > self.config.object_gate
        logits = logits - self.config.mask_threshold
        if extent is not None:
            present[: extent[0]] = present[extent[1] + 1 :] = False
            (box,) = (prompt.boxes[0] for prompt in prompts.values() if prompt.boxes is not None)
            logits = logits.masked_fill(self._outside(box, logits.shape[-1]), NO_OBJECT)
        start = None if followed is None else followed.track.start
        return ObjectSlices(logits[:, 0], scores[:, 0], present, start, followed)

    def _outside(self, box: Tensor, side: int) -> Tensor:
        """(side, side) mask pixels beyond a box in image pixels, one mask pixel of leeway for the interpolation."""
        x0, y0, x1, y1 = (box.float() + 0.5) * side / self.sam2.config.image_size
        at = torch.arange(side, device=box.device) + 0.5
        columns, rows = ((at < low - 1) | (at > high + 1) for low, high in ((x0, x1), (y0, y1)))
        return rows[:, None] | columns

    def _alone(self, features: Features, prompts: Prompts, cancel: Event | None) -> tuple[Tensor, Tensor]:
        """Every slice without memory."""
        objects = prompts.batch_size or 1

        def decode(start: int, stop: int) -> tuple[Tensor, Tensor]:
            part, pairs = features[start:stop], objects * (stop - start)
            return self.sam2.predict_slices(part, prompts, gate_by_object_score=False, max_batch=pairs)

        limit = self._pairs // objects
        logits, scores = zip(*self._chunks.run(decode, 0, len(features), cancel, limit))
        return torch.cat(logits), torch.cat(scores)
