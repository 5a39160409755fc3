"""The verb `bench`: measures the parts of the engine beside what one would run otherwise, on this machine."""

import argparse
from argparse import Namespace
from importlib import import_module
from typing import Any

PARTS = ("ingest", "kernels", "encoder", "segmenter")


def options(parser: argparse.ArgumentParser) -> None:
    """Options of `bench`."""
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="runs of each side, 5 or more (default: 5)")


def bench(args: Namespace) -> tuple[dict[str, Any], str]:
    """Rows of one part, also appended to bench/results/PART.csv."""
    from medvl_sam2.bench import kernels, rows, segmenter
    from medvl_sam2.engine.geometry import InputError

    if args.rounds < 5:
        raise InputError(f"rounds: expected 5 or more, got {args.rounds}")
    if args.part == "kernels":
        found = kernels.run()
        return _document(args, found, kernels.write_csv(found)), kernels.table(found)
    try:
        found = import_module(f"medvl_sam2.bench.{args.part}").run(rounds=args.rounds)
    except ValueError as error:
        raise InputError(str(error)) from error
    table = segmenter.table if args.part == "segmenter" else rows.table
    return _document(args, found, rows.append_csv(found, f"{args.part}.csv")), table(found)


def _document(args: Namespace, found: list[dict[str, Any]], path: Any) -> dict[str, Any]:
    wrong = [f"{row.get('operation') or row['work']} by {row['provider']}" for row in found if not row["correct"]]
    return {"part": args.part, "rows": found, "csv": path, "problems": wrong}
