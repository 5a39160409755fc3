"""The fast form of SAM2's step from slice to slice: equal to `model.sam2`, less work, nothing done twice.

What reads no memory leaves the loop and is shared by all objects: the first self-attention of the memory attention with
its positions, the first cross-attention's queries, the memory encoder's view of the image, prompts and grid positions.
Objects are a batch. Values stay at the memory's width and keys stay turned (`ring_memory`).
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medvl_sam2.engine.ring_memory import MemoryReader, OpenMemory
from medvl_sam2.kernels.axial_rope import rope_linear
from medvl_sam2.kernels.linear import linear
from medvl_sam2.kernels.memory_attention import memory_self_attention
from medvl_sam2.model.sam2 import SAM2, Prompts, SliceFeatures
from medvl_sam2.model.sam2.layers import sine_position
from medvl_sam2.model.sam2.structures import StepOutput

CACHED_TOKENS = 1024


@dataclass(frozen=True)
class SharedSlices:
    """What all objects on C slices share.

    Attributes:
        tokens: (C, N, d) after the first self-attention.
        queries: (C, N, d) of the first cross-attention, turned.
        pixels: (C, d, h, w) as the memory encoder sees the image.
        high_res: As in `SliceFeatures`.
    """

    tokens: Tensor
    queries: Tensor
    pixels: Tensor
    high_res: tuple[Tensor, Tensor]

    def __getitem__(self, index: int) -> "SharedSlices":
        """Views of one slice."""
        part = slice(index, index + 1)
        high_res = (self.high_res[0][part], self.high_res[1][part])
        return SharedSlices(self.tokens[part], self.queries[part], self.pixels[part], high_res)

    def rows(self, part: slice) -> "SharedSlices":
        """The entries of some rows; one entry serves all."""
        if len(self.tokens) == 1:
            return self
        high_res = (self.high_res[0][part], self.high_res[1][part])
        return SharedSlices(self.tokens[part], self.queries[part], self.pixels[part], high_res)

    @staticmethod
    def cat(parts: Sequence["SharedSlices"]) -> "SharedSlices":
        """Join ranges of slices."""
        if len(parts) == 1:
            return parts[0]
        names = ("tokens", "queries", "pixels")
        tokens, queries, pixels = (torch.cat([getattr(part, name) for part in parts]) for name in names)
        fine, coarse = (torch.cat([part.high_res[level] for part in parts]) for level in range(2))
        return SharedSlices(tokens, queries, pixels, (fine, coarse))

    @staticmethod
    def join(parts: Sequence["SharedSlices"], objects: int) -> "SharedSlices":
        """One slice per chain as the batch of all chains' objects; a single chain's slice stays a batch of one."""
        if len(parts) == 1:
            return parts[0]

        def join(tensors: Iterable[Tensor]) -> Tensor:
            return torch.cat([x.expand(objects, *x.shape[1:]) for x in tensors])

        tokens, queries = join(part.tokens for part in parts), join(part.queries for part in parts)
        fine, coarse = (join(part.high_res[level] for part in parts) for level in range(2))
        return SharedSlices(tokens, queries, join(part.pixels for part in parts), (fine, coarse))


class EncodedPrompts(NamedTuple):
    """Prompts as the decoder takes them, the same on every slice: tokens (B, T, d), dense map, multimask choice."""

    sparse: Tensor
    dense: Tensor
    multimask: bool

    def rows(self, part: slice) -> "EncodedPrompts":
        """The prompts of some rows."""
        dense = self.dense if len(self.dense) == 1 else self.dense[part]
        return EncodedPrompts(self.sparse[part], dense, self.multimask)

    @staticmethod
    def join(parts: Sequence["EncodedPrompts"]) -> "EncodedPrompts":
        """The prompts of several chains as one batch; their tokens are equally many."""
        if len(parts) == 1:
            return parts[0]
        alike = all(len(part.dense) == 1 for part in parts)
        dense = parts[0].dense if alike else torch.cat([p.dense.expand(len(p.sparse), -1, -1, -1) for p in parts])
        return EncodedPrompts(torch.cat([part.sparse for part in parts]), dense, parts[0].multimask)


class SliceRunner:
    """A SAM2 made ready for running over slices.

    Args:
        sam2: In evaluation mode, on its device, in its dtype; not to be changed afterwards.
    """

    @torch.inference_mode()
    def __init__(self, sam2: SAM2) -> None:
        self.sam2 = sam2
        self.reader = MemoryReader(sam2)
        self.loops: OrderedDict[Hashable, Any] = OrderedDict()
        self.grid = sam2.sam_prompt_encoder.grid_position()
        config, weight = sam2.config, sam2.no_mem_embed
        self._layers = list(sam2.memory_attention.layers)
        self._own = [layer.self_attn.projections() for layer in self._layers]
        self._lift = (0.1 * sine_position(config.feature_size, config.d_model, weight.device)).to(weight.dtype)

    def forget(self) -> None:
        """Let go of recorded loops and their buffers."""
        while self.loops:
            self.loops.popitem()[1].step.close()

    def prepare(self, features: SliceFeatures) -> SharedSlices:
        """Do for some slices whatever does not depend on memories."""
        layer, cross = self._layers[0], self.reader.layers[0].cross
        x = features.vision.flatten(2).transpose(1, 2) + self._lift
        x = x + memory_self_attention(layer.norm1(x), self._own[0], self.reader.rope)
        queries = rope_linear(layer.norm2(x), cross.q_weight, cross.q_bias, self.reader.rope)
        return SharedSlices(x, queries, self.sam2.memory_encoder.pix_feat_proj(features.vision), features.high_res)

    def encode_prompts(self, prompts: Prompts, objects: int, multimask: bool | None) -> EncodedPrompts:
        """Encode what is asked of B objects.

        Args:
            prompts: Of the B objects; may be empty.
            objects: B.
            multimask: As in `SAM2.step`.
        """
        sparse, dense = self.sam2.sam_prompt_encoder(prompts, objects)
        return EncodedPrompts(sparse, dense, self.sam2.wants_multimask(prompts, multimask))

    def step(
        self, shared: SharedSlices, memory: OpenMemory, prompts: EncodedPrompts, gate: bool, wants_memory: bool
    ) -> tuple[StepOutput, Tensor | None]:
        """Segment one slice per chain and encode its memory, on a CPU a few rows at a time, which its cache then holds.

        Args:
            shared, memory, prompts, gate: As in `segment`.
            wants_memory: Whether memory tokens are wanted.

        Returns:
            The outcome, and tokens as of `remember` or None.
        """
        tokens = self.sam2.config.feature_size**2
        size = max(1, CACHED_TOKENS // tokens) if shared.tokens.device.type == "cpu" else memory.rows
        outs, memories = [], []
        for start in range(0, memory.rows, size):
            part = slice(start, min(memory.rows, start + size))
            own = shared.rows(part)
            out = self.segment(own, memory.narrow(part), prompts.rows(part), gate)
            outs.append(out)
            if wants_memory:
                memories.append(self.remember(own, out))
        if len(outs) > 1:
            names = [field.name for field in fields(StepOutput) if field.name != "memory"]
            outs = [StepOutput(**{name: torch.cat([getattr(out, name) for out in outs]) for name in names})]
        return outs[0], torch.cat(memories) if wants_memory else None

    def segment(self, shared: SharedSlices, memory: OpenMemory, prompts: EncodedPrompts, gate: bool) -> StepOutput:
        """Segment one slice per chain.

        Args:
            shared: Of the slice, or one entry per row.
            memory: What each row reads.
            prompts: Of all rows.
            gate: As `gate_by_object_score` in `SAM2.step`.
        """
        side = self.sam2.config.feature_size
        x = self._condition(shared, memory).transpose(1, 2).unflatten(-1, (side, side))
        return self.sam2.decode(
            x + prompts.dense, shared.high_res, prompts.sparse, self.grid, multimask=prompts.multimask, gate=gate
        )

    def remember(self, shared: SharedSlices, out: StepOutput, is_from_user: bool = False) -> Tensor:
        """Memory tokens (rows, N, mem_dim) of a slice's masks."""
        return self.sam2.encode_memory(
            shared.pixels, out.low_res_logits, out.object_score, is_from_user, is_projected=True
        )

    def _condition(self, shared: SharedSlices, memory: OpenMemory) -> Tensor:
        rope = self.reader.rope
        x = shared.tokens.expand(memory.rows, -1, -1)
        for number, (layer, own, read) in enumerate(zip(self._layers, self._own, self.reader.layers)):
            if number:
                y, x = layer.norm2.add(x, memory_self_attention(layer.norm1(x), own, rope))
                queries = rope_linear(y, read.cross.q_weight, read.cross.q_bias, rope)
            else:
                queries = shared.queries.expand(memory.rows, -1, -1)
            x = layer.feed_forward(x, linear(memory.attend(number, queries), *read.absorbed))
        return self.sam2.memory_attention.norm(x)
