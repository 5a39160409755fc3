"""Batches of every training phase, as functions of the step number alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medvl_sam2.model.config import MedVLConfig
from medvl_sam2.model.processing import VolumeProcessor
from medvl_sam2.model.prompts import REPORT_REQUEST, ChatTokens, with_choices
from medvl_sam2.training.clips import PromptKind, join_clips, make_clip, prompt_kind, spatial_prompt, windowed
from medvl_sam2.training.config import PhaseConfig, TrainConfig
from medvl_sam2.training.corpus import synthetic_facts
from medvl_sam2.training.facts import fact_rows, fact_vector
from medvl_sam2.training.packing import TextBatch, pack
from medvl_sam2.training.phantom import FINDINGS, STRUCTURES
from medvl_sam2.training.phantom_findings import MASKED
from medvl_sam2.training.questions import make_questions
from medvl_sam2.training.reports import write_report
from medvl_sam2.training.requests import make_requests
from medvl_sam2.training.segmentation import Clips
from medvl_sam2.training.store import PhantomStore, Sample
from medvl_sam2.training.terms import FINDING_TERMS, PHASES, PLACES, REGION_WORDS, SIDES, STRUCTURE_TERMS

Target = tuple[str, str, str | None]

# Classes of the dense and promptable pre-training: every structure, then every finding that has a mask.
CLASSES: tuple[Target, ...] = (
    *(("structure", name, None) for name in STRUCTURES),
    *(("finding", name, None) for name in MASKED),
)
# A finding of this many voxels counts as if it filled its eighth of a patch.
_FINDING_VOXELS = 6
# Multiple choice is the hardest to learn: the answer, its place among the choices, and that place's letter.
_QUESTION_WEIGHTS = {"multiple_choice": 3.0, "short": 1.0, "long": 0.5}
# Turns about the letters of choices, in a sequence of the first part of the language steps and of the rest. From a few
# among other turns the letters are not learnt at all.
_DRILL_STEPS, _DRILLS_FIRST, _DRILLS_LATER = 0.15, 12, 3
_DRILL_WORDS = (
    *2 * (tuple(STRUCTURE_TERMS),),
    *2 * (tuple(f"{side} {term.noun}" for term in FINDING_TERMS.values() for side in SIDES),),
    (*SIDES, "both sides"),
    tuple(f"{side} {place}" for side in SIDES for places in PLACES.values() for place in places),
    PHASES,
    tuple(REGION_WORDS.values()),
)
# Share of the vision steps on crops, and of the crops that hold a finding where the scan has one.
_CROP_STEPS, _CROP_FOUND = 0.72, 0.75


@dataclass
class LanguageBatch:
    """Turns about scans of which only the facts are given.

    Attributes:
        text: Packed turns behind the visual placeholders.
        rows: (B, visual tokens, len(FACTS)) how much each placeholder says of each fact, about 0 to 1.
        classes: (N,) index into `CLASSES` of what each [SEG] token stands for, in reading order.
    """

    text: TextBatch
    rows: Tensor
    classes: Tensor


@dataclass
class VisionBatch:
    """Encoder grids, or crops of them, with what each patch and each scan holds.

    Attributes:
        grid: (B, 1, D, H, W) in 0-1.
        patches: (B, T, 8 * len(CLASSES)) share of each class in each eighth of each patch.
        facts: (B, len(FACTS)) 0 or 1; None for crops, which do not show all.
        tokens: (B, T) place of each patch of a crop in the whole grid; None for whole grids.
        names: Of the scans.
    """

    grid: Tensor
    patches: Tensor
    facts: Tensor | None
    tokens: Tensor | None = None
    names: tuple[str, ...] = ()


@dataclass
class ClassBatch:
    """Clips with the classes asked for.

    Attributes:
        clips: See `Clips`.
        classes: (N,) index into `CLASSES`.
        dense: (V, T, m, m) class of each mask pixel, 0 background, else 1 + index.
        names: Of the scans.
    """

    clips: Clips
    classes: Tensor
    dense: Tensor
    names: tuple[str, ...] = ()


@dataclass
class JointBatch:
    """Scans with their text and, in stage 3, their clips.

    Attributes:
        grid: (B, 1, D, H, W) in 0-1.
        text: Packed turns; [SEG] tokens in the order of `clips.owner`.
        clips: None in text-only batches.
        features: (B, T, C) of the frozen image encoder, where they are kept; it need not run then.
        names: Of the scans.
    """

    grid: Tensor
    text: TextBatch
    clips: Clips | None
    features: Tensor | None = None
    names: tuple[str, ...] = ()


class Batches:
    """Makes batches from stored phantoms.

    Args:
        store: Rendered phantoms.
        model: Model config.
        chat: Token ids of conversations; None for the phases without text.
        config: Of the run.
    """

    def __init__(self, store: PhantomStore, model: MedVLConfig, chat: ChatTokens | None, config: TrainConfig):
        self.store, self.model, self.chat, self.config = store, model, chat, config
        self.processor = VolumeProcessor(model)
        self._order: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.empty(0))

    def _samples(self, step: int, phase: PhaseConfig, tag: int) -> list[tuple[Sample, np.random.Generator]]:
        drawn = []
        for n in range(step * phase.batch, (step + 1) * phase.batch):
            epoch, place = divmod(n, len(self.store))
            if self._order[0] != (tag, epoch):
                order = np.random.default_rng([self.config.seed, tag, epoch]).permutation(len(self.store))
                self._order = (tag, epoch), order
            rng = np.random.default_rng([self.config.seed, tag, 1, n])
            drawn.append((self.store[int(self._order[1][place])], rng))
        return drawn

    def language(self, step: int) -> LanguageBatch:
        """Turns about drawn facts, without scans: what the LLM knows before it sees any image."""
        phase = self.config.language
        drilled = step < _DRILL_STEPS * phase.steps
        turns, rows, classes = [], [], []
        for n in range(step * phase.batch, (step + 1) * phase.batch):
            rng = np.random.default_rng([self.config.seed, 0, 1, n])
            facts = synthetic_facts(rng)
            requests = self._requests(facts, phase, rng)
            turns.append(_letter_drills(_DRILLS_FIRST if drilled else _DRILLS_LATER, rng))
            turns[-1] += [] if drilled else self._text_turns(facts, phase, rng)
            turns[-1] += [(request.text, request.answer) for request in requests]
            classes += [CLASSES.index((kind, name, None)) for r in requests for kind, name, _ in r.targets]
            rows.append(torch.from_numpy(fact_rows(facts, self.chat.visual_tokens, rng)))
        return LanguageBatch(pack(self.chat, turns), torch.stack(rows), torch.tensor(classes, dtype=torch.long))

    def vision(self, step: int) -> VisionBatch:
        """Grids with the content of every patch; crops of them at first.

        A finding fills a few patches of a whole scan, and attention over the others costs most of a step. Crops around
        findings show several times as many of them for the same work; whole scans then teach what only they tell.
        """
        phase = self.config.vision
        cropped = bool(phase.crops) and step < _CROP_STEPS * phase.steps
        drawn = self._samples(step, replace(phase, batch=phase.crops) if cropped else phase, 6 if cropped else 1)
        names = _names(drawn)
        if cropped:
            crops = [self._crop(sample, rng) for sample, rng in drawn]
            grids, patches, tokens = (torch.stack(parts) for parts in zip(*crops))
            return VisionBatch(windowed(grids, self.model.volume.window)[:, None], patches, None, tokens, names)
        patches = torch.stack([self._patch_shares(s.grid_structures, s.grid_findings) for s, _ in drawn])
        facts = torch.stack([torch.from_numpy(fact_vector(sample.facts)) for sample, _ in drawn])
        return VisionBatch(self._grids(drawn), patches, facts, names=names)

    def sam2(self, step: int) -> ClassBatch:
        """Clips with clicks, boxes and class prompts."""
        phase = self.config.sam2
        drawn = self._samples(step, phase, 2)
        kind = prompt_kind(np.random.default_rng([self.config.seed, 2, 2, step]))
        clips, classes, dense = [], [], []
        for sample, rng in drawn:
            run = _Run(sample, rng)
            visible = [i for i, target in enumerate(CLASSES) if run.mask(target)[0].any()]
            anywhere = [i for i, target in enumerate(CLASSES) if run.mask(target).any()]
            chosen = _choose(rng, visible, anywhere, phase.requests, semantic=kind.semantic, spatial=kind.points > 0)
            clips.append(self._clip(run, [CLASSES[i] for i in chosen], kind, rng))
            classes += chosen
            dense.append(run.dense(self.model.sam2.mask_size))
        return ClassBatch(join_clips(clips, kind), torch.tensor(classes), torch.stack(dense), _names(drawn))

    def stage(self, name: str) -> Callable[[int], JointBatch]:
        """Batches of one of the paper's stages: "stage1", "stage2" or "stage3"."""
        phase: PhaseConfig = getattr(self.config, name)
        tag = 2 + int(name[-1])
        return lambda step: self._joint(step, phase, tag, segmentation=name == "stage3")

    def _joint(self, step: int, phase: PhaseConfig, tag: int, *, segmentation: bool) -> JointBatch:
        drawn = self._samples(step, phase, tag)
        kind = prompt_kind(np.random.default_rng([self.config.seed, tag, 2, step]))
        turns, clips = [], []
        for sample, rng in drawn:
            turns.append(self._text_turns(sample.facts, phase, rng))
            if segmentation:
                requests = self._requests(sample.facts, phase, rng)
                turns[-1] += [(request.text, request.answer) for request in requests]
                targets = [target for request in requests for target in request.targets]
                clips.append(self._clip(_Run(sample, rng, targets), targets, kind, rng))
        joined = join_clips(clips, kind) if segmentation else None
        return JointBatch(self._grids(drawn), pack(self.chat, turns), joined, names=_names(drawn))

    def _text_turns(self, facts: dict[str, Any], phase: PhaseConfig, rng: np.random.Generator) -> list[tuple[str, str]]:
        turns = []
        if rng.random() < phase.report:
            turns.append((REPORT_REQUEST, write_report(facts, rng)))
        if phase.questions:
            questions = make_questions(facts, rng)
            weights = np.array([_QUESTION_WEIGHTS[question.kind] for question in questions])
            count = min(phase.questions, len(questions))
            for i in rng.choice(len(questions), count, replace=False, p=weights / weights.sum()):
                question = questions[i]
                text = with_choices(question.text, question.choices) if question.choices else question.text
                turns.append((text, question.answer))
        return turns

    def _requests(self, facts: dict[str, Any], phase: PhaseConfig, rng: np.random.Generator) -> list[Any]:
        requests = make_requests(facts, rng) if phase.requests else []
        return [requests[i] for i in rng.permutation(len(requests))[: phase.requests]]

    def _grids(self, drawn: list[tuple[Sample, np.random.Generator]]) -> Tensor:
        grids = torch.stack([_scanner(sample.grid, rng) for sample, rng in drawn])
        return windowed(grids, self.model.volume.window)[:, None]

    def _clip(self, run: "_Run", targets: list[Target], kind: PromptKind, rng: np.random.Generator) -> Clips:
        masks = [run.mask(target) for target in targets]
        prompts = [spatial_prompt(mask[0], kind.points, rng) for mask in masks]
        return make_clip(_scanner(run.hu, rng), masks, prompts, kind, self.processor, self.model)

    def _crop(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """HU, patch shares and place of half the grid along every axis, around a finding if there is one."""
        patch = np.array(self.model.volume.patch)
        counts = np.array(self.model.volume.size) // patch
        half = counts // 2
        corner = rng.integers(0, counts - half + 1)
        found = np.flatnonzero(sample.grid_findings)
        if len(found) and rng.random() < _CROP_FOUND:
            kinds = sample.grid_findings.ravel()[found]
            found = found[kinds == rng.choice(np.unique(kinds))]
            spot = np.array(np.unravel_index(rng.choice(found), sample.grid_findings.shape))
            corner = np.clip(spot // patch - rng.integers(0, half), 0, counts - half)
        part = tuple(slice(low, high) for low, high in zip(corner * patch, (corner + half) * patch))
        tokens = np.ravel_multi_index(np.indices(half).reshape(3, -1) + corner[:, None], tuple(counts))
        shares = self._patch_shares(sample.grid_structures[part], sample.grid_findings[part])
        return _scanner(sample.grid[part], rng), shares, torch.from_numpy(tokens)

    def _patch_shares(self, grid_structures: np.ndarray, grid_findings: np.ndarray) -> Tensor:
        """(T, 8 * len(CLASSES)): share of each class in each eighth of each patch of a grid or a part of one."""
        size, patch = grid_structures.shape, self.model.volume.patch
        eighths = tuple(2 * n // p for n, p in zip(size, patch))
        block = np.arange(math.prod(eighths)).reshape(eighths)
        for axis, p in enumerate(patch):
            block = np.repeat(block, p // 2, axis)

        def count(labels: np.ndarray, classes: int) -> np.ndarray:
            flat = np.bincount((block * (classes + 1) + labels).ravel(), minlength=math.prod(eighths) * (classes + 1))
            halves = [n for whole in eighths for n in (whole // 2, 2)]
            counts = flat.reshape(*halves, classes + 1)[..., 1:].transpose(0, 2, 4, 1, 3, 5, 6)
            return counts.reshape(-1, 8, classes)

        structures = count(grid_structures, len(STRUCTURES)) / (math.prod(patch) / 8)
        findings = np.minimum(count(grid_findings, len(MASKED)) / _FINDING_VOXELS, 1.0)
        return torch.from_numpy(np.concatenate([structures, findings], -1)).float().flatten(1)


def _letter_drills(count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Turns that ask which letter a choice has: the half of multiple choice that needs no scan."""
    drills = []
    for _ in range(count):
        words = _DRILL_WORDS[int(rng.integers(len(_DRILL_WORDS)))]
        choices = [words[i] for i in rng.permutation(len(words))[: rng.integers(2, 5)]]
        place = int(rng.integers(len(choices)))
        text = with_choices(f"Which choice says {choices[place]}?", choices)
        drills.append((text, f"{ascii_uppercase[place]}. {choices[place]}"))
    return drills


def _names(drawn: list[tuple[Sample, np.random.Generator]]) -> tuple[str, ...]:
    return tuple(f"phantom {sample.facts['seed']}" for sample, _ in drawn)


class _Run:
    """One run of consecutive slices of a sample, in one of the two directions."""

    def __init__(self, sample: Sample, rng: np.random.Generator, targets: list[Target] | None = None):
        runs = sample.slices.shape[0]
        order = slice(None, None, int(rng.choice([1, -1])))
        self.midline = sample.midline
        weights = np.ones(runs)
        if targets:
            # Prefer the run that shows most of what is asked for.
            for run in range(runs):
                self._take(sample, run, order)
                weights[run] += 3 * sum(self.mask(target).any() for target in targets)
        self._take(sample, int(rng.choice(runs, p=weights / weights.sum())), order)

    def _take(self, sample: Sample, run: int, order: slice) -> None:
        self.hu = sample.slices[run][order]
        self.structures = sample.slice_structures[run][order]
        self.findings = sample.slice_findings[run][order]

    def mask(self, target: Target) -> np.ndarray:
        """(T, R, R) bool."""
        kind, name, side = target
        mask = self.structures == STRUCTURES[name] if kind == "structure" else self.findings == FINDINGS[name]
        if side is None or kind == "structure":
            return mask
        left = np.arange(mask.shape[-1]) + 0.5 > self.midline * mask.shape[-1]
        return mask & (left if side == "left" else ~left)

    def dense(self, size: int) -> Tensor:
        """(T, size, size) class per mask pixel; a finding wins over its structure."""
        step = self.structures.shape[-1] // size
        near = slice(step // 2, None, step)
        structures, findings = self.structures[:, near, near], self.findings[:, near, near]
        labels = np.where(findings > 0, findings.astype(np.int64) + len(STRUCTURES), structures)
        return torch.from_numpy(labels.astype(np.int64))


def _choose(
    rng: np.random.Generator, visible: list[int], anywhere: list[int], count: int, *, semantic: bool, spatial: bool
) -> list[int]:
    pool = visible if spatial else anywhere
    if not pool:
        pool = list(range(len(CLASSES)))
    # Findings are rare and small: half again as likely as a structure.
    weights = np.array([1.5 if CLASSES[i][0] == "finding" else 1.0 for i in pool])
    chosen = [int(i) for i in rng.choice(pool, count, p=weights / weights.sum(), replace=len(pool) < count)]
    if semantic and not spatial:
        absent = rng.random(count) < 0.2
        chosen = [int(rng.integers(len(CLASSES))) if a else c for a, c in zip(absent, chosen)]
    return chosen


def _scanner(hu: np.ndarray, rng: np.random.Generator) -> Tensor:
    """HU with the differences between scanners: offset, gain and noise."""
    values = torch.from_numpy(hu.astype(np.float32))
    noise = torch.from_numpy(rng.standard_normal(values.shape, dtype=np.float32))
    return values * float(rng.normal(1, 0.02)) + float(rng.normal(0, 8)) + noise * float(rng.uniform(0, 12))
