"""Counts what a kernel asks of memory and of the matrix units, in Triton's interpreter.

The counts are requests of the program (re-reads included), beside the number of different addresses; neither is what a
GPU's caches let through to its memory.
"""

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


def huge(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Make a tensor that claims any amount of memory and owns one element; only for `addresses_only`."""
    one = torch.zeros(1, dtype=dtype).numpy()
    steps = tuple(stride * one.itemsize for stride in strides)
    return torch.from_numpy(np.lib.stride_tricks.as_strided(one, shape, steps))


@dataclass
class Addresses:
    """Addresses of the launches inside `addresses_only`."""

    loads: set[int] = field(default_factory=set)
    stores: set[int] = field(default_factory=set)


@contextmanager
def addresses_only() -> Iterator[Addresses]:
    """Note where interpreted launches would load and store, and touch nothing; loads give `other` or zero."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

    addresses = Addresses()
    originals = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def load(self, pointers, mask, other, *rest):
        addresses.loads.update(int(a) for a in np.unique(pointers.data[mask.data.astype(bool)]))
        kind = pointers.get_element_ty()
        zeros = np.zeros_like(pointers.data, dtype=_get_np_dtype(kind))
        return TensorHandle(zeros if other is None else other.data, kind)

    def store(self, pointers, value, mask, *rest):
        addresses.stores.update(int(a) for a in np.unique(pointers.data[mask.data.astype(bool)]))

    try:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
        yield addresses
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = originals
