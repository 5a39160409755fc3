"""What each verb does: arguments in, a JSON document and its readable form out."""

import logging
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.files import check_file, make_folder, new_folder, write_text
from medvl_sam2.engine.geometry import InputError, Volume
from medvl_sam2.engine.masks import check_writable, write_mask
from medvl_sam2.engine.progress import bar
from medvl_sam2.engine.segmentation import label_map
from medvl_sam2.engine.session import VolumeSession
from medvl_sam2.engine.volumes import read_volume

logger = logging.getLogger(__name__)
Result = tuple[dict[str, Any], str]


def segment(args: Namespace) -> Result:
    """Masks into one file."""
    if not args.targets and not args.point and not args.box:
        raise InputError("target: nothing to segment; give a name or description, --point or --box")
    if len(args.targets) > 1 and (args.point or args.box):
        raise InputError("target: --point and --box mark one object; give one name at a time with them")
    check_writable(args.output)
    with bar("segment", ("read scan", "load model", "segment", "write")) as step:
        volume = _scan(args)
        step()
        engine = _engine(args)
        session = engine.open(volume)
        step()
        if args.point or args.box:
            target = args.targets[0] if args.targets else None
            found = [session.segment(target, points=args.point, box=args.box, space=args.space)]
        else:
            found = session.segment_all(args.targets)
        step()
        labels = {value: s.name for value, s in enumerate(found, 1) if not s.absent}
        mask = label_map(found)
        if labels:
            write_mask(args.output, mask, session.volume, labels)
        step()
    objects, lines = [], []
    for value, one in enumerate(found, 1):
        volume_ml = round(int((mask == value).sum()) * session.volume.voxel_ml, 2)
        objects.append(
            {
                "name": one.name,
                "label": None if one.absent else value,
                "absent": one.absent,
                "volume_ml": volume_ml,
                "answer": one.text,
                "slices": 0 if one.absent else int(one.present.sum()),
            }
        )
        lines.append(f"{one.name}: {one.text if one.absent else f'label {value}, {volume_ml:.1f} mL'}")
    if labels:
        lines.append(f"Written: {args.output}")
    elif args.output.exists():
        lines.append(f"Nothing was found, so no file was written; {args.output} is from an earlier run.")
    else:
        lines.append("Nothing was found, so no file was written.")
    document = {**_about(engine, session, args), "output": args.output if labels else None, "objects": objects}
    return document, "\n".join(lines)


def ask(args: Namespace) -> Result:
    """Answer to a question."""
    volume = _scan(args)
    engine = _engine(args)
    session = engine.open(volume)
    answer = session.ask(args.question, args.choice)
    document = {**_about(engine, session, args), "question": args.question, "answer": answer.text}
    if args.choice:
        document |= {"choices": args.choice, "choice": answer.choice}
    return document, answer.text


def report(args: Namespace) -> Result:
    """Report of a scan."""
    if args.output is not None:
        check_file(args.output)
    volume = _scan(args)
    engine = _engine(args)
    session = engine.open(volume)
    text = session.report().text
    if args.output is not None:
        write_text(args.output, text + "\n")
    return {**_about(engine, session, args), "report": text, "output": args.output}, text


def demo(args: Namespace) -> Result:
    """The tour."""
    from medvl_sam2.training.demo import run

    if args.seed < 1_000_000:
        raise InputError(f"seed: {args.seed} may have been trained on; give 1000000 or more")
    return run(_engine(args), make_folder(args.out), seed=args.seed)


def batch(args: Namespace) -> Result:
    """A line per scan."""
    from medvl_sam2.engine.batch import Job, run

    if args.workers < 1:
        raise InputError(f"workers: expected 1 or more, got {args.workers}")
    disable_progress_bar()
    job = Job(
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        targets=tuple(args.target),
        questions=tuple(args.question),
        report=args.report,
    )
    summary = run(args.folder, args.out, job, workers=args.workers)
    lines = [f"{problem['path']}: {problem['reason']}" for problem in summary["problems"]]
    lines.append("{scans} scans: {done} done, {skipped} done before, {failed} failed; see {results}".format(**summary))
    return summary, "\n".join(lines)


def serve(args: Namespace) -> Result:
    """A server, until it is told to stop."""
    try:
        from medvl_sam2.engine.server.app import serve as run
        from medvl_sam2.engine.server.auth import ApiKeys, check_host
    except ModuleNotFoundError as error:
        raise InputError(f"serve: needs the package {error.name}; pip install 'medvl-sam2[server]'") from error
    for name in ("workers", "timeout", "expire", "max_upload", "replicas"):
        if getattr(args, name) <= 0:
            raise InputError(f"{name}: expected more than 0, got {getattr(args, name):g}")
    if args.queue < 0 or not 0 <= args.port < 65536:
        raise InputError("queue, port: expected 0 or more waiting requests and a port below 65536")
    keys = ApiKeys.load(args.keys)
    # Before the model is loaded: most mistakes show here.
    check_host(args.host, keys)
    limits = {
        "workers": args.workers,
        "waiting": args.queue,
        "timeout": args.timeout,
        "expire": args.expire,
        "max_upload": int(args.max_upload * 1e6),
    }
    place = {"host": args.host, "port": args.port, "data": args.data, "keys": keys}
    if args.ray:
        from medvl_sam2.engine.server.replicas import serve_replicas

        if args.data is None:
            raise InputError("serve --ray: needs --data DIR, a folder that every replica reaches")
        engine = {"device": args.device, "dtype": args.dtype, "language_backend": args.language_backend}
        serve_replicas(args.model, replicas=args.replicas, engine=engine, limits=limits, **place)
    else:
        run(_engine(args), Path(args.model).name, **place, **limits)
    return {"model": args.model, "stopped": True}, "Stopped."


def phantom(args: Namespace) -> Result:
    """A phantom's files."""
    from medvl_sam2.training.phantom import make_phantom, write_phantom

    if args.seed < 0:
        raise InputError(f"seed: expected 0 or more, got {args.seed}")
    out = make_folder(args.out)
    chosen = make_phantom(args.seed)
    write_phantom(chosen, out)
    document = {"out": out, **chosen.facts}
    return document, f"Phantom {args.seed} ({chosen.region}) written to {out}"


def train(args: Namespace) -> Result:
    """A trained model directory."""
    from medvl_sam2.training.config import load_config
    from medvl_sam2.training.train import check, run

    with _input_errors():
        config = load_config(args.config, args.set)
        check(config, args.until)
    directory = run(config, make_folder(args.out), until=args.until)
    return {"config": args.config, "model": directory}, f"Model written to {directory}"


def evaluate(args: Namespace) -> Result:
    """Measures of a model."""
    from medvl_sam2.training.evaluate import PROMPTS, TASKS, run

    if args.data == "phantom" and args.seeds[0] < 1_000_000:
        raise InputError(f"seeds: {args.seeds[0]} may have been trained on; give 1000000 or more")
    listed = Path(args.data).suffix == ".jsonl" and Path(args.data).is_file()
    if args.data != "phantom" and not listed and not Path(args.data).is_dir():
        raise InputError(f"data: expected phantom, a folder of labelled scans or a manifest (.jsonl), got {args.data}")
    if args.processes < 1:
        raise InputError(f"processes: expected 1 or more, got {args.processes}")
    if unknown := [task for task in args.task if task not in (*TASKS, PROMPTS)]:
        raise InputError(f"task: expected {', '.join((*TASKS, PROMPTS))}, got {unknown[0]!r}")
    out = None if args.out is None else make_folder(args.out)
    disable_progress_bar()
    options = {"seeds": args.seeds, "out": out, "processes": args.processes, "tasks": args.task, "split": args.split}
    summary = run(args.model, args.data, **options)
    measures = {name: value for name, value in summary.items() if not isinstance(value, dict)}
    for name in ("report", "vqa_open"):
        measures |= {f"{name}/{score}": value for score, value in summary.get(name, {}).items()}
    lines = []
    for name, value in measures.items():
        low_high = summary["intervals"].get(name)
        lines.append(f"{name:<28} {value}" + (f"  ({low_high[0]} to {low_high[1]})" if low_high else ""))
    lines += ["", f"{'Dice':<24} {'text':>7} {'box':>7} {'point':>7} {'scans':>6}"]
    for name, row in summary["dice_per_class"].items():
        dice = " ".join(
            "      -" if row.get(mode) is None else f"{row[mode]:7.3f}" for mode in ("text", "box", "point")
        )
        lines.append(f"{name:<24} {dice} {row['scans']:6}")
    return summary, "\n".join(lines)


def convert(args: Namespace) -> Result:
    """A model directory from public checkpoints, or the LLM of a model for another runtime."""
    if args.runtime is not None:
        return _export(args)
    from medvl_sam2.model.convert import convert as join

    if missing := [f"--{name}" for name in ("vit", "llm", "sam2", "output") if getattr(args, name) is None]:
        raise InputError(f"convert: expected {', '.join(missing)} as well; see medvl-sam2 convert --help")
    disable_progress_bar()
    with new_folder(args.output) as folder, _input_errors():
        config = join(vit=args.vit, llm=args.llm, sam2=args.sam2, out=folder, image_size=args.image_size)
    document = {"model": args.output, "config": config.to_dict()}
    return document, f"Model written to {args.output}; its projector, LoRA and [SEG] bridge are untrained."


def _export(args: Namespace) -> Result:
    from medvl_sam2.model.export import EXPORTED, export_language
    from medvl_sam2.model.modeling import MedVLSAM2
    from medvl_sam2.model.presets import PRESETS

    # A preset's files are not in the working directory, even if a folder there has its name.
    own = args.model is not None and args.model not in PRESETS and Path(args.model).is_dir()
    if args.model is None or (args.output is None and not own):
        raise InputError("convert --for vllm: expected --model DIR, or --model NAME with -o DIR")
    disable_progress_bar()
    output = args.output or Path(args.model) / EXPORTED
    with new_folder(output) as folder, _input_errors():
        export_language(MedVLSAM2.from_pretrained(args.model).language, folder, merge=args.merge)
    return {"model": args.model, "language": output}, f"Language model written to {output}"


def info(args: Namespace) -> Result:
    """What this machine offers."""
    from medvl_sam2.engine.info import collect, describe

    document = collect()
    return document, describe(document)


def _engine(args: Namespace) -> MedVLEngine:
    disable_progress_bar()
    backend = getattr(args, "language_backend", "transformers")
    return MedVLEngine.from_pretrained(args.model, device=args.device, dtype=args.dtype, language_backend=backend)


def _scan(args: Namespace) -> Volume:
    """The scan, read before the model is loaded: most mistakes show here."""
    volume = read_volume(args.scan, series=args.series)
    for warning in volume.warnings:
        logger.warning("%s: %s", args.scan, warning)
    return volume


def _about(engine: MedVLEngine, session: VolumeSession, args: Namespace) -> dict[str, Any]:
    return {
        "scan": args.scan,
        "model": args.model,
        "device": str(engine.device),
        "dtype": str(engine.precision),
        "warnings": list(session.volume.warnings),
        "seconds": {name: round(value, 4) for name, value in session.stages.items()},
    }


@contextmanager
def _input_errors() -> Iterator[None]:
    """Where every ValueError says what is wrong with an argument."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error
