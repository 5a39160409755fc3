"""Folders that runs come back to: what each was made for, and the processes that fill one."""

import fcntl
import json
import multiprocessing
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from medvl_sam2.engine.files import write_text
from medvl_sam2.engine.geometry import InputError

SETTINGS = "settings.json"
"""What a cache was made for, beside its files."""


def claim(path: Path, made: dict[str, Any], free: Collection[str] = ()) -> None:
    """Write down what a folder is made for, or find out that it was made for something else.

    Args:
        path: Of the note, within the folder.
        made: Settings, in trees of plain values.
        free: Settings that may change, as "a.b".

    Raises:
        InputError: The folder was begun with another value of a setting.
    """
    if not path.is_file():
        write_text(path, json.dumps(made, indent=1))
        return
    try:
        theirs = _flat(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({error}); remove the folder, or give another one") from error
    ours = _flat(json.loads(json.dumps(made)))
    for key in sorted({*ours, *theirs}.difference(free)):
        if ours.get(key) != theirs.get(key):
            raise InputError(
                f"{path.parent}: was begun with {key} {theirs.get(key)}, not {ours.get(key)}; give another folder, or "
                "remove this one"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


@contextmanager
def alone(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold a folder for this process.

    Args:
        folder: That is there.
        wait: For another process that holds it.

    Raises:
        InputError: Another process holds it, and is not waited for.
    """
    with open(folder / "lock", "w") as file:
        try:
            # Of this process alone: workers that outlive a kill for a moment do not hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            raise InputError(f"{folder}: another run is at work there; wait for it") from error
        yield


def spread(work: Callable[[int], Any], items: Sequence[int], processes: int) -> Iterator[Any]:
    """Results of `work` on each item, in order; in processes of their own when there are several."""
    if processes <= 1:
        yield from map(work, items)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, initializer=_single_thread) as pool:
        yield from pool.imap(work, items, chunksize=1)


def _single_thread() -> None:
    # By the time that a worker runs anything it has imported torch, which no longer reads OMP_NUM_THREADS then.
    torch.set_num_threads(1)
