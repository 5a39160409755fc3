"""Which number format each part runs in, by what the hardware does well."""

import time
from dataclasses import dataclass

import torch
from torch import nn

_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WORTH_IT = 1.3


@dataclass(frozen=True)
class Precision:
    """Weights' dtypes: the 3D ViT with its projector, the LLM, and SAM2 with the [SEG] bridge."""

    vision: torch.dtype
    language: torch.dtype
    sam2: torch.dtype

    def __str__(self) -> str:
        names = {part: str(getattr(self, part)).removeprefix("torch.") for part in ("vision", "language", "sam2")}
        if len(set(names.values())) == 1:
            return names["sam2"]
        return ", ".join(f"{part} {name}" for part, name in names.items())


def choose_device(name: str) -> torch.device:
    """Device of a name; "auto" is CUDA where there is one.

    Raises:
        ValueError: No such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"device: expected auto, cpu or a device of this machine, got {name!r} ({reason})") from error
    return device


def choose_precision(name: str, device: torch.device, hidden_size: int) -> Precision:
    """Dtypes of a name; "auto" decides by the device.

    On CUDA from capability 8.0 all parts take bfloat16. On a CPU the convolutions of SAM2 stay float32, since bfloat16
    ones fall to scalar code there, and the LLM takes bfloat16 only where a timed product of its size gains from it.

    Args:
        name: "auto", "float32", "bfloat16" or "float16".
        device: Where the model runs.
        hidden_size: Width of the LLM.

    Raises:
        ValueError: Unknown name.
    """
    if name in _NAMES:
        return Precision(*[_NAMES[name]] * 3)
    if name != "auto":
        raise ValueError(f"dtype: expected auto or one of {', '.join(_NAMES)}, got {name!r}")
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device) >= (8, 0)
        return Precision(*[torch.bfloat16 if modern else torch.float32] * 3)
    language = torch.bfloat16 if hidden_size >= 512 and bfloat16_gain(hidden_size) > _WORTH_IT else torch.float32
    return Precision(torch.float32, language, torch.float32)


@torch.inference_mode()
def bfloat16_gain(width: int, rows: int = 1, repeats: int = 5) -> float:
    """How many times faster a (rows, width) x (width, 4 width) product runs in bfloat16 than in float32 here."""
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        layer = nn.Linear(width, 4 * width, bias=False, dtype=dtype)
        x = torch.randn(rows, width, dtype=dtype)
        layer(x)
        runs = []
        for _ in range(repeats):
            start = time.perf_counter()
            layer(x)
            runs.append(time.perf_counter() - start)
        times[dtype] = min(runs)
    return times[torch.float32] / times[torch.bfloat16]
