"""SAM2 in plain torch with the official parameter names: image encoder, prompts, mask decoder, memory, propagation."""

from medvl_sam2.model.sam2.config import SAM2Config
from medvl_sam2.model.sam2.memory_bank import MemoryBank, MemorySelection
from medvl_sam2.model.sam2.modeling import NO_OBJECT, SAM2
from medvl_sam2.model.sam2.propagation import VolumeTracker, propagate
from medvl_sam2.model.sam2.structures import MemoryEntry, Prompts, SliceFeatures, StepOutput

__all__ = [
    "NO_OBJECT",
    "SAM2",
    "MemoryBank",
    "MemoryEntry",
    "MemorySelection",
    "Prompts",
    "SAM2Config",
    "SliceFeatures",
    "StepOutput",
    "VolumeTracker",
    "propagate",
]
