"""`medvl-sam2 experiment`: the paper's three claims at the tiny scale, with equal budgets and several seeds.

Every arm begins with the same LLM, 3D ViT and SAM2, and with equal seeds sees the same phantoms in the same order. What
is finished is kept, so an experiment that was killed goes on where it stopped, and experiments share runs.
"""

import copy
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial, partialmethod
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from tqdm import tqdm

from medvl_sam2.engine.files import write_text
from medvl_sam2.training import evaluate, train
from medvl_sam2.training.arms import AFTER_STAGE2, base_model, fingerprint, render_phantoms, run_log, train_arm
from medvl_sam2.training.config import TrainConfig
from medvl_sam2.training.phantom import EVALUATION_SEED_START
from medvl_sam2.training.prepared import alone
from medvl_sam2.training.summary import summarise_prompts

PROJECTORS = ("mixer", "grouped_linear", "pooled")
EXPERIMENTS: dict[str, tuple[str, ...]] = {
    "projector": PROJECTORS,
    "prompts": ("mixer",),
    "stages": ("mixer", "one_stage"),
}
"""The arms that are trained for each, with every seed."""
# Scans of each seed when one ready model is measured on several sets of them.
_SET = 1000
Row = dict[str, Any]


@dataclass(frozen=True)
class Lab:
    """Where and how experiments run.

    Attributes:
        out: Folder of all runs and results.
        config: Budget of every arm.
        seeds: Of the arms.
        scans: Unseen phantoms that each arm is measured on.
        processes: Arms at a time; they share torch's threads. Small models train faster two on a thread each than one
            after the other on two.
        base: What the arms begin with; see `arms.base_model`.
    """

    out: Path
    config: TrainConfig
    seeds: Sequence[int] = (0, 1, 2)
    scans: int = 16
    processes: int = 1
    base: str | Path | None = "tiny"

    @property
    def phantoms(self) -> range:
        """Seeds of the unseen phantoms."""
        return range(EVALUATION_SEED_START, EVALUATION_SEED_START + self.scans)

    @cached_property
    def begin(self) -> str | Path:
        """The model that the arms begin with, made when first asked for."""
        return base_model(self.base, self.config, self.out)

    def trained(self, arm: str, seed: int) -> Path:
        """The run of an arm; "one_stage" is the Mixer with all steps in stage 3."""
        config = copy.deepcopy(self.config)
        config.seed = seed
        if arm == "one_stage":
            config.stage3.steps += config.stage1.steps + config.stage2.steps
            config.stage1.steps = config.stage2.steps = 0
        kind = arm if arm in PROJECTORS else "mixer"
        return train_arm(self.begin, self.out, f"{arm}-{seed}", config, kind, keep_stage2=arm == "mixer")


def run(
    name: str,
    lab: Lab,
    model: str | Path | None = None,
    *,
    command: str = "",
    report: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Run one experiment, or go on with it.

    Args:
        name: Of `EXPERIMENTS`.
        lab: Budget and folder.
        model: For "prompts": a trained model to measure on a set of scans per seed, in place of a run per seed.
        command: That repeats the experiment, for the page.
        report: Called each time the results of one more seed are written.

    Returns:
        What `<out>/<name>.json` holds: "arms", each with the measures of every seed in order; and "note", a remark for
        the page that may be written there by hand, and is kept.

    Raises:
        ValueError: Unknown experiment, or fewer than two seeds.
        InputError: Another experiment is running in the folder, or it holds runs of another budget or beginning.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment: expected one of {', '.join(EXPERIMENTS)}, got {name!r}")
    if len(lab.seeds) < 2:
        raise ValueError(f"seeds: expected two or more, got {len(lab.seeds)}; a spread needs them")
    lab.out.mkdir(parents=True, exist_ok=True)
    path = lab.out / f"{name}.json"
    result: dict[str, Any] = {
        "experiment": name,
        "note": json.loads(path.read_text()).get("note", "") if path.is_file() else "",
        "command": command,
        "seeds": list(lab.seeds),
        "scans": lab.scans,
        "steps": {stage: getattr(lab.config, stage).steps for stage in train.STAGES} if model is None else {},
        "base": _described(lab.base) if model is None else None,
        "model": None if model is None else str(model),
        "arms": {},
    }
    arms: dict[str, list[Row]] = result["arms"]
    trained = EXPERIMENTS[name]
    with alone(lab.out, wait=False), _several(lab, training=model is None) as work:
        jobs = [(arm, place) for place in range(len(lab.seeds)) for arm in trained]
        found = work(partial(_rows, name, replace(lab, processes=1), model), *zip(*jobs))
        # Seed by seed, so that an experiment that is stopped early has compared all arms alike.
        for _ in tqdm(lab.seeds, desc=name, unit="seed"):
            for _ in trained:
                for arm, row in next(found).items():
                    arms.setdefault(arm, []).append(row)
            write_text(path, json.dumps(result, indent=2) + "\n")
            if report is not None:
                report()
    return result


def _rows(name: str, lab: Lab, model: str | Path | None, arm: str, place: int) -> dict[str, Row]:
    """What an experiment tells of one arm with one seed, by the names of its tables."""
    seed = lab.seeds[place]
    if name == "prompts":
        return {"prompts": _prompts(lab, seed, place, model)}
    row = _trained_row(lab, arm, seed)
    if name == "projector":
        return {arm: row}
    if arm == "one_stage":
        return {"one stage": row}
    before = lab.out / "runs" / f"mixer-{seed}" / AFTER_STAGE2
    return {
        "three stages": row,
        "after stage 2": _measure(lab, before, f"after_stage2-{seed}", ("vqa", "report")),
    }


def _prompts(lab: Lab, seed: int, place: int, model: str | Path | None) -> Row:
    if model is None:
        directory, scans = lab.trained("mixer", seed) / "model", lab.phantoms
    else:
        directory, scans = model, range(lab.phantoms[0] + place * _SET, lab.phantoms[-1] + 1 + place * _SET)
    name = f"prompts-{seed}"
    summary = _measure(lab, directory, name, (evaluate.PROMPTS,), scans)
    with open(lab.out / "measures" / name / "scans.jsonl") as file:
        return {**summary, "prompts": summarise_prompts([json.loads(line) for line in file])}


def _trained_row(lab: Lab, arm: str, seed: int) -> Row:
    out = lab.trained(arm, seed)
    return {**_measure(lab, out / "model", f"{arm}-{seed}"), **run_log(out)}


def _measure(
    lab: Lab,
    model: str | Path,
    name: str,
    tasks: Sequence[str] = evaluate.TASKS,
    scans: range | None = None,
) -> Row:
    """Summary of a model on unseen phantoms, kept in `<out>/measures/<name>`."""
    folder, scans = lab.out / "measures" / name, scans or lab.phantoms
    asked = {"model": fingerprint(model), "scans": [scans.start, scans.stop], "tasks": list(tasks)}
    kept = folder / "measured.json"
    if not kept.is_file() or json.loads(kept.read_text()) != asked:
        kept.unlink(missing_ok=True)
        evaluate.run(model, seeds=scans, out=folder, processes=lab.processes, tasks=tasks, rendered=lab.out / "unseen")
        # Written last: a measurement that was broken off is made again.
        write_text(kept, json.dumps(asked))
    return json.loads((folder / "summary.json").read_text())


def _described(base: str | Path | None) -> dict[str, Any]:
    """What the page tells of the beginning."""
    parts = base is None or (Path(base) / "checkpoints").is_dir()
    return {"name": None if base is None else str(base), "before_stages": parts}


@contextmanager
def _several(lab: Lab, *, training: bool) -> Iterator[Callable[..., Iterator[dict[str, Row]]]]:
    """`map`, with as many calls at a time as the lab has processes."""
    if lab.processes == 1:
        yield map
        return
    if training:
        # Once, before several arms find them missing.
        render_phantoms(lab.begin, lab.config, lab.out)
    threads = max(1, torch.get_num_threads() // lab.processes)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(lab.processes, context, _start_worker, (threads,)) as pool:
        try:
            yield pool.map
        except BaseException:
            # The pool would wait for what runs, and for jobs that workers hold already. All go on from checkpoints.
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def _start_worker(threads: int) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A worker that outlived a kill would train on in a folder that the next experiment takes over.
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    # Bars of several processes would overwrite each other.
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
