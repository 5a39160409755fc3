"""Language backend on plain transformers: the keys and values of a scan's prefix are computed once and shared."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event

import torch
from torch import Tensor
from transformers import DynamicCache

from medvl_sam2.engine.language.base import Forced, LanguageBackend, Step
from medvl_sam2.model.language import LanguageModel
from medvl_sam2.model.prompts import ChatTokens

_BATCH = 16


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a scan's prefix, batch 1, never written to."""

    cache: DynamicCache
    length: int


class TransformersBackend(LanguageBackend):
    """Greedy decoding with a growing cache.

    Args:
        model: The LLM in evaluation mode; its LoRA is merged in place unless `merge` is False.
        chat: Token ids of conversations.
        convention: "input" or "predicting", see `SegConfig.convention`.
        merge: Fold the LoRA into the base weights: the same answers, fewer and smaller products per token.
    """

    name = "transformers"

    def __init__(self, model: LanguageModel, chat: ChatTokens, convention: str, *, merge: bool = True):
        self.model = model
        self.chat = chat
        self.convention = convention
        if merge:
            # The base model is rewritten inside `peft`, so `model.causal` is the merged one from here on.
            model.peft.merge_and_unload()

    @property
    def _device(self) -> torch.device:
        return self.model.seg_input.device

    @torch.inference_mode()
    def prefix(self, visual: Tensor) -> Prefix:
        """See `LanguageBackend.prefix`."""
        ids = torch.tensor([self.chat.prefix()], device=self._device)
        embeds = self.model.embed(ids)
        place = (ids == self.chat.context_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(place, visual.to(embeds))
        cache = DynamicCache(config=self.model.causal.config)
        self.model.hidden(embeds, cache)
        return Prefix(cache, ids.shape[1])

    def prefix_bytes(self, prefix: Prefix) -> int:
        """See `LanguageBackend.prefix_bytes`."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in prefix.cache.layers)

    @torch.inference_mode()
    def generate(
        self, prefix: Prefix, ids: Sequence[int], *, max_tokens: int = 512, cancel: Event | None = None
    ) -> Iterator[Step]:
        """See `LanguageBackend.generate`."""
        cache = _fork(prefix.cache)
        hidden = self._feed(cache, ids)
        for left in reversed(range(max_tokens)):
            if cancel is not None and cancel.is_set():
                return
            token = int(self.model.logits(hidden).argmax())
            if token == self.chat.end_id:
                return
            seg = token == self.chat.seg_id
            if not seg:
                yield Step(token)
            elif self.convention == "predicting":
                yield Step(token, hidden)
            if left or (seg and self.convention == "input"):
                hidden = self._feed(cache, [token])
            if seg and self.convention == "input":
                yield Step(token, hidden)

    def _feed(self, cache: DynamicCache, ids: Sequence[int]) -> Tensor:
        """Append tokens; the last position's hidden state (H,)."""
        embeds = self.model.embed(torch.tensor([list(ids)], device=self._device))
        return self.model.hidden(embeds, cache)[0, -1]

    @torch.inference_mode()
    def forced(
        self,
        prefix: Prefix,
        questions: Sequence[Sequence[int]],
        answer: Sequence[int],
        rivals: Sequence[Sequence[int] | None],
    ) -> list[Forced]:
        """See `LanguageBackend.forced`; the questions run as batches, padded on the right."""
        results = []
        for first in range(0, len(questions), _BATCH):
            batch = questions[first : first + _BATCH]
            rows = [[*question, *answer] for question in batch]
            width = max(map(len, rows))
            ids = torch.tensor([row + [self.chat.end_id] * (width - len(row)) for row in rows], device=self._device)
            cache = _fork(prefix.cache, len(rows))
            hidden = self.model.hidden(self.model.embed(ids), cache)
            results += [
                self._weigh(hidden[i], len(question), answer, rivals[first + i]) for i, question in enumerate(batch)
            ]
        return results

    def _weigh(self, hidden: Tensor, start: int, answer: Sequence[int], rival: Sequence[int] | None) -> Forced:
        offset = start - (self.convention == "predicting")
        states = hidden[[offset + i for i, token in enumerate(answer) if token == self.chat.seg_id]]
        # Up to the first difference both answers share their context, so one forward serves both.
        place = next((i for i, (own, other) in enumerate(zip(answer, rival or ())) if own != other), 0)
        begin, differ = self.model.logits(hidden[[start - 1, start + place - 1]]).float()
        margin = math.inf if rival is None else float(differ[answer[place]] - differ[rival[place]])
        return Forced(states, margin, int(begin.argmax()))


def _fork(cache: DynamicCache, batch: int = 1) -> DynamicCache:
    """A cache that continues from another without copying it: growing a layer makes new tensors."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    if batch > 1:
        for layer in fork.layers:
            layer.keys, layer.values = (x.expand(batch, *x.shape[1:]) for x in (layer.keys, layer.values))
    return fork
