"""What each verb does: arguments in, a JSON document and its readable form out."""

import logging
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.files import check_file, make_folder, write_text
from medvl_sam2.engine.geometry import InputError
from medvl_sam2.engine.masks import check_writable, write_mask
from medvl_sam2.engine.progress import bar
from medvl_sam2.engine.segmentation import label_map
from medvl_sam2.engine.session import VolumeSession

logger = logging.getLogger(__name__)
Result = tuple[dict[str, Any], str]


def segment(args: Namespace) -> Result:
    """Masks into one file."""
    if not args.targets and not args.point and not args.box:
        raise InputError("target: nothing to segment; give a name or description, --point or --box")
    if len(args.targets) > 1 and (args.point or args.box):
        raise InputError("target: --point and --box mark one object; give one name at a time with them")
    check_writable(args.output)
    with bar("segment", ("load model", "read scan", "segment", "write")) as step:
        engine = _engine(args)
        step()
        session = _open(engine, args)
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
    lines.append(f"Written: {args.output}" if labels else "Nothing was found, so no file was written.")
    document = {**_about(engine, session, args), "output": args.output if labels else None, "objects": objects}
    return document, "\n".join(lines)


def ask(args: Namespace) -> Result:
    """Answer to a question."""
    engine = _engine(args)
    session = _open(engine, args)
    answer = session.ask(args.question, args.choice)
    document = {**_about(engine, session, args), "question": args.question, "answer": answer.text}
    if args.choice:
        document |= {"choices": args.choice, "choice": answer.choice}
    return document, answer.text


def report(args: Namespace) -> Result:
    """Report of a scan."""
    if args.output is not None:
        check_file(args.output)
    engine = _engine(args)
    session = _open(engine, args)
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


def phantom(args: Namespace) -> Result:
    """A phantom's files."""
    from medvl_sam2.training.phantom import write_phantom

    if args.seed < 0:
        raise InputError(f"seed: expected 0 or more, got {args.seed}")
    files = write_phantom(args.seed, make_folder(args.out))
    document = {"seed": args.seed, "out": args.out, "files": files}
    return document, f"Phantom {args.seed} written to {args.out}"


def train(args: Namespace) -> Result:
    """A trained model directory."""
    from medvl_sam2.training.config import load_config
    from medvl_sam2.training.train import run

    with _input_errors():
        config = load_config(args.config, args.set)
    directory = run(config, make_folder(args.out))
    return {"config": args.config, "model": directory}, f"Model written to {directory}"


def evaluate(args: Namespace) -> Result:
    """Measures of a model."""
    from medvl_sam2.training.evaluate import run

    return run(_engine(args), data=args.data, seeds=args.seeds)


def convert(args: Namespace) -> Result:
    """A model directory from public checkpoints."""
    from medvl_sam2.model.convert import convert as join

    out = make_folder(args.output)
    with _input_errors():
        join(vit=args.vit, llm=args.llm, sam2=args.sam2, out=out)
    return {"model": out}, f"Model written to {out}"


def info(args: Namespace) -> Result:
    """What this machine offers."""
    from medvl_sam2.engine.info import collect, describe

    document = collect()
    return document, describe(document)


def _engine(args: Namespace) -> MedVLEngine:
    return MedVLEngine.from_pretrained(args.model, device=args.device, dtype=args.dtype)


def _open(engine: MedVLEngine, args: Namespace) -> VolumeSession:
    session = engine.open(args.scan, series=args.series)
    for warning in session.volume.warnings:
        logger.warning("%s: %s", args.scan, warning)
    return session


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
