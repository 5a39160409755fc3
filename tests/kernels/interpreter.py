"""Counts what a kernel asks of memory and of the matrix units, in Triton's interpreter.

The counts are requests of the program (re-reads included), beside the number of different addresses; neither is what a
GPU's caches let through to its memory.
"""

import ctypes
import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class Traffic:
    """Bytes and floating-point operations of the launches inside `count_traffic`."""

    load_bytes: int = 0
    store_bytes: int = 0
    dot_flops: int = 0
    loaded: dict[int, int] = field(default_factory=dict)
    stored: dict[int, int] = field(default_factory=dict)

    @property
    def unique_load_bytes(self) -> int:
        return sum(self.loaded.values())

    @property
    def unique_store_bytes(self) -> int:
        return sum(self.stored.values())


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count loads, stores, atomics (as both) and dots of every interpreted launch inside the context."""
    from triton.runtime.interpreter import InterpreterBuilder

    traffic = Traffic()
    originals = {n: getattr(InterpreterBuilder, n) for n in ("create_masked_load", "create_masked_store", "create_dot")}
    originals["create_atomic_rmw"] = InterpreterBuilder.create_atomic_rmw

    def note(pointers, mask, seen: dict[int, int]) -> int:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        seen.update((int(address), size) for address in np.unique(addresses))
        return size * addresses.size

    def load(self, pointers, mask, *rest):
        traffic.load_bytes += note(pointers, mask, traffic.loaded)
        return originals["create_masked_load"](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        traffic.store_bytes += note(pointers, mask, traffic.stored)
        return originals["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self, operation, pointers, value, mask, *rest):
        traffic.load_bytes += note(pointers, mask, traffic.loaded)
        traffic.store_bytes += note(pointers, mask, traffic.stored)
        return originals["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    def dot(self, a, b, *rest):
        traffic.dot_flops += 2 * a.data.size * b.data.shape[-1]
        return originals["create_dot"](self, a, b, *rest)

    hooks = {"create_masked_load": load, "create_masked_store": store, "create_dot": dot, "create_atomic_rmw": atomic}
    try:
        for name, hook in hooks.items():
            setattr(InterpreterBuilder, name, hook)
        yield traffic
    finally:
        for name, original in originals.items():
            setattr(InterpreterBuilder, name, original)


# The first address past what Linux gives to a process on x86-64 and arm64: nothing real lies there.
_NOWHERE = 1 << 48
_made = itertools.count()


def huge(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Make a tensor that claims any amount of memory and has none; only for launches inside `addresses_only`."""
    kind = torch.zeros(1, dtype=dtype).numpy().dtype
    # Far apart from one another, as the interpreter takes tensors at one address for views of one storage.
    address = _NOWHERE + (next(_made) << 40)
    one = np.frombuffer((ctypes.c_byte * kind.itemsize).from_address(address), dtype=kind)
    steps = tuple(stride * kind.itemsize for stride in strides)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(np.lib.stride_tricks.as_strided(one, shape, steps))


@contextmanager
def addresses_only() -> Iterator[set[int]]:
    """Let interpreted launches take `huge` tensors: gives the addresses that they ask for, and touches none of these.

    Loads from such an address give ``other`` or zero; other tensors are read and written as ever.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    from triton.runtime.interpreter import _get_np_dtype as numpy_type

    asked: set[int] = set()
    original_load, original_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def split(pointers, mask) -> TensorHandle:
        wanted = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        far = pointers.data >= _NOWHERE
        asked.update(int(address) for address in np.unique(pointers.data[wanted & far]))
        return TensorHandle(wanted & ~far, mask.dtype)

    def load(self, pointers, mask, other, *rest):
        if other is None:
            kind = pointers.get_element_ty()
            other = TensorHandle(np.zeros_like(pointers.data, dtype=numpy_type(kind)), kind)
        return original_load(self, pointers, split(pointers, mask), other, *rest)

    def store(self, pointers, value, mask, *rest):
        return original_store(self, pointers, value, split(pointers, mask), *rest)

    try:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
        yield asked
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = original_load, original_store


@contextmanager
def program_at(x: int = 0, y: int = 0, z: int = 0) -> Iterator[None]:
    """Add (x, y, z) to every program's index, so that a launch of few programs runs those far into a large grid."""
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.set_grid_idx

    def shifted(self, i: int, j: int, k: int) -> None:
        self.grid_idx = (i + x, j + y, k + z)

    try:
        InterpreterBuilder.set_grid_idx = shifted
        yield
    finally:
        InterpreterBuilder.set_grid_idx = original
