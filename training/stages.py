"""What trains in each stage of the paper: the one table, and its application."""

from torch import nn

# Patterns of parameter names, in the order of the paper. Whether SAM2's memory trains is not disclosed; the digest says
# "SAM2 decoder", so the memory encoder and memory attention stay as they are.
TRAINABLE: dict[str, tuple[str, ...]] = {
    "stage1": ("projector.",),
    "stage2": ("projector.", "vision.", ".lora_"),
    "stage3": (
        "projector.",
        "vision.",
        ".lora_",
        "language.seg_input",
        "language.seg_output",
        "seg_bridge.",
        "sam2.sam_mask_decoder.",
    ),
}


def set_trainable(model: nn.Module, stage: str) -> list[nn.Parameter]:
    """Freeze everything but the stage's parameters.

    Args:
        model: A `MedVLSAM2`.
        stage: Key of `TRAINABLE`.

    Returns:
        The parameters that train.
    """
    patterns = TRAINABLE[stage]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            any(pattern in f".{name}" if pattern[0] == "." else name.startswith(pattern) for pattern in patterns)
        )
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
