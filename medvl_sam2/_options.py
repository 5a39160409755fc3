"""Options of each verb. Imports nothing heavy, so that --help and wrong arguments answer at once."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

DEMO_SEED = 1_000_250


def common(parser: argparse.ArgumentParser) -> None:
    """Options of every verb."""
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line of stdout")
    parser.add_argument("--debug", action="store_true", help="log more and show where an error came from")


def model(parser: argparse.ArgumentParser) -> None:
    """Options of every verb that runs a model."""
    parser.add_argument("--model", default="tiny", metavar="NAME|DIR", help="preset or model directory (default: tiny)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")


def scan(parser: argparse.ArgumentParser) -> None:
    """The scan of a verb."""
    parser.add_argument("scan", type=Path, help=".nii, .nii.gz, .nrrd, .mha, a DICOM folder or a .zip with a series")
    parser.add_argument("--series", help="which DICOM series: UID, number or description")


def demo(parser: argparse.ArgumentParser) -> None:
    """Options of `demo`."""
    model(parser)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), metavar="DIR", help="default: demo_output")
    parser.add_argument("--seed", type=int, default=DEMO_SEED, help=f"phantom, 1000000 or more (default: {DEMO_SEED})")


def segment(parser: argparse.ArgumentParser) -> None:
    """Options of `segment`."""
    scan(parser)
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help='name or description ("left kidney"); several make a label map'
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help=".nii.gz, .nii, .seg.nrrd, .nrrd or .mha")
    parser.add_argument(
        "--point",
        type=_point,
        action="append",
        metavar="I,J,K[,+|-]",
        help="mark the object (+) or the background (-); may be repeated",
    )
    parser.add_argument(
        "--box", type=_numbers(6), metavar="I0,J0,K0,I1,J1,K1", help="box round the object, lower corner first"
    )
    parser.add_argument(
        "--space", choices=("voxel", "ras", "lps"), default="voxel", help="of points and box (default: voxel)"
    )
    model(parser)


def ask(parser: argparse.ArgumentParser) -> None:
    """Options of `ask`."""
    scan(parser)
    parser.add_argument("question")
    parser.add_argument("--choice", action="append", metavar="TEXT", help="possible answer; repeat for each")
    model(parser)


def report(parser: argparse.ArgumentParser) -> None:
    """Options of `report`."""
    scan(parser)
    parser.add_argument("-o", "--output", type=Path, help="write the report to a text file as well")
    model(parser)


def batch(parser: argparse.ArgumentParser) -> None:
    """Options of `batch`."""
    parser.add_argument("folder", type=Path, metavar="IN", help="folder of scans, with folders below it")
    parser.add_argument("out", type=Path, metavar="OUT", help="gets results.jsonl and masks; a stopped run goes on")
    parser.add_argument("--target", action="append", default=[], metavar="NAME", help="segment this; may be repeated")
    parser.add_argument("--question", action="append", default=[], metavar="TEXT", help="answer this; may be repeated")
    parser.add_argument("--report", action="store_true", help="write a report")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="engines; above 1 by Ray (default: 1)")
    model(parser)


def serve(parser: argparse.ArgumentParser) -> None:
    """Options of `serve`."""
    model(parser)
    parser.add_argument(
        "--language-backend", choices=("transformers", "vllm"), default="transformers", help="default: transformers"
    )
    parser.add_argument("--host", default="127.0.0.1", help="other than loopback only with keys (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument(
        "--keys", type=Path, metavar="FILE", help="API keys, one a line; or in MEDVL_SAM2_API_KEYS, commas between"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="keep uploaded scans here over restarts (default: a temporary folder)"
    )
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="requests at a time (default: 4)")
    parser.add_argument("--queue", type=int, default=32, metavar="N", help="requests that may wait (default: 32)")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="of a request (default: 300)")
    parser.add_argument(
        "--expire", type=float, default=3600, metavar="S", help="delete a scan this long after its last use"
    )
    parser.add_argument("--ray", action="store_true", help="serve from several processes, by Ray Serve")
    parser.add_argument("--replicas", type=int, default=2, metavar="N", help="with --ray: processes (default: 2)")
    parser.add_argument("--max-upload", type=float, default=2048, metavar="MB", help="of a scan's file (default: 2048)")


def phantom(parser: argparse.ArgumentParser) -> None:
    """Options of `phantom`."""
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")


def train(parser: argparse.ArgumentParser) -> None:
    """Options of `train`."""
    parser.add_argument("--config", default="tiny", metavar="NAME|YAML", help="shipped name or a file (default: tiny)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the run; a killed run goes on"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="override a setting; may be repeated"
    )
    parser.add_argument(
        "--until", metavar="PHASE", help="last of sam2, language, vision, stage1, stage2, stage3 (default: all)"
    )


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Options of `evaluate`."""
    parser.add_argument("--model", default="tiny", metavar="NAME|DIR", help="preset or model directory (default: tiny)")
    parser.add_argument(
        "--data",
        default="phantom",
        metavar="phantom|DIR|FILE",
        help="phantoms, a folder of labelled scans, or a manifest of public data sets",
    )
    parser.add_argument("--split", default="test", help="of a manifest: train, val or test (default: test)")
    parser.add_argument(
        "--seeds", type=_seeds, default=range(1_000_000, 1_000_200), metavar="A:B", help="phantoms A to B-1"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write a line per scan and the summary there")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="scans at a time (default: 1)")
    parser.add_argument(
        "--task",
        type=lambda text: text.split(","),
        default=["report", "vqa", "segmentation"],
        metavar="A,B",
        help="of report, vqa, segmentation, prompts (default: the first three)",
    )


def convert(parser: argparse.ArgumentParser) -> None:
    """Options of `convert`."""
    parser.add_argument("--vit", type=Path, metavar="FILE", help="M3D-CLIP: pretrained_ViT.bin or model.safetensors")
    parser.add_argument("--llm", type=Path, metavar="DIR", help="InternVL2.5 or a Qwen2 model")
    parser.add_argument("--sam2", type=Path, metavar="FILE", help="sam2_hiera_*.pt or sam2.1_hiera_*.pt")
    parser.add_argument("--image-size", type=int, default=1024, metavar="PIXELS", help="of SAM2 (default: 1024)")
    parser.add_argument(
        "--for", choices=("vllm",), dest="runtime", help="write the LLM of --model for this runtime instead"
    )
    parser.add_argument("--model", metavar="NAME|DIR", help="with --for: preset or model directory")
    parser.add_argument("--merge", action="store_true", help="with --for: add the LoRA to the weights")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="directory to make (with --for: MODEL/vllm)")


def info(parser: argparse.ArgumentParser) -> None:
    """`info` has no options of its own."""


def joined(arguments: Sequence[str]) -> list[str]:
    """Bind `--point` and `--box` to their values: one that begins with a minus would be taken for an option."""
    bound: list[str] = []
    for argument in arguments:
        if bound and bound[-1] in ("--point", "--box"):
            bound[-1] = f"{bound[-1]}={argument}"
        else:
            bound.append(argument)
    return bound


def _point(text: str) -> tuple[float, ...]:
    parts = text.split(",")
    if len(parts) == 4 and parts[3] not in ("+", "-", "+1", "-1", "1", "0"):
        raise argparse.ArgumentTypeError(f"expected + or - as the fourth value, got {parts[3]!r}")
    label = () if len(parts) < 4 else (1.0 if parts[3] in ("+", "+1", "1") else -1.0,)
    return (*_numbers(3)(",".join(parts[:3] if len(parts) == 4 else parts)), *label)


def _numbers(count: int) -> Callable[[str], tuple[float, ...]]:
    def parse(text: str) -> tuple[float, ...]:
        try:
            values = tuple(float(part) for part in text.split(","))
        except ValueError:
            values = ()
        if len(values) != count:
            raise argparse.ArgumentTypeError(f"expected {count} numbers with commas between, got {text!r}")
        return values

    return parse


def _seeds(text: str) -> range:
    first, _, last = text.partition(":")
    try:
        seeds = range(int(first), int(last) if last else int(first) + 1)
    except ValueError:
        seeds = range(0)
    if not seeds or seeds[0] < 0:
        raise argparse.ArgumentTypeError(f"expected A:B with 0 <= A < B, got {text!r}")
    return seeds
