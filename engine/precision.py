"""Which number format each part runs in, by what the hardware does well."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from medvl_sam2.model.config import MedVLConfig

logger = logging.getLogger(__name__)

_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WORTH_IT = 1.3
# Width of a transformer, side of a slice in pixels.
_LEAST_SIZE = 512
_MANY_ROWS = 1024


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


def cuda_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 from capability 8.0; older GPUs emulate it, and take float32."""
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32


def choose_precision(name: str, device: torch.device, config: MedVLConfig) -> Precision:
    """Dtypes of a name; "auto" decides by the device.

    On CUDA from capability 8.0 all parts take bfloat16. On a CPU each part takes it where its own kind of work, timed
    here, gains from it: the ViT's products and SAM2's products and convolutions do with AMX, and are up to 60 times
    slower without; decoding waits for memory and gains elsewhere. Small parts stay float32, since they gain little.

    Args:
        name: "auto", "float32", "bfloat16" or "float16".
        device: Where the model runs.
        config: Sizes of the parts.

    Raises:
        ValueError: Unknown name.
    """
    if name in _NAMES:
        if name != "float32" and device.type == "cpu" and (gain := convolution_gain(_NAMES[name])) < 1:
            logger.warning("%s: %.0f times slower than float32 on this CPU; take dtype='auto'", name, 1 / gain)
        return Precision(*[_NAMES[name]] * 3)
    if name != "auto":
        raise ValueError(f"dtype: expected auto or one of {', '.join(_NAMES)}, got {name!r}")
    if device.type == "cuda":
        return Precision(*[cuda_dtype(device)] * 3)
    vision, language, side = config.vision.hidden_size, config.language.hidden_size, config.sam2.image_size

    def chosen(size: int, *gains: Callable[[], float]) -> torch.dtype:
        pays = size >= _LEAST_SIZE and all(gain() > _WORTH_IT for gain in gains)
        return torch.bfloat16 if pays else torch.float32

    return Precision(
        vision=chosen(vision, lambda: product_gain(vision, _MANY_ROWS)),
        language=chosen(language, lambda: product_gain(language)),
        sam2=chosen(side, lambda: product_gain(config.sam2.d_model, _MANY_ROWS), convolution_gain),
    )


def product_gain(width: int, rows: int = 1) -> float:
    """How many times faster a (rows, width) x (width, 4 width) product runs in bfloat16 than in float32 here."""
    return _gain(lambda: nn.Linear(width, 4 * width, bias=False), (rows, width), torch.bfloat16)


def convolution_gain(dtype: torch.dtype = torch.bfloat16) -> float:
    """The same of a 3x3 convolution of 64 channels on 64x64 pixels, in a dtype of 16 bits."""
    return _gain(lambda: nn.Conv2d(64, 64, 3, padding=1), (1, 64, 64, 64), dtype)


@torch.inference_mode()
def _gain(layer: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype, repeats: int = 5) -> float:
    times = {}
    for kind in (torch.float32, dtype):
        module, x = layer().to(kind), torch.randn(shape, dtype=kind)
        module(x)
        runs = []
        for _ in range(repeats):
            start = time.perf_counter()
            module(x)
            runs.append(time.perf_counter() - start)
        times[kind] = min(runs)
    return times[torch.float32] / times[dtype]
