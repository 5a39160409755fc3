"""One way to register an operation with PyTorch, so that all of them compile, export, differentiate and switch alike.

`torch.library.custom_op` rather than `triton_op`: the latter traces the Triton body even for CPU tensors, so neither
`torch.compile` nor `opcheck` would work on a machine without a GPU, and an opaque operation also keeps Inductor from
choosing tile settings of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from medvl_sam2.kernels._common import MIN_CAPABILITY, register_operation, why_not_triton

NAMESPACE = "medvl_sam2"


def define_op(
    name: str,
    reference: Callable[..., Any],
    launch: Callable[..., Any] | None,
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    switch: str | None = None,
    mutates_args: Sequence[str] = (),
    capability: tuple[int, int] = MIN_CAPABILITY,
) -> torch.library.CustomOpDef:
    """Register ``medvl_sam2::name``.

    The schema comes from the annotations of `reference` (Tensor, Optional, int, float, bool, Sequence[int], ...).
    `reference`, `launch` and `fake` take the same arguments, and for the same arguments must give outputs of the same
    shapes, dtypes and strides that share no memory with an input.

    Args:
        name: Operation name; a backward is by custom ``<op>_bwd``.
        reference: Plain torch. Runs on the CPU, and on CUDA whenever Triton may not, as with any float64 tensor.
        launch: Host function that launches the Triton kernels; None when the operation has no kernel.
        fake: Returns empty outputs for shape propagation.
        backward: ``backward(ctx, *grads)``; must itself be traceable, so it calls another operation or plain torch.
        setup_context: ``setup_context(ctx, inputs, output)``.
        switch: Name that `disable` and ``MEDVL_SAM2_DISABLE`` know it by; the file's operation, by default `name`.
        mutates_args: Names of arguments written in place.
        capability: Least compute capability that the kernels need; older GPUs run the reference.

    Returns:
        The operation, to be called like a function.
    """
    switch = switch or name
    register_operation(switch, capability=capability)
    schema = torch.library.infer_schema(reference, mutates_args=tuple(mutates_args))

    def on_cuda(*args: Any, **options: Any) -> Any:
        tensors = [a for a in (*args, *options.values()) if isinstance(a, torch.Tensor)]
        exact = any(tensor.dtype == torch.float64 for tensor in tensors)
        if launch is None or exact or why_not_triton(switch, tensors[0].device):
            return reference(*args, **options)
        return launch(*args, **options)

    op = torch.library.custom_op(
        f"{NAMESPACE}::{name}", on_cuda, mutates_args=tuple(mutates_args), device_types="cuda", schema=schema
    )
    op.register_kernel("cpu")(reference)
    op.register_fake(fake)
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)
    return op
