"""Memories of the slices before, in slots that never move, with the memory attention's keys turned and kept.

A chain of slices is planned ahead on the host: which slot holds whose memory, and what every step reads. The loop then
looks at no value on the device. Softmax does not see the order of the keys, so a slot is overwritten in place. A
slot's temporal encoding changes with its age, and the projection is linear::

    R(p) (Wk (m + pos + t) + b) = R(p) (Wk (m + pos) + b) + R(p) Wk t

so the first term is kept per slot and layer, the second in a table of all ages, and both are exact.
"""

from collections.abc import Collection, Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from medvl_sam2.kernels.axial_rope import axial_rope_tables, rope_linear
from medvl_sam2.kernels.memory_attention import Projections, absorb_values, memory_attention_cached
from medvl_sam2.model.sam2 import SAM2, MemoryBank
from medvl_sam2.model.sam2.config import SAM2Config
from medvl_sam2.model.sam2.layers import pointer_position, sine_position
from medvl_sam2.model.sam2.structures import MemoryEntry


class Step(NamedTuple):
    """One slice of a chain.

    Attributes:
        index: The slice.
        memories: (slot, index into the temporal encoding) of each memory that it reads.
        pointers: (slice, distance) of each object pointer that it reads.
        slot: Where its own memory goes; None when nobody reads it.
    """

    index: int
    memories: tuple[tuple[int, int], ...]
    pointers: tuple[tuple[int, int], ...]
    slot: int | None


class ChainPlan(NamedTuple):
    """A chain's steps, the memories (slice -> slot) that it needs before the first, and how many slots it takes."""

    steps: tuple[Step, ...]
    loads: dict[int, int]
    num_slots: int


def plan_chain(
    order: Sequence[int],
    reverse: bool,
    conditioning: Collection[int],
    tracked: Collection[int],
    num_slices: int,
    config: SAM2Config,
    keep: Collection[int] = (),
) -> ChainPlan:
    """Lay out a chain: what each slice reads is what `MemoryBank.select` gives.

    Args:
        order: Slices in the order of the chain, conditioning ones left out.
        reverse: Whether the chain runs towards lower slices.
        conditioning: Slices whose memory stays.
        tracked: Slices reached before, whose memory may be read.
        num_slices: Slices of the volume.
        config: Numbers of memories and pointers, strides.
        keep: Slices whose memory is wanted for later even if this chain does not read it.
    """
    bank = MemoryBank(num_slices)
    for index in conditioning:
        bank.conditioning[index] = _place(index)
    for index in tracked:
        bank.tracked[index] = _place(index)
    reads, last_read = [], {}
    for number, index in enumerate(order):
        selection = bank.select(index, config, reverse, training=False)
        memories = tuple((int(entry.features), time) for time, entry in selection.memories)
        reads.append((memories, tuple((int(slice_), distance) for distance, slice_ in selection.pointers)))
        last_read |= {slice_: number for slice_, _ in memories}
        bank.tracked[index] = _place(index)
    made = {index: number for number, index in enumerate(order)}
    # A slice that is tracked anew is read from before until its own step, and from this chain after it.
    early = {
        slice_ for number, (memories, _) in enumerate(reads) for slice_, _ in memories if made.get(slice_, -1) >= number
    }
    needed = sorted((set(last_read) - set(made)) | early)
    slots: dict[int, int] = {slice_: slot for slot, slice_ in enumerate(needed)}
    loads, free, num_slots = dict(slots), [], len(slots)
    steps = []
    for number, (index, (memories, pointers)) in enumerate(zip(order, reads)):
        places = tuple((slots[slice_], time) for slice_, time in memories)
        for slice_ in [s for s in slots if last_read[s] <= number and s not in conditioning]:
            free.append(slots.pop(slice_))
        if index in slots:
            free.append(slots.pop(index))
        slot = None
        if last_read.get(index, -1) > number or index in keep:
            if not free:
                free.append(num_slots)
                num_slots += 1
            slot = free.pop()
            if last_read.get(index, -1) > number:
                slots[index] = slot
            else:
                free.append(slot)
        steps.append(Step(index, places, pointers, slot))
    return ChainPlan(tuple(steps), loads, num_slots)


def _place(index: int) -> MemoryEntry:
    """Stands for a slice's memory where only its whereabouts matter."""
    return MemoryEntry(torch.tensor(index), torch.tensor(index))


class ReadLayer(NamedTuple):
    """A layer's part in reading memories: key weights, absorbed values (weight, bias), keys of the ages (T, N, D)."""

    cross: Projections
    absorbed: tuple[Tensor, Tensor]
    ages: Tensor


class MemoryReader:
    """What reading memories needs of a SAM2 and does not change from scan to scan.

    Args:
        sam2: In evaluation mode.
    """

    def __init__(self, sam2: SAM2) -> None:
        config, weight = sam2.config, sam2.maskmem_tpos_enc
        self.sam2 = sam2
        self.split = config.d_model // config.mem_dim
        self.rope = axial_rope_tables(config.feature_size, config.feature_size, config.d_model, weight.device)
        self.position = sine_position(config.feature_size, config.mem_dim, weight.device).to(weight.dtype)
        times = weight[:, 0].expand(-1, len(self.position), -1)
        self.layers = []
        for layer in sam2.memory_attention.layers:
            cross = layer.cross_attn_image.projections()
            ages = rope_linear(times, cross.k_weight, None, self.rope)
            self.layers.append(ReadLayer(cross, absorb_values(cross), ages))

    def pointer_positions(self, num_slices: int) -> Tensor:
        """Positions (2 S + 1, mem_dim) of pointers; row S + d: at a distance of d slices."""
        config, weight = self.sam2.config, self.sam2.maskmem_tpos_enc
        if not config.is_v21:
            return weight.new_zeros(2 * num_slices + 1, config.mem_dim)
        span = max(1, min(num_slices, config.max_object_pointers) - 1)
        table = pointer_position(num_slices, span, config.d_model, weight.device)
        return self.sam2.obj_ptr_tpos_proj(table.to(weight.dtype))

    def pointer_keys(self, tokens: Tensor) -> list[Tensor]:
        """Every layer's keys of pointer tokens (B, T, mem_dim), which have no place in the grid."""
        plain = {"num_plain_tokens": tokens.shape[1]}
        return [rope_linear(tokens, x.cross.k_weight, x.cross.k_bias, self.rope, **plain) for x in self.layers]


class RingMemory:
    """Slots for the memories of several chains of B objects; a row is an object of a chain, chain by chain.

    Args:
        reader: Weights and tables.
        chains: Chains that run together.
        objects: B.
        num_slots: Slots of a row.
        storage_dtype: Memories are rounded to this type, as the sam2 package keeps them; None: as they are.
        keep_keys: Keep the turned keys of every slot and layer; else they are projected anew at each step, which takes
            a sixteenth of the memory and on a CPU about a tenth more time.
    """

    def __init__(
        self,
        reader: MemoryReader,
        chains: int,
        objects: int,
        num_slots: int,
        *,
        storage_dtype: torch.dtype | None,
        keep_keys: bool,
    ) -> None:
        config, weight = reader.sam2.config, reader.sam2.maskmem_tpos_enc
        self.reader, self.chains, self.objects = reader, chains, objects
        self.storage_dtype = storage_dtype
        size = (chains, objects, num_slots, config.feature_size**2)
        self.tokens = weight.new_zeros(*size, config.mem_dim)
        self.kept = [weight.new_zeros(*size, config.d_model) for _ in reader.layers] if keep_keys else None

    def only(self, part: slice) -> "RingMemory":
        """A view of some chains."""
        view = copy(self)
        view.tokens = self.tokens[part]
        view.chains = len(view.tokens)
        view.kept = None if self.kept is None else [keys[part] for keys in self.kept]
        return view

    def rounded(self, tokens: Tensor) -> Tensor:
        """Memory tokens as they are kept."""
        return tokens if self.storage_dtype is None else tokens.to(self.storage_dtype).to(self.tokens.dtype)

    def write(self, slots: Sequence[int | None], tokens: Tensor) -> None:
        """Keep memories (chains * B, N, mem_dim), each chain's in a slot of its own."""
        tokens = self.rounded(tokens).unflatten(0, (self.chains, self.objects))
        for chain, slot in enumerate(slots):
            if slot is not None:
                self.tokens[chain, :, slot] = tokens[chain]
                for number, keys in enumerate(self.kept or ()):
                    keys[chain, :, slot] = self.turned(number, tokens[chain])

    def write_at(self, slots: Tensor, tokens: Tensor) -> None:
        """As `write`, with the slots (chains,) on the device."""
        tokens = self.rounded(tokens).unflatten(0, (self.chains, self.objects))
        for chain in range(self.chains):
            slot = slots[chain : chain + 1]
            self.tokens[chain].index_copy_(1, slot, tokens[chain][:, None])
            for number, keys in enumerate(self.kept or ()):
                keys[chain].index_copy_(1, slot, self.turned(number, tokens[chain])[:, None])

    def load(self, other: "RingMemory") -> None:
        """Copy the slots that both rings have; they have the same rows."""
        slots = min(self.tokens.shape[2], other.tokens.shape[2])
        self.tokens[:, :, :slots].copy_(other.tokens[:, :, :slots])
        for mine, theirs in zip(self.kept or (), other.kept or ()):
            mine[:, :, :slots].copy_(theirs[:, :, :slots])

    def turned(self, number: int, tokens: Tensor) -> Tensor:
        """Keys of memories (rows, N, mem_dim) for layer ``number``, without their age."""
        cross = self.reader.layers[number].cross
        return rope_linear(tokens + self.reader.position, cross.k_weight, cross.k_bias, self.reader.rope)

    def open(self, steps: Sequence[Step], pointers: Sequence[Tensor], positions: Tensor) -> "OpenMemory":
        """What a step reads.

        Args:
            steps: The step of each chain.
            pointers: (S, B, d) of all slices, for each chain.
            positions: `MemoryReader.pointer_positions`.
        """
        return OpenMemory(self, steps, pointers, positions)


class OpenMemory:
    """Keys and values of one step, row by row."""

    def __init__(self, ring: RingMemory, steps: Sequence[Step], pointers: Sequence[Tensor], positions: Tensor) -> None:
        self._ring, self._steps = ring, steps
        self._rows = range(ring.chains * ring.objects)
        split = ring.reader.split
        centre = (len(positions) - 1) // 2
        self._pointers, self._pointer_keys = [], []
        for step, own in zip(steps, pointers):
            where = [slice_ for slice_, _ in step.pointers]
            tokens = own[where].transpose(0, 1).unflatten(-1, (split, -1)).flatten(1, 2)
            times = positions[[centre + distance for _, distance in step.pointers]].repeat_interleave(split, dim=0)
            self._pointers.append(tokens.to(ring.tokens.dtype))
            self._pointer_keys.append(ring.reader.pointer_keys(tokens + times))

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    def narrow(self, part: slice) -> "OpenMemory":
        """A view of some rows."""
        view = copy(self)
        view._rows = self._rows[part]
        return view

    def attend(self, number: int, queries: Tensor) -> Tensor:
        """What layer ``number`` reads with queries (rows, N, D): averaged memories (rows, N, mem_dim)."""
        # Row by row, so that a row's keys are still in the cache when they are used.
        parts = [
            memory_attention_cached(
                queries[place : place + 1],
                self._keys(number, row),
                self._values(row),
                slot_size=queries.shape[1],
                num_pointer_tokens=self._pointers[row // self._ring.objects].shape[1],
            )
            for place, row in enumerate(self._rows)
        ]
        return torch.cat(parts)

    def _values(self, row: int) -> Tensor:
        chain, item = divmod(row, self._ring.objects)
        tokens = self._ring.tokens[chain, item]
        parts = [tokens[slot] for slot, _ in self._steps[chain].memories]
        return torch.cat((*parts, self._pointers[chain][item]))[None]

    def _keys(self, number: int, row: int) -> Tensor:
        chain, item = divmod(row, self._ring.objects)
        ring, step, ages = self._ring, self._steps[chain], self._ring.reader.layers[number].ages
        pointers = self._pointer_keys[chain][number][item]
        size = ages.shape[1]
        out = ages.new_empty(len(step.memories) * size + len(pointers), ages.shape[2])
        slots = [slot for slot, _ in step.memories]
        if ring.kept is None:
            turned = ring.turned(number, ring.tokens[chain, item, slots])
        else:
            turned = [ring.kept[number][chain, item, slot] for slot in slots]
        for place, (part, (_, time)) in enumerate(zip(turned, step.memories)):
            torch.add(part, ages[time], out=out[place * size : (place + 1) * size])
        out[len(step.memories) * size :] = pointers
        return out[None]
