"""The staged trainer: `medvl-sam2 train`."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from medvl_sam2.engine.files import new_folder
from medvl_sam2.model.config import MedVLConfig
from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.model.presets import preset
from medvl_sam2.training import precision
from medvl_sam2.training.batches import Batches
from medvl_sam2.training.config import TrainConfig, load_config
from medvl_sam2.training.corpus import text_corpus, train_tokenizer
from medvl_sam2.training.datasets.batches import ManifestBatches
from medvl_sam2.training.datasets.build import build_real
from medvl_sam2.training.distributed import World, join
from medvl_sam2.training.loop import run_phase
from medvl_sam2.training.objectives import JointObjective
from medvl_sam2.training.pretrain import pretrain_language, pretrain_sam2, pretrain_vision
from medvl_sam2.training.stages import set_trainable
from medvl_sam2.training.store import PhantomStore

logger = logging.getLogger(__name__)

STAGES = ("stage1", "stage2", "stage3")
PHASES = ("sam2", "language", "vision", *STAGES)
# Texts that the tokenizer is made from.
_TOKENIZER_PHANTOMS = 3000


def run(
    config: str | TrainConfig,
    out: str | Path,
    overrides: list[str] | tuple[str, ...] = (),
    *,
    until: str | None = None,
    settings: MedVLConfig | None = None,
) -> Path:
    """Train from nothing to a model directory, or go on where a killed run stopped.

    Under torchrun or `accelerate launch` the processes train together.

    Args:
        config: Name of a shipped config, YAML file, or a ready config.
        out: Folder of the run: phantoms, checkpoints, logs, and at the end `model/`.
        overrides: `a.b=c` settings on top of the config.
        until: Last phase to run, so that each stage can have a command of its own; all of them by default.
        settings: Shapes of a fresh model in place of the preset's.

    Returns:
        The model directory.

    Raises:
        ValueError: Bad config, or `until` is no phase.
        InputError: The folder holds phantoms of other settings, or cannot be written.
    """
    config = config if isinstance(config, TrainConfig) else load_config(config, overrides)
    phases = check(config, until)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if config.threads:
        torch.set_num_threads(config.threads)
    world = join(config.device)
    model, batches = build(config, out, settings, world)
    for phase in phases:
        run_one(phase, model, batches, config, out, world)
    if world.is_main:
        # An earlier run up to another phase may have left a model there.
        with new_folder(out / "model", replace=True) as part:
            model.save_pretrained(part)
    world.barrier()
    return out / "model"


def check(config: TrainConfig, until: str | None = None) -> tuple[str, ...]:
    """Find out before the work begins whether a run can be: returns its phases up to `until`.

    Raises:
        ValueError: A setting that does not exist, or `until` is no phase.
    """
    precision.check(config.precision, config.parallel)
    phases = STAGES if config.data.source else PHASES
    if until is not None and until not in phases:
        raise ValueError(f"until: expected one of {', '.join(phases)}, got {until!r}")
    return phases if until is None else phases[: phases.index(until) + 1]


def build(
    config: TrainConfig, out: Path, settings: MedVLConfig | None = None, world: World | None = None
) -> tuple[MedVLSAM2, Batches | ManifestBatches]:
    """Model with its tokenizer, and the batches of a run.

    A run on phantoms begins with a fresh model, and renders them if needed; one on real scans with the weights that
    `preset` names.
    """
    world = world or World()
    if not world.is_main:
        # The first process renders or prepares; the others then find all of it.
        world.barrier()
    torch.manual_seed(config.seed)
    built = build_real(config, out) if config.data.source else _build_fresh(config, out, settings)
    if world.is_main:
        world.barrier()
    return built


def _build_fresh(config: TrainConfig, out: Path, settings: MedVLConfig | None) -> tuple[MedVLSAM2, Batches]:
    settings = settings or preset(config.preset)
    store = PhantomStore(Path(config.data.cache or out / "phantoms"), settings, config.data)
    store.prepare()
    seeds = range(config.data.first_seed, config.data.first_seed + _TOKENIZER_PHANTOMS)
    tokenizer = train_tokenizer(text_corpus(seeds), settings.language.config["vocab_size"])
    model = MedVLSAM2(settings, tokenizer)
    return model, Batches(store, settings, model.chat, config)


def run_one(
    phase: str,
    model: MedVLSAM2,
    batches: Batches | ManifestBatches,
    config: TrainConfig,
    out: Path,
    world: World | None = None,
) -> None:
    """Run one phase, or load it where its checkpoint is complete.

    Raises:
        ValueError: Unknown phase.
    """
    if phase not in PHASES:
        raise ValueError(f"phase: expected one of {', '.join(PHASES)}, got {phase!r}")
    # Heads made for a phase begin alike whether or not earlier phases ran in this process.
    torch.manual_seed(config.seed * 1_000_003 + PHASES.index(phase))
    pretraining: dict[str, Callable[..., None]] = {
        "language": pretrain_language,
        "vision": pretrain_vision,
        "sam2": pretrain_sam2,
    }
    if phase in pretraining:
        pretraining[phase](model, batches, config, out, world)
        return
    set_trainable(model, phase)
    run_phase(phase, JointObjective(model, config.loss), batches.stage(phase), config, out, world)
