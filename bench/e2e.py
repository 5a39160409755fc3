"""Measures whole requests, from a scan's voxels to masks on its grid and to a report, beside the three parts in a row.

Weights are random, so an answer with [SEG] is put into both sides' mouths: ours reads it in one pass, as `segment` does
with trained weights, and `generate` may choose nothing else. All masks, and all tokens of the report, are compared
before a ratio is given: with each other in float32 on the CPU, elsewhere with what float32 on the CPU gives.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvl_sam2.bench.counting import CountedStages
from medvl_sam2.bench.kernels import Row, environment
from medvl_sam2.bench.language import (
    compared,
    near_exact,
    prompt_rows,
    random_language,
    shipped_tokenizer,
    twin,
    weight_bytes,
)
from medvl_sam2.bench.place import CPU, Place, watched
from medvl_sam2.bench.reference import Mask, Reference
from medvl_sam2.bench.rows import Check, checked, judged, relative_error, typical_error
from medvl_sam2.bench.segmenter import dice, models, placed, randomise, variant_of
from medvl_sam2.bench.timing import copy_rate, gemm_rate, in_turns
from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.geometry import Volume
from medvl_sam2.engine.language.transformers import TransformersBackend
from medvl_sam2.engine.segmentation import Segmentation
from medvl_sam2.engine.session import VolumeSession
from medvl_sam2.engine.text import requested
from medvl_sam2.model.config import MedVLConfig
from medvl_sam2.model.language import LanguageModel
from medvl_sam2.model.modeling import MedVLSAM2, cast_weights
from medvl_sam2.model.processing import ScanArray
from medvl_sam2.model.prompts import REPORT_REQUEST, SEG, SEGMENT_ANSWER, ChatTokens

logger = logging.getLogger(__name__)

REFERENCE, COLD, WARM = "three parts in a row", "ours, new scan", "ours, known scan"
NAMES = (
    *("liver", "spleen", "left kidney", "right kidney", "pancreas", "aorta", "stomach", "gallbladder"),
    *("heart", "left lung", "right lung", "trachea", "esophagus", "bladder", "portal vein", "duodenum"),
)
_LIKING = 30.0


@dataclass(frozen=True)
class Setting:
    """Both sides on the same weights, and a scan.

    Attributes:
        engine: Ours, with the LoRA merged.
        reference: The three parts, with the LoRA unmerged.
        volume: Made up; twice as many slices as the model takes.
        willing: Context within which the weights begin to answer a mask request as trained ones do.
        exact: The same weights and scan in float32 on the CPU, where operations are counted and, in other formats, both
            sides are held to it; None where this is that.
    """

    engine: MedVLEngine
    reference: Reference
    volume: Volume
    willing: Callable[..., Iterator[None]]
    exact: "Setting | None" = None

    @property
    def place(self) -> Place:
        """Where both sides run."""
        return self.reference.place


def measure(
    setting: Setting, *, objects: Sequence[int] = (1, 8), tokens: int = 256, rounds: int = 5
) -> dict[str, list[Row]]:
    """Time requests.

    Args:
        setting: Of `build`.
        objects: Numbers of objects, each measured for itself; at most 16. May be empty.
        tokens: Length of the report; 0 leaves it out.
        rounds: Times that each side runs; the median counts.

    Returns:
        "rows": see `medvl_sam2.bench.rows.judged`; "stages": seconds and floor of each stage of a mask request.

    Raises:
        ValueError: More objects than there are names.
    """
    place = setting.place
    rates = gemm_rate(device=place.device, dtype=place.dtype), copy_rate(device=place.device)
    rows, stages = [], []
    for count in objects:
        found, parts = masks(setting, count, rates, rounds)
        rows, stages = rows + found, stages + parts
    if tokens:
        rows += report(setting, tokens, rounds)
    return {"rows": rows, "stages": stages}


def build(config: MedVLConfig, *, slices: int, side: int = 512, place: Place = CPU) -> Setting:
    """Random weights that keep every part busy, on both sides, and a scan.

    Args:
        config: Shapes; [SEG] takes the id that the tiny preset's tokenizer has for it.
        slices: Axial slices that SAM2 sees.
        side: Side of the scan's slices in voxels.
        place: Where both sides run.

    Raises:
        ValueError: The sam2 package is not installed.
    """
    model, plain, package = random_model(config, slices)
    engine = MedVLEngine(model, device=str(place.device), dtype=place.dtype_name)
    cast_weights(plain.to(place.device), place.dtype)
    if package is not None:
        package = placed(package, place)
    reference = Reference(model, plain, package, place)
    exact = None if place == CPU else build(config, slices=slices, side=side)
    setting = Setting(engine, reference, made_up_scan(slices, side), lambda: None, exact)
    return replace(setting, willing=_willing(setting))


def random_model(config: MedVLConfig, slices: int) -> tuple[MedVLSAM2, LanguageModel, nn.Module | None]:
    """Random weights: the model, its LLM with the LoRA apart, and the package's predictor where it has this SAM2.

    Args:
        config: See `build`.
        slices: See `build`.
    """
    tokenizer = shipped_tokenizer()
    spoken = replace(config.language, seg_token_id=tokenizer.convert_tokens_to_ids(SEG))
    config = replace(config, language=spoken, volume=replace(config.volume, slices=slices))
    plain = random_language(spoken, config.lora, ChatTokens(tokenizer, spoken.system, config.projector.tokens))
    model = MedVLSAM2(config, tokenizer, twin(plain)).eval().requires_grad_(False)
    variant, package = variant_of(config.sam2), None
    if variant is not None:
        package, model.sam2 = models(variant, config.sam2.image_size)
    else:
        randomise(model.sam2)
        logger.warning("%s: the package has no such SAM2; the plain loop of model/sam2 stands for it", config.name)
    return model, plain, package


def made_up_scan(slices: int, side: int) -> Volume:
    """Smooth blobs of soft tissue and fat, (2 slices, side, side) int16, without air around."""
    coarse = torch.randn(1, 1, 8, 16, 16, generator=torch.Generator().manual_seed(3))
    blobs = F.interpolate(coarse, (2 * slices, side, side), mode="trilinear")[0, 0]
    return Volume.from_array((100 * blobs).clamp(-300, 300).to(torch.int16).numpy(), spacing=(2.5, 0.8, 0.8))


def _willing(setting: Setting) -> Callable[[], Iterator[None]]:
    """One row of the output layer that makes the weights begin "It is [SEG]." after every mask request."""
    engine, plain, chat = setting.engine, setting.reference.language, setting.reference.chat
    scan = ScanArray(setting.volume.voxels)
    visual = setting.reference.visual_tokens(scan, engine.processor.transform(scan))
    backend = TransformersBackend(plain, chat, engine.config.seg.convention, merge=False)
    prefix = backend.prefix(visual)
    states = []
    with torch.inference_mode():
        for name in NAMES:
            ids = torch.tensor([chat.question(requested(name)[1])], device=setting.place.device)
            states.append(plain.hidden(plain.embed(ids), deepcopy(prefix.cache))[0, -1])
    # The shortest row that gives these states about the same large logit; how they differ by rounding is left out.
    wanted = torch.full((len(NAMES), 1), _LIKING, dtype=torch.float64)
    least = 1e-3 if setting.place.dtype == torch.float32 else 0.1
    row = torch.linalg.lstsq(torch.stack(states).double().cpu(), wanted, rcond=least, driver="gelsd").solution
    first = chat.answer(SEGMENT_ANSWER)[0]

    @contextmanager
    def willing(language: LanguageModel = plain) -> Iterator[None]:
        weight = language.causal.get_output_embeddings().weight
        with torch.no_grad():
            before = weight[first].clone()
            weight[first] = row[:, 0].to(weight)
        try:
            yield
        finally:
            weight[first] = before

    return willing


def masks(setting: Setting, count: int, rates: tuple[float, float], rounds: int) -> tuple[list[Row], list[Row]]:
    """Rows of a request for the masks of some objects, and of its stages.

    Args:
        setting: Of `build`.
        count: Objects.
        rates: FLOP/s of a large product, bytes/s of a large copy.
        rounds: Times that each side runs.
    """
    if not 1 <= count <= len(NAMES):
        raise ValueError(f"objects: expected 1 to {len(NAMES)}, got {count}")
    engine, volume, names = setting.engine, setting.volume, NAMES[:count]
    known, times = engine.open(volume), []

    def cold() -> list[Segmentation]:
        session = engine.open(volume)
        found = segmented(session, names)
        times.append(dict(session.stages))
        return found

    sides = {
        REFERENCE: lambda: setting.reference.segment(volume, names),
        COLD: cold,
        WARM: lambda: segmented(known, names),
    }
    place, first = setting.place, {}
    with setting.willing():
        for side, request in sides.items():
            if side == WARM:
                # Makes the scan a known one, which is not what its requests are measured for.
                segmented(known, names)
            first[side] = watched(request, place.device)
        times.clear()
        spent = dict(zip(sides, in_turns(list(sides.values()), rounds, place.device)))
        floors = stage_floors(setting, names, rates)
    found = {side: answer for side, (answer, _) in first.items()}
    if setting.exact is None:
        checks = checked(found, distance)
    else:
        judge = setting.exact.reference
        # With the same row, which is an input as well where embeddings are tied.
        with setting.willing(judge.language):
            checks = checked(found, rounded, judge.segment(volume, names))
    config = engine.config
    work = f"{config.name}: {config.volume.slices} slices @{config.sam2.image_size}, masks"
    shown = f"{rates[0] / 1e9:.0f} GFLOP/s, {rates[1] / 1e9:.1f} GB/s"
    rows = _told(judged(work, spent, checks, rate=shown, place=place, objects=count))
    again = ("language", "masks")
    for row in rows:
        rise = first[row["provider"]][1]
        row["peak_mb"] = None if rise is None else rise / 1e6
        row["per_second"] = count / row["seconds"]
        row["floor_seconds"] = sum(
            floor for stage, floor in floors.items() if row["provider"] != WARM or stage in again
        )
        row["over_floor"] = row["seconds"] / row["floor_seconds"]
    stages = []
    for stage in times[0]:
        seconds = sorted(one.get(stage, 0.0) for one in times)[len(times) // 2]
        floor = floors.get(stage)
        part = {"work": work, "objects": count, "stage": stage, "seconds": seconds, "floor_seconds": floor}
        part |= {"over_floor": seconds / floor if floor else None, "correct": checks[COLD].correct}
        stages.append({**part, **environment(place.device)})
    return rows, stages


def _told(rows: list[Row]) -> list[Row]:
    """With how many times as fast a known scan is as a new one in `over_new` of its row, if both are right."""
    new, known = (next(row for row in rows if row["provider"] == side) for side in (COLD, WARM))
    if new["correct"] and known["correct"]:
        known["over_new"] = new["seconds"] / known["seconds"]
    return rows


def segmented(session: VolumeSession, names: Sequence[str]) -> list[Segmentation]:
    """Masks on the scan's own grid.

    Raises:
        RuntimeError: The model had another answer of its own, so that other work was done than is to be measured.
    """
    # An answer of the model's own would be decoded token by token, which a plain request with trained weights is not.
    with patch.object(session, "_own_answer", side_effect=RuntimeError("e2e: the weights began another answer")):
        found = session.segment_all(names)
    if any(one.text != SEGMENT_ANSWER for one in found):
        raise RuntimeError(f"e2e: expected {SEGMENT_ANSWER!r} to every request, got {[one.text for one in found]}")
    with session.stages.measure("voxels"):
        for one in found:
            # Made at its first use, and kept.
            _ = one.mask
    return found


def compare(got: Sequence[Segmentation], want: Sequence[Mask]) -> Check:
    """Check masks of ours against those of the three parts, both in float32."""
    return checked({REFERENCE: want, COLD: got}, distance)[COLD]


def distance(got: Sequence[Segmentation | Mask], want: Sequence[Mask]) -> tuple[float, float]:
    """Worst relative error of the objects' gated logits, and worst Dice on the scan's grid."""
    return _worst(relative_error, got, want)


def rounded(got: Sequence[Segmentation | Mask], want: Sequence[Mask]) -> tuple[float, float]:
    """As `distance` where rounding differs: an object's error is the median over its slices."""
    return _worst(typical_error, got, want)


def _worst(
    error: Callable[[Tensor, Tensor], float], got: Sequence[Segmentation | Mask], want: Sequence[Mask]
) -> tuple[float, float]:
    errors, overlaps = [], []
    for one, other in zip(got, want, strict=True):
        ours = Mask(one.gated_logits, torch.from_numpy(one.mask)) if isinstance(one, Segmentation) else one
        errors.append(error(ours.logits, other.logits))
        overlaps.append(dice(ours.voxels, other.voxels))
    # max() passes over what is not a number.
    return next(filter(math.isnan, errors), max(errors)), min(overlaps)


def stage_floors(setting: Setting, names: Sequence[str], rates: tuple[float, float]) -> dict[str, float]:
    """Seconds below which no stage of a request on a new scan can be: by its products, or by the weights it reads."""
    # Counted on the CPU, where every operation has a formula.
    plan = setting.exact or setting
    session = plan.engine.open(plan.volume)
    session.stages = CountedStages(plan.engine.device)
    with plan.willing():
        session.segment_all(names)
    read = weight_bytes(setting.reference.language.causal) / rates[1]
    floors = {stage: flops / rates[0] for stage, flops in session.stages.flops.items()}
    return {stage: max(floor, read) if stage in ("prefix", "language") else floor for stage, floor in floors.items()}


def report(setting: Setting, tokens: int, rounds: int) -> list[Row]:
    """Rows of a report of a fixed length.

    Args:
        setting: Of `build`.
        tokens: Length.
        rounds: Times that each side runs.
    """
    engine, volume, place = setting.engine, setting.volume, setting.place
    known = engine.open(volume)
    want = setting.reference.report(volume, tokens)
    scan = ScanArray(volume.voxels)
    prefix = engine.language.prefix(
        engine.visual_tokens(engine.processor.encoder_grid(scan, engine.processor.transform(scan)))
    )
    asked = engine.chat.question(REPORT_REQUEST)
    got = [step.token for step in engine.language.generate(prefix, asked, max_tokens=tokens)]
    if setting.exact is None:
        checks = {REFERENCE: compared(want, want, tokens), COLD: compared(got, want, tokens)}
    else:
        exact = setting.exact.reference
        visual = exact.visual_tokens(scan, exact.processor.transform(scan))
        rows = prompt_rows(exact.language, exact.chat, visual, asked)
        checks = near_exact({REFERENCE: want, COLD: got}, exact.language, rows, tokens)
    # A known scan's prefix is the same one, kept.
    checks[WARM] = checks[COLD]
    sides = {
        REFERENCE: lambda: setting.reference.report(volume, tokens),
        COLD: lambda: engine.open(volume).report(max_tokens=tokens),
        WARM: lambda: known.report(max_tokens=tokens),
    }
    known.report(max_tokens=1)
    spent = dict(zip(sides, in_turns(list(sides.values()), rounds, place.device)))
    rows = _told(judged(f"{engine.config.name}: report of {tokens} tokens", spent, checks, place=place))
    for row in rows:
        row["per_second"] = tokens / row["seconds"]
    return rows


def table(stages: Sequence[Row]) -> str:
    """Lay the stages of mask requests out for reading."""
    lines = [f"{'stage of a new scan':20} {'objects':>7} {'s':>9} {'floor s':>9} {'x floor':>8}"]
    for row in stages:
        floor, over = ("-" if row[key] is None else f"{row[key]:.3f}" for key in ("floor_seconds", "over_floor"))
        lines.append(f"{row['stage']:20} {row['objects']:7} {row['seconds']:9.4f} {floor:>9} {over:>8}")
    return "\n".join(lines)
