"""MedVL-SAM2: reports, answers and masks from a 3D CT, by one model.

Public names load on first use, so ``import medvl_sam2`` needs no GPU and none of the optional packages.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# In a checkout or an editable install the five folders lie beside this package rather than in it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file():
    __path__.append(str(_checkout))

_PUBLIC = {
    "MedVLEngine": "medvl_sam2.engine.engine",
    "MedVLConfig": "medvl_sam2.model.config",
    "MedVLSAM2": "medvl_sam2.model.modeling",
    "InputError": "medvl_sam2.engine.geometry",
    "Volume": "medvl_sam2.engine.volumes",
    "read_volume": "medvl_sam2.engine.volumes",
    "write_mask": "medvl_sam2.engine.volumes",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
