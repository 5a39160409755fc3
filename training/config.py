"""Training configuration: YAML over one schema, with `--set a.b=c` on top."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).resolve().parent / "configs"


@dataclass
class DataConfig:
    """What a run learns from: phantoms, or the real scans of a manifest.

    Attributes:
        source: Manifest of real scans (`medvl-sam2 data index`) for the paper's stages; phantoms when empty.
        split: Of the manifest.
        augment: Random views of real scans.
        features: Keep the frozen image encoder's features for stage 1, whose real scans are then seen unchanged.
        first_seed: Seeds first_seed ... first_seed + phantoms - 1, below the evaluation seeds.
        phantoms: How many.
        rich: Share of the phantoms drawn with four to six findings: as drawn, most show none or one, and a finding is
            learnt from the scans that show it.
        runs: Runs of consecutive slices kept per phantom.
        run_length: Slices in a run.
        cache: Folder of rendered phantoms, `<out>/phantoms` when empty; or of prepared scans, `<out>/scans`.
        workers: Processes that render the phantoms, or that prepare and load real scans.
    """

    source: str = ""
    split: str = "train"
    augment: bool = True
    features: bool = False
    first_seed: int = 0
    phantoms: int = 3000
    rich: float = 0.0
    runs: int = 3
    run_length: int = 4
    cache: str = ""
    workers: int = 2


@dataclass
class PhaseConfig:
    """One phase of training.

    Attributes:
        steps: Optimiser steps; 0 skips the phase.
        batch: Volumes (text sequences for `language`) per batch.
        accumulate: Batches per step in each process; a step of N processes takes N times as many.
        lr: Peak learning rate, after warm-up; cosine to zero.
        warmup: Share of the steps with rising learning rate.
        weight_decay: AdamW's.
        beta2: AdamW's decay of squared gradients; 0.98 forgets faster, which short runs need.
        ema: Decay of a moving average of the weights that the phase ends with; 0 keeps the last weights.
        clip: Largest gradient norm.
        questions: Question turns packed behind one scan.
        requests: Segmentation requests packed behind one scan (stage 3), or objects per clip (sam2).
        report: Chance that a sequence holds the report.
        crops: Crops of an eighth of the grid per batch in the first part of the steps (vision); 0 takes whole volumes
            throughout.
    """

    steps: int = 1000
    batch: int = 4
    accumulate: int = 1
    lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    beta2: float = 0.98
    ema: float = 0.0
    clip: float = 1.0
    questions: int = 6
    requests: int = 6
    report: float = 1.0
    crops: int = 0


@dataclass
class LossConfig:
    """Weights of the joint loss.

    CE, BCE and Dice are LISA's, Sa2VA's and UniBiomed's defaults; the paper does not disclose its own. The object score
    and IoU heads are SAM2's and get small weights, since slices without the object need a decision.
    """

    ce: float = 1.0
    bce: float = 2.0
    dice: float = 0.5
    object_score: float = 0.2
    iou: float = 0.05


@dataclass
class TrainConfig:
    """A whole run.

    Attributes:
        preset: Model preset to build; for real scans the preset or directory whose weights are trained on.
        seed: Of initial weights, batches and texts.
        device: "auto", "cpu" or a CUDA device.
        parallel: How several processes share the model: "ddp" (a copy each) or "fsdp" (FSDP2, shards).
        precision: "fp32"; "bf16" or "fp16" (autocast, fp16 with loss scaling); "bf16-pure" (bf16 weights, float32
            copies of the trained ones for the optimiser).
        checkpoint_activations: Keep only the inputs of transformer blocks for the backward and compute the rest again.
        fused: Use the fused operations of `kernels/`; False takes plain PyTorch throughout.
        threads: Torch threads; 0 keeps torch's choice.
        save_every: Steps between checkpoints.
        log_every: Steps between log rows.
        wandb: Project of Weights & Biases to log to as well; empty for none.
    """

    preset: str = "tiny"
    seed: int = 0
    device: str = "auto"
    parallel: str = "ddp"
    precision: str = "fp32"
    checkpoint_activations: bool = False
    fused: bool = True
    threads: int = 0
    save_every: int = 200
    log_every: int = 20
    wandb: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    language: PhaseConfig = field(default_factory=PhaseConfig)
    vision: PhaseConfig = field(default_factory=PhaseConfig)
    sam2: PhaseConfig = field(default_factory=PhaseConfig)
    stage1: PhaseConfig = field(default_factory=PhaseConfig)
    stage2: PhaseConfig = field(default_factory=PhaseConfig)
    stage3: PhaseConfig = field(default_factory=PhaseConfig)


def load_config(name: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Read a shipped config by name or a YAML file, then apply `a.b=c` overrides.

    The key `base` of a file names another that it changes.

    Raises:
        ValueError: No such file, an unknown key (the nearest is named) or a value of the wrong type.
    """
    path = CONFIGS / f"{name}.yaml" if (CONFIGS / f"{name}.yaml").is_file() else Path(name)
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise ValueError(f"config: expected one of {shipped} or a YAML file, got {str(name)!r}")
    values = _parsed(path.read_text(), str(path)) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected sections and settings, got {values!r}; see {CONFIGS} for examples")
    base = values.pop("base", None)
    config = TrainConfig() if base is None else load_config(base)
    _update(config, values, str(path))
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"set: expected key=value, got {override!r}")
        tree = _parsed(value, f"set: {override}")
        for part in reversed(key.strip().split(".")):
            tree = {part: tree}
        _update(config, tree, "set")
    return config


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML ({' '.join(str(error).split())}); correct it") from error


def _update(config: Any, values: dict[str, Any], source: str, prefix: str = "") -> None:
    known = {f.name: f for f in dataclasses.fields(config)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ValueError(f"{source}: unknown key {prefix + key!r}; did you mean {prefix + near[0]!r}?")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise ValueError(f"{source}: {prefix + key} expected a section, got {value!r}")
            _update(current, value, source, f"{prefix}{key}.")
        else:
            setattr(config, key, _typed(value, current, f"{source}: {prefix + key}"))


def _typed(value: Any, current: Any, where: str) -> Any:
    if isinstance(current, float) and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{where} expected a number, got {value!r}") from None
    if type(value) is not type(current):
        raise ValueError(f"{where} expected {type(current).__name__}, got {value!r}")
    return value
