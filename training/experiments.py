"""`medvl-sam2 experiment`: the paper's three claims at the tiny scale, with equal budgets and several seeds.

Every arm begins with the same pre-trained parts (LLM, 3D ViT, SAM2), which are trained once, and sees the same
phantoms. What an arm has finished is kept, so an interrupted experiment goes on where it stopped, and experiments share
runs.
"""

import copy
import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvl_sam2.model.presets import preset
from medvl_sam2.training import checkpoint, evaluate, train
from medvl_sam2.training.config import TrainConfig
from medvl_sam2.training.phantom import EVALUATION_SEED_START

logger = logging.getLogger(__name__)

EXPERIMENTS = ("projector", "prompts", "stages")
PROJECTORS = ("mixer", "grouped_linear", "pooled")
_PARTS = tuple(phase for phase in train.PHASES if phase not in train.STAGES)
# Scans of each seed when one ready model is measured on several sets of them.
_SET = 1000


@dataclass(frozen=True)
class Lab:
    """Where and how experiments run.

    Attributes:
        out: Folder of all runs and results.
        config: Budget of every arm.
        seeds: Of the arms.
        scans: Unseen phantoms that each arm is measured on.
        processes: Scans at a time in the measurements.
        base: Folder of a training run whose pre-trained parts are taken; trained in `out` when None.
    """

    out: Path
    config: TrainConfig
    seeds: Sequence[int] = (0, 1, 2)
    scans: int = 24
    processes: int = 1
    base: Path | None = None

    @property
    def phantoms(self) -> range:
        """Seeds of the unseen phantoms."""
        return range(EVALUATION_SEED_START, EVALUATION_SEED_START + self.scans)


def run(name: str, lab: Lab, model: str | Path | None = None) -> dict[str, Any]:
    """Run one experiment, or go on with it.

    Args:
        name: Of `EXPERIMENTS`.
        lab: Budget and folder.
        model: For "prompts": a trained model to measure on a set of scans per seed, in place of a run per seed.

    Returns:
        What `<out>/<name>.json` holds: "arms", each with the measures of every seed in order.

    Raises:
        ValueError: Unknown experiment, or fewer than two seeds.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment: expected one of {', '.join(EXPERIMENTS)}, got {name!r}")
    if len(lab.seeds) < 2:
        raise ValueError(f"seeds: expected two or more, got {len(lab.seeds)}; a spread needs them")
    lab.out.mkdir(parents=True, exist_ok=True)
    arms = _prompts(lab, model) if name == "prompts" else {"projector": _projector, "stages": _stages}[name](lab)
    steps = {phase: getattr(lab.config, phase).steps for phase in train.PHASES}
    result = {
        "experiment": name,
        "seeds": list(lab.seeds),
        "scans": lab.scans,
        "steps": steps,
        "model": None if model is None else str(model),
        "arms": arms,
    }
    (lab.out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _projector(lab: Lab) -> dict[str, list[dict[str, Any]]]:
    return {
        kind: [_measure(lab, _trained(lab, kind, seed) / "model", f"{kind}-{seed}") for seed in lab.seeds]
        for kind in PROJECTORS
    }


def _prompts(lab: Lab, model: str | Path | None) -> dict[str, list[dict[str, Any]]]:
    rows = []
    for place, seed in enumerate(lab.seeds):
        if model is None:
            directory, scans = _trained(lab, "mixer", seed) / "model", lab.phantoms
        else:
            directory, scans = Path(model), range(lab.phantoms[0] + place * _SET, lab.phantoms[-1] + 1 + place * _SET)
        rows.append(_measure(lab, directory, f"prompts-{seed}", (evaluate.PROMPTS,), scans))
    return {"prompts": rows}


def _stages(lab: Lab) -> dict[str, list[dict[str, Any]]]:
    arms: dict[str, list[dict[str, Any]]] = {"three stages": [], "after stage 2": [], "one stage": []}
    for seed in lab.seeds:
        before = _trained(lab, "mixer", seed, until="stage2") / "after_stage2"
        arms["after stage 2"].append(_measure(lab, before, f"after_stage2-{seed}", ("vqa", "report")))
        staged, joint = _trained(lab, "mixer", seed), _trained(lab, "one_stage", seed)
        arms["three stages"].append(_measure(lab, staged / "model", f"mixer-{seed}") | {"run": str(staged)})
        arms["one stage"].append(_measure(lab, joint / "model", f"one_stage-{seed}") | {"run": str(joint)})
    return arms


def _trained(lab: Lab, arm: str, seed: int, until: str | None = None) -> Path:
    """The run of an arm, trained up to a stage; "one_stage" is the Mixer with all steps in stage 3."""
    out = lab.out / "runs" / f"{arm}-{seed}"
    # After stage 2 the three-stage arm is measured, so its weights of that moment are kept beside the final ones.
    keep = out / "after_stage2"
    if (out / "model.done").is_file() and until is None or (keep / "config.json").is_file() and until is not None:
        return out
    config = _arm_config(lab, arm, seed)
    _begin_with(_pretrained(lab), out, config)
    settings = preset(config.preset)
    kind = arm if arm in PROJECTORS else "mixer"
    settings = dataclasses.replace(settings, projector=dataclasses.replace(settings.projector, kind=kind))
    # A run that goes no further leaves the weights of that stage where finished ones stood.
    (out / "model.done").unlink(missing_ok=True)
    train.run(config, out, until=until, settings=settings)
    if until is not None:
        shutil.copytree(out / "model", keep, dirs_exist_ok=True)
    else:
        (out / "model.done").touch()
    return out


def _arm_config(lab: Lab, arm: str, seed: int) -> TrainConfig:
    config = copy.deepcopy(lab.config)
    config.seed = seed
    config.data.cache = config.data.cache or str(lab.out / "phantoms")
    if arm == "one_stage":
        config.stage3.steps += config.stage1.steps + config.stage2.steps
        config.stage1.steps = config.stage2.steps = 0
    return config


def _pretrained(lab: Lab) -> Path:
    """Folder with the checkpoints of the pre-trained parts."""
    if lab.base is not None:
        return Path(lab.base)
    config = copy.deepcopy(lab.config)
    config.data.cache = config.data.cache or str(lab.out / "phantoms")
    out = lab.out / "runs" / "base"
    if not (out / "model" / "config.json").is_file():
        train.run(config, out, until=_PARTS[-1])
    return out


def _begin_with(base: Path, out: Path, config: TrainConfig) -> None:
    for part in _PARTS:
        source, target = base / "checkpoints" / f"{part}.pt", out / "checkpoints" / f"{part}.pt"
        kept = checkpoint.load(source)
        if kept is None:
            if getattr(config, part).steps:
                raise ValueError(f"base: expected {source} of a finished run, found none")
            continue
        # Taken as finished, whatever the number of steps it had.
        getattr(config, part).steps = kept["step"]
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def _measure(
    lab: Lab,
    model: Path,
    name: str,
    tasks: Sequence[str] = evaluate.TASKS,
    scans: range | None = None,
) -> dict[str, Any]:
    """Summary of a model on unseen phantoms, kept in `<out>/measures/<name>`."""
    folder = lab.out / "measures" / name
    if not (folder / "summary.json").is_file():
        evaluate.run(model, seeds=scans or lab.phantoms, out=folder, processes=lab.processes, tasks=tasks)
    return json.loads((folder / "summary.json").read_text())
