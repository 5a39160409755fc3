"""Goes through chains of slices: planned, made ready a window at a time, any number of them together."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import NamedTuple

from medvl_sam2.engine.cancelling import check
from medvl_sam2.engine.graphs import LoopShape, StaticLoop, static_loop
from medvl_sam2.engine.ring_memory import ChainPlan, RingMemory, Step, plan_chain
from medvl_sam2.engine.runner import EncodedPrompts, SharedSlices, SliceRunner
from medvl_sam2.engine.track_state import Features, TrackState

WINDOW_BYTES = 2 << 30


class Chain(NamedTuple):
    """A way of some objects through the slices.

    Attributes:
        state: Of the objects; read, and brought up to date.
        prompt: What is asked on every slice.
        order: The slices.
        reverse: Whether they run towards lower ones.
        tracked: Slices tracked before whose memory may be read.
    """

    state: TrackState
    prompt: EncodedPrompts
    order: list[int]
    reverse: bool
    tracked: Collection[int]


@dataclass(frozen=True)
class LoopOptions:
    """How chains run.

    Attributes:
        gate: As `gate_by_object_score` in `SAM2.step`.
        chunk: Slices that are made ready at a time.
        keys_bytes: Most memory for keys kept from step to step; beyond it they are projected anew.
        static: Every step on the same addresses, as one CUDA graph.
        cancel: Ends the chains with `Cancelled` before the next slice once set.
    """

    gate: bool
    chunk: int
    keys_bytes: int
    static: bool
    cancel: Event | None = None


def lay_out(chain: Chain) -> ChainPlan:
    """Plan a chain."""
    state = chain.state
    keep = () if chain.reverse else state.near
    config = state.runner.sam2.config
    return plan_chain(chain.order, chain.reverse, state.conditioning, chain.tracked, len(state.features), config, keep)


class ChainLoop:
    """Runs chains through one volume.

    Args:
        runner: The model.
        features: All S slices.
        options: How.
    """

    def __init__(self, runner: SliceRunner, features: Features, options: LoopOptions) -> None:
        self._runner, self._features, self._options = runner, features, options
        self._positions = runner.reader.pointer_positions(len(features))

    def run(self, chains: Sequence[Chain]) -> None:
        """Go through chains side by side, each for its own length.

        Args:
            chains: Of equally many objects; none reads slices that another one makes.
        """
        if not chains:
            return
        # The longest first, so that those still under way are always the first rows.
        chains = sorted(chains, key=lambda chain: -len(chain.order))
        plans = [lay_out(chain) for chain in chains]
        ring = self._ring(chains, plans)
        views = self._views(chains)
        for count, start, stop in stretches([len(plan.steps) for plan in plans], self._options.static):
            steps = [plan.steps[start:stop] for plan in plans[:count]]
            self._loop(ring.only(slice(count)), chains[:count], steps, views[:count])

    def _loop(
        self, ring: RingMemory, chains: Sequence[Chain], plans: Sequence[Sequence[Step]], views: Sequence["_Window"]
    ) -> None:
        static = self._options.static and len(plans[0]) > 1
        if not static:
            live = sum(map(bool, plans))
            ring, chains, plans, views = ring.only(slice(live)), chains[:live], plans[:live], views[:live]
        loop = self._static_loop(ring, chains, plans, views) if static else None
        prompt = EncodedPrompts.join([chain.prompt for chain in chains])
        for number in range(len(plans[0])):
            check(self._options.cancel)
            steps = [plan[number] for plan in plans if number < len(plan)]
            if loop is None:
                self._step(ring, chains, steps, views, prompt)
            else:
                for chain, (view, step) in enumerate(zip(views, steps)):
                    # A window over all slices is the same for every chain, and goes in once.
                    if view.enter(step.index) or not number and view not in views[:chain]:
                        loop.enter(chain, view.shared)
                loop.step()
            for row, (chain, step) in enumerate(zip(chains, steps)):
                chain.state.tracked[step.index] = False
                chain.state.forget(step.index)
                if step.slot is not None and chain.state.is_near(step.index):
                    held = ring.tokens if loop is None else loop.ring.tokens
                    chain.state.keep(step.index, held[row, :, step.slot])
        if loop is not None:
            for row, (chain, plan) in enumerate(zip(chains, plans)):
                if plan:
                    loop.give(row, [step.index for step in plan], chain.state)
            ring.load(loop.ring)

    def _step(
        self,
        ring: RingMemory,
        chains: Sequence[Chain],
        steps: Sequence[Step],
        views: Sequence["_Window"],
        prompt: EncodedPrompts,
    ) -> None:
        shared = SharedSlices.join([view[step.index] for view, step in zip(views, steps)], ring.objects)
        memory = ring.open(steps, [chain.state.pointers for chain in chains], self._positions)
        slots = [step.slot for step in steps]
        wants_memory = any(slot is not None for slot in slots)
        out, tokens = self._runner.step(shared, memory, prompt, self._options.gate, wants_memory)
        for row, (chain, step) in enumerate(zip(chains, steps)):
            chain.state.store(step.index, out, slice(row * ring.objects, (row + 1) * ring.objects))
        if tokens is not None:
            ring.write(slots, tokens)

    def _static_loop(
        self, ring: RingMemory, chains: Sequence[Chain], plans: Sequence[Sequence[Step]], views: Sequence["_Window"]
    ) -> StaticLoop:
        steps = [step for plan in plans for step in plan]
        states = list({id(chain.state): chain.state for chain in chains}.values())
        prompt = EncodedPrompts.join([chain.prompt for chain in chains])
        config, slices = self._runner.sam2.config, len(self._features)
        # At least what a chain through the middle reads: then a loop is the same wherever its objects begin.
        memories, pointers = config.num_memories, min(slices, config.max_object_pointers)
        shape = LoopShape(
            chains=ring.chains,
            objects=ring.objects,
            states=len(states),
            slots=max(memories, ring.tokens.shape[2]),
            reads=max(memories, *(len(step.memories) for step in steps)),
            pointers=max(pointers, *(len(step.pointers) for step in steps)),
            windows=len({id(view) for view in views}),
            window=views[0].size,
            slices=slices,
            prompt=(prompt.sparse.shape, prompt.dense.shape, prompt.multimask),
            gate=self._options.gate,
            storage_dtype=ring.storage_dtype,
            keep_keys=ring.kept is not None,
        )
        loop = static_loop(self._runner, shape)
        places = [view.places([step.index for step in plan]) for view, plan in zip(views, plans)]
        owners = [next(i for i, state in enumerate(states) if state is chain.state) for chain in chains]
        loop.start(ring, prompt, [state.pointers for state in states], owners, plans, places)
        return loop

    def _ring(self, chains: Sequence[Chain], plans: Sequence[ChainPlan]) -> RingMemory:
        state = chains[0].state
        num_slots = max(plan.num_slots for plan in plans)
        config, dtype = self._runner.sam2.config, state.scores.dtype
        tokens = len(plans) * state.objects * num_slots * config.feature_size**2
        keys = tokens * config.d_model * config.memory_layers * dtype.itemsize
        ring = RingMemory(
            self._runner.reader,
            len(plans),
            state.objects,
            num_slots,
            storage_dtype=state.storage_dtype,
            keep_keys=keys <= self._options.keys_bytes and any(len(plan.steps) > 1 for plan in plans),
        )
        for number, (chain, plan) in enumerate(zip(chains, plans)):
            own = ring.only(slice(number, number + 1))
            for index, slot in plan.loads.items():
                own.write([slot], chain.state.memory(index).to(ring.tokens.dtype))
        return ring

    def _views(self, chains: Sequence[Chain]) -> list["_Window"]:
        config, dtype, chunk = self._runner.sam2.config, chains[0].state.scores.dtype, self._options.chunk
        volume = 6 * len(self._features) * config.feature_size**2 * config.d_model * dtype.itemsize
        if self._options.static and len(chains) > 2 and volume <= WINDOW_BYTES:
            # Many chains are on many slices at a time: one window over all, copied in once.
            every = range(len(self._features))
            return [_Window(self._runner, self._features, every, False, chunk, whole=True)] * len(chains)
        chunk = max(1, min(chunk, 2 * chunk // len(chains)))
        return [_Window(self._runner, self._features, c.order, c.reverse, chunk) for c in chains]


def stretches(lengths: Sequence[int], static: bool) -> Iterator[tuple[int, int, int]]:
    """Cut chains of falling lengths into stretches (count, start, stop) on which the first `count` run together.

    Each runs for exactly its length, unless the loop is static: then half of the chains may have ended and idle before
    the next, smaller loop takes over, and that one is of 1, 2, 4, ... chains, so that few shapes need be recorded.
    """
    start, count = 0, len(lengths)
    while count:
        stop = lengths[count // 2] if static else lengths[count - 1]
        yield count, start, stop
        start, count = stop, sum(length > stop for length in lengths)
        if static and count:
            count = min(len(lengths), 1 << (count - 1).bit_length())


class _Window:
    """The slices of a chain made ready a few at a time, in the chain's direction; or, if `whole`, all at once."""

    def __init__(
        self,
        runner: SliceRunner,
        features: Features,
        order: Sequence[int],
        reverse: bool,
        chunk: int,
        whole: bool = False,
    ) -> None:
        self._runner, self._features, self._reverse, self._chunk = runner, features, reverse, chunk
        self._low, self._high, self._whole = min(order), max(order) + 1, whole
        self._span = range(0)
        self.size = self._high - self._low if whole else chunk
        self.shared: SharedSlices | None = None

    def __getitem__(self, index: int) -> SharedSlices:
        """What objects on a slice share."""
        self.enter(index)
        return self.shared[index - self._span.start]

    def enter(self, index: int) -> bool:
        """Have a slice ready; tells whether that took the next window."""
        if index in self._span:
            return False
        # Let go of the last window before the next one is made.
        self.shared = None
        self._span = span = self._around(index)
        starts = range(span.start, span.stop, self._chunk)
        stops = [min(span.stop, start + self._chunk) for start in starts]
        ready = [self._runner.prepare(self._features[start:stop]) for start, stop in zip(starts, stops)]
        self.shared = SharedSlices.cat(ready)
        return True

    def places(self, order: Sequence[int]) -> list[int]:
        """Where within its window each slice will be, when they come in this order from now on."""
        span, found = self._span, []
        for index in order:
            span = span if index in span else self._around(index)
            found.append(index - span.start)
        return found

    def _around(self, index: int) -> range:
        if self._whole:
            return range(self._low, self._high)
        if self._reverse:
            return range(max(self._low, index - self._chunk + 1), index + 1)
        return range(index, min(self._high, index + self._chunk))
