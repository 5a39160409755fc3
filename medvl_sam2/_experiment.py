"""`experiment`: the paper's claims tested at the tiny scale. The options import nothing heavy."""

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

Result = tuple[dict[str, Any], str]


def options(parser: argparse.ArgumentParser) -> None:
    """Options of `experiment`."""
    parser.add_argument("experiment", choices=("projector", "prompts", "stages"))
    parser.add_argument("--out", type=Path, default=Path("experiments"), metavar="DIR", help="default: experiments")
    parser.add_argument(
        "--config", default="experiment", metavar="NAME|YAML", help="budget of one arm (default: experiment)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a setting of the budget")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each arm (default: 3)")
    parser.add_argument("--scans", type=int, default=16, metavar="N", help="unseen phantoms per run (default: 16)")
    parser.add_argument(
        "--processes", type=int, default=2, metavar="N", help="runs at a time, which share the cores (default: 2)"
    )
    parser.add_argument(
        "--base",
        default="tiny",
        metavar="NAME|DIR|none",
        help="what all arms begin with: a model, the pre-trained parts of a training run's folder, or none to train "
        "parts first (default: tiny)",
    )
    parser.add_argument("--model", metavar="NAME|DIR", help="prompts only: measure this model instead of training")
    parser.add_argument("--page", type=Path, metavar="FILE", help="results of all experiments (default: OUT/README.md)")


def experiment(args: Namespace) -> Result:
    """Run it, and write the page."""
    from transformers.utils.logging import disable_progress_bar

    from medvl_sam2.engine.files import make_folder
    from medvl_sam2.engine.geometry import InputError
    from medvl_sam2.training.config import load_config
    from medvl_sam2.training.experiment_page import write_page
    from medvl_sam2.training.experiments import Lab, run

    if args.model and args.experiment != "prompts":
        raise InputError(f"model: only the prompts experiment measures a ready model, not {args.experiment}")
    if min(args.seeds - 1, args.scans, args.processes) < 1:
        raise InputError("seeds, scans, processes: expected 2 or more seeds, 1 or more of the others")
    try:
        config = load_config(args.config, args.set)
    except ValueError as error:
        raise InputError(str(error)) from error
    disable_progress_bar()
    page = args.page or args.out / "README.md"
    base = None if args.base == "none" else args.base
    lab = Lab(make_folder(args.out), config, range(args.seeds), args.scans, args.processes, base)
    result = run(args.experiment, lab, args.model, command=_command(args), report=lambda: write_page(args.out, page))
    return {"page": page, **result}, f"Results of {args.experiment} written to {page}"


def _command(args: Namespace) -> str:
    """The command with what changes its results; folders and processes are the reader's own."""
    options = {"config": "experiment", "seeds": 3, "scans": 16, "base": "tiny", "model": None}
    changed = [f"--{name} {getattr(args, name)}" for name, default in options.items() if getattr(args, name) != default]
    return " ".join(["medvl-sam2 experiment", args.experiment, *changed, *(f"--set {setting}" for setting in args.set)])
