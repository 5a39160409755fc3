"""Answers decoded together: B questions on one scan's prefix, in a cache of fixed size that is written in place.

The prefix is copied in once. Questions of different lengths are padded on the left, so that all answers begin at the
same place; what is padded is seen by nobody, and every row counts its positions for itself. Places, positions and what
is visible lie on the device, so that a step is the same launches for every token: on CUDA they are one graph.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from medvl_sam2.engine.graphs import StepGraph
from medvl_sam2.model.language import LanguageModel


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, (B, heads, L, D)."""

    is_sliding = False

    def __init__(self, rows: "AnswerRows", like: Tensor, length: int) -> None:
        super().__init__()
        shape = (rows.count, like.shape[1], length, like.shape[3])
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.is_initialized = True
        self._rows = rows

    def lazy_initialization(self, *args: Any) -> None:
        """Nothing is left to do."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values in their places; all those that may be seen."""
        self.keys.index_copy_(2, self._rows.places, keys)
        self.values.index_copy_(2, self._rows.places, values)
        return self.keys[:, :, : self._rows.stop], self.values[:, :, : self._rows.stop]

    def get_seq_length(self) -> int:
        """Places written."""
        return self._rows.stop

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Not asked for: masks are always given."""
        return self._rows.stop, 0

    def get_max_length(self) -> int:
        """Places there are."""
        return self.keys.shape[2]

    # The name in transformers before 5.20.
    get_max_cache_shape = get_max_length


class AnswerRows:
    """B answers under way.

    Args:
        model: The LLM.
        like: A layer's keys of some prefix, (1, heads, P, D).
        layers: How many layers there are.
        count: B.
        length: Places of the cache: prefix, longest question and longest answer.
        static: Every step attends to all places, so that it can be recorded; else to those written.

    Attributes:
        tokens: (B,) the token that each row says next.
        hidden: (B, H) the states that say them.
        static: As given.
        places: Where new keys and values go.
        stop: Places that are attended to.
    """

    def __init__(
        self, model: LanguageModel, like: Tensor, layers: int, count: int, length: int, *, static: bool
    ) -> None:
        self._model, self.count, self.length, self.static = model, count, length, static
        weight = model.seg_input
        self._layers = [_Layer(self, like, length) for _ in range(layers)]
        self._cache = Cache(layers=self._layers)
        self.tokens = torch.zeros(count, dtype=torch.long, device=weight.device)
        self.hidden = like.new_zeros(count, weight.shape[0])
        self.stop = length
        self._place = torch.zeros(1, dtype=torch.long, device=weight.device)
        self.places = self._place
        self._positions = torch.zeros(count, 1, dtype=torch.long, device=weight.device)
        self._visible = torch.zeros(count, 1, 1, length, dtype=torch.bool, device=weight.device)
        self.step = StepGraph(self._step, weight.device if static else torch.device("cpu"))

    def start(self, prefix: Sequence[tuple[Tensor, Tensor]], questions: Sequence[Sequence[int]], padding: int) -> None:
        """Take in the questions: the first tokens of the answers are then known.

        Args:
            prefix: Keys and values (1, heads, P, D) of each layer.
            questions: Tokens of the B questions.
            padding: Any token.
        """
        device, begin = self.tokens.device, prefix[0][0].shape[2]
        for own, (keys, values) in zip(self._layers, prefix):
            own.keys[:, :, :begin].copy_(keys)
            own.values[:, :, :begin].copy_(values)
            # Nobody sees what is left of another's answer, but a weight of zero would not stop an infinity in it.
            own.keys[:, :, begin:].zero_()
            own.values[:, :, begin:].zero_()
        width = max(map(len, questions))
        ids = torch.tensor([[padding] * (width - len(q)) + list(q) for q in questions], device=device)
        blank = torch.tensor([width - len(q) for q in questions], device=device)[:, None]
        end, column = begin + width, torch.arange(width, device=device)
        self._visible.zero_()
        self._visible[..., :begin] = True
        self._visible[..., begin:end] = (column >= blank)[:, None, None]
        # A padding sees the prefix, so that no row of the attention is empty.
        before = torch.arange(end, device=device) <= begin + column[:, None]
        self.places, self.stop = begin + column, end
        hidden = self._model.hidden(
            self._model.embed(ids),
            self._cache,
            attention_mask=self._visible[..., :end] & before,
            position_ids=begin + (column - blank).clamp(min=0),
        )
        self._say(hidden[:, -1])
        self.places, self.stop = self._place, self.length if self.static else end
        self._place.fill_(end)
        self._positions.copy_(end - blank)

    def feed(self) -> None:
        """Go on by one token in every row."""
        if not self.static:
            self.stop += 1
        self.step()

    def close(self) -> None:
        """Let go of the graph and the cache at once, rather than when Python next looks for cycles."""
        self.step.close()
        self._layers.clear()
        self._cache = None

    def _step(self) -> None:
        self._visible.index_fill_(3, self._place, True)
        hidden = self._model.hidden(
            self._model.embed(self.tokens[:, None]),
            self._cache,
            attention_mask=self._visible[..., : self.stop],
            position_ids=self._positions,
        )
        self._say(hidden[:, 0])
        self._place.add_(1)
        self._positions.add_(1)

    def _say(self, hidden: Tensor) -> None:
        self.hidden.copy_(hidden)
        self.tokens.copy_(self._model.logits(hidden).argmax(-1))
