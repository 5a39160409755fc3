"""The loop over slices on a GPU: every step the same launches on the same addresses, replayed as one CUDA graph.

What differs from step to step (slots, ages, pointers, slices) lies in tables on the device, laid out before the loop;
a counter on the device walks through them. The host only says "again", and copies the next window of slices in.
"""

import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from medvl_sam2.engine.beside import RECORDING
from medvl_sam2.engine.ring_memory import MemoryReader, RingMemory, Step
from medvl_sam2.engine.runner import EncodedPrompts, SharedSlices, SliceRunner
from medvl_sam2.engine.track_state import TrackState
from medvl_sam2.kernels.memory_attention import memory_attention_cached

logger = logging.getLogger(__name__)
# One object alone, and 8 with the smaller loops that take over as their chains end.
KEPT_LOOPS = 8
KEPT_BYTES = 4 << 30
# What a chain reads that had ended before the loop began: something, so that no row of the attention is empty.
_IDLE = Step(0, ((0, 0),), (), None)


class StepGraph:
    """A function of no arguments that always does the same on the same tensors.

    On CUDA the first call runs it (on a stream of its own, as capturing wants it), the second records it, and from
    then on a call is one launch. Elsewhere, and where it cannot be recorded, every call runs it.

    Args:
        function: Runs the step.
        device: Where its tensors are.
    """

    # After a recording that failed no other one is begun in this process.
    is_refused = False
    # Streams to record on, by device and by the stream that replays: each comes with a workspace of cuBLAS's own.
    _streams: ClassVar[dict[tuple[torch.device, int], torch.cuda.Stream]] = {}

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self._function, self._device = function, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_warm = False

    @property
    def is_recorded(self) -> bool:
        """Whether calls replay a graph."""
        return self._graph is not None

    def __call__(self) -> None:
        """Run the step once."""
        if self._graph is not None:
            self._graph.replay()
        elif self._device.type != "cuda" or StepGraph.is_refused:
            self._function()
        elif not self._is_warm:
            stream, usual = self._stream(), torch.cuda.current_stream(self._device)
            stream.wait_stream(usual)
            with torch.cuda.stream(stream):
                self._function()
            usual.wait_stream(stream)
            self._is_warm = True
        else:
            self._record()
            self()

    def close(self) -> None:
        """Let go of the graph and of what the function holds; the step cannot be run afterwards."""
        self._graph, self._function = None, _closed

    def _stream(self) -> torch.cuda.Stream:
        key = (self._device, torch.cuda.current_stream(self._device).cuda_stream)
        if key not in self._streams:
            self._streams[key] = torch.cuda.Stream(self._device)
        return self._streams[key]

    def _record(self) -> None:
        graph, pool, stream = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), self._stream()
        before = torch.cuda.current_stream(self._device)
        # The device, since a recording belongs to the current one. A collection could free another graph meanwhile,
        # which CUDA forbids.
        with RECORDING, torch.cuda.device(self._device):
            collects = gc.isenabled()
            gc.disable()
            try:
                # Other threads go on launching on their own streams meanwhile.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    self._function()
                self._graph = graph
            except RuntimeError as error:
                # Ending a broken recording raises, too, and would leave the thread on the recording's stream.
                torch.cuda.set_stream(before)
                _give_up(torch.cuda.current_device(), pool)
                reason = str(error.__context__ or error).strip().splitlines()[0]
                logger.warning("a step cannot be recorded as a CUDA graph (%s); steps are launched anew", reason)
                StepGraph.is_refused = True
            finally:
                if collects:
                    gc.enable()


def _give_up(device: int, pool: Any) -> None:
    """Tell the allocator that a recording is over: a broken one does not, and no memory would be given back again."""
    # Not public. Without them, and where the recording did end, the first call raises.
    with suppress(AttributeError, RuntimeError):
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


def _closed() -> None:
    raise RuntimeError("step: closed; make a new loop")


class LoopShape(NamedTuple):
    """What a recorded step is made for; loops of one shape share it.

    Attributes:
        chains, objects, slots: Of the ring.
        states: Groups of objects with logits of their own.
        reads, pointers: Most memories and pointers that a step reads.
        windows: As many as there are chains, or 1 for all of them.
        window: Most slices that are made ready at a time.
        slices: Of the volume.
        prompt: Shapes of the encoded prompts, and their multimask choice.
        gate: As `gate_by_object_score`.
        storage_dtype: As in `RingMemory`.
        keep_keys: As in `RingMemory`.
    """

    chains: int
    objects: int
    states: int
    slots: int
    reads: int
    pointers: int
    windows: int
    window: int
    slices: int
    prompt: tuple[torch.Size, torch.Size, bool]
    gate: bool
    storage_dtype: torch.dtype | None
    keep_keys: bool


class StaticLoop:
    """Buffers and the recorded step of one shape.

    Args:
        runner: The model.
        shape: What it is made for.
    """

    def __init__(self, runner: SliceRunner, shape: LoopShape) -> None:
        config, weight = runner.sam2.config, runner.sam2.no_mem_embed
        side, dim = config.feature_size, config.d_model
        self._runner, self.shape = runner, shape
        self.ring = RingMemory(
            runner.reader,
            shape.chains,
            shape.objects,
            # One more slot takes what nobody reads.
            shape.slots + 1,
            storage_dtype=shape.storage_dtype,
            keep_keys=shape.keep_keys,
        )
        window = (shape.windows, shape.window)
        self._shared = SharedSlices(
            weight.new_zeros(*window, side**2, dim),
            weight.new_zeros(*window, side**2, dim),
            weight.new_zeros(*window, dim, side, side),
            (
                weight.new_zeros(*window, dim // 8, 4 * side, 4 * side),
                weight.new_zeros(*window, dim // 4, 2 * side, 2 * side),
            ),
        )
        sparse, dense, multimask = shape.prompt
        self._prompts = EncodedPrompts(weight.new_zeros(sparse), weight.new_zeros(dense), multimask)
        self._counter = torch.zeros(1, dtype=torch.long, device=weight.device)
        size = (shape.slices, shape.chains)

        def table(*columns: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(*size, *columns, dtype=dtype, device=weight.device)

        self._tables = {
            "index": table(),
            "place": table(),
            "slot": table(),
            "slots": table(shape.reads),
            "ages": table(shape.reads),
            "pointers": table(shape.pointers),
            "distances": table(shape.pointers),
            "lengths": table(shape.reads + 1, dtype=torch.int32),
        }
        # One more row of each state takes what a chain does that has ended before the others.
        rows = (shape.states, shape.slices + 1, shape.objects)
        self._logits = weight.new_zeros(*rows, config.mask_size, config.mask_size, dtype=torch.float32)
        self._scores = weight.new_zeros(rows)
        self._pointers = weight.new_zeros(*rows, dim)
        self._positions = runner.reader.pointer_positions(shape.slices)
        self.step = StepGraph(self._step, weight.device)

    @property
    def nbytes(self) -> int:
        """Memory of the buffers; the graph holds about as much again as a step needs."""
        own = (*_tensors(self._shared), self.ring.tokens, *(self.ring.kept or ()), self._logits, self._pointers)
        return sum(x.nbytes for x in own)

    def start(
        self,
        ring: RingMemory,
        prompts: EncodedPrompts,
        pointers: Sequence[Tensor],
        owners: Sequence[int],
        chains: Sequence[Sequence[Step]],
        places: Sequence[Sequence[int]],
    ) -> None:
        """Take in a loop: `step` then goes through it.

        Args:
            ring: Memories from before the first step.
            prompts: Of all rows.
            pointers: (S, B, d) object pointers of each state from before.
            owners: The state of each chain.
            chains: The steps of each chain; the first has the most, and one that has ended has none.
            places: Each step's slice within its window.
        """
        self.ring.load(ring)
        self._prompts.sparse.copy_(prompts.sparse)
        self._prompts.dense.copy_(prompts.dense)
        for own, before in zip(self._pointers, pointers):
            own[: self.shape.slices].copy_(before)
        self._owners = list(owners)
        self._counter.zero_()
        for name, rows in self._laid_out(chains, places).items():
            values = torch.tensor(rows, dtype=self._tables[name].dtype)
            self._tables[name][: len(rows)].copy_(values.reshape(len(rows), *self._tables[name].shape[1:]))

    def _laid_out(self, chains: Sequence[Sequence[Step]], places: Sequence[Sequence[int]]) -> dict[str, list]:
        shape, split = self.shape, self._runner.reader.split
        rows: dict[str, list] = {name: [] for name in self._tables}
        first = [owner * (shape.slices + 1) for owner in self._owners]
        for number in range(len(chains[0])):
            # A chain that has ended goes on reading what its last step read, and writes where nobody looks.
            steps = [
                chain[number] if number < len(chain) else (chain or [_IDLE])[-1]._replace(index=shape.slices, slot=None)
                for chain in chains
            ]
            rows["index"].append([start + step.index for start, step in zip(first, steps)])
            rows["place"].append([at[min(number, len(at) - 1)] if at else 0 for at in places])
            rows["slot"].append([shape.slots if step.slot is None else step.slot for step in steps])
            rows["slots"].append([_filled([slot for slot, _ in step.memories], shape.reads) for step in steps])
            rows["ages"].append([_filled([age for _, age in step.memories], shape.reads) for step in steps])
            pointers = [[start + t for t, _ in step.pointers] for start, step in zip(first, steps)]
            rows["pointers"].append([_filled(values, shape.pointers) for values in pointers])
            distances = [[shape.slices + distance for _, distance in step.pointers] for step in steps]
            rows["distances"].append([_filled(values, shape.pointers) for values in distances])
            tokens = self.ring.tokens.shape[3]
            rows["lengths"].append(
                [_filled([tokens] * len(step.memories), shape.reads) + [split * len(step.pointers)] for step in steps]
            )
        return rows

    def enter(self, chain: int, window: SharedSlices) -> None:
        """Copy a chain's next window of slices in, or the one of all chains."""
        count = len(window.tokens)
        for target, source in zip(_tensors(self._shared), _tensors(window)):
            target[min(chain, self.shape.windows - 1), :count].copy_(source)

    def give(self, chain: int, slices: list[int], state: TrackState) -> None:
        """Write what a chain found on some slices into a state."""
        owner = self._owners[chain]
        state.logits[slices], state.scores[slices] = self._logits[owner, slices], self._scores[owner, slices]
        state.pointers[slices] = self._pointers[owner, slices]

    def _step(self) -> None:
        shape, runner = self.shape, self._runner
        now = {name: table.index_select(0, self._counter)[0] for name, table in self._tables.items()}
        parts = [self._slice(chain, now["place"][chain : chain + 1]) for chain in range(shape.chains)]
        shared = SharedSlices.join(parts, shape.objects)
        logits, scores, pointers = (x.flatten(0, 1) for x in (self._logits, self._scores, self._pointers))
        memory = StaticMemory(self.ring, now, pointers, self._positions)
        out = runner.segment(shared, memory, self._prompts, shape.gate)
        batch = (shape.chains, shape.objects)
        logits.index_copy_(0, now["index"], out.low_res_logits[:, 0].unflatten(0, batch))
        scores.index_copy_(0, now["index"], out.object_score[:, 0].unflatten(0, batch))
        pointers.index_copy_(0, now["index"], out.object_pointer.unflatten(0, batch))
        self.ring.write_at(now["slot"], runner.remember(shared, out))
        self._counter.add_(1)

    def _slice(self, chain: int, place: Tensor) -> SharedSlices:
        parts = (x[min(chain, self.shape.windows - 1)].index_select(0, place) for x in _tensors(self._shared))
        tokens, queries, pixels, fine, coarse = parts
        return SharedSlices(tokens, queries, pixels, (fine, coarse))


def static_loop(runner: SliceRunner, shape: LoopShape) -> StaticLoop:
    """The runner's loop of a shape; the last few stay, with their graphs."""
    loop = runner.loops.pop(shape, None)
    if loop is None:
        while len(runner.loops) >= KEPT_LOOPS:
            runner.loops.popitem(last=False)[1].step.close()
        loop = StaticLoop(runner, shape)
        while runner.loops and loop.nbytes + sum(kept.nbytes for kept in runner.loops.values()) > KEPT_BYTES:
            runner.loops.popitem(last=False)[1].step.close()
    runner.loops[shape] = loop
    return loop


def _filled(values: list[int], size: int) -> list[int]:
    return values + [0] * (size - len(values))


def _tensors(shared: SharedSlices) -> tuple[Tensor, ...]:
    return (shared.tokens, shared.queries, shared.pixels, *shared.high_res)


class StaticMemory:
    """What a step reads, as `OpenMemory`, with places and ages on the device and a count of what is valid.

    Args:
        ring: The memories.
        now: The step's rows of the tables.
        pointers: (N, B, d) of all slices of all states.
        positions: `MemoryReader.pointer_positions`.
    """

    def __init__(self, ring: RingMemory, now: dict[str, Tensor], pointers: Tensor, positions: Tensor) -> None:
        reader: MemoryReader = ring.reader
        self._ring, self._now = ring, now
        self._pointer_keys, values = [], []
        for chain in range(ring.chains):
            tokens = pointers.index_select(0, now["pointers"][chain]).transpose(0, 1)
            tokens = tokens.unflatten(-1, (reader.split, -1)).flatten(1, 2)
            times = positions.index_select(0, now["distances"][chain])
            times = times[:, None].expand(-1, reader.split, -1).flatten(0, 1)
            self._pointer_keys.append(reader.pointer_keys(tokens + times))
            memories = ring.tokens[chain].index_select(1, now["slots"][chain]).flatten(1, 2)
            values.append(torch.cat((memories, tokens), dim=1))
        self._values = torch.cat(values) if len(values) > 1 else values[0]
        lengths = now["lengths"]
        self._lengths = lengths[:, None].expand(-1, ring.objects, -1).flatten(0, 1).contiguous()

    @property
    def rows(self) -> int:
        """Rows of the ring."""
        return self._ring.chains * self._ring.objects

    def attend(self, number: int, queries: Tensor) -> Tensor:
        """As `OpenMemory.attend`."""
        ring, now, keys = self._ring, self._now, []
        ages = ring.reader.layers[number].ages
        for chain in range(ring.chains):
            slots = now["slots"][chain]
            if ring.kept is None:
                memories = ring.tokens[chain].index_select(1, slots)
                turned = ring.turned(number, memories.flatten(0, 1)).unflatten(0, memories.shape[:2])
            else:
                turned = ring.kept[number][chain].index_select(1, slots)
            turned = (turned + ages.index_select(0, now["ages"][chain])).flatten(1, 2)
            keys.append(torch.cat((turned, self._pointer_keys[chain][number]), dim=1))
        return memory_attention_cached(
            queries,
            torch.cat(keys) if len(keys) > 1 else keys[0],
            self._values,
            slot_size=queries.shape[1],
            num_pointer_tokens=self._pointer_keys[0][0].shape[1],
            lengths=self._lengths,
        )
