"""Command line: reads the arguments, runs one function per verb, prints its result.

With ``--json`` the last line of stdout is one JSON document; progress and logs go to stderr. Exit status: 0 fine, 1 the
run failed, 2 the input is wrong (one sentence on stderr says what to do).
"""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from medvl_sam2 import __version__, _bench, _data, _experiment, _options

# Verb: (help, function that adds its options, function that does the work as "module:name").
VERBS = {
    "demo": ("see everything on an unseen phantom and a real chest CT", _options.demo, "medvl_sam2._verbs:demo"),
    "segment": (
        "masks of organs or findings by name, description, point or box",
        _options.segment,
        "medvl_sam2._verbs:segment",
    ),
    "ask": ("answer a question about a scan", _options.ask, "medvl_sam2._verbs:ask"),
    "report": ("write a report of a scan", _options.report, "medvl_sam2._verbs:report"),
    "batch": ("process a folder of scans", _options.batch, "medvl_sam2._verbs:batch"),
    "serve": ("serve chat, masks and reports over HTTP", _options.serve, "medvl_sam2._verbs:serve"),
    "phantom": ("make a procedural CT with its truth", _options.phantom, "medvl_sam2._verbs:phantom"),
    "data": ("index, check, count and prepare data sets for training", _data.options, "medvl_sam2._data:run"),
    "train": ("train a model in the paper's stages", _options.train, "medvl_sam2._verbs:train"),
    "evaluate": ("measure a model on phantoms or labelled scans", _options.evaluate, "medvl_sam2._verbs:evaluate"),
    "experiment": (
        "test the paper's claims at the tiny scale",
        _experiment.options,
        "medvl_sam2._experiment:experiment",
    ),
    "bench": ("measure the engine beside what one would run otherwise", _bench.options, "medvl_sam2._bench:bench"),
    "profile": (
        "trace requests: timeline, operations, memory",
        _bench.profile_options,
        "medvl_sam2._bench:profile",
    ),
    "convert": ("make a model directory from public checkpoints", _options.convert, "medvl_sam2._verbs:convert"),
    "info": ("device, kernels and optional packages in use", _options.info, "medvl_sam2._verbs:info"),
}


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    main = _Parser(prog="medvl-sam2", description="Reports, answers and masks from a 3D CT. Not a medical device.")
    main.add_argument("--version", action="version", version=f"medvl-sam2 {__version__}")
    verbs = main.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (text, add_options, _) in VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_options(verb)
        _options.common(verb)
    return main


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parser().parse_args(_options.joined(sys.argv[1:] if arguments is None else arguments))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    if args.debug:
        logging.getLogger("medvl_sam2").setLevel(logging.DEBUG)
    else:
        # What libraries will change in their next version is of no use to a reader of reports.
        warnings.simplefilter("ignore", FutureWarning)
    module, name = VERBS[args.verb][2].split(":")
    try:
        document, text = getattr(import_module(module), name)(args)
        print(json.dumps(document, default=_plain, allow_nan=False) if args.json else text, flush=True)
        return 1 if document.get("problems") else 0
    except BrokenPipeError:
        # The reader has gone; nothing is left to say, and Python must not try again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("medvl-sam2: interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        if args.debug:
            raise
        print(f"medvl-sam2 {args.verb}: error: {_sentence(error)}", file=sys.stderr)
        return 2 if _is_input_error(error) else 1


def _is_input_error(error: Exception) -> bool:
    from medvl_sam2.engine.geometry import InputError

    return isinstance(error, InputError)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if _is_input_error(error) else f"{type(error).__name__}: {text} (--debug shows where)"


def _plain(value: Any) -> Any:
    """JSON form of paths and NumPy numbers."""
    return value.item() if hasattr(value, "item") else str(value)


if __name__ == "__main__":
    sys.exit(main())
