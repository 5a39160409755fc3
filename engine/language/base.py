"""The narrow interface between the engine and a language model runtime.

A scan becomes a prefix once; every question on it is a stream of tokens, and each [SEG] token carries the hidden state
that prompts SAM2. A backend is anything that can do these things.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from threading import Event
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One generated token.

    Attributes:
        token: Its id.
        hidden: (H,) state that prompts SAM2 when the token is [SEG], else None.
    """

    token: int
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Forced:
    """What the model makes of an answer put into its mouth.

    Attributes:
        hidden: (N, H) states of the answer's [SEG] tokens, in reading order.
        margin: Log-odds of the forced answer over the rival one, at the first token where the two differ; above zero
            the model would rather begin the forced one. Infinite when there is no rival.
        first: Token that the model itself would begin its answer with.
    """

    hidden: Tensor
    margin: float
    first: int


class LanguageBackend(ABC):
    """Runs the LLM.

    A prefix is the backend's own object; the engine only keeps it and hands it back. Backends never change a prefix,
    so several questions may use one at the same time.

    Attributes:
        name: Of the backend.
        batch: Most questions of one `generate_all`.
    """

    name: str
    batch = 16

    @abstractmethod
    def prefix(self, visual: Tensor) -> Any:
        """Prepare a scan.

        Args:
            visual: (tokens, H) rows of the projector.

        Returns:
            The prefix of every conversation about the scan.
        """

    @abstractmethod
    def prefix_bytes(self, prefix: Any) -> int:
        """Memory that a prefix holds."""

    @abstractmethod
    def generate(
        self, prefix: Any, ids: Sequence[int], *, max_tokens: int = 512, cancel: Event | None = None
    ) -> Iterator[Step]:
        """Greedy answer, token by token.

        Args:
            prefix: Of `prefix`.
            ids: Tokens after the prefix, up to where the answer begins (`ChatTokens.question`).
            max_tokens: Length limit.
            cancel: Ends the stream before the next token once set.

        Yields:
            The answer's tokens, without the one that ends the turn.
        """

    def generate_all(
        self,
        prefix: Any,
        questions: Sequence[Sequence[int]],
        *,
        max_tokens: Sequence[int],
        cancel: Event | None = None,
    ) -> Iterator[list[Step | None]]:
        """Greedy answers to several questions, decoded side by side; each is what `generate` gives.

        Args:
            prefix: Of `prefix`.
            questions: As ``ids`` of `generate`; at most `batch`.
            max_tokens: Length limit of each answer.
            cancel: Ends all answers before the next token once set.

        Yields:
            The next token of each answer, None for one that has ended.
        """
        streams = [
            self.generate(prefix, ids, max_tokens=limit, cancel=cancel) for ids, limit in zip(questions, max_tokens)
        ]
        try:
            yield from map(list, zip_longest(*streams))
        finally:
            for stream in streams:
                stream.close()

    @abstractmethod
    def forced(
        self,
        prefix: Any,
        questions: Sequence[Sequence[int]],
        answer: Sequence[int],
        rivals: Sequence[Sequence[int] | None],
    ) -> list[Forced]:
        """Read the [SEG] states of a given answer to several questions, without decoding.

        Args:
            prefix: Of `prefix`.
            questions: Tokens of each question.
            answer: Tokens of the answer, [SEG] among them.
            rivals: For each question the tokens of the other answer to weigh it against, or None.

        Returns:
            One result per question.
        """
