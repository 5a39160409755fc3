"""One run of an experiment: a beginning that all arms share, and going on after a kill at any moment."""

import copy
import csv
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from medvl_sam2.engine.files import new_folder, write_text
from medvl_sam2.engine.geometry import InputError
from medvl_sam2.model.config import MedVLConfig
from medvl_sam2.model.modeling import WEIGHTS, MedVLSAM2
from medvl_sam2.model.presets import PRESETS, preset
from medvl_sam2.training import checkpoint, train
from medvl_sam2.training.batches import Batches
from medvl_sam2.training.config import TrainConfig
from medvl_sam2.training.distributed import join
from medvl_sam2.training.prepared import claim
from medvl_sam2.training.store import PhantomStore

AFTER_STAGE2 = "after_stage2"
"""Folder within a run: the model as it was after stage 2."""
_PARTS = tuple(phase for phase in train.PHASES if phase not in train.STAGES)
# Settings that change how a run goes, not what comes out of it.
_FREE = ("device", "threads", "save_every", "log_every", "wandb", "data.cache", "data.workers")


def fingerprint(model: str | Path) -> str:
    """Short hash of the config and weights of a preset or model directory."""
    directory = _directory(model)
    stamp = hashlib.sha256()
    for path in sorted([directory / "config.json", *directory.rglob("*.safetensors")]):
        stamp.update(path.relative_to(directory).as_posix().encode())
        stamp.update(path.read_bytes())
    return stamp.hexdigest()[:16]


def _directory(model: str | Path) -> Path:
    return WEIGHTS / str(model) if str(model) in PRESETS else Path(model)


def base_model(base: str | Path | None, config: TrainConfig, home: Path) -> str | Path:
    """The model whose LLM, 3D ViT, SAM2 and [SEG] bridge every arm begins with.

    Args:
        base: Preset or model directory, taken as it is; folder of a training run, whose pre-trained parts are taken as
            they were before the paper's stages; None to pre-train them with the budget of `config`.
        config: Of the arms.
        home: Folder of the experiments; the parts of a run go to `base` in it.

    Raises:
        InputError: Neither a model nor a run with all of its parts, or `home` has the parts of another run.
    """
    run = None if base is None else Path(base)
    if run is not None and not (run / "checkpoints").is_dir():
        if str(base) not in PRESETS and not (run / "config.json").is_file():
            raise InputError(f"base: expected a preset, a model directory or the folder of a training run, got {base}")
        return base
    config, settings, out = copy.deepcopy(config), preset(config.preset), home / "base"
    source = "pre-trained here"
    if run is not None:
        files = [run / "checkpoints" / f"{part}.pt" for part in _PARTS]
        if missing := [file for file in files if not file.is_file()]:
            raise InputError(f"base: expected {missing[0]} of a finished run, found none")
        source = json.dumps([[str(file.resolve()), file.stat().st_mtime_ns] for file in files])
        if (run / "model" / "config.json").is_file():
            settings = MedVLConfig.load(run / "model")
    done = out / "parts.done"
    if not done.is_file() or done.read_text() != source:
        if done.is_file():
            raise InputError(f"{out}: holds the parts of another run; give another folder for the experiments")
        if run is not None:
            _take_parts(files, out, config)
        config.data.cache = str(_phantoms(settings, config, home))
        train.run(config, out, until=_PARTS[-1], settings=settings)
        write_text(done, source)
    return out / "model"


def _take_parts(files: list[Path], out: Path, config: TrainConfig) -> None:
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    for part, file in zip(_PARTS, files):
        # Taken as finished, whatever the number of steps it had.
        getattr(config, part).steps = checkpoint.load(file)["step"]
        shutil.copyfile(file, out / "checkpoints" / file.name)


def render_phantoms(base: str | Path, config: TrainConfig, home: Path) -> None:
    """Render what all arms are trained on, unless it has been.

    Args:
        base: Of `base_model`.
        config: Of the arms.
        home: Folder of the experiments.
    """
    _store(MedVLConfig.load(_directory(base)), config, home).prepare()


def train_arm(
    base: str | Path, home: Path, name: str, config: TrainConfig, projector: str, *, keep_stage2: bool = False
) -> Path:
    """Train one arm through the paper's stages, or go on with it.

    Projector and LoRA begin anew, everything else as in `base`. Once finished, the model and the logs stay.

    Args:
        base: Of `base_model`.
        home: Folder of the experiments.
        name: Of the run, its folder in `home`/runs.
        config: Budget and seed.
        projector: Kind.
        keep_stage2: Also keep the model of that moment, in `AFTER_STAGE2`.

    Returns:
        The run's folder, with `model` and `logs`.

    Raises:
        InputError: The folder holds a run with other settings or another beginning.
    """
    out = home / "runs" / name
    out.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(config)
    made = {"base": fingerprint(base), "projector": projector, "config": settings}
    claim(out / "arm.json", made, [f"config.{key}" for key in _FREE])
    finished = (out / "model").is_dir() and ((out / AFTER_STAGE2).is_dir() or not keep_stage2)
    if not finished:
        if config.threads:
            torch.set_num_threads(config.threads)
        model, batches = _build(base, config, projector, home)
        for stage in train.STAGES:
            train.run_one(stage, model, batches, config, out, join(config.device))
            if stage == "stage2" and keep_stage2:
                _save(model, out / AFTER_STAGE2)
        _save(model, out / "model")
    # Optimiser states are several times the size of the model.
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return out


def _build(base: str | Path, config: TrainConfig, projector: str, home: Path) -> tuple[MedVLSAM2, Batches]:
    begun = MedVLSAM2.from_pretrained(base, torch.float32)
    kind = dataclasses.replace(begun.config.projector, kind=projector)
    settings = dataclasses.replace(begun.config, projector=kind)
    store = _store(settings, config, home)
    store.prepare()
    torch.manual_seed(config.seed)
    model = MedVLSAM2(settings, begun.tokenizer)
    shared = {key: value for key, value in begun.state_dict().items() if not _is_new(key)}
    missing, unexpected = model.load_state_dict(shared, strict=False)
    assert not unexpected and all(map(_is_new, missing))
    return model, Batches(store, settings, model.chat, config)


def _store(model: MedVLConfig, config: TrainConfig, home: Path) -> PhantomStore:
    return PhantomStore(_phantoms(model, config, home), model, config.data)


def _is_new(key: str) -> bool:
    return key.startswith("projector.") or ".lora_" in key


def _phantoms(model: MedVLConfig, config: TrainConfig, home: Path) -> Path:
    """The cache that the config names, or a folder in `home` for phantoms rendered alike."""
    data = config.data
    if data.cache:
        return Path(data.cache)
    drawn = [data.first_seed, data.phantoms, data.rich, data.runs, data.run_length]
    stamp = json.dumps([dataclasses.asdict(model.volume), model.sam2.image_size, *drawn])
    return home / "phantoms" / hashlib.sha256(stamp.encode()).hexdigest()[:12]


def _save(model: MedVLSAM2, directory: Path) -> None:
    if not directory.is_dir():
        with new_folder(directory) as part:
            model.save_pretrained(part)


def run_log(out: Path) -> dict[str, Any]:
    """What the logs of a run tell: "minutes" of training, and the text loss as "curve" of [step, loss] over all stages.

    Args:
        out: Folder of the run.
    """
    seconds, done, curve = 0.0, 0, []
    for stage in train.STAGES:
        path = out / "logs" / f"{stage}.csv"
        if not path.is_file():
            continue
        step = 0
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                seconds += float(row["seconds_per_step"]) * (int(row["step"]) - step)
                step = int(row["step"])
                curve.append([done + step, float(row["ce"])])
        done += step
    return {"minutes": round(seconds / 60, 1), "curve": curve}
