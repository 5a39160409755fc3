"""What every kernel file shares: the optional Triton import, argument checks, the per-operation switch, the status.

Kernel files take ``triton`` and ``tl`` from here. Without Triton both are stand-ins that let a file of kernels import,
so that the reference path, ``import medvl_sam2`` and the CPU tests need no Triton at all.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:
    HAS_TRITON, INTERPRETED = False, False

    class _Absent:
        """Stands for a missing module: any attribute is itself, calling it as a decorator gives the function back."""

        def __getattr__(self, name: str) -> "_Absent":
            return self

        def __call__(self, *args: Any, **options: Any) -> Any:
            return args[0] if args and callable(args[0]) else self

    triton = tl = _Absent()

MIN_CAPABILITY = (8, 0)
DISABLE_VARIABLE = "MEDVL_SAM2_DISABLE"

_lock = Lock()
_disabled: Counter[str] = Counter(name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(","))
_operations: dict[str, Callable[[], tuple[str, str]] | None] = {}
_capabilities: dict[str, tuple[int, int]] = {}


@dataclass(frozen=True)
class OpStatus:
    """Which path one operation takes, and why."""

    name: str
    path: str
    reason: str


@contextmanager
def disable(*names: str) -> Iterator[None]:
    """Send operations down their reference path while the context is open, on every device and in every thread.

    Args:
        names: Operation names as in `op_status`; ``"all"`` stands for every operation.
    """
    # One switch for the process, not one per thread: autograd runs the backward of CUDA tensors on threads of its own.
    with _lock:
        _disabled.update(names)
    try:
        yield
    finally:
        with _lock:
            _disabled.subtract(names)


def is_disabled(name: str) -> bool:
    """Tell whether `name` was switched off by ``MEDVL_SAM2_DISABLE`` or by `disable`."""
    return _disabled.get(name, 0) > 0 or _disabled.get("all", 0) > 0


def why_not_triton(name: str, device: torch.device | str | None = None) -> str:
    """Say why operation `name` would not launch Triton kernels on `device`, or return an empty string if it would."""
    if is_disabled(name):
        return f"switched off ({DISABLE_VARIABLE} or disable())"
    if not HAS_TRITON:
        return "triton is not installed"
    if torch.version.hip is not None:
        return "tuned and tested for NVIDIA GPUs only"
    if not torch.cuda.is_available():
        return "no CUDA device"
    device = torch.device("cuda" if device is None else device)
    if device.type != "cuda":
        return f"tensors on {device.type}"
    capability, least = torch.cuda.get_device_capability(device), _capabilities.get(name, MIN_CAPABILITY)
    if capability < least:
        return f"compute capability {capability[0]}.{capability[1]} is below {least[0]}.{least[1]}"
    return ""


def register_operation(
    name: str,
    describe: Callable[[], tuple[str, str]] | None = None,
    capability: tuple[int, int] = MIN_CAPABILITY,
) -> None:
    """Enter an operation into `op_status`.

    Args:
        name: The operation's name, equal to its file's.
        describe: Gives (path, reason) for an operation that chooses among more than Triton and its reference.
        capability: Least compute capability of a GPU that has what its kernels need.
    """
    _operations[name], _capabilities[name] = describe, capability


def op_status() -> list[OpStatus]:
    """Tell for every operation of this folder which path it takes on this machine, and why."""
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        import_module(f"medvl_sam2.kernels.{path.stem}")
    status = []
    for name, describe in sorted(_operations.items()):
        if describe is not None:
            status.append(OpStatus(name, *describe()))
            continue
        reason = why_not_triton(name)
        status.append(OpStatus(name, "reference" if reason else "triton", reason or torch.cuda.get_device_name()))
    return status


def check_shape(op: str, what: str, tensor: torch.Tensor, shape: Sequence[int | None]) -> None:
    """Raise ValueError unless `tensor` has `shape`, where None leaves an axis free."""
    if tensor.ndim != len(shape) or any(n is not None and n != m for n, m in zip(shape, tensor.shape, strict=True)):
        wanted = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
        raise ValueError(f"{op}: expected {what} of shape {wanted}, got {tuple(tensor.shape)}")


def check_dtype(op: str, what: str, tensor: torch.Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise ValueError unless `tensor` has one of `dtypes`."""
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{op}: expected {what} of dtype {names}, got {got}; cast it first")


def check_same_device(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless all tensors that are not None lie on one device."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        names = ", ".join(sorted(str(device) for device in devices))
        raise ValueError(f"{op}: expected all tensors on one device, got {names}; move them with .to(device)")


def check_last_stride(op: str, what: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless the last axis of `tensor` is dense."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{op}: expected {what} with last-axis stride 1, got {tensor.stride(-1)}; call .contiguous()")


def dot_precision(dtype: torch.dtype) -> str:
    """Give the ``input_precision`` of `tl.dot` that float32 products have in PyTorch: TF32 only where it is allowed."""
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "ieee"


def device_guard(tensor: torch.Tensor) -> Any:
    """Make the tensor's GPU current for a launch; a no-op on the CPU, where only the interpreter launches."""
    return torch.cuda.device_of(tensor)


def match_autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Cast floating tensors as autocast does for a matrix product; give them back unchanged outside of autocast."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or not t.is_floating_point() else t.to(dtype) for t in tensors)


def without_autocast(device: str) -> AbstractContextManager:
    """Keep autocast out of a block; tensors of the meta device know no autocast."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run CPU steps on the calling thread alone.

    For loops of many short steps on cache-sized buffers: handing each to a team of threads wins little on an idle
    machine and waits hundreds of times for a thread that is not scheduled on a busy one.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    # A count holds for the thread that sets it, and for every thread that first asks for one later, for good. Those are
    # to have the usual one, and only another thread can say so without changing it here.
    usual = Thread(target=torch.set_num_threads, args=(threads,))
    usual.start()
    usual.join()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
