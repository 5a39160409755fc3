"""Batches of the paper's stages from real scans, as functions of the step number alone."""

import logging
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from medvl_sam2.engine.geometry import InputError
from medvl_sam2.model.config import MedVLConfig
from medvl_sam2.model.processing import VolumeProcessor
from medvl_sam2.model.prompts import ChatTokens
from medvl_sam2.training.augment import NONE, Chances, Intensity, View, draw_intensity, draw_view, swap_sides
from medvl_sam2.training.batches import JointBatch
from medvl_sam2.training.clips import PromptKind, join_clips, make_clip, prompt_kind, spatial_prompt, windowed
from medvl_sam2.training.config import PhaseConfig, TrainConfig
from medvl_sam2.training.datasets.base import Record
from medvl_sam2.training.datasets.features import FeatureCache
from medvl_sam2.training.datasets.store import ManifestStore, RealSample
from medvl_sam2.training.datasets.turns import descriptions_of, requests, text_turns
from medvl_sam2.training.packing import pack
from medvl_sam2.training.segmentation import Clips

logger = logging.getLogger(__name__)

_TAGS = {"stage1": 13, "stage2": 14, "stage3": 15}
# Broken scans in a row after which the data, not a scan, are at fault.
_TRIES = 16


class ManifestBatches:
    """Makes the batches of the three stages from a manifest.

    Epochs are permutations of the scans a stage can use; batch `s` depends on the seed and `s` alone, so a run that
    is resumed in the middle of an epoch goes on with the same batches.

    Args:
        store: Scans of one split.
        model: Model config.
        chat: Token ids of conversations.
        config: Of the run.
        chances: Of the random views; M3D's by default.
        features: Kept features of the frozen encoder for stage 1, whose scans are then seen unchanged.
    """

    def __init__(
        self,
        store: ManifestStore,
        model: MedVLConfig,
        chat: ChatTokens,
        config: TrainConfig,
        *,
        chances: Chances | None = None,
        features: FeatureCache | None = None,
    ):
        self.store, self.model, self.chat, self.config = store, model, chat, config
        self.chances = Chances() if chances is None else chances
        self.features = features
        self.processor = VolumeProcessor(model)
        self._usable: dict[str, np.ndarray] = {}
        self._order: tuple[tuple[str, int], np.ndarray] = (("", -1), np.empty(0))

    def usable(self, stage: str) -> np.ndarray:
        """Positions of the scans that a stage can use: with a report, with any text, or with anything at all.

        Raises:
            InputError: None of the split's scans.
        """
        if not self._usable:
            # One pass for all stages: a manifest with millions of texts takes a while to read.
            fitting = np.array([_stages(self.store.record(index)) for index in range(len(self.store))], bool)
            columns = fitting.reshape(-1, len(_TAGS)).T
            self._usable = {name: np.flatnonzero(column) for name, column in zip(_TAGS, columns)}
        if not len(self._usable[stage]):
            raise InputError(
                f"{self.store.manifest.path}: no scan with what {stage} needs; see 'medvl-sam2 data stats'"
            )
        return self._usable[stage]

    def stage(self, name: str) -> Callable[[int], JointBatch]:
        """Batches of one of the paper's stages: "stage1", "stage2" or "stage3"."""
        phase: PhaseConfig = getattr(self.config, name)
        if phase.steps:
            # Found out here, before the workers fork.
            self.usable(name)
        return partial(self._batch, name, phase)

    def _batch(self, stage: str, phase: PhaseConfig, step: int) -> JointBatch:
        kind = prompt_kind(np.random.default_rng([self.config.seed, _TAGS[stage], 2, step]))
        features = self.features if stage == "stage1" else None
        chances = NONE if features is not None else self.chances
        grids, turns, clips, kept, names = [], [], [], [], []
        for place, rng in self._drawn(stage, phase, step):
            sample = self._sample(stage, place)
            names.append(sample.record.id)
            view = draw_view(_said(sample), rng, chances)
            words = swap_sides if view.swaps_sides else str
            asked = requests(sample, phase.requests, rng, words, marked=kind.points > 0) if stage == "stage3" else []
            told = text_turns(sample.record, phase.report, phase.questions, rng, words)
            # A sequence without an answer would teach nothing, and a batch of them has no loss.
            if not told and not asked:
                told = text_turns(sample.record, 1.0, 1, rng, words)
            turns.append(told + [(request.text, request.answer) for request in asked])
            intensity = draw_intensity(rng, chances)
            grids.append(self._grid(sample, view, intensity))
            if targets := [target for request in asked for _, target, _ in request.targets]:
                clips.append(self._clip(sample, targets, kind, view, intensity, rng))
            if features is not None:
                kept.append(features.load(sample.record.id))
        return JointBatch(
            torch.stack(grids),
            pack(self.chat, turns),
            join_clips(clips, kind) if clips else None,
            torch.stack(kept) if kept else None,
            tuple(names),
        )

    def _drawn(self, stage: str, phase: PhaseConfig, step: int) -> list[tuple[int, np.random.Generator]]:
        usable, tag = self.usable(stage), _TAGS[stage]
        drawn = []
        for n in range(step * phase.batch, (step + 1) * phase.batch):
            epoch, place = divmod(n, len(usable))
            if self._order[0] != (stage, epoch):
                order = np.random.default_rng([self.config.seed, tag, epoch]).permutation(len(usable))
                self._order = (stage, epoch), order
            drawn.append((int(self._order[1][place]), np.random.default_rng([self.config.seed, tag, 1, n])))
        return drawn

    def _sample(self, stage: str, place: int) -> RealSample:
        """A scan; a broken one is named and the next that can be read takes its place, in every run alike."""
        usable = self.usable(stage)
        for attempt in range(min(_TRIES, len(usable))):
            try:
                return self.store[int(usable[(place + attempt) % len(usable)])]
            except InputError as error:
                logger.warning("%s; another scan takes its place", error)
                last = error
        raise last

    def _grid(self, sample: RealSample, view: View, intensity: Intensity) -> Tensor:
        hu = torch.from_numpy(view.apply(sample.grid).astype(np.float32))
        window = self.model.volume.window
        return windowed(intensity.apply(hu, window), window)[None]

    def _clip(
        self,
        sample: RealSample,
        names: list[str],
        kind: PromptKind,
        view: View,
        intensity: Intensity,
        rng: np.random.Generator,
    ) -> Clips:
        length, side = self.config.data.run_length, self.model.sam2.image_size
        start, backwards = _run_start(sample, names, length, marked=kind.points > 0, rng=rng)
        stop = min(start + length, sample.depth)
        stack, layers = sample.slices(start, stop)
        # A scan of fewer slices than a run repeats its last one.
        order = np.minimum(np.arange(length), stop - start - 1)
        order = order[::-1] if backwards else order
        hu = torch.from_numpy(view.apply(stack[order]).astype(np.float32))
        if hu.shape[-1] != side:
            hu = F.interpolate(hu[:, None], (side, side), mode="bilinear")[:, 0]
        masks = [np.ascontiguousarray(view.apply(sample.mask(name, layers)[order])) for name in names]
        prompts = [spatial_prompt(mask[0], kind.points, rng) for mask in masks]
        hu = intensity.apply(hu, self.model.volume.window)
        return make_clip(hu, masks, prompts, kind, self.processor, self.model)


def _stages(record: Record) -> tuple[bool, bool, bool]:
    """Whether each stage can use a record."""
    told = any(text.kind != "referring" for text in record.texts)
    return any(text.kind == "report" for text in record.texts), told, told or bool(record.masks)


def _said(sample: RealSample) -> list[str]:
    """All that may be said of a scan: its texts, the names of its classes and their descriptions."""
    record = sample.record
    said = [part for text in record.texts for part in (text.question or "", text.answer, *(text.choices or ()))]
    names = [*sample.names, *sample.empty, *record.classes]
    return [*said, *names, *(text for name in names for text in descriptions_of(name, sample.terms))]


def _run_start(
    sample: RealSample, names: list[str], length: int, *, marked: bool, rng: np.random.Generator
) -> tuple[int, bool]:
    """First slice of a run that most likely shows what is asked for, and whether it is gone through backwards."""
    backwards = bool(rng.random() < 0.5)
    starts = max(1, sample.depth - length + 1)
    present = np.stack([sample.counts[name] > 0 for name in names]).astype(float)
    if marked:
        # An object can be marked on the first slice only where it is there.
        first = np.minimum(np.arange(starts) + (length - 1 if backwards else 0), sample.depth - 1)
        weights = present[:, first].sum(0)
    else:
        reach = np.lib.stride_tricks.sliding_window_view(np.pad(present, ((0, 0), (0, length - 1))), length, axis=1)
        weights = reach.any(-1)[:, :starts].sum(0)
    weights = weights + 0.05
    return int(rng.choice(starts, p=weights / weights.sum())), backwards
