"""Output files that are written whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medvl_sam2.engine.geometry import InputError


@contextmanager
def replacing(path: str | os.PathLike, suffix: str | None = None) -> Iterator[Path]:
    """A temporary name beside `path`, moved there when the block ends well; otherwise the old file stays as it was.

    Args:
        path: Of the file.
        suffix: Ending of the temporary name, for writers that go by it; the last one of `path` when None.

    Raises:
        InputError: The place cannot be written, or its disk is full.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{uuid.uuid4().hex[:12]}{target.suffix if suffix is None else suffix}")
    try:
        yield part
        os.replace(part, target)
    except OSError as error:
        raise InputError(
            f"{path}: could not be written ({error.strerror or error}); free space or choose another place"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file whole.

    Raises:
        InputError: See `replacing`.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def check_file(path: str | os.PathLike) -> None:
    """Find out before the work begins whether a file can be written.

    Raises:
        InputError: No such folder, a folder in the way, or no permission.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a file name")
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist; create it or choose another")
    probe = path.parent / f".{uuid.uuid4().hex[:12]}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{path}: not writable ({error.strerror}); choose another place") from error


@contextmanager
def new_folder(path: str | os.PathLike, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well, and is removed otherwise.

    Args:
        path: Of the folder.
        replace: Take the place of a folder that is there, which stays whole until then.

    Raises:
        InputError: Something is there already, or the place cannot be written.
    """
    # A link stays one; what it leads to is replaced.
    path = Path(os.path.realpath(path))
    if path.exists() and not (path.is_dir() and (replace or not any(path.iterdir()))):
        raise InputError(f"{path}: is there already; choose another name or remove it")
    part = path.with_name(f".{uuid.uuid4().hex[:12]}")
    old = part.with_suffix(".old")
    try:
        part.mkdir(parents=True)
        yield part
        if replace and path.exists():
            path.rename(old)
        part.rename(path)
    except OSError as error:
        raise InputError(
            f"{path}: could not be written ({error.strerror or error}); free space or choose another place"
        ) from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for stale in (part, old):
            shutil.rmtree(stale, ignore_errors=True)


def make_folder(path: str | os.PathLike) -> Path:
    """Create an output folder and check that files can be made in it.

    Raises:
        InputError: A file is in the way, or the place cannot be written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InputError(f"{path}: a file is in the way of this folder; choose another name") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be created ({error.strerror}); choose another place") from error
    check_file(path / "probe")
    return path
