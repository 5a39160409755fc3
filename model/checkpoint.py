"""Reading weights files, and loading them strictly."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

State = dict[str, Tensor]
_INDEX = "model.safetensors.index.json"


def read_state(path: str | Path) -> State:
    """Read a weights file, or a folder of (sharded) safetensors.

    Args:
        path: .safetensors, a torch pickle (.bin, .pt, .pth; only tensors are accepted), or a folder.

    Returns:
        Tensors by name, each in memory of its own; a checkpoint's "model" or "state_dict" entry is opened.

    Raises:
        ValueError: No such file, damaged, or a pickle that holds code.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a weights file, got nothing there; check the path")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: expected tensors only, got a pickle with code in it or a damaged file; "
            "convert it to safetensors on a machine that you can lose"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: expected a whole weights file, got {_first_line(error)}") from error
    for entry in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(entry), Mapping):
            state = state[entry]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected tensors by name, got something else; is it a model checkpoint?")
    # M3D-CLIP's .bin holds views into one storage of the whole CLIP, which would stay alive.
    return {key: value.clone() for key, value in state.items()}


def _read_folder(path: Path) -> State:
    if (path / _INDEX).is_file():
        names = sorted(set(json.loads((path / _INDEX).read_text())["weight_map"].values()))
    else:
        names = sorted(file.name for file in path.glob("*.safetensors"))
    if not names:
        raise ValueError(f"{path}: expected .safetensors files in the folder, got none")
    state: State = {}
    for name in names:
        state |= read_state(path / name)
    return state


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str, *, skip: str | None = None) -> None:
    """Load every parameter and buffer, and nothing else.

    Args:
        module: What to fill.
        state: Tensors by name.
        source: For the error: what the tensors were read from.
        skip: Prefix of the module's keys that come from elsewhere.

    Raises:
        ValueError: Missing, left over or mis-shaped keys, all listed.
    """
    own = {key: value for key, value in module.state_dict().items() if skip is None or not key.startswith(skip)}
    faults = [f"missing {key}" for key in own if key not in state]
    faults += [f"left over {key}" for key in state if key not in own]
    faults += [
        f"{key} expected {tuple(value.shape)}, got {tuple(state[key].shape)}"
        for key, value in own.items()
        if key in state and value.shape != state[key].shape
    ]
    if faults:
        raise ValueError(f"{source}: expected the weights of this model, got " + "; ".join(faults))
    module.load_state_dict(state, strict=False)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
