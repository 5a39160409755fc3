"""Language backend on plain transformers: the keys and values of a scan's prefix are computed once and shared."""

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event

import torch
from torch import Tensor
from transformers import DynamicCache

from medvl_sam2.engine.language.base import Forced, LanguageBackend, Step
from medvl_sam2.engine.language.rows import AnswerRows
from medvl_sam2.model.language import LanguageModel
from medvl_sam2.model.prompts import ChatTokens

# Of a recorded decoder: the length of its caches comes in steps of the first, up to the second; the ones used last are
# kept, of so many places together.
_STEP, _LONGEST, _KEPT = 256, 2048, 16_384


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a scan's prefix, batch 1, never written to."""

    cache: DynamicCache
    length: int


class TransformersBackend(LanguageBackend):
    """Greedy decoding in caches that are written in place.

    Args:
        model: The LLM in evaluation mode; its LoRA is merged in place unless `merge` is False.
        chat: Token ids of conversations.
        convention: "input" or "predicting", see `SegConfig.convention`.
        merge: Fold the LoRA into the base weights: the same answers, fewer and smaller products per token.
        static: Decode on the same addresses, as a CUDA graph; None does so on CUDA.
    """

    name = "transformers"

    def __init__(
        self, model: LanguageModel, chat: ChatTokens, convention: str, *, merge: bool = True, static: bool | None = None
    ):
        self.model = model
        self.chat = chat
        self.convention = convention
        self.static = static
        self._kept: OrderedDict[tuple[int, int], AnswerRows] = OrderedDict()
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
        for (step,) in self.generate_all(prefix, [ids], max_tokens=[max_tokens], cancel=cancel):
            yield step

    @torch.inference_mode()
    def generate_all(
        self,
        prefix: Prefix,
        questions: Sequence[Sequence[int]],
        *,
        max_tokens: Sequence[int],
        cancel: Event | None = None,
    ) -> Iterator[list[Step | None]]:
        """See `LanguageBackend.generate_all`; one batch, whose rows go on until the last one ends."""
        left = list(max_tokens)
        length = prefix.length + max(map(len, questions)) + max(left)
        rows = self._take_rows(prefix, len(left), length)
        try:
            rows.start([(x.keys, x.values) for x in prefix.cache.layers], questions, self.chat.end_id)
            while any(left) and not (cancel is not None and cancel.is_set()):
                said = rows.tokens.tolist()
                left = [0 if token == self.chat.end_id else n for token, n in zip(said, left)]
                segs = [i for i, token in enumerate(said) if left[i] and token == self.chat.seg_id]
                # The state of [SEG] as the input is there once it has been fed.
                if must_feed := bool(segs) and self.convention == "input":
                    rows.feed()
                states = {i: rows.hidden[i].clone() for i in segs}
                if any(left):
                    yield [Step(token, states.get(i)) if left[i] else None for i, token in enumerate(said)]
                left = [max(0, n - 1) for n in left]
                if any(left) and not must_feed:
                    rows.feed()
        finally:
            self._give_rows(rows)

    def _take_rows(self, prefix: Prefix, count: int, length: int) -> AnswerRows:
        like, layers = prefix.cache.layers[0].keys, len(prefix.cache.layers)
        static = self._device.type == "cuda" if self.static is None else self.static
        if static and length <= _LONGEST:
            # Few shapes, so that their graphs are met again.
            length = -(-length // _STEP) * _STEP
            if kept := self._kept.pop((count, length), None):
                return kept
            return AnswerRows(self.model, like, layers, count, length, static=True)
        return AnswerRows(self.model, like, layers, count, length, static=False)

    def _give_rows(self, rows: AnswerRows) -> None:
        if rows.static:
            if double := self._kept.pop((rows.count, rows.length), None):
                double.close()
            self._kept[rows.count, rows.length] = rows
            while sum(count * length for count, length in self._kept) > _KEPT:
                self._kept.popitem(last=False)[1].close()

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
        for first in range(0, len(questions), self.batch):
            batch = questions[first : first + self.batch]
            rows = [[*question, *answer] for question in batch]
            width = max(map(len, rows))
            ids = torch.tensor([row + [self.chat.end_id] * (width - len(row)) for row in rows], device=self._device)
            cache = _fork(prefix.cache, len(rows))
            hidden = self.model.hidden(self.model.embed(ids), cache)
            results += [
                self._weigh(hidden[i], len(question), answer, rivals[first + i]) for i, question in enumerate(batch)
            ]
        return results

    @torch.inference_mode()
    def predicted(self, prefix: Prefix, question: Sequence[int], answer: Sequence[int]) -> list[int]:
        """What the model would say at each place of an answer that it is given up to there.

        Args:
            prefix: From `prefix`.
            question: Token ids.
            answer: Token ids of the answer.
        """
        ids = torch.tensor([[*question, *answer]], device=self._device)
        hidden = self.model.hidden(self.model.embed(ids), _fork(prefix.cache))[0, len(question) - 1 : -1]
        return self.model.logits(hidden).argmax(-1).tolist()

    def forget(self) -> None:
        """Let go of recorded decoders, which know the weights of the time when they were recorded."""
        while self._kept:
            self._kept.popitem()[1].close()

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
