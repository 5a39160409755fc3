"""The verbs `bench` and `profile`: how fast the engine is on this machine, and where its time goes."""

import argparse
import json
import logging
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvl_sam2 import _options

if TYPE_CHECKING:
    from medvl_sam2.bench.place import Place

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Result = tuple[dict[str, Any], str]
PARTS = ("ingest", "kernels", "encoder", "language", "segmenter", "e2e", "memory")
PRESETS = ("tiny", "1b-fast", "1b", "2b", "4b", "8b")
WORKS = ("masks", "report", "scaling")


def options(parser: argparse.ArgumentParser) -> None:
    """Options of `bench`."""
    parser.add_argument("part", choices=(*PARTS, "all"), help="all: every part, each in a process of its own")
    parser.add_argument("--preset", choices=PRESETS, default="1b-fast", help="sizes of the model (default: 1b-fast)")
    parser.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda, cuda:1, ...; bfloat16 on CUDA, float32 on a CPU, on both sides (default: auto)",
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="runs of each side, 5 or more (default: 5)")
    parser.add_argument(
        "--slices", type=int, metavar="N", help="segmenter, e2e, memory (default: 16, 32, and 32 beside 128)"
    )
    parser.add_argument(
        "--objects", type=int, nargs="+", metavar="N", help="segmenter, e2e, memory (default: 1 4 8, 1 8, and 8)"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="language, report of e2e (default: 32, 256)")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=WORKS, help="e2e: what to measure (default: all)")
    parser.add_argument("--operations", nargs="+", metavar="NAME", help="kernels: which of them (default: all)")
    parser.add_argument(
        "--tune", action="store_true", help="kernels: search tile settings for this GPU and keep the faster; minutes"
    )
    parser.add_argument(
        "--compile", action="store_true", help="encoder, language, segmenter: the baseline under torch.compile too"
    )
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw charts as PNG into this folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for PART.json and CSV (default: bench/results)")


def profile_options(parser: argparse.ArgumentParser) -> None:
    """Options of `profile`."""
    parser.add_argument("scan", type=Path, nargs="?", help="as of other verbs; a made-up one by default")
    parser.add_argument("--out", type=Path, default=Path("profile"), metavar="DIR", help="default: profile")
    parser.add_argument("--target", default="liver", metavar="NAME", help="object to segment (default: liver)")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="length of the answer (default: 16)")
    parser.add_argument("--series", help="which DICOM series: UID, number or description")
    _options.model(parser)


def bench(args: Namespace) -> Result:
    """Rows of one part, also appended to its CSV file and written as JSON; or all parts, one after the other."""
    from medvl_sam2.engine.geometry import InputError

    if args.rounds < 5:
        raise InputError(f"rounds: expected 5 or more, got {args.rounds}")
    for name in ("slices", "tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 2:
            raise InputError(f"{name}: expected 2 or more, got {getattr(args, name)}")
    if args.objects and min(args.objects) < 1:
        raise InputError(f"objects: expected 1 or more, got {min(args.objects)}")
    if args.part != "kernels" and (args.tune or args.operations):
        raise InputError("tune, operations: belong to one part; use bench kernels --tune, bench kernels --operations")
    if args.plot is not None:
        from medvl_sam2.engine.files import make_folder

        try:
            import matplotlib  # noqa: F401
        except ModuleNotFoundError as error:
            raise InputError("plot: needs the package matplotlib; pip install 'medvl-sam2[bench]'") from error
        make_folder(args.plot)
    if args.part == "all":
        return _all(args)
    from medvl_sam2.bench.kernels import commit

    # Read before anything is measured, since others may commit meanwhile.
    commit()
    try:
        return _MEASURES[args.part](args)
    except ValueError as error:
        raise InputError(str(error)) from error


def _rows(args: Namespace, found: list[Row]) -> Result:
    """What comes of a part whose rows have sides."""
    from medvl_sam2.bench import plots, rows

    document = _written(args, {"rows": found})
    if args.plot is not None:
        plots.compared(found, args.plot / f"{args.part}.png")
    return document, rows.table(found)


def _written(args: Namespace, tables: dict[str, list[Row]]) -> dict[str, Any]:
    """Append every table to a CSV file, and write all of them as one JSON document."""
    from medvl_sam2.bench import files

    folder = Path() if args.out is None else args.out.absolute()
    document: dict[str, Any] = {"part": args.part, **tables, "csv": []}
    wrong = {}
    for name, found in tables.items():
        file = f"{args.part}.csv" if name == "rows" else f"{args.part}_{name}.csv"
        if found:
            document["csv"].append(files.append_csv(found, folder / file))
        wrong |= {f"{row['work']} by {row.get('provider', name)}": 1 for row in found if not row.get("correct", True)}
    document["problems"] = list(wrong)
    files.write_json(document, folder / f"{args.part}.json")
    return files.finite(document)


def _place(args: Namespace) -> "Place":
    from medvl_sam2.bench.place import Place

    return Place.choose(args.device)


def _ingest(args: Namespace) -> Result:
    from medvl_sam2.bench import ingest

    return _rows(args, ingest.run(rounds=args.rounds, place=_place(args)))


def _kernels(args: Namespace) -> Result:
    from medvl_sam2.bench import files, kernels, plots, tuning

    if args.tune:
        if args.plot is not None:
            logger.warning("plot: nothing to draw for --tune, which finds settings and measures no rivals")
        found = tuning.tune(args.operations)
        return files.finite({"part": args.part, "tuned": found, "problems": []}), tuning.table(found)
    found = kernels.run(args.operations, device=_place(args).device)
    folder = kernels.RESULTS if args.out is None else args.out.absolute()
    wrong = [f"{row['operation']} by {row['provider']}" for row in found if not row["correct"]]
    path = kernels.write_csv(found, folder / "kernels.csv")
    document = {"part": args.part, "rows": found, "csv": [path], "problems": wrong}
    files.write_json(document, folder / "kernels.json")
    if args.plot is not None:
        plots.operations(found, args.plot / "kernels.png")
    return files.finite(document), kernels.table(found)


def _encoder(args: Namespace) -> Result:
    from medvl_sam2.bench import encoder
    from medvl_sam2.model.presets import preset

    config = preset(args.preset)
    options = {"rounds": args.rounds, "compile": args.compile, "place": _place(args)}
    return _rows(args, encoder.run(volume=config.volume, config=config.vision, **options))


def _language(args: Namespace) -> Result:
    from medvl_sam2.bench import language
    from medvl_sam2.model.presets import preset

    options = {"tokens": args.tokens or 32, "visual_tokens": preset(args.preset).projector.tokens}
    options |= {"rounds": args.rounds, "compile": args.compile, "place": _place(args)}
    return _rows(args, language.run(name=args.preset, **options))


def _segmenter(args: Namespace) -> Result:
    from medvl_sam2.bench import segmenter

    variant, size = _package_model(args.preset)
    options = {"slices": args.slices or 16, "objects": args.objects or (1, 4, 8), "rounds": args.rounds}
    options |= {"compile": args.compile, "place": _place(args)}
    return _rows(args, segmenter.run(variant=variant, image_size=size, **options))


def _memory(args: Namespace) -> Result:
    from medvl_sam2.bench import memory, plots

    variant, size = _package_model(args.preset)
    slices = (args.slices,) if args.slices else (32, 128)
    place, found = _place(args), []
    for objects in args.objects or (8,):
        found += memory.run(variant=variant, image_size=size, slices=slices, objects=objects, place=place)
    document = _written(args, {"rows": found})
    if args.plot is not None:
        plots.memory(found, args.plot / "memory.png")
    return document, memory.table(found)


def _package_model(name: str) -> tuple[str, int]:
    from medvl_sam2.bench import segmenter
    from medvl_sam2.model.presets import preset

    config = preset(name).sam2
    variant = segmenter.variant_of(config)
    if variant is None:
        raise ValueError(f"preset: the sam2 package has no model of {name}'s sizes; give 1b-fast or 1b")
    return variant, config.image_size


def _e2e(args: Namespace) -> Result:
    from medvl_sam2.bench import e2e, plots, rows, scaling
    from medvl_sam2.model.presets import preset

    setting = e2e.build(preset(args.preset), slices=args.slices or 32, place=_place(args))
    objects = (args.objects or (1, 8)) if "masks" in args.works else ()
    tokens = (args.tokens or 256) if "report" in args.works else 0
    tables = e2e.measure(setting, objects=objects, tokens=tokens, rounds=args.rounds)
    texts = [rows.table(tables["rows"])] if tables["rows"] else []
    if tables["stages"]:
        texts.append(e2e.table(tables["stages"]))
    if "scaling" in args.works:
        tables["scaling"], tables["fits"] = scaling.run(setting, rounds=args.rounds)
        texts.append(scaling.table(tables["fits"]))
    document = _written(args, tables)
    if args.plot is not None:
        if tables["rows"]:
            plots.compared(tables["rows"], args.plot / "e2e.png")
        if tables["stages"]:
            plots.waterfall(tables["stages"], args.plot / "waterfall.png")
        if "scaling" in args.works:
            plots.scaling(tables["scaling"], tables["fits"], args.plot / "scaling.png")
    return document, "\n\n".join(texts)


_MEASURES: dict[str, Callable[[Namespace], Result]] = {
    "ingest": _ingest,
    "kernels": _kernels,
    "encoder": _encoder,
    "language": _language,
    "segmenter": _segmenter,
    "e2e": _e2e,
    "memory": _memory,
}


def _all(args: Namespace) -> Result:
    """Every part in a process of its own: none finds memory or threads that another left."""
    from medvl_sam2.bench.files import RESULTS

    folder = RESULTS if args.out is None else args.out.absolute()
    shared = ["--preset", args.preset, "--rounds", str(args.rounds), "--device", args.device]
    for name in ("tokens", "plot", "out"):
        if getattr(args, name) is not None:
            shared += [f"--{name}", str(getattr(args, name))]
    if args.objects:
        shared += ["--objects", *map(str, args.objects)]
    if args.compile:
        shared.append("--compile")
    problems, documents = [], {}
    for part in PARTS:
        command = [sys.executable, "-m", "medvl_sam2.cli", "bench", part, *shared, "--works", *args.works]
        if args.slices is not None and part != "memory":
            # How memory grows shows in long scans alone.
            command += ["--slices", str(args.slices)]
        file = folder / f"{part}.json"
        before = file.stat().st_mtime_ns if file.exists() else None
        # The tables are for a reader; stdout stays free for the one document.
        if subprocess.run(command, stdout=sys.stderr).returncode:
            problems.append(part)
            logger.warning("bench %s failed or found something wrong, see above", part)
        # A part that failed leaves the document of an earlier run as it was.
        if file.exists() and file.stat().st_mtime_ns != before:
            documents[part] = json.loads(file.read_text())
    text = f"Failed or wrong: {', '.join(problems)}" if problems else f"Measured: {', '.join(PARTS)}"
    return {"part": "all", "parts": documents, "problems": problems}, text


def profile(args: Namespace) -> Result:
    """Trace, table of operations and memory timeline of a model's requests."""
    from transformers.utils.logging import disable_progress_bar

    from medvl_sam2.bench import e2e, profiling
    from medvl_sam2.engine.engine import MedVLEngine
    from medvl_sam2.engine.files import make_folder
    from medvl_sam2.engine.geometry import InputError
    from medvl_sam2.engine.volumes import read_volume
    from medvl_sam2.model.presets import preset

    if args.tokens < 1:
        raise InputError(f"tokens: expected 1 or more, got {args.tokens}")
    disable_progress_bar()
    volume = e2e.made_up_scan(32, 512) if args.scan is None else read_volume(args.scan, series=args.series)
    options = {"device": args.device, "dtype": args.dtype}
    if args.model in PRESETS and args.model != "tiny":
        # No weights are shipped for these; random ones take as long.
        config = preset(args.model)
        engine = MedVLEngine(e2e.random_model(config, config.volume.slices)[0], **options)
    else:
        engine = MedVLEngine.from_pretrained(args.model, **options)
    found = profiling.run(engine, volume, make_folder(args.out), target=args.target, tokens=args.tokens)
    lines = [f"{one['ms']:10.2f} ms {one['calls']:6} x  {one['name']}" for one in found["top"][:15]]
    lines.append(f"Peak of memory: {', '.join(f'{mb:.0f} MB on {name}' for name, mb in found['peak_mb'].items())}")
    lines.append(f"Written: {found['trace']} (open it in ui.perfetto.dev), {found['operations']}, {found['memory']}")
    return {"model": args.model, "device": str(engine.device), "dtype": str(engine.precision), **found}, "\n".join(
        lines
    )
