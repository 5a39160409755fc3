"""OpenAI's chat protocol over a scan's session."""

import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from medvl_sam2.engine.cancelling import check
from medvl_sam2.engine.segmentation import Segmentation
from medvl_sam2.engine.server.errors import as_api_error
from medvl_sam2.engine.server.masks import StoredMask, describe
from medvl_sam2.engine.server.metrics import Metrics
from medvl_sam2.engine.server.schemas import (
    ChatAnswer,
    ChatCompletion,
    ChatRequest,
    Choice,
    Mask,
    Usage,
    chunk,
)
from medvl_sam2.engine.server.volumes import StoredVolume, VolumeStore


@dataclass(frozen=True)
class Piece:
    """A part of an answer: text, a mask, or the end."""

    text: str = ""
    mask: Mask | None = None
    finish: str | None = None
    usage: Usage | None = None


@dataclass
class Chat:
    """One chat request.

    Attributes:
        body: What was asked.
        volume: About which scan.
        store: Holds the scan.
        metrics: Told of tokens and times.
    """

    body: ChatRequest
    volume: StoredVolume
    store: VolumeStore
    metrics: Metrics
    asked: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.body.model,
        }

    def pieces(self, cancel: Event) -> Iterator[Piece]:
        """Compute the answer, piece by piece; runs in a worker.

        Raises:
            Cancelled: Nobody waits for it any more.
        """
        words = [message.words() for message in self.body.messages]
        history = list(zip(words[:-1:2], words[1::2]))
        tokens, timings = 0, {}
        with self.store.using(self.volume) as session:
            events = session.chat(words[-1], history=history, max_tokens=self.body.limit, cancel=cancel)
            try:
                # Closed in any case, so that the language backend lets go of a request that nobody waits for.
                with closing(events):
                    for event in events:
                        # What was cancelled ends here, so a finish is OpenAI's "stop" or "length".
                        check(cancel)
                        timings = event.timings
                        if not tokens and event.tokens:
                            self.metrics.first_token_seconds.observe(time.perf_counter() - self.asked)
                        tokens = event.tokens
                        usage = None
                        if event.finish:
                            prompt = session.prefix_tokens + len(session.prompt_ids(words[-1], history))
                            usage = Usage(prompt_tokens=prompt, completion_tokens=tokens, total_tokens=prompt + tokens)
                        yield Piece(event.text, self._mask(event.segmentation), event.finish, usage)
            finally:
                self.metrics.tokens.inc(tokens)
                self.metrics.observe_work(timings)

    def _mask(self, found: Segmentation | None) -> Mask | None:
        if found is None:
            return None
        stored = StoredMask.of(found)
        self.store.keep(self.volume, stored)
        self.metrics.masks.inc()
        return describe(stored, found, self.volume.id)

    def whole(self, cancel: Event) -> ChatCompletion:
        """Compute the answer; runs in a worker."""
        text, masks = [], []
        last = Piece()
        for last in self.pieces(cancel):
            text.append(last.text)
            masks += [last.mask] if last.mask else []
        answer = ChatAnswer(content="".join(text), segmentations=masks)
        return ChatCompletion(
            **self._head, choices=[Choice(message=answer, finish_reason=last.finish)], usage=last.usage
        )

    async def events(self, pieces: AsyncGenerator[Piece, None]) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        with_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        head = {**self._head, "usage": None} if with_usage else self._head
        yield _event(chunk(head, {"role": "assistant", "content": ""}))
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    if piece.text:
                        yield _event(chunk(head, {"content": piece.text}))
                    if piece.mask is not None:
                        yield _event(chunk(head, {"segmentation": piece.mask.model_dump()}))
                    if piece.finish:
                        yield _event(chunk(head, {}, piece.finish))
                        if with_usage:
                            usage = {"choices": [], "usage": piece.usage.model_dump()}
                            yield _event({**head, "object": "chat.completion.chunk", **usage})
        except Exception as error:
            # The status has been sent, so the error is an event.
            yield _event(as_api_error(error).body())
        yield "data: [DONE]\n\n"


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"
