"""Goes through chains of slices: planned, made ready a window at a time, alone or two together."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from medvl_sam2.engine.graphs import LoopShape, StaticLoop, static_loop
from medvl_sam2.engine.ring_memory import ChainPlan, RingMemory, Step, plan_chain
from medvl_sam2.engine.runner import EncodedPrompts, SharedSlices, SliceRunner
from medvl_sam2.engine.track_state import Features, TrackState


class Chain(NamedTuple):
    """Slices to go through in order, and the slices tracked before whose memory may be read."""

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
    """

    gate: bool
    chunk: int
    keys_bytes: int
    static: bool


def lay_out(state: TrackState, chain: Chain) -> ChainPlan:
    """Plan a chain over a state."""
    keep = () if chain.reverse else state.near
    config = state.runner.sam2.config
    return plan_chain(chain.order, chain.reverse, state.conditioning, chain.tracked, len(state.features), config, keep)


class ChainLoop:
    """Runs chains over a state.

    Args:
        state: Read, and brought up to date.
        options: How.
    """

    def __init__(self, state: TrackState, options: LoopOptions) -> None:
        self._state, self._options = state, options
        self._positions = state.runner.reader.pointer_positions(len(state.features))

    def run(self, chains: Sequence[Chain], prompt: EncodedPrompts) -> None:
        """Go through chains together, then through the rest of the longer one.

        Args:
            chains: One, or two that do not read each other's slices.
            prompt: What is asked on every slice.
        """
        state = self._state
        plans = [lay_out(state, chain) for chain in chains]
        ring = self._ring(plans)
        views = [
            _Window(state.runner, state.features, chain.order, chain.reverse, self._options.chunk) for chain in chains
        ]
        together = min(len(plan.steps) for plan in plans)
        self._loop(ring, [plan.steps[:together] for plan in plans], views, prompt.repeat(len(chains)))
        for number, plan in enumerate(plans):
            if rest := plan.steps[together:]:
                self._loop(ring.only(number), [rest], [views[number]], prompt)

    def _loop(
        self, ring: RingMemory, chains: Sequence[Sequence[Step]], views: Sequence["_Window"], prompt: EncodedPrompts
    ) -> None:
        state = self._state
        is_static = self._options.static and len(chains[0]) > 1
        loop = self._static_loop(ring, chains, views, prompt) if is_static else None
        for steps in zip(*chains):
            where = [step.index for step in steps]
            if loop is None:
                shared = SharedSlices.join([view[index] for view, index in zip(views, where)], state.objects)
                memory = ring.open(steps, state.pointers, self._positions)
                slots = [step.slot for step in steps]
                wants_memory = any(slot is not None for slot in slots)
                out, tokens = state.runner.step(shared, memory, prompt, self._options.gate, wants_memory)
                state.store(where, out)
                if tokens is not None:
                    ring.write(slots, tokens)
            else:
                for chain, (view, index) in enumerate(zip(views, where)):
                    if view.enter(index) or steps[0] is chains[0][0]:
                        loop.enter(chain, view.shared)
                loop.step()
            for chain, step in enumerate(steps):
                state.tracked[step.index] = False
                state.forget(step.index)
                if step.slot is not None and state.is_near(step.index):
                    held = ring.tokens if loop is None else loop.ring.tokens
                    state.keep(step.index, held[chain, :, step.slot])
        if loop is not None:
            done = [step.index for steps in chains for step in steps]
            state.logits[done], state.scores[done] = loop.logits[done], loop.scores[done]
            state.pointers[done] = loop.pointers[done]
            ring.load(loop.ring)

    def _static_loop(
        self, ring: RingMemory, chains: Sequence[Sequence[Step]], views: Sequence["_Window"], prompt: EncodedPrompts
    ) -> StaticLoop:
        state = self._state
        steps = [step for chain in chains for step in chain]
        shape = LoopShape(
            chains=ring.chains,
            objects=state.objects,
            slots=ring.tokens.shape[2],
            reads=max(len(step.memories) for step in steps),
            pointers=max(len(step.pointers) for step in steps),
            window=self._options.chunk,
            slices=len(state.features),
            prompt=(prompt.sparse.shape, prompt.dense.shape, prompt.multimask),
            gate=self._options.gate,
            storage_dtype=state.storage_dtype,
            keep_keys=ring.kept is not None,
        )
        loop = static_loop(state.runner, shape)
        places = [view.places([step.index for step in chain]) for view, chain in zip(views, chains)]
        loop.start(ring, prompt, state.pointers, chains, places)
        return loop

    def _ring(self, plans: Sequence[ChainPlan]) -> RingMemory:
        state = self._state
        num_slots = max(plan.num_slots for plan in plans)
        config, dtype = state.runner.sam2.config, state.scores.dtype
        tokens = len(plans) * state.objects * num_slots * config.feature_size**2
        keys = tokens * config.d_model * config.memory_layers * dtype.itemsize
        ring = RingMemory(
            state.runner.reader,
            len(plans),
            state.objects,
            num_slots,
            storage_dtype=state.storage_dtype,
            keep_keys=keys <= self._options.keys_bytes and any(len(plan.steps) > 1 for plan in plans),
        )
        for chain, plan in enumerate(plans):
            for index, slot in plan.loads.items():
                ring.only(chain).write([slot], state.memory(index).to(ring.tokens.dtype))
        return ring


class _Window:
    """The slices of a chain made ready a few at a time, in the chain's direction."""

    def __init__(
        self, runner: SliceRunner, features: Features, order: Sequence[int], reverse: bool, chunk: int
    ) -> None:
        self._runner, self._features, self._reverse, self._chunk = runner, features, reverse, chunk
        self._low, self._high = min(order), max(order) + 1
        self._span = range(0)
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
        self._span = self._around(index)
        self.shared = self._runner.prepare(self._features[self._span.start : self._span.stop])
        return True

    def places(self, order: Sequence[int]) -> list[int]:
        """Where within its window each slice will be, when they come in this order from now on."""
        span, found = self._span, []
        for index in order:
            span = span if index in span else self._around(index)
            found.append(index - span.start)
        return found

    def _around(self, index: int) -> range:
        if self._reverse:
            return range(max(self._low, index - self._chunk + 1), index + 1)
        return range(index, min(self._high, index + self._chunk))
