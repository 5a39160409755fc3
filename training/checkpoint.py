"""Checkpoints that survive a kill at any moment."""

import os
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any]) -> None:
    """Write whole or not at all: a full disk or a kill leaves the previous file as it was.

    Raises:
        OSError: It could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        # torch's writer tells of a full disk by a RuntimeError.
        raise OSError(f"{path}: could not be written ({error}); free space, then go on from the one before") from error
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any] | None:
    """The state at `path`, or None where there is none yet."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None
