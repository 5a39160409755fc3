"""`data`: public data sets made ready for training. The options import nothing heavy."""

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

Result = tuple[dict[str, Any], str]
_SHOWN_CLASSES = 12


def options(parser: argparse.ArgumentParser) -> None:
    """Options of `data`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str) -> argparse.ArgumentParser:
        found = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        for option, shown in (
            ("--json", "print one JSON document as the last line of stdout"),
            ("--debug", "log more"),
        ):
            # A default here would undo an option given before the action.
            found.add_argument(option, action="store_true", default=argparse.SUPPRESS, help=shown)
        return found

    index = action("index", "read data sets in their published layouts into a manifest and split files")
    index.add_argument("roots", nargs="+", metavar="[LAYOUT=]DIR", help="folder of a data set (docs/data.md)")
    index.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="manifest, ending in .jsonl")
    index.add_argument(
        "--val", type=float, default=0.0, help="share of patients without a published split (default: 0)"
    )
    index.add_argument("--test", type=float, default=0.0, help="the same for the test split (default: 0)")
    index.add_argument("--seed", type=int, default=0, help="of that choice (default: 0)")
    check = action("check", "name every file of a manifest that is missing or broken")
    stats = action("stats", "count scans, patients, texts and classes of a manifest")
    cache = action("cache", "prepare the scans of a manifest for a model")
    speed = action("speed", "measure how many scans per second reach the trainer")
    for each in (check, stats, cache, speed):
        each.add_argument("manifest", type=Path)
    for each in (check, cache):
        each.add_argument("--processes", type=int, default=1, metavar="N", help="scans at a time (default: 1)")
    cache.add_argument("--model", default="tiny", metavar="NAME|DIR", help="preset or model directory (default: tiny)")
    cache.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the prepared scans")
    cache.add_argument("--split", choices=("train", "val", "test"), help="one split only")
    cache.add_argument("--features", action="store_true", help="also keep the image encoder's features, for stage 1")
    cache.add_argument("--precision", default="fp32", help="of the training run, for the features (default: fp32)")
    cache.add_argument("--device", default="auto", help="where to compute them (default: auto)")
    speed.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the prepared scans")
    speed.add_argument("--config", default="1b", metavar="NAME|YAML", help="training config (default: 1b)")
    speed.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a setting of the config")
    speed.add_argument("--stage", choices=("stage1", "stage2", "stage3"), default="stage3", help="default: stage3")
    speed.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    speed.add_argument("--scans", type=int, default=64, metavar="N", help="to load for each (default: 64)")


def run(args: Namespace) -> Result:
    """One action."""
    actions = {"index": _index, "check": _check, "stats": _stats, "cache": _cache, "speed": _speed}
    return actions[args.action](args)


def _index(args: Namespace) -> Result:
    from medvl_sam2.training.datasets.index import index

    document = index(args.roots, args.output, val=args.val, test=args.test, seed=args.seed)
    lines = [f"{name:<24} {count:>8} scans" for name, count in document["datasets"].items()]
    splits = ", ".join(f"{count} {split}" for split, count in document["splits"].items())
    lines.append(f"{document['records']} scans of {document['patients']} patients ({splits}) written to {args.output}")
    if document["unread"]:
        lines.append(f"{document['unread']} entries could not be used; 'medvl-sam2 data check' names them")
    return {"manifest": args.output, **document}, "\n".join(lines)


def _check(args: Namespace) -> Result:
    from medvl_sam2.training.datasets.check import check
    from medvl_sam2.training.datasets.manifest import Manifest

    manifest = Manifest(args.manifest)
    problems = [{"path": problem.path, "reason": problem.reason} for problem in check(manifest, args.processes)]
    lines = [f"{problem['path']}: {problem['reason']}" for problem in problems]
    lines.append(f"{len(manifest)} scans, {len(problems)} problems")
    return {"manifest": args.manifest, "records": len(manifest), "problems": problems}, "\n".join(lines)


def _stats(args: Namespace) -> Result:
    from medvl_sam2.training.datasets.check import stats
    from medvl_sam2.training.datasets.manifest import Manifest

    document = stats(Manifest(args.manifest))
    lines = [f"{document['records']} scans of {document['patients']} patients"]
    lines += [
        f"{split:<6} {n['records']:>8} scans {n['patients']:>8} patients" for split, n in document["splits"].items()
    ]
    for name, entry in document["datasets"].items():
        texts = ", ".join(f"{count} {kind}" for kind, count in entry["texts"].items()) or "no texts"
        lines += [
            "",
            f"{name}: {entry['records']} scans, {entry['patients']} patients, {texts}, {entry['masks']} masks",
        ]
        classes = list(entry["classes"].items())
        lines += [f"  {label:<32} {count:>6}" for label, count in classes[:_SHOWN_CLASSES]]
        if len(classes) > _SHOWN_CLASSES:
            lines.append(f"  and {len(classes) - _SHOWN_CLASSES} more classes")
    return {"manifest": args.manifest, **document}, "\n".join(lines)


def _cache(args: Namespace) -> Result:
    from medvl_sam2.training.datasets.cache import fill_cache

    splits = (args.split,) if args.split else ("train", "val", "test")
    document = fill_cache(
        args.manifest,
        args.out,
        model=args.model,
        splits=splits,
        processes=args.processes,
        features=args.features,
        precision=args.precision,
        device=args.device,
    )
    lines = [f"{problem['path']}: {problem['reason']}" for problem in document["problems"]]
    lines.append(f"{document['scans']} scans prepared in {args.out}")
    return document, "\n".join(lines)


def _speed(args: Namespace) -> Result:
    from medvl_sam2.engine.geometry import InputError
    from medvl_sam2.training.config import load_config
    from medvl_sam2.training.datasets.speed import measure

    if min(args.workers) < 0 or args.scans < 1:
        raise InputError("workers, scans: expected 0 or more workers and 1 or more scans")
    try:
        config = load_config(args.config, args.set)
    except ValueError as error:
        raise InputError(str(error)) from error
    config.data.source = str(args.manifest)
    document = measure(config, args.out, stage=args.stage, workers=args.workers, scans=args.scans)
    lines = [f"{'prepared from the files':<28} {document['from_files']:>10.2f} scans/s"]
    for rate in document["prepared"]:
        lines.append(
            f"{args.stage + ', workers: ' + str(rate['workers']):<28} {rate['scans_per_second']:>10.2f} scans/s"
        )
    for key, name in (("features_computed", "features computed"), ("features_kept", "features kept")):
        if key in document:
            lines.append(f"{name:<28} {document[key]:>10.2f} scans/s")
    return {"manifest": args.manifest, **document}, "\n".join(lines)
